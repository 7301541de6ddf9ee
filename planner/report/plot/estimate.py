"""Pictures that commands draw: the waterfall of an estimate, the Pareto front of a recommendation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from planner.answers.shared import SharedEstimate
from planner.memory.estimate import MemoryEstimate
from planner.question.dimensions import attention_kind
from planner.report.places import Box, Name, placed
from planner.report.plot.figure import BLUE, GRID, INK, KINDS, MUTED, RED, TEXT, title, written
from planner.report.text import words
from planner.report.text.estimate import label, waterfall
from planner.report.text.shared import exchanged
from planner.report.ticks import linear_ticks, log_ticks
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.answers.recommendation import Recommendation

LARGEST: Final = 110.0
"""Area of the largest mark (most memory), in square points."""


def plot(estimate: MemoryEstimate, path: Path, budget: int | None = None) -> None:
    """Writes the waterfall, 960 pixels wide, as PNG or SVG by the file's suffix."""
    written([path], lambda figure: draw_waterfall(figure, estimate, budget))


def plot_pareto(answer: Recommendation, path: Path) -> None:
    """Writes the Pareto front, mass over time with the picks marked, as PNG or SVG by the file's suffix."""
    written([path], lambda figure: draw_pareto(figure, answer))


def bytes_unit(maximum: float) -> tuple[int, str]:
    """(bytes of it, name) of the unit of an axis that goes up to `maximum` bytes."""
    for size, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")):
        if maximum >= size:
            return size, name
    return 1, "B"


# The waterfall.


def draw_waterfall(figure: Any, estimate: MemoryEstimate, budget: int | None) -> None:
    steps = waterfall(estimate)
    unit, name = bytes_unit(max(estimate.device, estimate.upper))
    figure.set_size_inches(8, 1.9 + 0.36 * (len(steps) + 1))
    axes = figure.add_subplot()
    rows = [*((label(step.name), step.start, step.bytes) for step in steps), ("together", 0, estimate.device)]
    colors = [BLUE] * len(steps) + [MUTED]
    for place, ((_, start, count), color) in enumerate(zip(rows, colors, strict=True)):
        axes.barh(place, count / unit, left=start / unit, color=color, edgecolor=color)
        text = f"{format_bytes(count)}   {count / estimate.device:6.1%}"
        axes.annotate(
            text,
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(104, 0),
            ha="right",
            textcoords="offset points",
            va="center",
            fontsize=TEXT + 0.5,
        )
    lines = [("upper bound", estimate.upper, RED, "--")]
    if budget is not None and budget < 3 * estimate.upper:
        lines.append(("budget", budget, INK, ":"))
    axes.set_xlim(0, 1.04 * max(estimate.device, *(count for _, count, _, _ in lines)) / unit)
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
    title(
        figure,
        f"{words.attention(estimate.config)}, on {estimate.on}{outside}",
        words.task(estimate.workload),
    )


# The Pareto front.


def draw_pareto(figure: Any, answer: Recommendation) -> None:
    from planner.report.text.recommend import seconds

    figure.set_size_inches(8, 5.2)
    axes = figure.add_subplot()
    largest = max(pick.upper for pick in (*answer.pareto, *answer.alternatives))
    kinds = dict.fromkeys(attention_kind(pick.config) for pick in answer.pareto)
    for kind in kinds:
        color, marker = KINDS[kind]
        picks = [pick for pick in answer.pareto if attention_kind(pick.config) == kind]
        axes.scatter(
            [pick.seconds for pick in picks],
            [100 * pick.mass for pick in picks],
            color=color,
            zorder=2,
            marker=marker,
            label=kind,
            s=[max(LARGEST * pick.upper / largest, 6) for pick in picks],
            linewidths=0,
        )
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.14)
    _round_ticks(axes, seconds)
    axes.set_xlabel("time of a call, predicted")
    axes.set_ylabel(f"mass of dense attention, %, profile {answer.quality.profile!r}")
    axes.grid(which="major", color=GRID, zorder=0)
    smallest = min(pick.upper for pick in answer.pareto)
    lengths = sorted({pick.seq for pick in answer.pareto})
    below = words.task(answer.workload)
    if len(lengths) > 1:
        below = f"{lengths[0]:,} to {lengths[-1]:,} tokens, {words.sizes(answer.workload)}"
    if isinstance(answer.memory, SharedEstimate):
        below += f"\n{answer.workload.gpus:,} GPUs, each of which {exchanged(answer.memory.sharing)}"
    title(figure, f"Pareto front of memory, time and mass, on {answer.on}", below)
    figure.legend(
        loc="outside lower left",
        ncols=len(kinds),
        fontsize=TEXT,
        handletextpad=0.3,
        columnspacing=1.4,
        title=f"size: memory at most, {format_bytes(smallest)} to {format_bytes(largest)}",
        alignment="left",
        title_fontsize=TEXT,
    )
    _name_picks(figure, axes, answer, seconds)


def _round_ticks(axes: Any, seconds_text: Callable[[float], str]) -> None:
    """Ticks at round numbers of seconds, in words, and of mass."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    ticks = log_ticks(left, right, 8)
    axes.set_xticks(ticks, [seconds_text(at) for at in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(linear_ticks(low, high, 7))
    axes.set(xlim=(left, right), ylim=(low, high))


def _name_picks(figure: Any, axes: Any, answer: Recommendation, seconds_text: Any) -> None:
    """Rings around the picks and their roles beside them, where there is room."""
    roles: dict[tuple[float, float], list[str]] = {}
    for pick in answer.alternatives:
        roles.setdefault((pick.seconds, 100 * pick.mass), []).append(pick.role)
    texts = [f"{', '.join(names)}: {seconds_text(at[0])}, {at[1]:.1f}%" for at, names in roles.items()]
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
    spots = axes.transData.transform([(pick.seconds, 100 * pick.mass) for pick in answer.pareto])
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
