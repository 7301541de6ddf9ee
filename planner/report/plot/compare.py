"""Two predictions as a picture: component by component side by side, and by how much they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from planner.answers.comparison import Comparison
from planner.report.plot.estimate import bytes_unit
from planner.report.plot.figure import BLUE, GREEN, INK, MUTED, RED, TEXT, title, written
from planner.report.text import words
from planner.report.text.estimate import label
from planner.units import format_bytes

HIGH: Final = 0.36
"""Height of one bar; a row is 1."""
COLUMNS: Final = (58, 112, 218)
"""Right ends of the columns of figures beside the bars, in points from the bars' right."""


def plot_comparison(comparison: Comparison, names: tuple[str, str], path: Path) -> None:
    """Writes the picture, as PNG or SVG by the file's suffix. `names`: the names of A and B."""
    written([path], lambda figure: draw_comparison(figure, comparison, names))


def rows_of(comparison: Comparison) -> list[tuple[str, int, int]]:
    """The bars as (name, bytes of A, bytes of B): components, then their sums."""
    a, b = comparison.a.estimate, comparison.b.estimate
    rows = [(label(name), *both) for name, both in comparison.components.items()]
    cached = (a.reserved - a.allocated, b.reserved - b.allocated)
    rows += [("cached segments", *cached)] if any(cached) else []
    return [*rows, ("together", a.device, b.device), ("upper bound", a.upper, b.upper)]


def change(a: int, b: int) -> str:
    """The difference from A to B in bytes, and as a share of A."""
    if a == b:
        return "="
    difference = f"{'+' if b > a else '-'}{short(abs(b - a))}"
    if not (a and b):
        return difference
    return f"{difference} ({(b - a) / a:+.0%})" if b < 10 * a else f"{difference} (x {b / a:,.0f})"


def short(count: int) -> str:
    """Bytes, with fewer digits of the smaller units."""
    return format_bytes(count, 2 if count >= 10**9 else 1)


def draw_comparison(figure: Any, comparison: Comparison, names: tuple[str, str]) -> None:
    rows = rows_of(comparison)
    figure.set_size_inches(8, 2.1 + 0.44 * len(rows))
    axes = figure.add_subplot()
    unit, name = bytes_unit(max(max(row[1], row[2]) for row in rows))
    above, below = ([at + side * HIGH / 2 for at in range(len(rows))] for side in (-1, 1))
    bars = [
        axes.barh(above, [row[1] / unit for row in rows], HIGH, color=MUTED),
        axes.barh(below, [row[2] / unit for row in rows], HIGH, color=BLUE),
    ]
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.axhline(len(rows) - 2.5, color=MUTED, linewidth=0.8)
    _column(axes, -1, ("A", "B", "B - A"), INK)
    for at, (_, first, second) in enumerate(rows):
        color = MUTED if first == second else RED if second > first else GREEN
        _column(axes, at, (short(first), short(second), change(first, second)), color)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=TEXT + 1)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"memory at the peak, {name}")
    a, b = comparison.a.estimate, comparison.b.estimate
    more = format_bytes(abs(b.upper - a.upper))
    headline = "At the upper bound both take the same"
    if a.upper != b.upper:
        headline = f"At the upper bound B takes {more} {'more' if b.upper > a.upper else 'less'} than A"
    sides = [
        f"{x}: {y[:28]}, {words.attention(z.config)}" for x, y, z in zip("AB", names, (a, b), strict=True)
    ]
    title(figure, headline)
    figure.legend(bars, sides, loc="outside lower left", ncols=1, fontsize=TEXT, handlelength=1.2)


def _column(axes: Any, at: int, texts: tuple[str, str, str], color: str) -> None:
    """The figures of a row, right of the bars; row -1 is the heading above them."""
    for text, right, ink in zip(texts, COLUMNS, (INK, INK, color), strict=True):
        axes.annotate(
            text,
            (1, max(at, -0.5)),
            xycoords=("axes fraction", "data"),
            color=ink,
            xytext=(right, 0 if at >= 0 else 8),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=TEXT,
        )
