"""Seconds and their ranges as text. Imports neither torch nor rich."""

from __future__ import annotations

from typing import Final, Protocol

UNITS: Final = ((1.0, "s"), (1e3, "ms"), (1e6, "us"))


class Timed(Protocol):
    """What has seconds and the range that they are probably in."""

    @property
    def seconds(self) -> float: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


def seconds(value: float) -> str:
    """Seconds with a unit: 4,560 s, 1.23 s, 45.6 ms or 789 us."""
    if 999.5 <= value < 1e9:
        return f"{value:,.0f} s"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError


def span(low: float | None, high: float | None) -> str:
    """A range in one unit, `40 to 60 ms`; empty where there is none."""
    if low is None or high is None:
        return ""
    first, last = seconds(low), seconds(high)
    number, _, unit = first.partition(" ")
    return f"{number if last.endswith(f' {unit}') else first} to {last}"


def predicted(value: float, low: float | None, high: float | None) -> str:
    """Predicted seconds and their range: `47 ms a call, probably 40 to 60 ms; predicted`."""
    known = span(low, high)
    return f"{seconds(value)} a call, {f'probably {known}; ' * bool(known)}predicted"


def are_apart(one: Timed, other: Timed) -> bool:
    """Whether one of two times is probably less: neither is in the other's range; without ranges, if they
    differ."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return one.seconds != other.seconds
    return not (other.low <= one.seconds <= other.high or one.low <= other.seconds <= one.high)
