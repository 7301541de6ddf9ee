"""Who holds which tokens and sends what to whom, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.report.plot.estimate import bytes_unit
from planner.report.plot.figure import BLUE, GRID, TEXT, title, tokens, written
from planner.report.ranks import Shared
from planner.report.text import words
from planner.report.text.shared import ring_text


def plot_shared(found: Shared, path: Path) -> None:
    """Writes the picture as PNG or SVG by the file's suffix."""
    written([path], lambda figure: draw_shared(figure, found))


def draw_shared(figure: Any, found: Shared) -> None:
    figure.set_size_inches(8, 5.2)
    held, moved = figure.subplots(1, 2, width_ratios=(1, 1))
    ranks, seq = range(found.world), found.workload.seq
    for rank in ranks:
        spans = [(begin, end - begin) for begin, end in found.holds[rank]]
        held.broken_barh(spans, (rank - 0.4, 0.8), color=BLUE)
    ticks = [0, seq // 2, seq]
    held.set_xticks(ticks, [tokens(at) for at in ticks])
    held.set(xlim=(0, seq), ylim=(found.world - 0.5, -0.5), xlabel="tokens that it holds", ylabel="rank")
    sent = found.sent
    unit, name = bytes_unit(float(sent.max(initial=1)))
    image = moved.imshow(sent / unit, cmap="Blues", vmin=0, interpolation="nearest")
    moved.set(xlabel="to rank", ylabel="from rank")
    few = [*range(0, found.world, max(found.world // 8, 1))]
    for axis in (held.yaxis, moved.yaxis, moved.xaxis):
        axis.set_ticks(few)
    for side in ("left", "right", "top", "bottom"):
        moved.spines[side].set(visible=True, color=GRID)
    passes = "forward and backward" if found.workload.mode == "training" else "forward"
    figure.colorbar(image, ax=moved, shrink=0.6).set_label(f"{name} sent, {passes}", fontsize=TEXT)
    workload = found.workload
    title(
        figure,
        f"{words.attention(found.config)}: {ring_text(workload.gpus, found.world)}, by {found.exchange}",
        words.task(workload),
    )
