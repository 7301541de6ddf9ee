"""Why an answer is the answer: what binds it, what came next, what one step in each dimension would change.
Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from attention.errors import ConfigError
from planner.answers.recommendation import Step, Why, Without
from planner.search import evaluate
from planner.search.climb import neighbours
from planner.search.evaluate import Point, gain, gains
from planner.search.gates import GATES, MASS, MEMORY
from planner.search.picks import pick
from planner.search.scenario import Scenario
from planner.search.solve import Found, first, order, passing

GAIN: Final = 0.005
"""A constraint binds if without it the answer would be better by more than this."""
LOOKED_AT: Final = 64
"""Candidates behind the best among which the runner-up is looked for."""


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
    for gate in GATES:
        other = gate.loosened(scenario)
        if other == scenario or (gate is MEMORY and scenario.free_length):
            continue
        _, good = passing(other, found.table)
        good &= gains(other, best, found.table.seq, found.table.figures) > GAIN
        which, table = np.flatnonzero(good), found.table
        if gate is MASS:
            which = table.may_reach(other, which)
            table = table.settled(scenario, which)
        new = first(other, table, order(other, table, which))
        if new is not None and gain(scenario, best, new) > GAIN:
            yield Without(constraint=gate.name, gain=gain(scenario, best, new), pick=pick(new))


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
            found = evaluate.point(scenario, config, best.seq)
        except ConfigError:
            continue
        yield Step(
            dimension=dimension, before=before, after=after, seconds=found.seconds, upper=found.memory.upper,
            mass=found.mass, layers=found.layers, failed=evaluate.failed(scenario, found),
        )  # fmt: skip
