"""A layout as a picture: the attention mask and, for a dilated attention, the positions of each head."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any, Final

from attention.errors import ConfigError
from planner.report.plot.figure import BLUE, GRID, INK, MUTED, TEXT, title, tokens, written
from planner.report.seen import Seen, Strip, cells, strips
from planner.report.text import words
from planner.report.text.layout import percent

CELLS: Final = 128
"""The largest number of rows and of columns of a picture."""
SHADES: Final = ("#ffffff", "#b3d4ea", "#7db6db", "#3d8fc4", BLUE)
LEVELS: Final = ("none", "up to 1/3", "up to 2/3", "more", "all")
"""The meaning of each shade: the share of a mark's pairs that is kept."""


def plot_layout(mask: Seen, path: Path) -> None:
    """Writes the picture as PNG or SVG; ConfigError for adaptive, which has none before it runs."""
    if mask.chosen:
        raise ConfigError("an adaptive attention chooses its blocks at run time: leave out --plot")
    written([path], lambda figure: draw_layout(figure, mask))


def draw_layout(figure: Any, mask: Seen) -> None:
    heads = strips(mask)
    below = 0.6 + 0.28 * len(heads) if heads else 0.0
    figure.set_size_inches(6.4, 7.1 + below)
    parts = figure.subfigures(2, 1, height_ratios=(7.1, below)) if heads else [figure]
    _draw_matrix(parts[0], mask)
    if heads:
        _draw_strips(parts[1].add_subplot(), heads)
    workload = mask.workload
    headline = f"{percent(mask.share)} of all pairs of {mask.unit}s" + ", by head 0" * mask.by_head
    blocks = f" in {mask.units:,} blocks of {mask.size:,}" * (mask.unit == "block")
    title(
        figure,
        f"{words.attention(mask.config)}: {headline}",
        f"{workload.seq:,} tokens{blocks}" + ", causal" * workload.causal + words.features(workload),
    )


def _draw_matrix(figure: Any, mask: Seen) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    axes = figure.add_subplot()
    shares = cells(mask, CELLS, CELLS)
    seq, first = mask.workload.seq, mask.first
    axes.imshow(
        shares,
        extent=(0, seq, seq, first),
        aspect="auto" if first else "equal",
        interpolation="nearest",
        cmap=ListedColormap(SHADES),
        norm=BoundaryNorm([-1, 1e-12, 1 / 3, 2 / 3, 1 - 1e-12, 2], len(SHADES)),
    )
    ticks = [0, seq // 4, seq // 2, 3 * seq // 4, seq]
    axes.set_xticks(ticks, [tokens(at) for at in ticks])
    asking = [first, (first + seq) // 2, seq] if first else ticks
    axes.set_yticks(asking, [tokens(at) for at in asking])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set(xlabel="keys, tokens", ylabel="queries, tokens")
    for side in ("right", "bottom"):
        axes.spines[side].set(visible=True, color=GRID)
    for side in ("left", "top"):  # where global tokens would be hidden
        axes.spines[side].set_visible(False)
    if ((shares > 0) & (shares < 1)).any():
        marks = [
            Patch(facecolor=color, edgecolor=MUTED, linewidth=0.5, label=label)
            for color, label in zip(SHADES, LEVELS, strict=True)
        ]
        figure.legend(
            handles=marks,
            loc="outside lower center",
            ncols=len(marks),
            fontsize=TEXT,
            handlelength=1.2,
            columnspacing=1.4,
            title="share of a mark's pairs that is kept",
            title_fontsize=TEXT,
        )


def _draw_strips(axes: Any, heads: list[Strip]) -> None:
    """A line for each kind of head, a mark for each position that it attends to."""
    place = 0.0
    labels = {}
    for (length, rate), group in groupby(heads, key=lambda strip: strip[:2]):
        for strip in group:
            positions = [at for at, one in enumerate(strip.positions) if one]
            axes.scatter(positions, [place] * len(positions), marker="s", s=13, color=BLUE, linewidths=0)
            few = ", ".join(map(str, strip.heads[:2])) + ", .." * (len(strip.heads) > 2)
            labels[place] = f"{tokens(length)} / {rate}, head {few}"
            place += 1
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set(ylim=(place - 0.4, -0.6), xlabel="position in a segment (segment / rate, heads)")
    axes.tick_params(axis="y", length=0, colors=INK)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
