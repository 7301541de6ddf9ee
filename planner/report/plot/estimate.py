"""Pictures that commands draw: the waterfall of an estimate, the Pareto set of a recommendation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from planner.memory.estimate import MemoryEstimate
from planner.report.places import Box, Name, placed
from planner.report.plot.figure import BLUE, GRID, INK, KINDS, MUTED, RED, TEXT, title, written
from planner.report.text import words
from planner.report.text.estimate import label, waterfall
from planner.report.text.words import kind_of
from planner.report.ticks import linear_ticks, log_ticks
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.answers.recommendation import Recommendation

LARGEST: Final = 110.0
"""Area of the mark of what takes most memory, in square points."""


def plot(found: MemoryEstimate, path: Path, budget: int | None = None) -> None:
    """Writes the waterfall, 960 pixels wide, as PNG or SVG by the file's suffix."""
    written([path], lambda figure: draw_waterfall(figure, found, budget))


def plot_pareto(found: Recommendation, path: Path) -> None:
    """Writes time against mass of what nothing surpasses, the picks marked, as PNG or SVG."""
    written([path], lambda figure: draw_pareto(figure, found))


def bytes_unit(most: float) -> tuple[int, str]:
    """The unit of an axis that goes up to so many bytes."""
    for size, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if most >= size:
            return size, name
    return 1, "B"


# The waterfall.


def draw_waterfall(figure: Any, found: MemoryEstimate, budget: int | None) -> None:
    steps = waterfall(found)
    unit, name = bytes_unit(max(found.device, found.upper))
    figure.set_size_inches(8, 1.9 + 0.36 * (len(steps) + 1))
    axes = figure.add_subplot()
    rows = [*((label(step.name), step.start, step.bytes) for step in steps), ("together", 0, found.device)]
    colors = [BLUE] * len(steps) + [MUTED]
    for place, ((_, start, count), color) in enumerate(zip(rows, colors, strict=True)):
        axes.barh(place, count / unit, left=start / unit, color=color, edgecolor=color)
        said = f"{format_bytes(count)}   {count / found.device:6.1%}"
        axes.annotate(
            said,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(104, 0),
            ha="right",
            textcoords="offset points",
            va="center",
            fontsize=TEXT + 0.5,
        )
    lines = [("upper bound", found.upper, RED, "--")]
    if budget is not None and budget < 3 * found.upper:
        lines.append(("budget", budget, INK, ":"))
    axes.set_xlim(0, 1.04 * max(found.device, *(count for _, count, _, _ in lines)) / unit)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    # One above the other, so that lines that are near each other do not write over each other.
    for above, (what, count, color, style) in enumerate(lines):
        axes.axvline(count / unit, color=color, linestyle=style, linewidth=1.5)
        right = count / unit > axes.get_xlim()[1] / 2
        axes.annotate(
            f"{what} {format_bytes(count)}",
            (count / unit, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4 if right else -4, 5 + 14 * above),
            textcoords="offset points",
            ha="right" if right else "left",
            fontsize=TEXT,
            color=color,
        )
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=TEXT + 1)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"memory at the peak, {name}")
    outside = f"; budget {format_bytes(budget)}" if budget is not None and len(lines) == 1 else ""
    title(figure, f"{words.attention(found.config)}, on {found.on}{outside}", words.task(found.workload))


# The Pareto set.


def draw_pareto(figure: Any, found: Recommendation) -> None:
    from planner.report.text.recommend import seconds

    figure.set_size_inches(8, 5.2)
    axes = figure.add_subplot()
    most = max(pick.upper for pick in (*found.pareto, *found.alternatives))
    kinds = dict.fromkeys(kind_of(pick.config) for pick in found.pareto)
    for kind in kinds:
        color, marker = KINDS[kind]
        picks = [pick for pick in found.pareto if kind_of(pick.config) == kind]
        axes.scatter(
            [pick.seconds for pick in picks],
            [100 * pick.mass for pick in picks],
            color=color,
            zorder=2,
            marker=marker,
            label=kind,
            s=[max(LARGEST * pick.upper / most, 6) for pick in picks],
            linewidths=0,
        )
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.14)
    _round_ticks(axes, seconds)
    axes.set_xlabel("time of a call, predicted")
    axes.set_ylabel(f"mass of dense attention, %, profile {found.quality.profile!r}")
    axes.grid(which="major", color=GRID, zorder=0)
    least = min(pick.upper for pick in found.pareto)
    lengths = sorted({pick.seq for pick in found.pareto})
    asked = words.task(found.workload)
    if len(lengths) > 1:
        asked = f"{lengths[0]:,} to {lengths[-1]:,} tokens, {words.sizes(found.workload)}"
    title(figure, f"What nothing surpasses in memory, time and mass, on {found.on}", asked)
    figure.legend(
        loc="outside lower left",
        ncols=len(kinds),
        fontsize=TEXT,
        handletextpad=0.3,
        columnspacing=1.4,
        title=f"size: memory at most, {format_bytes(least)} to {format_bytes(most)}",
        alignment="left",
        title_fontsize=TEXT,
    )
    _name_picks(figure, axes, found, seconds)


def _round_ticks(axes: Any, said: Callable[[float], str]) -> None:
    """Ticks at round numbers of seconds, in words, and of mass."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    ticks = log_ticks(left, right, 8)
    axes.set_xticks(ticks, [said(at) for at in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(linear_ticks(low, high, 7))
    axes.set(xlim=(left, right), ylim=(low, high))


def _name_picks(figure: Any, axes: Any, found: Recommendation, said: Any) -> None:
    """Rings around the picks and their roles beside them, where there is room."""
    roles: dict[tuple[float, float], list[str]] = {}
    for pick in found.alternatives:
        roles.setdefault((pick.seconds, 100 * pick.mass), []).append(pick.role)
    texts = [f"{', '.join(names)}: {said(at[0])}, {at[1]:.1f}%" for at, names in roles.items()]
    axes.scatter(
        [x for x, _ in roles],
        [y for _, y in roles],
        s=2.2 * LARGEST,
        facecolors="none",
        edgecolors=RED,
        linewidths=1.6,
        zorder=3,
    )
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    spots = axes.transData.transform([(pick.seconds, 100 * pick.mass) for pick in found.pareto])
    radius = 7 * scale
    points = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in spots.tolist()]
    at = axes.transData.transform(list(roles)).tolist()
    wide, high = 0.56 * TEXT * scale, 1.3 * TEXT * scale
    names = [Name(x, y, wide * len(text), high) for text, (x, y) in zip(texts, at, strict=True)]
    boxes = placed(names, points, Box(*axes.get_window_extent().extents), 11 * scale)
    for text, box, (x, y) in zip(texts, boxes, at, strict=True):
        middle = (box.left + box.right) / 2 - x, (box.low + box.high) / 2 - y
        axes.annotate(
            text,
            axes.transData.inverted().transform((x, y)),
            fontsize=TEXT,
            color=RED,
            ha="center",
            xytext=(middle[0] / scale, middle[1] / scale),
            textcoords="offset points",
            va="center",
        )
