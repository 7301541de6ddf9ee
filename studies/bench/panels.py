"""Panels that studies of settings draw: rows beside each other, and curves over a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from planner.report.plot.figure import GRID, INK, LABEL, MUTED, TEXT
from studies.bench.records import Row
from studies.bench.study import Results

ReadRow = Callable[[Row], float | None]
"""The number that is shown of a row; None for nothing."""


class Series(NamedTuple):
    """One of the numbers that a row shows in a panel."""

    name: str
    of: ReadRow
    color: str
    marker: str = "o"
    hollow: bool = False


class Panel(NamedTuple):
    """Numbers with one unit."""

    label: str
    marks: tuple[Series, ...]
    log: bool = False
    none: str = ""
    """The text where no mark has a number."""


def beside(figure: Any, rows: Results, panels: Sequence[Panel]) -> None:
    """A line for each row, named at the left, and panel beside panel; rules between series."""
    figure.set_size_inches(11, 2.1 + 0.29 * len(rows))
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, panel in zip(every, panels, strict=True):
        numbers = [[mark.of(row) for mark in panel.marks] for row in rows]
        for place, shown in enumerate(numbers):
            for mark, number in zip(panel.marks, shown, strict=True):
                if number is not None:
                    handles[mark.name] = axes.scatter(
                        number,
                        place,
                        marker=mark.marker,
                        s=34,
                        edgecolors=mark.color,
                        linewidths=1.3,
                        facecolors="none" if mark.hollow else mark.color,
                        zorder=2,
                    )
            if panel.none and all(number is None for number in shown):
                axes.annotate(
                    panel.none,
                    (0.04, place),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    color=MUTED,
                    fontsize=TEXT,
                )
        _lines(axes, rows)
        _scale(axes, panel, max((n for shown in numbers for n in shown if n is not None), default=0.0))
    every[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    every[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(list(handles.values()), list(handles), loc="outside lower right", ncols=len(handles))


def _lines(axes: Any, rows: Results) -> None:
    """A faint line along each row, a rule between series."""
    for place, row in enumerate(rows):
        axes.axhline(place, color=GRID, linewidth=0.8, zorder=0)
        if place and row["series"] != rows[place - 1]["series"]:
            axes.axhline(place - 0.5, color=MUTED, linewidth=0.8)
    axes.tick_params(axis="y", length=0)


def _scale(axes: Any, panel: Panel, maximum: float) -> None:
    axes.set_xlabel(panel.label)
    if not maximum:
        axes.set_xticks([])
    elif panel.log:
        axes.set_xscale("log")
        axes.margins(x=0.1)
        plain(axes.xaxis)
    else:
        axes.set_xlim(0, 1.1 * maximum)


def plain(axis: Any) -> None:
    """Ticks of a logarithmic axis as 0.1, 1, 1,000, not as powers, and enough of them."""
    ticker = import_module("matplotlib.ticker")
    low, high = axis.get_view_interval()
    if high < 10 * low:
        subs: tuple[float, ...] = (1.0, 2.0, 3.0, 5.0, 7.0)
    else:
        subs = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.12g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


class Curves(NamedTuple):
    """One quantity over a setting, a curve for each series."""

    label: str
    lines: ReadRow
    """The number of a line: predicted or computed."""
    dots: ReadRow | None = None
    """The number of a dot: measured."""
    log: bool = False
    none: str = ""
    """The axis label of the place of rows without a number, above all others; empty for no such place."""
    rule: tuple[float, str] | None = None
    """A level to compare with, and its name."""


def curves(
    figure: Any,
    rows: Results,
    panels: Sequence[Curves],
    along: Callable[[Any], None],
    series: Mapping[str, tuple[str, str]],
) -> None:
    """Panels, three a line, and the names of the series after the last. `along` sets the axis of the setting
    (the rows' `x`); `series` has a colour and a marker of each."""
    lines = len(panels) // 3 + 1
    figure.set_size_inches(12, 0.9 + 3.1 * lines)
    every = figure.subplots(lines, 3, squeeze=False).ravel()
    styles = {
        name: {"color": color, "marker": mark, "markersize": 5} for name, (color, mark) in series.items()
    }
    for axes, panel in zip(every, panels, strict=False):
        top = _top(rows, panel)
        for name, style in styles.items():
            mine = [row for row in rows if row["series"] == name]
            x = [row["x"] for row in mine]
            y = [top if (number := panel.lines(row)) is None else number for row in mine]
            axes.plot(x, y, **style | ({"marker": ""} if panel.dots else {}))
            if panel.dots:
                points = [(row["x"], number) for row in mine if (number := panel.dots(row)) is not None]
                axes.plot([at for at, _ in points], [number for _, number in points], **style, linestyle="")
        _level(axes, panel, top)
        axes.set_ylabel(panel.label)
        along(axes)
        axes.grid(axis="y")
    for axes in every[len(panels) :]:
        axes.axis("off")
    handles = [every[-1].plot([], [], **style)[0] for style in styles.values()]
    every[-1].legend(handles, list(styles), loc="center left", fontsize=LABEL, labelspacing=0.9)


def _top(rows: Results, panel: Curves) -> float | None:
    """The height of the rows without a number; None if there are none or they have no place."""
    numbers = [panel.lines(row) for row in rows]
    present = [number for number in numbers if number is not None]
    return 3 * max(present, default=1.0) if panel.none and len(present) < len(numbers) else None


def _level(axes: Any, panel: Curves, top: float | None) -> None:
    """Sets the axis of a panel's quantity, and draws its rule."""
    if panel.log:
        axes.set_yscale("log")
        plain(axes.yaxis)
    else:
        axes.set_ylim(0, 1.15 * axes.dataLim.y1)
    if top is not None:
        ticks = [tick * 10**power for power in range(5) for tick in (1, 2, 5) if 2 * tick * 10**power < top]
        axes.set_yticks([*ticks, top], [*(f"{tick:,}" for tick in ticks), panel.none])
        axes.set_yticks([], minor=True)
    if panel.rule:
        level, name = panel.rule
        axes.axhline(level, color=INK, linewidth=1, linestyle=":")
        axes.annotate(
            name,
            (0.02, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=TEXT,
        )
