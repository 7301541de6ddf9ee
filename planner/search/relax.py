"""When nothing fits: the smallest changes that would help, each checked with the model. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from attention.errors import AttentionPlannerError
from planner.configs import Ints
from planner.question.space import Space
from planner.search.candidates import grid
from planner.search.evaluate import memory_of
from planner.search.scenario import Scenario
from planner.search.solve import Found, Table, enumerate_grid, first, order, passing, tabulate
from planner.units import bytes_option, format_bytes

TRIED: Final = 32
"""Candidates whose exact memory is looked at for the least."""


class NothingFitsError(AttentionPlannerError):
    """No config fits the budget and passes the gates. `relaxations`: changes, each of which would help."""

    def __init__(self, scenario: Scenario, relaxed: tuple[str, ...], seen: int) -> None:
        self.relaxations = relaxed
        where = "the CPU" if isinstance(scenario.card, str) else scenario.card.name
        said = f"; what would: {', or '.join(relaxed)}" if relaxed else ""
        super().__init__(
            f"none of {seen:,} candidates passes on {where} with {format_bytes(scenario.budget)} for it{said}"
        )


def relaxations(scenario: Scenario, space: Space, found: Found, reserved: int) -> tuple[str, ...]:
    """The smallest change of one thing each with which something passes, as options; `reserved`: bytes that
    the budget of the scenario is without."""
    return tuple(_relaxed(scenario, space, found, reserved))


def _passes(scenario: Scenario, space: Space) -> bool:
    parts = grid(space, scenario.workload, flex=scenario.flex, free_length=scenario.free_length)
    return enumerate_grid(scenario, parts).best is not None


def _relaxed(scenario: Scenario, space: Space, found: Found, reserved: int) -> Iterator[str]:
    table, gates = found.table, scenario.gates
    if scenario.free_length:
        # Nothing passes at any length: see what a short sequence needs.
        scenario = replace(scenario, workload=scenario.at(4096), objective="speed")
        table = tabulate(scenario, grid(space, scenario.workload, flex=scenario.flex))
    roomy = scenario.but(budget=1 << 60)
    _, good = passing(roomy, table)
    if good.any():
        needed = _least_memory(roomy, table, np.flatnonzero(good))
        if needed is not None and needed > scenario.budget:
            whole = needed + reserved
            yield f"--vram {bytes_option(whole)} (needs {format_bytes(whole)})"
    yield from _shorter(scenario, space)
    if gates.min_mass is not None:
        loose = scenario.but(gates=replace(gates, min_mass=None))
        which = np.flatnonzero(passing(loose, table)[1])
        settled = table.settled(scenario, which)
        best = first(loose, settled, _by_mass(settled, which))
        if best is not None and best.mass < gates.min_mass:
            yield f"--min-mass {math.floor(best.mass * 1000) / 1000:g}"
    if gates.layers is not None:
        loose = scenario.but(gates=replace(gates, layers=None))
        _, good = passing(loose, table)
        best = first(loose, table, order(loose, table, np.flatnonzero(good)))
        if best is not None and (best.layers is None or best.layers > gates.layers):
            yield f"--layers {best.layers or 0}"
    if gates.max_seconds is not None:
        loose = scenario.but(gates=replace(gates, max_seconds=None))
        _, good = passing(loose, table)
        best = first(loose, table, order(replace(loose, objective="speed"), table, np.flatnonzero(good)))
        if best is not None and best.seconds > gates.max_seconds:
            yield f"--max-seconds {_rounded_up(best.seconds):.6g}"
    for changes in _workloads(scenario):
        for change, update in changes:
            if _passes(replace(scenario, workload=scenario.workload.model_copy(update=update)), space):
                yield change
                break


def _rounded_up(value: float) -> float:
    """To three digits, so that what it is of fits."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / step + 1e-9) * step


def _by_mass(table: Table, which: Ints) -> Ints:
    return which[np.argsort(-table.figures.mass[which], kind="stable")]


def _least_memory(scenario: Scenario, table: Table, which: Ints) -> int | None:
    """The least upper bound of those that pass all else."""
    leanest = which[np.argsort(table.figures.memory[which], kind="stable")]
    found = [leanest[at : at + TRIED] for at in range(0, leanest.size, TRIED)]
    for chunk in found:
        reached = chunk[table.reaching(scenario, chunk)]
        if reached.size:
            exact = (
                memory_of(scenario, table.config(at, scenario), int(table.seq[at])).upper
                for at in reached.tolist()
            )
            return min(exact)
    return None


def _shorter(scenario: Scenario, space: Space) -> Iterator[str]:
    """The longest sequence at which something passes."""
    free = replace(scenario, objective="seq")
    best = enumerate_grid(free, grid(space, free.workload, flex=free.flex, free_length=True)).best
    if best is not None and best.seq < scenario.workload.seq:
        yield f"--seq {best.seq}"


def _workloads(scenario: Scenario) -> Iterator[list[tuple[str, dict[str, object]]]]:
    """Smaller workloads, dimension by dimension, the smallest change first: the option, what it changes."""
    workload = scenario.workload
    if workload.mode == "training":
        yield [("--mode inference", {"mode": "inference"})]
    if workload.itemsize > 2:
        yield [("--dtype float16", {"dtype": "float16"})]
    halves = [workload.batch >> power for power in range(1, workload.batch.bit_length())]
    yield [(f"--batch {batch}", {"batch": batch}) for batch in halves]
