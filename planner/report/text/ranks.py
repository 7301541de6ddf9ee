"""Who holds which tokens and sends what to whom, in at most 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from planner.report.ranks import Shared
from planner.report.text import words
from planner.report.text.estimate import wrapped
from planner.report.text.layout import PLAIN, SHADES
from planner.report.text.recommend import shape
from planner.report.text.shared import ring_text
from planner.units import format_bytes

CELLS = 64
"""Columns of a picture."""
PEERS = 22
"""Columns of peers."""


def shared_text(found: Shared, ink: str) -> str:
    """The config, a row for each rank, a picture of who sends to whom. `ink`: "#" if the terminal shows ASCII
    alone."""
    workload = found.workload
    head = [
        f"{words.attention(found.config)}, over {workload.seq:,} tokens"
        + ", causal" * workload.causal
        + words.features(workload),
        words.sizes(workload).partition(", causal")[0],
        *wrapped(shape(found.config), ""),
        f"{ring_text(workload.gpus, found.world)}; they exchange {found.exchange}",
    ]
    parts = head, list(_ranks(found)), list(_picture(found, PLAIN if ink.isascii() else SHADES))
    return "\n\n".join("\n".join(part) for part in parts)


def _ranks(found: Shared) -> Iterator[str]:
    sent = found.sent
    yield f"{'rank':>4}  {'holds tokens':<30}{'sends':>11}{'receives':>11}  to"
    for rank, pieces in enumerate(found.holds):
        holds = ", ".join(f"{begin:,} to {end - 1:,}" for begin, end in pieces) or "none"
        peers = _runs(peer for peer, nbytes in enumerate(sent[rank].tolist()) if nbytes)
        figures = [format_bytes(int(count), 1) for count in (sent[rank].sum(), sent[:, rank].sum())]
        yield f"{rank:>4}  {holds:<30.30}{figures[0]:>11}{figures[1]:>11}  {peers:.{PEERS - 2}}".rstrip()


def _runs(ranks: Iterable[int]) -> str:
    """Ranks in words, those that follow each other together: 0-2, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in runs) or "nobody"


def _picture(found: Shared, shades: str) -> Iterator[str]:
    """A row for each rank, a mark for each peer, the darker the more it sends there."""
    sent = found.sent
    most, wide = int(sent.max(initial=0)), max(CELLS // found.world, 1)
    passes = "forward and backward" if found.workload.mode == "training" else "forward"
    yield f"what a rank (row) sends to each (column), {passes}"
    if not most:
        yield "  nothing"
        return
    for rank, row in enumerate(sent.tolist()):
        marks = "".join(shades[-(-4 * nbytes // most)] * wide for nbytes in row)
        yield f"{rank:>4}  {marks}".rstrip()
    yield f"      {shades[4]} up to {format_bytes(most)}, {' '.join(shades[3:0:-1])} less"
