"""Picks: candidates with their figures, and the three that are shown side by side. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from operator import le

import numpy as np

from attention.sizes.arrays import Floats, Ints
from planner.answers.recommendation import Pick, Role
from planner.search.evaluate import Point


def unsurpassed(points: Sequence[Pick]) -> list[Pick]:
    """The points of the Pareto front, exactly: no other is as good in memory, time, mass and length and
    better in one; of equals the first."""
    costs: list[tuple[float, ...]] = [(one.upper, one.seconds, -one.mass, -one.seq) for one in points]

    def surpassed(at: int) -> bool:
        mine = costs[at]
        return any(
            all(map(le, theirs, mine)) and (theirs != mine or n < at) for n, theirs in enumerate(costs)
        )

    return [one for at, one in enumerate(points) if not surpassed(at)]


def pick(point: Point, role: Role = "") -> Pick:
    """A point as a pick."""
    return Pick(
        role=role,
        config=point.config,
        seq=point.seq,
        upper=point.memory.upper,
        seconds=point.seconds,
        low=point.low,
        high=point.high,
        mass=point.mass,
        layers=point.layers,
        launches=point.memory.launches,
    )


def three(seconds: Floats, mass: Floats, seq: Ints) -> tuple[int, int, int]:
    """Which of a Pareto set are fastest, balanced and widest; one may be several.

    Balanced is the nearest to having the least time, the most mass and the most tokens at once: log time,
    mass lost and log tokens lost, each scaled to its range in the set.
    """
    costs = [np.log(np.maximum(seconds, 1e-12)), -mass, -np.log(seq)]
    scaled = [(cost - cost.min()) / (np.ptp(cost) or 1.0) for cost in costs]
    balanced = np.linalg.norm(scaled, axis=0)
    # Masses that agree to three digits are the same for anyone who chooses.
    widest = np.lexsort((seconds, -np.round(mass, 3)))[0]
    return int(np.argmin(seconds)), int(np.argmin(balanced)), int(widest)
