"""What `show` shows: a layout drawn with characters and its figures, in at most 80 columns."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from attention.sizes.arrays import Floats
from planner.report.plot.figure import tokens
from planner.report.seen import MAXIMUM_LAYERS, Seen, cells, strips
from planner.report.text import words
from planner.report.text.recommend import pairs, reach, shape

COLUMNS: Final = 72
"""Columns of a picture. Its rows are half as many: characters are about twice as high as wide."""
MARGIN: Final = 8
SHADES: Final = " \u2591\u2592\u2593\u2588"
HALVES: Final = " \u2580\u2584\u2588"
"""Characters that show two rows: neither, the upper one, the lower one, both."""
PLAIN: Final = " .:+#"
"""Shades for terminals that show ASCII alone."""


def seen_text(mask: Seen, ink: str) -> str:
    """The config, a picture of its mask, the figures. `ink`: the character that bars are drawn with, "#" if
    the terminal shows ASCII alone."""
    workload = mask.workload
    head = [
        f"{words.attention(mask.config)}, over {workload.seq:,} tokens"
        + ", causal" * workload.causal
        + words.features(workload),
        shape(mask.config),
    ]
    drawn = [] if mask.chosen else [_picture(mask, plain=ink.isascii()), _strips(mask, ink)]
    return "\n\n".join("\n".join(part) for part in (head, *drawn, pairs(figures(mask))) if part)


def _picture(mask: Seen, plain: bool) -> list[str]:
    if mask.units > COLUMNS or (plain and mask.units > COLUMNS // 2):
        columns = min(mask.units, COLUMNS)
        shares = cells(mask, min(columns // 2, mask.rows), columns)
        rows, scale = _shaded(shares, PLAIN if plain else SHADES, mask)
    else:
        kept = cells(mask, mask.rows, mask.units) > 0
        rows = _plain(kept) if plain else _halves(kept)
        scale = f"each {mask.unit} is drawn: {mask.rows:,} x {mask.units:,}"
        scale += f" of {mask.size:,} tokens" * (mask.unit == "block")
    seq, width = mask.workload.seq, len(rows[0])
    whose = "keys of head 0" if mask.by_head else "keys"
    sides = {0: tokens(mask.first), len(rows) // 2: "queries", len(rows) - 1: tokens(seq)}
    return [
        f"{'':{MARGIN}}0{whose:^{max(width - 1 - len(tokens(seq)), len(whose) + 2)}}{tokens(seq)}",
        *(f"{sides.get(at, ''):>{MARGIN - 1}} {row}".rstrip() for at, row in enumerate(rows)),
        f"{'':{MARGIN}}{scale}",
    ]


def _shaded(shares: Floats, shades: str, mask: Seen) -> tuple[list[str], str]:
    """Rows of shades, and what a shade means."""
    levels = np.where(shares >= 1, 4, np.where(shares > 0, 1 + (3 * shares).astype(int), 0))
    asking = mask.workload.query_tokens, mask.workload.seq
    high, wide = (round(length / count) for length, count in zip(asking, shares.shape, strict=True))
    scale = f"a mark is {high:,} queries by {wide:,} keys: {shades[4]} all kept, "
    scale += f"{' '.join(shades[3:0:-1])} in part"
    return ["".join(shades[level] for level in row) for row in levels.tolist()], scale


def _plain(kept: Any) -> list[str]:
    """One mark for each unit, or a square of them."""
    times = COLUMNS // 2 // kept.shape[1]
    large = np.repeat(np.repeat(kept, times, axis=0), 2 * times, axis=1)
    return ["".join(PLAIN[-1] if one else " " for one in row) for row in large.tolist()]


def _halves(kept: Any) -> list[str]:
    """One mark for each unit, or a square of them, two rows a line."""
    times = COLUMNS // kept.shape[1]
    large = np.repeat(np.repeat(kept, times, axis=0), times, axis=1)
    if len(large) % 2:
        large = np.vstack([large, np.zeros((1, large.shape[1]), bool)])
    marks = large[::2] + 2 * large[1::2]
    return ["".join(HALVES[mark] for mark in row) for row in marks.tolist()]


def _strips(mask: Seen, ink: str) -> list[str]:
    """The positions that each kind of head of a dilated attention attends to."""
    lines: list[str] = []
    before = None
    for strip in strips(mask):
        if strip[:2] != before:
            before = strip[:2]
            lines.append(
                f"segments of {strip.length:,} tokens, rate {strip.rate}; the first {len(strip.positions)}:"
            )
        few = ", ".join(map(str, strip.heads[:2])) + ", .." * (len(strip.heads) > 2)
        marks = "".join(ink if one else "." for one in strip.positions)
        lines.append(f"{'head ' + few:<15.15} {marks}")
    return lines


def figures(mask: Seen) -> list[tuple[str, str]]:
    """What is kept, the reach and the mass, as (name, text) each."""
    unit = mask.unit
    several = len(mask.workload.documents or ()) > 1
    permit = ["causality"] * mask.workload.causal + ["documents"] * several
    permitting = f"{' and '.join(permit)} permit" + "s" * (permit == ["causality"])
    if mask.chosen:
        return [
            ("blocks", f"{mask.units:,} of {mask.size:,} tokens"),
            (
                "chosen",
                "at run time, for each head by its trained scorer: which blocks these are, and their mass "
                "and reach, is not known before",
            ),
            (
                "budget",
                f"{_some(mask.maximum, 'block')} a row, {percent(mask.maximum / mask.units)} of all, "
                "the row's own among them",
            ),
        ]
    about = "" if mask.exact else "about "
    even = mask.minimum == mask.maximum
    rows = "" if even else f"{mask.minimum:,} to "
    return [
        (f"{unit}s", f"{mask.units:,}" + f" of {mask.size:,} tokens" * (unit == "block")),
        (
            "kept",
            f"{about}{percent(mask.share)} of all pairs of {unit}s"
            + f", {percent(mask.permitted)} of those that {permitting}" * bool(permit)
            + ", by head 0" * mask.by_head,
        ),
        ("a row", about + rows + _some(mask.maximum, unit) + f", {mask.mean:,.1f} on average" * (not even)),
        (
            "reach",
            reach(mask.layers)
            if mask.layers
            else f"not within {MAXIMUM_LAYERS} layers: some tokens stay out of reach",
        ),
        ("mass", f"{mask.mass:.1%} of dense attention's, profile {mask.profile!r}"),
    ]


def percent(share: float) -> str:
    """A share as a percentage of three digits."""
    return f"{100 * share:.3g}%"


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)
