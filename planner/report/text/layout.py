"""What `show` shows: a layout drawn with characters and its figures, in at most 80 columns."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from attention.sizes.arrays import Floats
from planner.report.plot.figure import tokens
from planner.report.seen import MOST_LAYERS, Seen, cells, strips
from planner.report.text import words
from planner.report.text.recommend import pairs, reach, shape

COLUMNS: Final = 72
"""Of a picture, whose rows are half as many: characters are about twice as high as wide."""
MARGIN: Final = 8
SHADES: Final = " \u2591\u2592\u2593\u2588"
HALVES: Final = " \u2580\u2584\u2588"
"""Nothing, the upper half, the lower, both."""
PLAIN: Final = " .:+#"
"""Shades, where the terminal shows ASCII alone."""


def seen_text(found: Seen, ink: str) -> str:
    """What it is, its picture, its figures. `ink`: what bars are drawn with, "#" where all is ASCII."""
    workload = found.workload
    head = [
        f"{words.attention(found.config)}, over {workload.seq:,} tokens" + ", causal" * workload.causal,
        shape(found.config),
    ]
    drawn = [] if found.chosen else [_picture(found, plain=ink.isascii()), _strips(found, ink)]
    return "\n\n".join("\n".join(part) for part in (head, *drawn, pairs(figures(found))) if part)


def _picture(found: Seen, plain: bool) -> list[str]:
    if found.units > COLUMNS or (plain and found.units > COLUMNS // 2):
        columns = min(found.units, COLUMNS)
        shares = cells(found, columns // 2, columns)
        rows, scale = _shaded(shares, PLAIN if plain else SHADES, found)
    else:
        kept = cells(found, found.units, found.units) > 0
        rows = _plain(kept) if plain else _halves(kept)
        scale = f"each {found.unit} is drawn: {found.units:,} x {found.units:,}"
        scale += f" of {found.size:,} tokens" * (found.unit == "block")
    seq, width = found.workload.seq, len(rows[0])
    whose = "keys of head 0" if found.unit == "token" else "keys"
    sides = {0: "0", len(rows) // 2: "queries", len(rows) - 1: tokens(seq)}
    return [
        f"{'':{MARGIN}}0{whose:^{max(width - 1 - len(tokens(seq)), len(whose) + 2)}}{tokens(seq)}",
        *(f"{sides.get(at, ''):>{MARGIN - 1}} {row}".rstrip() for at, row in enumerate(rows)),
        f"{'':{MARGIN}}{scale}",
    ]


def _shaded(shares: Floats, shades: str, found: Seen) -> tuple[list[str], str]:
    """Rows of shades, and what a shade means."""
    levels = np.where(shares >= 1, 4, np.where(shares > 0, 1 + (3 * shares).astype(int), 0))
    high, wide = (round(found.workload.seq / count) for count in shares.shape)
    scale = f"a mark is {high:,} queries by {wide:,} keys: {shades[4]} all seen, "
    scale += f"{' '.join(shades[3:0:-1])} in part"
    return ["".join(shades[level] for level in row) for row in levels.tolist()], scale


def _plain(kept: Any) -> list[str]:
    """One mark for each unit, or a square of them."""
    times = COLUMNS // 2 // len(kept)
    large = np.repeat(np.repeat(kept, times, axis=0), 2 * times, axis=1)
    return ["".join(PLAIN[-1] if one else " " for one in row) for row in large.tolist()]


def _halves(kept: Any) -> list[str]:
    """The same with two rows a line."""
    times = COLUMNS // len(kept)
    large = np.repeat(np.repeat(kept, times, axis=0), times, axis=1)
    if len(large) % 2:
        large = np.vstack([large, np.zeros((1, large.shape[1]), bool)])
    marks = large[::2] + 2 * large[1::2]
    return ["".join(HALVES[mark] for mark in row) for row in marks.tolist()]


def _strips(found: Seen, ink: str) -> list[str]:
    """Which positions the heads of a dilated attention take."""
    lines: list[str] = []
    before = None
    for strip in strips(found):
        if strip[:2] != before:
            before = strip[:2]
            lines.append(
                f"segments of {strip.length:,} tokens, rate {strip.rate}; the first {len(strip.positions)}:"
            )
        few = ", ".join(map(str, strip.heads[:2])) + ", .." * (len(strip.heads) > 2)
        taken = "".join(ink if one else "." for one in strip.positions)
        lines.append(f"{'head ' + few:<15.15} {taken}")
    return lines


def figures(found: Seen) -> list[tuple[str, str]]:
    """What is kept and how far that carries, (name, said) each."""
    unit, permitted = found.unit, found.workload.causal
    if found.chosen:
        return [
            ("blocks", f"{found.units:,} of {found.size:,} tokens"),
            (
                "chosen",
                "at run time, for each head by its trained scorer: which they are, and what mass and "
                "reach they have, is not known before",
            ),
            (
                "budget",
                f"{_some(found.most, 'block')} a row, {percent(found.most / found.units)} of all, "
                "the row's own among them",
            ),
        ]
    about = "" if found.exact else "about "
    even = found.least == found.most
    rows = "" if even else f"{found.least:,} to "
    return [
        (f"{unit}s", f"{found.units:,}" + f" of {found.size:,} tokens" * (unit == "block")),
        (
            "kept",
            f"{about}{percent(found.share)} of all pairs of {unit}s"
            + f", {percent(found.permitted)} of those that causality permits" * permitted
            + ", by head 0" * (unit == "token"),
        ),
        ("a row", about + rows + _some(found.most, unit) + f", {found.mean:,.1f} in the mean" * (not even)),
        (
            "reach",
            reach(found.layers)
            if found.layers
            else f"not within {MOST_LAYERS} layers: some tokens cannot be heard of",
        ),
        ("mass", f"{found.mass:.1%} of dense attention's, profile {found.profile!r}"),
    ]


def percent(share: float) -> str:
    """Three digits."""
    return f"{100 * share:.3g}%"


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}" + "s" * (count != 1)
