"""Charts as SVG: data in, markup out. Colours are the page's (`page.css`), by class, so that they follow
light and dark and print.

A chart of points is drawn twice, for a narrow and for a wide screen, of which the page shows one: text that
is scaled with its picture is too small on a phone or too large on a desk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from attention.sizes.arrays import Floats
from planner.report.page.html import Html, tag
from planner.report.places import Box, Name, placed
from planner.report.ticks import linear_ticks, log_ticks

SHAPES: Final = {
    "dense": "M-.9-.9h1.8v1.8h-1.8z",
    "dilated": "M0-1.1L1.1 .9H-1.1z",
    "local_window": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "global_local": "M0-1.25L1.25 0L0 1.25L-1.25 0z",
    "dilated_sparse": "M0 1.1L1.1-.9H-1.1z",
    "adaptive": "M-.4-1.1h.8v.7h.7v.8h-.7v.7h-.8v-.7h-.7v-.8h.7z",
    "multihead": "M0-.5L.6-1.1L1.1-.6L.5 0L1.1 .6L.6 1.1L0 .5L-.6 1.1L-1.1 .6L-.5 0L-1.1-.6L-.6-1.1z",
}
"""The SVG path of each kind of attention, from about -1 to 1; the class of its name gives the colour."""
SHADES: Final = 5
LARGE, SMALL = 7.0, 3.0
"""Half the size of the largest mark (most memory) and of the smallest, in pixels."""
LETTER, BOLD, LINE = 7.2, 8.0, 15.0
"""The largest width of a letter in a chart, that of a bold one, and the height of a line, in pixels."""


# Bars, one in a row of a table.


def bar(start: float, length: float, kind: str = "") -> Html:
    """A bar from `start` over `length`, both as shares of the whole width, 0 to 1."""
    first, last = (min(max(at, 0.0), 1.0) for at in (start, start + length))
    width = min(max(last - first, 0.004), 1.0)
    first = min(first, 1 - width)
    return _strip(_rect(first, width, f"ink {kind}"))


def delta(share: float, kind: str = "") -> Html:
    """A bar to the left or to the right of a line in the middle; `share` from -1 to 1."""
    share = min(max(share, -1.0), 1.0) / 2
    drawn = [_rect(min(0.5 + share, 0.5), abs(share), f"ink {kind}")] if abs(share) >= 0.002 else []
    return _strip(*drawn, _rect(0.4985, 0.003, "line"))


def pair(expected: float, measured: float | None) -> Html:
    """A pale bar of what was expected, and on it one of what was measured; both are shares, 0 to 1."""
    pale = _rect(0, min(max(expected, 0.004), 1.0), "pale")
    if measured is None:
        return _strip(pale)
    return _strip(pale, _rect(0, min(max(measured, 0.004), 1.0), "ink", low=2.5, high=5))


def _strip(*parts: Html) -> Html:
    return tag(
        "svg",
        *parts,
        class_="bar",
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        aria_hidden="true",
        focusable="false",
    )


def _rect(first: float, width: float, kind: str, low: float = 0, high: float = 10) -> Html:
    return tag(
        "rect", x=_number(100 * first), y=low, width=_number(100 * width), height=high, class_=kind.strip()
    )


# Points.


class Mark(NamedTuple):
    """A point of a chart."""

    x: float
    y: float
    size: float
    """Its area as a share of the largest mark's, 0 to 1."""
    kind: str
    """One of SHAPES."""
    description: str
    """The text that is shown when the mark is pointed at."""
    name: str = ""
    """A name beside the mark, which then has a ring around it; empty for none."""


class Axis(NamedTuple):
    """An axis of a chart of points."""

    label: str
    tick_text: Callable[[float], str]
    """The text of a tick at a value."""
    log: bool = False


def points(what: str, marks: Sequence[Mark], x: Axis, y: Axis, *, diagonal: bool = False) -> Html:
    """A chart of points, for both screens, with the description of the point that is looked at. `diagonal`:
    both axes have one scale, and a line marks where both values are equal."""
    kinds = dict.fromkeys(mark.kind for mark in marks)
    key = tag("ul", *(tag("li", _alone(kind), " " + kind) for kind in kinds), class_="key")
    charts = [
        _points(what, marks, x, y, diagonal, width, height, kind)
        for width, height, kind in ((340, 320, "narrow"), (760, 420, "wide"))
    ]
    return tag("figure", key, *charts, tag("p", class_="description", aria_hidden="true"))


def _alone(kind: str) -> Html:
    return tag("svg", _shape(kind, 0, 0, 6), viewBox="-9 -9 18 18", class_="mark", aria_hidden="true")


def _shape(kind: str, x: float, y: float, size: float) -> Html:
    return tag(
        "path",
        d=SHAPES[kind],
        class_=f"of-{kind}",
        transform=f"translate({_number(x)} {_number(y)}) scale({_number(size)})",
    )


