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
from planner.search.solve import Solved, first, order, passing

GAIN: Final = 0.005
"""A constraint binds if without it the answer would be better by more than this."""
LOOKED_AT: Final = 64
"""Candidates behind the best among which the runner-up is looked for."""


def explain(scenario: Scenario, solved: Solved, best: Point) -> Why:
    """The reasons for `best`."""
    without = tuple(sorted(_without(scenario, solved, best), key=lambda one: -one.gain))
    runner_up = _runner_up(scenario, solved, best)
    return Why(
        binding=without[0].constraint if without else None,
        without=without,
        runner_up=pick(runner_up) if runner_up else None,
        behind=-gain(scenario, best, runner_up) if runner_up else None,
        steps=tuple(_steps(scenario, best)),
    )


def _without(scenario: Scenario, solved: Solved, best: Point) -> Iterator[Without]:
    """Each constraint without which the answer would be better."""
    for gate in GATES:
        other = gate.loosened(scenario)
        if other == scenario or (gate is MEMORY and scenario.free_length):
            continue
        _, good = passing(other, solved.table)
        good &= gains(other, best, solved.table.seq, solved.table.figures) > GAIN
        which, table = np.flatnonzero(good), solved.table
        if gate is MASS:
            which = table.may_reach(other, which)
            table = table.settled(scenario, which)
        new = first(other, table, order(other, table, which))
        if new is not None and gain(scenario, best, new) > GAIN:
            yield Without(constraint=gate.name, gain=gain(scenario, best, new), pick=pick(new))


def _runner_up(scenario: Scenario, solved: Solved, best: Point) -> Point | None:
    """The grid's best of another shape."""
    _, good = passing(scenario, solved.table)
    ordered = order(scenario, solved.table, np.flatnonzero(good))
    ordered = ordered[: LOOKED_AT * 16]
    others = ordered[~solved.table.shaped(best.config, ordered)]
    return first(scenario, solved.table, others[:LOOKED_AT])


def _steps(scenario: Scenario, best: Point) -> Iterator[Step]:
    """One step down and one up in each dimension that there is."""
    for dimension, before, after, config in neighbours(best.config, scenario.workload):
        try:
            other = evaluate.point(scenario, config, best.seq)
        except ConfigError:
            continue
        yield Step(
            dimension=dimension,
            before=before,
            after=after,
            seconds=other.seconds,
            upper=other.memory.upper,
            mass=other.mass,
            layers=other.layers,
            failed=evaluate.failed(scenario, other),
        )
