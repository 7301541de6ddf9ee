"""Seconds of the ranks that share a sequence: what they compute, what they exchange, and how much of that is
hidden behind computing. Imports no torch.

T = sum over steps of max(compute, alpha x messages + bytes / beta of what is on its way meanwhile)

The longest rank's counts. That an exchange slows the kernels that hide it is not in it, nor that ranks wait
for a slower one at each stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from attention.config import AttentionConfig
from attention.sharding.ranges import sight_of
from attention.sharding.rows import rows_received
from attention.sharding.shards import Shards, shards_of
from attention.sharding.traffic import Exchanged, PeerBytes
from planner.calibration import Costs, Rates
from planner.memory.machines import Machine
from planner.ranks.links import Network
from planner.ranks.ring import ring_of
from planner.speed.rank_work import RankWork, Steps, work_of_rank
from planner.speed.seconds import check, kernel_of, pass_seconds
from planner.workload import Workload

FEW_RANKS = 16
"""Ranks of which all are looked at; of more, those at the edges, and those that receive most."""


class PassTime(NamedTuple):
    """Seconds of a pass of one rank, and the bytes that it sends and receives."""

    seconds: float
    compute: float
    exchange: float
    """Seconds in which its links are busy."""
    sent: int
    received: int

    @property
    def exposed(self) -> float:
        """Seconds in which it waits for what it exchanges."""
        return max(self.seconds - self.compute, 0.0)

    @property
    def hidden(self) -> float:
        """Seconds of the exchange in which it computes."""
        return max(self.exchange - self.exposed, 0.0)


class RankTime(NamedTuple):
    """The longest rank of a call."""

    rank: int
    exchange: Exchanged
    forward: PassTime
    backward: PassTime | None
    most: tuple[tuple[int, int], tuple[int, int]]
    """The most bytes that a rank sends and the most that one receives, forward and backward."""
    looked_at: int
    """Ranks that were looked at."""

    @property
    def seconds(self) -> float:
        return self.forward.seconds + (self.backward.seconds if self.backward else 0.0)


def longest_rank(
    config: AttentionConfig, workload: Workload, machine: Machine, rates: Rates, network: Network
) -> RankTime:
    """The rank of a ring that takes longest. ConfigError as of `planner.speed.seconds.seconds`."""
    check(workload, machine, rates)
    world = ring_of(config, workload).world
    shards = shards_of(config, workload.seq, world)
    kernel = kernel_of(rates)
    times = []
    ranks = ranks_of(config, shards, workload, network)
    for rank in ranks:
        work = work_of_rank(config, workload, machine, kernel, rank)
        # Rings of other ranks may lie in nodes otherwise.
        places = {ring * world % (network.node or 1) for ring in range(min(workload.gpus // world, world))}
        times.append(
            max((_time(work, workload, rates, network, rank, place) for place in places), key=_longer)
        )
    slowest = max(times, key=_longer)
    passes = [[one.forward for one in times], [one.backward for one in times if one.backward]]
    forward, backward = (
        (max((one.sent for one in each), default=0), max((one.received for one in each), default=0))
        for each in passes
    )
    return slowest._replace(most=(forward, backward), looked_at=len(ranks))


def ranks_of(config: AttentionConfig, shards: Shards, workload: Workload, network: Network) -> list[int]:
    """The ranks that are looked at."""
    world = int(shards.world)
    if world <= FEW_RANKS:
        return list(range(world))
    ranks = {0, world // 2, world - 1}
    if network.node and network.node < world:
        ranks |= {network.node - 1, network.node}
    if config.variant != "adaptive":
        sight, every = sight_of(config, workload.seq, workload.causal), np.arange(world)
        rows = rows_received(sight, shards, every, workload.causal, workload.heads, workload.groups)  # type: ignore[arg-type]
        ranks.add(int(np.argmax(np.broadcast_to(rows, world))))
    return sorted(ranks)


def _longer(time: RankTime) -> float:
    return time.seconds


def _time(
    work: RankWork, workload: Workload, rates: Rates, network: Network, rank: int, first: int
) -> RankTime:
    """The time of a rank of a ring whose first GPU is the `first` of a node."""
    to_all = work.exchange == "heads"

    def timed(steps: Steps, costs: Costs) -> PassTime:
        seconds = compute = exchange = 0.0
        for step in steps:
            computing = float(pass_seconds(step.totals, costs, rates))
            moving = exchange_seconds(step.exchanges, network, rank, first, all_to_all=to_all)
            seconds += max(computing, moving)
            compute, exchange = compute + computing, exchange + moving
        pairs = [one for step in steps for each in step.exchanges for one in each.values()]
        return PassTime(seconds, compute, exchange, *(sum(one[way] for one in pairs) for way in (0, 1)))

    forward = timed(work.forward, rates.costs("forward", workload.dtype))
    backward = timed(work.backward, rates.costs("backward", workload.dtype)) if work.backward else None
    return RankTime(rank, work.exchange, forward, backward, ((0, 0), (0, 0)), 1)


def exchange_seconds(
    exchanges: Iterable[PeerBytes], network: Network, rank: int, first: int = 0, *, all_to_all: bool = False
) -> float:
    """Seconds of exchanges of a rank that are on their way together: each link takes both directions at a
    time, and the links of a node and between nodes go side by side."""
    counts: dict[str, list[int]] = {}
    for peers in exchanges:
        for peer, (sent, received) in peers.items():
            count = counts.setdefault(network.link(first + rank, first + peer).key, [0, 0, 0])
            for at, more in enumerate((1, sent, received)):
                count[at] += more
    links = {link.key: link for link in (network.inside, network.between) if link}
    return max(
        (
            links[key].seconds(peers, max(sent, received), all_to_all=all_to_all)
            for key, (peers, sent, received) in counts.items()
        ),
        default=0.0,
    )
