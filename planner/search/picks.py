"""Picks: candidates with their figures, and the three that are shown side by side. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from attention.config import AttentionConfig, Value
from planner.search.scenario import Point

Role = Literal["fastest", "balanced", "widest", ""]


class Quality(Value):
    """What a config still attends to."""

    profile: str
    """Name of the attention profile."""
    mass: float
    """Share of dense attention's mass under it."""
    layers: int | None
    """Until the last token can hear of all that causality permits; None: never."""


class Pick(Value):
    """One config with its figures."""

    role: Role = ""
    config: AttentionConfig
    seq: int
    upper: int
    """Bytes that are not exceeded."""
    seconds: float
    mass: float
    layers: int | None


def pick(found: Point, role: Role = "") -> Pick:
    """A point as a pick."""
    return Pick(
        role=role, config=found.config, seq=found.seq, upper=found.memory.upper, seconds=found.seconds,
        mass=found.mass, layers=found.layers,
    )  # fmt: skip


def three(points: Sequence[Point]) -> tuple[Pick, ...]:
    """Fastest, balanced and widest of a Pareto set; one config may be several.

    Balanced is the point nearest to having both the least time and the most mass, log time and mass lost each
    scaled to their ranges in the set.
    """
    if not points:
        return ()
    fastest = min(points, key=lambda p: (p.seconds, -p.mass))
    widest = max(points, key=lambda p: (p.mass, -p.seconds))
    times = [math.log(max(p.seconds, 1e-12)) for p in points]
    least, spread = min(times), max(times) - min(times) or 1.0
    lost = widest.mass - min(p.mass for p in points) or 1.0

    def distance(p: Point) -> float:
        time = (math.log(max(p.seconds, 1e-12)) - least) / spread
        return math.hypot(time, (widest.mass - p.mass) / lost)

    balanced = min(points, key=distance)
    return pick(fastest, "fastest"), pick(balanced, "balanced"), pick(widest, "widest")