class _Scale(NamedTuple):
    """Maps the values of an axis to pixels."""

    low: float
    high: float
    first: float
    last: float
    log: bool

    def at(self, value: float) -> float:
        share = (_position(value, self.log) - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    def ticks(self, maximum: int) -> list[float]:
        if self.log:
            return log_ticks(math.exp(self.low), math.exp(self.high), maximum)
        return linear_ticks(self.low, self.high, maximum)


def _scale(values: Sequence[float], log: bool, first: float, last: float) -> _Scale:
    """The scale that all values lie on, with room at both ends."""
    positions = [_position(value, log) for value in values]
    room = 0.07 * (max(positions) - min(positions)) or 0.1 * (1.0 if log else abs(positions[0]) or 1.0)
    return _Scale(min(positions) - room, max(positions) + room, first, last, log)


def _position(value: float, log: bool) -> float:
    """A value's position on an axis, logarithmic if `log`; values out of range lie at its ends."""
    return math.log(min(max(value, 1e-12), 1e12)) if log else min(max(value, -1e12), 1e12)


def _points(
    what: str, marks: Sequence[Mark], x: Axis, y: Axis, diagonal: bool, width: int, height: int, kind: str
) -> Html:
    left, right, top, low = 58.0, width - 10.0, 26.0, height - 44.0
    across, up = [mark.x for mark in marks], [mark.y for mark in marks]
    if diagonal:
        across = up = across + up
    wide, high = _scale(across, x.log, left, right), _scale(up, y.log, low, top)
    parts = [*_frame(wide, high, x, y)]
    if diagonal:
        parts.append(tag("path", d=f"M{left} {low}L{right} {top}", class_="equal"))
    drawn, boxes, names = [], [], []
    for mark in marks:
        at, size = (wide.at(mark.x), high.at(mark.y)), max(LARGE * math.sqrt(max(mark.size, 0)), SMALL)
        boxes.append(Box(at[0] - size, at[1] - size, at[0] + size, at[1] + size))
        drawn.append(_mark(mark, at, size))
        if mark.name:
            names.append((mark.name, Name(*at, BOLD * len(mark.name), LINE)))
    spots = placed([name for _, name in names], boxes, Box(left, top, right, low), LARGE + 9)
    for (text, _), spot in zip(names, spots, strict=True):
        middle = {"x": _number((spot.left + spot.right) / 2), "y": _number(spot.high - 0.28 * LINE)}
        parts.append(tag("text", text, class_="name", text_anchor="middle", **middle))
    return tag(
        "svg",
        *parts,
        *drawn,
        viewBox=f"0 0 {width} {height}",
        class_=f"points {kind}",
        role="group",
        aria_label=what,
    )


def _mark(mark: Mark, at: tuple[float, float], size: float) -> Html:
    x, y = map(_number, at)
    ring = tag("circle", cx=x, cy=y, r=LARGE + 4, class_="ring") if mark.name else None
    hit = tag("circle", cx=x, cy=y, r=LARGE + 5, class_="hit")
    return tag(
        "g",
        tag("title", mark.description),
        hit,
        ring,
        _shape(mark.kind, *at, size),
        tabindex="0",
        role="img",
        class_="point",
        aria_label=mark.description,
    )


def _frame(wide: _Scale, high: _Scale, x: Axis, y: Axis) -> list[Html]:
    """Grid, ticks and names of the axes."""
    parts = []
    for tick in _apart(wide.ticks(9), wide, x.tick_text):
        at = _number(wide.at(tick))
        parts += [
            tag("path", d=f"M{at} {high.first}V{high.last}", class_="grid"),
            tag("text", x.tick_text(tick), x=at, y=high.first + 16, text_anchor="middle"),
        ]
    for tick in high.ticks(6):
        at = _number(high.at(tick))
        parts += [
            tag("path", d=f"M{wide.first} {at}H{wide.last}", class_="grid"),
            tag("text", y.tick_text(tick), x=wide.first - 6, y=_number(high.at(tick) + 4), text_anchor="end"),
        ]
    return [
        *parts,
        tag("text", y.label, x=0, y=12, class_="axis"),
        tag("text", x.label, x=wide.last, y=high.first + 36, text_anchor="end", class_="axis"),
    ]


def _apart(ticks: Sequence[float], scale: _Scale, tick_text: Callable[[float], str]) -> list[float]:
    """The ticks whose text touches neither the one before nor the edge."""
    readable: list[float] = []
    edge = -math.inf
    for tick in ticks:
        half = LETTER * len(tick_text(tick)) / 2
        if scale.at(tick) - half > edge and scale.at(tick) + half < scale.last + 10:
            readable.append(tick)
            edge = scale.at(tick) + half + LETTER
    return readable


# Layouts.


def matrix(what: str, shares: Floats) -> Html:
    """An attention mask, a square for each cell: the darker, the larger the share that is kept."""
    rows, columns = shares.shape
    marks: dict[int, list[str]] = {}
    for row, values in enumerate(shares.tolist()):
        begin = 0
        for at in range(1, columns + 1):
            level = shade(values[begin])
            if at == columns or shade(values[at]) != level:
                if level:
                    marks.setdefault(level, []).append(f"M{begin} {row}h{at - begin}v1h{begin - at}z")
                begin = at
    paths = [tag("path", d="".join(runs), class_=f"shade-{level}") for level, runs in sorted(marks.items())]
    return tag(
        "svg",
        *paths,
        viewBox=f"0 0 {columns} {rows}",
        class_="matrix",
        role="img",
        aria_label=what,
        shape_rendering="crispEdges",
    )


def shade(share: float) -> int:
    """The shade of a share: 0 for nothing, SHADES - 1 for all."""
    return 0 if share <= 0 else SHADES - 1 if share >= 1 else 1 + min(int(3 * share), 2)


def strip(positions: Sequence[bool]) -> Html:
    """A mark for each position that is true."""
    path = "".join(f"M{at}.15 0h.7v1h-.7z" for at, one in enumerate(positions) if one)
    return tag(
        "svg",
        tag("path", d=path, class_="ink"),
        viewBox=f"0 0 {len(positions)} 1",
        class_="bar",
        preserveAspectRatio="none",
        aria_hidden="true",
        focusable="false",
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
