"""Which rank of a ring holds which tokens and sends what to whom: the figures of a picture. Imports no
torch."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attention.config import AttentionConfig
from attention.errors import ConfigError
from attention.sharding.shards import shards_of
from attention.sharding.traffic import Exchanged, PeerBytes, traffic
from planner.ranks.ring import exchange_of, refuse_sharing, ring_of
from planner.workload import Workload, refuse_features

MOST_RANKS: Final = 64
"""Ranks that are drawn."""


class Shared(NamedTuple):
    """How the ranks of a ring share a sequence."""

    config: AttentionConfig
    workload: Workload
    exchange: Exchanged
    holds: tuple[tuple[tuple[int, int], ...], ...]
    """(first, one past the last) of the pieces of each rank's tokens."""
    forward: tuple[PeerBytes, ...]
    """Of each rank, {peer: (bytes sent, bytes received)}."""
    backward: tuple[PeerBytes, ...]

    @property
    def world(self) -> int:
        """Ranks of the ring."""
        return len(self.holds)

    @property
    def sent(self) -> NDArray[np.int64]:
        """[ranks, peers], bytes that each sends to each, forward and in training backward."""
        table = np.zeros((self.world, self.world), np.int64)
        for step in (self.forward, self.backward):
            for rank, peers in enumerate(step):
                for peer, (sent, _) in peers.items():
                    table[rank, peer] += sent
        return table


def shared(config: AttentionConfig, workload: Workload) -> Shared:
    """How the first ring of GPUs shares a call; ConfigError for more ranks than are drawn, and for calls that
    ranks do not share."""
    refuse_features(config, workload)
    refuse_sharing(config, workload)
    world, batch = ring_of(config, workload)
    if world > MOST_RANKS:
        raise ConfigError(
            f"rings of at most {MOST_RANKS} GPUs are drawn, got {world:,}; `planner estimate` has "
            "figures of more"
        )
    shards, exchange = shards_of(config, workload.seq, world), exchange_of(config, workload)
    packing = (workload.documents,) if workload.documents is not None else None
    each = [
        traffic(
            config,
            shards,
            rank,
            workload.causal,
            batch=batch,
            heads=workload.heads,
            kv_heads=workload.groups,
            head_dim=workload.head_dim,
            itemsize=workload.itemsize,
            training=workload.mode == "training",
            exchange=exchange,
            documents=packing,
        )
        for rank in range(world)
    ]
    return Shared(
        config,
        workload,
        exchange,
        tuple(shards.pieces(rank) for rank in range(world)),
        tuple(one.forward for one in each),
        tuple(one.backward for one in each),
    )


def shared_data(found: Shared) -> dict[str, Any]:
    """The figures as JSON has them."""
    return {
        "config": found.config.model_dump(mode="json"),
        "workload": found.workload.model_dump(mode="json"),
        "exchange": found.exchange,
        "ranks": [
            {"rank": rank, "holds": holds, "forward": ahead, "backward": back}
            for rank, (holds, ahead, back) in enumerate(
                zip(found.holds, found.forward, found.backward, strict=True)
            )
        ],
    }
