"""Where whole numbers stop fitting."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from `low` to below `high` that fits, where all below it do too. `low` is not asked:
    it fits, or stands for nothing; nor is `high`, which does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
