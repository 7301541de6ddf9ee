"""Where names beside points go, so that they hide neither points nor each other. No drawing here: sizes and
places are in the unit that the caller draws in, y growing downwards or upwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Box(NamedTuple):
    """A rectangle by its corners."""

    left: float
    low: float
    right: float
    high: float

    def common(self, other: Box) -> float:
        """The area that this box and `other` share."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.high, other.high) - max(self.low, other.low)
        return max(wide, 0.0) * max(high, 0.0)


class Name(NamedTuple):
    """A name to be placed: the point that it belongs to, and its size."""

    x: float
    y: float
    width: float
    height: float


_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""Directions (right, up) from a point in the order of preference: to the right, to the left, ..."""


def placed(names: Sequence[Name], points: Sequence[Box], within: Box, gap: float) -> list[Box]:
    """A place for each name, at a distance of `gap` or twice that from its point: the one that covers the
    smallest area of `points`, of the names before it and of the outside of `within`."""
    boxes: list[Box] = []
    for name in names:
        spots = [_beside(name, *side, far * gap) for far in (1, 2) for side in _SIDES]
        costs = [_cost(spot, points, boxes, within) for spot in spots]
        boxes.append(spots[costs.index(min(costs))])
    return boxes


def _beside(name: Name, right: int, up: int, gap: float) -> Box:
    x = name.x + right * gap - (1 - right) * name.width / 2
    y = name.y + up * gap - (1 - up) * name.height / 2
    return Box(x, y, x + name.width, y + name.height)


def _cost(spot: Box, points: Sequence[Box], names: Sequence[Box], within: Box) -> float:
    size = (spot.right - spot.left) * (spot.high - spot.low)
    outside = size - spot.common(within)
    return round(10 * outside + sum(spot.common(other) for other in (*points, *names)), 6)
