"""Pictures: the waterfall of an estimate, the Pareto set of a recommendation. Imports matplotlib, when it
draws."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from attention.errors import AttentionPlannerError, ConfigError, UnavailableError
from planner.memory.estimate import MemoryEstimate
from planner.report import words
from planner.report.estimate import label, waterfall
from planner.report.words import kind_of
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.recommendation import Recommendation

SUFFIXES: Final = (".png", ".svg")
_BAR, _TOTAL, _LINE = "#4c78a8", "#54606c", "#c0392b"


def plot(found: MemoryEstimate, path: Path, budget: int | None = None) -> None:
    """Writes the waterfall, 800 pixels wide, as PNG or SVG by the file's suffix."""
    _written(path, lambda figure: _draw(figure, found, budget))


def plot_pareto(found: Recommendation, path: Path) -> None:
    """Writes time against mass of what nothing surpasses, the picks marked, as PNG or SVG."""
    _written(path, lambda figure: _draw_pareto(figure, found))


def _written(path: Path, draw: Callable[[Any], None]) -> None:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path} must end in {' or '.join(SUFFIXES)}")
    try:
        figure = import_module("matplotlib.figure").Figure(layout="constrained")
    except ImportError:
        raise UnavailableError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    draw(figure)
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise AttentionPlannerError(f"--plot {path} cannot be written: {error.strerror}") from None


def _draw(figure: Any, found: MemoryEstimate, budget: int | None) -> None:
    steps = waterfall(found)
    unit, name = (10**9, "GB") if max(found.device, found.upper) >= 10**9 else (10**6, "MB")
    figure.set_size_inches(8, 1.9 + 0.36 * (len(steps) + 1))
    axes = figure.add_subplot()
    places = range(len(steps))
    starts, widths = [step.start / unit for step in steps], [step.bytes / unit for step in steps]
    axes.barh(places, widths, left=starts, color=_BAR, edgecolor=_BAR)
    axes.barh(len(steps), found.device / unit, color=_TOTAL)
    for place, (start, width) in enumerate([*zip(starts, widths, strict=True), (0, found.device / unit)]):
        axes.annotate(
            format_bytes(width * unit),
            (start + width, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axes.axvline(found.upper / unit, color=_LINE, linestyle="--", label="upper bound")
    if budget is not None and budget < 4 * found.upper:
        axes.axvline(budget / unit, color="black", linestyle=":", label="budget")
    axes.set_yticks([*places, len(steps)], [*(label(step.name) for step in steps), "together"], fontsize=11)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"memory at the peak, {name}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    title = f"{words.attention(found.config)}, on {found.on}\n{words.task(found.workload)}"
    figure.suptitle(title, fontsize=12)
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=10)


# Okabe and Ito's colours, which people with any colour vision tell apart, and shapes besides.
_KINDS: Final = {
    "dense": ("#000000", "s"), "dilated": ("#e69f00", "^"), "local_window": ("#56b4e9", "o"),
    "global_local": ("#0072b2", "D"), "dilated_sparse": ("#009e73", "v"), "adaptive": ("#cc79a7", "P"),
}  # fmt: skip


def _draw_pareto(figure: Any, found: Recommendation) -> None:
    figure.set_size_inches(8, 5)
    axes = figure.add_subplot()
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for pick in found.pareto:
        by_kind.setdefault(kind_of(pick.config), []).append((pick.seconds, 100 * pick.mass))
    for kind, points in by_kind.items():
        color, marker = _KINDS[kind]
        axes.scatter(*zip(*points, strict=True), color=color, marker=marker, s=42, label=kind, zorder=2)
    named: dict[tuple[float, float], list[str]] = {}
    for pick in found.alternatives:
        named.setdefault((pick.seconds, 100 * pick.mass), []).append(pick.role)
    for (seconds, mass), roles in named.items():
        axes.scatter([seconds], [mass], s=190, facecolors="none", edgecolors=_LINE, linewidths=1.6, zorder=3)
        axes.annotate(
            ", ".join(roles), (seconds, mass), xytext=(0, -20), textcoords="offset points", ha="center",
            fontsize=10, color=_LINE,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.14)
    axes.set_xlabel("seconds a call, predicted", fontsize=11)
    axes.set_ylabel(f"mass of dense attention, %, profile {found.quality.profile!r}", fontsize=11)
    axes.grid(which="major", color="#e3e6e8", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    title = f"What nothing surpasses in memory, time and mass, on {found.on}\n{words.task(found.workload)}"
    figure.suptitle(title, fontsize=12)
    figure.legend(loc="outside lower center", ncols=len(by_kind), frameon=False, fontsize=10)
