"""What does dilation change in memory, time, mass and reach? `planner study dilation`

The five settings in the reports of the original project, at the share of blocks that they name and with as
many blocks as its code kept; dilation of tokens, as in LongNet; other block sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

from planner import gpus
from planner.report.plot.figure import BLUE, ORANGE, RED, title
from studies.bench.panels import Panel, Series, beside
from studies.bench.records import Job, Row
from studies.bench.study import Findings, Results, Scope, Study
from studies.bench.trade_offs import (
    MASS,
    REACH,
    SEEDS_CARD,
    Purpose,
    StudyConfig,
    asked,
    case_steps,
    dilated,
    held,
    here,
    memory_panel,
    memory_words,
    seconds,
    seeds_kb,
    slower,
    sparse,
    spread,
    steady,
    table,
    task,
    where,
)

SEQ, QUICK = 16_384, 2048
SEEDS: Final = (
    ((2048,), (1,), 123.7),
    ((2048, 4096), (1, 2), 117.3),
    ((4096,), (1,), 120.5),
    ((8192,), (1,), 132.7),
    ((2048, 4096, 8192), (1, 2, 4), 530.0),
)
"""Segment lengths, rates, and the milliseconds that the reports give at 16,384 tokens, 8 heads x 64."""
SEEDS_KB: Final = 4.40
"""Memory per token in all five, in the reports' unit of 1/1000 MiB."""
BLOCK: Final = 64
NAMED, WIDER = 0.01, 0.05
"""Shares of blocks kept: that of the reports, and one of which large blocks are more than one a row."""
LENGTHS, RATES = (2048, 4096, 8192, 16_384), (1, 2, 4, 8)
BRANCHES, SIZES = SEEDS[-1][:2], (64, 128, 256)


def cases(quick: bool = False) -> list[StudyConfig]:
    """The configs of all series; quick, the reports' five and one of each other series."""
    named, kept, tokens, sizes = [], [], [], []
    for *branches, ms in SEEDS:
        name = f"dilated_sparse {_text(*branches)}"
        blocks = seeds_blocks(branches[1])
        more = {"seeds_ms": ms}
        named.append(
            StudyConfig(f"{name}, {NAMED:.0%}", sparse(*branches, sparsity_ratio=NAMED), "named", more=more)
        )
        as_run = sparse(*branches, sparsity_ratio=blocks * BLOCK / SEQ)
        kept.append(StudyConfig(f"{name}, {blocks} blocks a row", as_run, "kept", more=more))
    for count in range(1, len(LENGTHS) + 1):
        many = LENGTHS[:count], RATES[:count]
        tokens.append(StudyConfig(f"dilated {_text(*many)}", dilated(*many), "tokens"))
    for size in SIZES:
        name = f"dilated_sparse {_text(*BRANCHES)}, {WIDER:.0%}, block {size}"
        sizes.append(StudyConfig(name, sparse(*BRANCHES, sparsity_ratio=WIDER, block=size), "sizes"))
    rest = [group[-1:] if quick else group for group in (kept, tokens, sizes)]
    return named + list(chain.from_iterable(rest))


def seeds_blocks(rates: Sequence[int]) -> int:
    """Blocks a row that the reports' code keeps, whatever sparsity_ratio and the segments are: the row's own
    and one at each side for each of three rates."""
    return 1 + 2 * len(rates[:3])


def _text(lengths: Sequence[int], rates: Sequence[int]) -> str:
    return " ".join(f"{length}/{rate}" for length, rate in zip(lengths, rates, strict=True))


def steps(scope: Scope) -> list[Job]:
    plan = Purpose(task(SEQ), gpus.find(SEEDS_CARD))
    return case_steps(cases(scope.quick), plan, here(scope, QUICK if scope.quick else SEQ))


def seeds_times(row: Row) -> float | None:
    """A setting's time in the reports, as a multiple of the first setting's."""
    return row["seeds_ms"] / SEEDS[0][2] if "seeds_ms" in row else None


def dilation_table(rows: Results) -> str:
    def seeds(row: Row) -> str:
        ratio = seeds_times(row)
        return "" if ratio is None else f"{row['seeds_ms']}; {ratio:.2f}; {SEEDS_KB:.2f}"

    return table(
        rows,
        {
            "original project: ms; times the first; KB a token": seeds,
            "predicted KB a token, as it counts": lambda row: f"{seeds_kb(row['planned']):.2f}",
        },
    )


def draw(figure: Any, rows: Results) -> None:
    """Rows beside each other: time, memory, mass, reach."""
    first = rows[0]
    mine, card = first["here"], first["planned"]
    time = Panel(
        "time, times\nthe first's",
        (
            Series(
                f"predicted, {card['on']}",
                lambda row: row["planned"]["seconds"] / card["seconds"],
                ORANGE,
                "D",
                hollow=True,
            ),
            Series(f"reported, {card['on']}", seeds_times, RED, "X"),
            Series(f"measured, {mine['on']}", lambda row: slower(row, first), BLUE),
        ),
        log=True,
    )
    memory = memory_panel(first, lambda row: SEEDS_KB if "seeds_ms" in row else None)
    beside(figure, rows, (time, memory, MASS, REACH))
    below = f"{asked(mine)}; {asked(card)}; 8 heads x 64"
    title(figure, "Segment length/rate of each branch, and the blocks kept", below)


def findings(rows: Results) -> Findings:
    first = rows[0]
    by = {name: [row for row in rows if row["series"] == name] for name in ("named", "kept", "tokens")}
    seeds = SEEDS[-1][2] / SEEDS[0][2]
    memory = spread(held(row["here"]) for row in rows)
    times = spread(slower(row, first) for row in by["named"])
    took = (
        f"take {times[0]:.2f} to {times[1]:.2f} times the first's time ({asked(first['here'])})"
        if seconds(first)
        else f"have no time to compare with ({first['name']} did not run)"
    )
    mass = spread(row["quality"]["mass"] for row in by["named"])
    tokens = spread(row["quality"]["mass"] for row in by["tokens"])
    rates = slower(by["kept"][-1], first)
    return Findings(
        "Asked: what do segment lengths and dilation rates change in memory, time, mass and reach?",
        f"Found: on {where(first['here'])} memory {memory_words(memory)}; at {NAMED:.0%} of the blocks the "
        f"five settings {took} and keep {mass[0]:.0%} to {mass[1]:.0%} of the mass; dilation "
        f"of tokens keeps {tokens[0]:.0%} to {tokens[1]:.0%}.",
        f"The original project {'too ' * steady(memory)}sees no change in memory, but {seeds:.1f} times the "
        "time at three rates: its dilated_sparse ignores sparsity_ratio and keeps more blocks a row the more "
        "rates there are, with a Python step for each"
        + (f"; with as many blocks it is {rates:.1f} times here." if rates else "."),
    )


STUDY = Study(steps, {"dilation": dilation_table}, draw, findings)
