"""Pictures that commands draw: the waterfall of an estimate, the Pareto set of a recommendation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.memory.estimate import MemoryEstimate
from planner.report import words
from planner.report.estimate import label, waterfall
from planner.report.figure import BLUE, GRID, INK, KINDS, MUTED, RED, title, written
from planner.report.words import kind_of
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.recommendation import Recommendation


def plot(found: MemoryEstimate, path: Path, budget: int | None = None) -> None:
    """Writes the waterfall, 960 pixels wide, as PNG or SVG by the file's suffix."""
    written([path], lambda figure: draw_waterfall(figure, found, budget))


def plot_pareto(found: Recommendation, path: Path) -> None:
    """Writes time against mass of what nothing surpasses, the picks marked, as PNG or SVG."""
    written([path], lambda figure: draw_pareto(figure, found))


def draw_waterfall(figure: Any, found: MemoryEstimate, budget: int | None) -> None:
    steps = waterfall(found)
    unit, name = (10**9, "GB") if max(found.device, found.upper) >= 10**9 else (10**6, "MB")
    figure.set_size_inches(8, 1.9 + 0.36 * (len(steps) + 1))
    axes = figure.add_subplot()
    places = range(len(steps))
    starts, widths = [step.start / unit for step in steps], [step.bytes / unit for step in steps]
    axes.barh(places, widths, left=starts, color=BLUE, edgecolor=BLUE)
    axes.barh(len(steps), found.device / unit, color=MUTED)
    for place, (start, width) in enumerate([*zip(starts, widths, strict=True), (0, found.device / unit)]):
        axes.annotate(
            format_bytes(width * unit),
            (start + width, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axes.axvline(found.upper / unit, color=RED, linestyle="--", label="upper bound")
    if budget is not None and budget < 4 * found.upper:
        axes.axvline(budget / unit, color=INK, linestyle=":", label="budget")
    axes.set_yticks([*places, len(steps)], [*(label(step.name) for step in steps), "together"], fontsize=11)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"memory at the peak, {name}", fontsize=11)
    title(figure, f"{words.attention(found.config)}, on {found.on}", words.task(found.workload))
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=10)


def draw_pareto(figure: Any, found: Recommendation) -> None:
    axes = figure.add_subplot()
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for pick in found.pareto:
        by_kind.setdefault(kind_of(pick.config), []).append((pick.seconds, 100 * pick.mass))
    for kind, points in by_kind.items():
        color, marker = KINDS[kind]
        axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=42, label=kind, zorder=2)
    named: dict[tuple[float, float], list[str]] = {}
    for pick in found.alternatives:
        named.setdefault((pick.seconds, 100 * pick.mass), []).append(pick.role)
    for (seconds, mass), roles in named.items():
        axes.scatter([seconds], [mass], s=190, facecolors="none", edgecolors=RED, linewidths=1.6, zorder=3)
        axes.annotate(
            ", ".join(roles), (seconds, mass), xytext=(0, -20), textcoords="offset points", ha="center",
            fontsize=10, color=RED,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.14)
    axes.set_xlabel("seconds a call, predicted", fontsize=11)
    axes.set_ylabel(f"mass of dense attention, %, profile {found.quality.profile!r}", fontsize=11)
    axes.grid(which="major", color=GRID, zorder=0)
    title(
        figure, f"What nothing surpasses in memory, time and mass, on {found.on}", words.task(found.workload)
    )
    figure.legend(loc="outside lower center", ncols=len(by_kind), frameon=False, fontsize=10)
