"""Why an answer is the answer: what binds it, what came next, what one step in each dimension would change.
Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Final

import numpy as np
from pydantic import BeforeValidator

from attention.config import Value, as_tuple
from attention.errors import ConfigError
from planner.search import scenario as asked
from planner.search.climb import neighbours
from planner.search.grid import Found, first, order, passing
from planner.search.picks import Pick, pick
from planner.search.scenario import Point, Scenario, gain, gains

GAIN: Final = 0.005
"""A constraint binds if without it the answer would be better by more than this."""
LOOKED_AT: Final = 64
"""Candidates behind the best among which the runner-up is looked for."""


class Without(Value):
    """What the answer would be without one constraint."""

    constraint: str
    gain: float
    """By how much better: 0.25 is 25% of the objective."""
    pick: Pick


class Step(Value):
    """The answer with one dimension changed by a step."""

    dimension: str
    before: str
    after: str
    seconds: float
    upper: int
    mass: float
    layers: int | None
    failed: Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
    """Constraints that it would not meet."""


class Why(Value):
    """The reasons."""

    binding: str | None
    """The constraint without which the answer would be better by most; None if none keeps it back."""
    without: Annotated[tuple[Without, ...], BeforeValidator(as_tuple)]
    runner_up: Pick | None
    """The best of another shape: not the same attention with another workspace or backend."""
    behind: float | None
    """By how much of the objective it is behind."""
    steps: Annotated[tuple[Step, ...], BeforeValidator(as_tuple)]


def explain(scenario: Scenario, found: Found, best: Point) -> Why:
    """The reasons for `best`."""
    without = tuple(sorted(_without(scenario, found, best), key=lambda one: -one.gain))
    runner_up = _runner_up(scenario, found, best)
    return Why(
        binding=without[0].constraint if without else None,
        without=without,
        runner_up=pick(runner_up) if runner_up else None,
        behind=-gain(scenario, best, runner_up) if runner_up else None,
        steps=tuple(_steps(scenario, best)),
    )


def _without(scenario: Scenario, found: Found, best: Point) -> Iterator[Without]:
    """Each constraint without which the answer would be better."""
    gates = scenario.gates
    loosened = {
        "memory": scenario.but(budget=1 << 60),
        "mass": scenario.but(gates=replace(gates, min_mass=None)),
        "reach": scenario.but(gates=replace(gates, layers=None)),
        "seconds": scenario.but(gates=replace(gates, max_seconds=None)),
    }
    for name, other in loosened.items():
        if other == scenario or (name == "memory" and scenario.free_length):
            continue
        _, good = passing(other, found.table)
        good &= gains(other, best, found.table.seq, found.table.figures) > GAIN
        which, table = np.flatnonzero(good), found.table
        if name == "mass":
            which = table.may_reach(other, which)
            table = table.settled(scenario, which)
        new = first(other, table, order(other, table, which))
        if new is not None and gain(scenario, best, new) > GAIN:
            yield Without(constraint=name, gain=gain(scenario, best, new), pick=pick(new))


def _runner_up(scenario: Scenario, found: Found, best: Point) -> Point | None:
    """The grid's best of another shape."""
    _, good = passing(scenario, found.table)
    ordered = order(scenario, found.table, np.flatnonzero(good))
    ordered = ordered[: LOOKED_AT * 16]
    others = ordered[~found.table.shaped(best.config, ordered)]
    return first(scenario, found.table, others[:LOOKED_AT])


def _steps(scenario: Scenario, best: Point) -> Iterator[Step]:
    """One step down and one up in each dimension that there is."""
    for dimension, before, after, config in neighbours(best.config):
        try:
            found = asked.point(scenario, config, best.seq)
        except ConfigError:
            continue
        yield Step(
            dimension=dimension, before=before, after=after, seconds=found.seconds, upper=found.memory.upper,
            mass=found.mass, layers=found.layers, failed=asked.failed(scenario, found),
        )  # fmt: skip
