"""When nothing fits: the smallest changes that would help, each checked with the model. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from attention.errors import AttentionPlannerError
from planner.question.relaxation import Relaxation, cheaper, spelt
from planner.question.space import Space
from planner.ranks.links import network_of
from planner.search.candidates import grid
from planner.search.evaluate import Point, failed, memory_of
from planner.search.gates import MASS, MEMORY, REACH, SECONDS, Gate
from planner.search.scenario import Scenario
from planner.search.solve import Solved, Table, enumerate_grid, first, order, passing, tabulate
from planner.units import format_bytes
from planner.workload import Workload

LADDER: Final = tuple(1 << power for power in range(1, 11))
"""Numbers of GPUs that are tried where fewer do not do."""
TRIED: Final = 32
"""Candidates whose exact memory is looked at for the least."""


class NothingFitsError(AttentionPlannerError):
    """No config fits the budget and passes the gates. `relaxations`: changes, each of which would help, as
    options; `changes`: the same as values."""

    def __init__(self, scenario: Scenario, changes: tuple[Relaxation, ...], seen: int) -> None:
        self.changes = changes
        self.relaxations = tuple(map(spelt, changes))
        where = "the CPU" if isinstance(scenario.card, str) else scenario.card.name
        help = f"; what would: {', or '.join(self.relaxations)}" if changes else ""
        super().__init__(
            f"none of {seen:,} candidates passes on {where} with {format_bytes(scenario.budget)} for it{help}"
        )


def relaxations(scenario: Scenario, space: Space, solved: Solved, reserved: int) -> tuple[Relaxation, ...]:
    """The smallest change of one thing each with which something passes; `reserved`: bytes that the budget of
    the scenario is without."""
    return tuple(_relaxed(scenario, space, solved, reserved))


def _passes(scenario: Scenario, space: Space) -> bool:
    parts = grid(
        space,
        scenario.workload,
        flex=scenario.flex,
        windows=scenario.windows,
        free_length=scenario.free_length,
    )
    return enumerate_grid(scenario, parts).best is not None


def _relaxed(scenario: Scenario, space: Space, solved: Solved, reserved: int) -> Iterator[Relaxation]:
    table = solved.table
    if scenario.free_length:
        # Nothing passes at any length: see what a short sequence needs.
        scenario = replace(
            scenario, workload=scenario.at(max(4096, scenario.workload.queries or 1)), objective="speed"
        )
        table = tabulate(
            scenario, grid(space, scenario.workload, flex=scenario.flex, windows=scenario.windows)
        )
    needed = _memory_needed(scenario, table)
    if needed is not None and needed > scenario.budget:
        yield Relaxation("vram", needed + reserved)
        yield from _more_gpus(scenario, space)  # that memory is shared, not that it would be faster
    yield from _shorter(scenario, space)
    for gate, change in _CHANGES.items():
        nearest = _nearest(scenario, table, gate)
        if nearest is not None:
            yield change(nearest)
    for changes in _smaller(scenario.workload):
        for one in changes:
            if _passes(replace(scenario, workload=one.applied(scenario.workload)), space):
                yield one
                break


def _rounded_up(value: float) -> float:
    """To three digits, so that what it is of fits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / step + 1e-9) * step


_CHANGES: Final[dict[Gate, Callable[[Point], Relaxation]]] = {
    MASS: lambda point: Relaxation("min_mass", math.floor(point.mass * 1000) / 1000),
    REACH: lambda point: Relaxation("layers", point.layers or 0),
    SECONDS: lambda point: Relaxation("max_seconds", _rounded_up(point.seconds)),
}
"""What lets a candidate through a gate."""


def _nearest(scenario: Scenario, table: Table, gate: Gate) -> Point | None:
    """Of what passes all other gates, the candidate to loosen this one for; None where nothing needs that."""
    if gate.limit(scenario) is None:
        return None
    loose = gate.loosened(scenario)
    which = np.flatnonzero(passing(loose, table)[1])
    if gate is MASS:
        table = table.settled(scenario, which)
        ordered = which[np.argsort(-table.figures.mass[which], kind="stable")]
    else:
        ordered = order(replace(loose, objective="speed") if gate is SECONDS else loose, table, which)
    best = first(loose, table, ordered)
    return best if best is not None and gate.name in failed(scenario, best) else None


def _memory_needed(scenario: Scenario, table: Table) -> int | None:
    """The smallest upper bound of candidates that pass all gates but that of memory; None if none does."""
    loose = MEMORY.loosened(scenario)
    which = np.flatnonzero(passing(loose, table)[1])
    leanest = which[np.argsort(table.figures.memory[which], kind="stable")]
    for at in range(0, leanest.size, TRIED):
        chunk = leanest[at : at + TRIED]
        reached = chunk[table.reaching(loose, chunk)]
        if reached.size:
            return min(
                memory_of(loose, table.config(one, loose), int(table.seq[one])).upper
                for one in reached.tolist()
            )
    return None


def _more_gpus(scenario: Scenario, space: Space) -> Iterator[Relaxation]:
    """The fewest GPUs, a power of two, with which something passes where memory is what lacks; none for a
    CPU, nor for calls that ranks do not share."""
    workload = scenario.workload
    if isinstance(scenario.card, str) or workload.query_tokens < workload.seq:
        return
    link = scenario.network if scenario.network is not None and scenario.network.is_given else None
    for gpus in LADDER:
        # Each holds its share of q, k, v and out at least.
        if gpus <= workload.gpus or scenario.outside + workload.floor // gpus > scenario.budget:
            continue
        network = network_of(gpus, scenario.card)
        if link is not None:
            network = link if link.node is None or gpus % link.node == 0 else link._replace(node=None)
        more = replace(scenario, workload=workload.model_copy(update={"gpus": gpus}), network=network)
        if _passes(more, space):
            yield Relaxation("gpus", gpus)
            return


def _shorter(scenario: Scenario, space: Space) -> Iterator[Relaxation]:
    """The longest sequence at which something passes; none where documents fix the length."""
    if scenario.workload.documents is not None:
        return
    free = replace(scenario, objective="seq")
    best = enumerate_grid(
        free, grid(space, free.workload, flex=free.flex, windows=free.windows, free_length=True)
    ).best
    if best is not None and best.seq < scenario.workload.seq:
        yield Relaxation("seq", best.seq)


def _smaller(workload: Workload) -> Iterator[list[Relaxation]]:
    """Changes to smaller workloads, dimension by dimension, the smallest change first."""
    yield from ([change] for change in cheaper(workload))
    yield [Relaxation("batch", workload.batch >> power) for power in range(1, workload.batch.bit_length())]
