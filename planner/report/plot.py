"""The waterfall of an estimate as a picture. Imports matplotlib, when it draws."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Final

from attention.errors import AttentionPlannerError, ConfigError, UnavailableError
from planner.memory.estimate import MemoryEstimate
from planner.report import words
from planner.report.estimate import label, waterfall
from planner.units import format_bytes

SUFFIXES: Final = (".png", ".svg")
_BAR, _TOTAL, _LINE = "#4c78a8", "#54606c", "#c0392b"


def plot(found: MemoryEstimate, path: Path, budget: int | None = None) -> None:
    """Writes the waterfall, 800 pixels wide, as PNG or SVG by the file's suffix."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot {path} must end in {' or '.join(SUFFIXES)}")
    try:
        figure = import_module("matplotlib.figure").Figure(layout="constrained")
    except ImportError:
        raise UnavailableError(
            "--plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    _draw(figure, found, budget)
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
