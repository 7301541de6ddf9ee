"""Seconds of the ranks that share a sequence: what they compute, what they exchange, and how much of that is
hidden behind computing. Imports no torch.

T = sum over steps of max(compute, alpha x messages + bytes / beta of what is on its way meanwhile)

The longest rank's counts. On a CPU nothing hides. That an exchange slows the kernels that hide it is not in
it, nor that ranks wait for a slower one at each stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from attention.config import AttentionConfig
from attention.sharding.ranges import sight_of
from attention.sharding.rows import rows_received
from attention.sharding.shards import Shards, shards_of
from attention.sharding.traffic import Exchanged, PeerBytes
from planner.calibration import Rates
from planner.memory.machines import Cpu, Machine
from planner.ranks.links import Network
from planner.ranks.ring import exchange_of, ring_of
from planner.speed.rank_work import RankWork, Steps, work_of_rank
from planner.speed.seconds import check, kernel_of, pass_seconds
from planner.speed.work import gpu_kernel
from planner.workload import Workload

FEW_RANKS = 4
"""Ranks of which all are looked at; of more, or where they exchange heads, those at the edges, and those that
receive most."""


class PassTime(NamedTuple):
    """Seconds of a pass of one rank, and the bytes that it sends and receives."""

    compute: float
    hidden: float
    """Seconds of the exchange in which it computes."""
    exposed: float
    """Seconds in which it waits for the exchange."""
    sent: int
    received: int

    @property
    def exchange(self) -> float:
        """Seconds in which its links are busy."""
        return self.hidden + self.exposed

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


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
    config: AttentionConfig, workload: Workload, machine: Machine, rates: Rates | None, network: Network
) -> RankTime:
    """The rank of a ring that takes longest; of a device without rates, the one that exchanges longest.
    ConfigError as of `planner.speed.seconds.seconds`."""
    if rates is not None:
        check(workload, machine, rates)
    world = ring_of(config, workload).world
    shards = shards_of(config, workload.seq, world)
    kernel = kernel_of(rates) if rates is not None else gpu_kernel(1)
    times = []
    ranks, node = ranks_of(config, shards, workload, network), network.node or 1
    for rank in ranks:
        work = work_of_rank(config, workload, machine, kernel, rank)
        # Rings of other ranks may lie in nodes otherwise.
        firsts = {ring * world % node for ring in range(min(workload.gpus // world, node))}
        placed = [_time(work, workload, machine, rates, network, rank, first) for first in firsts]
        times.append(max(placed, key=_longer))
    slowest = max(times, key=_longer)
    passes = [[one.forward for one in times], [one.backward for one in times if one.backward]]
    forward, backward = (
        (max((one.sent for one in each), default=0), max((one.received for one in each), default=0))
        for each in passes
    )
    return slowest._replace(most=(forward, backward), looked_at=len(ranks))


def ranks_of(config: AttentionConfig, shards: Shards, workload: Workload, network: Network) -> list[int]:
    """The ranks that are looked at."""
    world, by_heads = int(shards.world), exchange_of(config, workload) == "heads"
    if world <= FEW_RANKS and not by_heads:
        return list(range(world))
    ranks = {0, world - 1} if by_heads else {0, 1, world // 2, world - 1}
    if network.node and network.node < world:
        ranks |= {network.node - 1, network.node}
    if not by_heads:  # of which ranks differ in tokens alone
        sight, every = sight_of(config, workload.seq, workload.causal), np.arange(world)
        rows = rows_received(sight, shards, every, workload.causal, workload.heads, workload.groups)  # type: ignore[arg-type]
        ranks.add(int(np.argmax(np.broadcast_to(rows, world))))
    return sorted(ranks)


def _longer(time: RankTime) -> float:
    return time.seconds


def _time(
    work: RankWork,
    workload: Workload,
    machine: Machine,
    rates: Rates | None,
    network: Network,
    rank: int,
    first: int,
) -> RankTime:
    """The time of a rank of a ring whose first GPU is the `first` of a node."""
    to_all = work.exchange == "heads"

    def timed(steps: Steps, step: Literal["forward", "backward"]) -> PassTime:
        costs = rates.costs(step, workload.dtype) if rates else {}
        compute = hidden = exposed = 0.0
        for one in steps:
            computing = float(pass_seconds(one.totals, costs, rates)) if rates else 0.0
            moving = exchange_seconds(one.exchanges, network, rank, first, all_to_all=to_all)
            # The cores that would compute meanwhile are those that carry messages.
            behind = 0.0 if isinstance(machine, Cpu) else min(computing, moving)
            compute, hidden, exposed = compute + computing, hidden + behind, exposed + moving - behind
        pairs = [pair for one in steps for peers in one.exchanges for pair in peers.values()]
        return PassTime(compute, hidden, exposed, *(sum(pair[way] for pair in pairs) for way in (0, 1)))

    forward = timed(work.forward, "forward")
    backward = timed(work.backward, "backward") if work.backward else None
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
