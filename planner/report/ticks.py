"""Round numbers for axes."""

from __future__ import annotations

import math


def log_ticks(low: float, high: float, maximum: int) -> list[float]:
    """Ticks from `low` to `high`, both above 0, some in each power of ten; no more than `maximum`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for parts, every in (
        ((1, 1.5, 2, 3, 5, 7), 1),
        ((1, 2, 5), 1),
        ((1, 3), 1),
        ((1,), 1),
        ((1,), 2),
        ((1,), 4),
        ((1,), 8),
        ((1,), 100),
    ):
        steps = (float(f"{part}e{power}") for power in powers if power % every == 0 for part in parts)
        ticks = [at for at in steps if low <= at <= high]
        if len(ticks) <= maximum:
            break
    return ticks


def linear_ticks(low: float, high: float, maximum: int) -> list[float]:
    """Ticks from `low` to `high`, at multiples of 1, 2 or 5 times a power of ten; no more than `maximum`."""
    size = (high - low) / maximum
    power = 10.0 ** math.floor(math.log10(size))
    step = next(part * power for part in (1, 2, 5, 10) if part * power >= size)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(at * step, 12) for at in range(first, last + 1)]
