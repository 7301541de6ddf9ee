"""What does the segment length change? `planner study segments`

The first segment from 256 tokens to all of them, alone and with two dilated branches up to the whole
sequence; of tokens (dilated) and of blocks (dilated_sparse).
"""

from __future__ import annotations

from typing import Any, Final

from planner import gpus
from planner.report.plot.figure import BLUE, GREEN, ORANGE, RED, title, token_axis
from studies.bench.panels import curves
from studies.bench.records import Job
from studies.bench.study import Findings, Results, Scope, Study, many
from studies.bench.trade_offs import (
    SEEDS_CARD,
    Purpose,
    StudyConfig,
    asked,
    case_steps,
    dilated,
    five,
    held,
    here,
    memory_words,
    sparse,
    spread,
    table,
    task,
)

SEQ: Final = 65_536
"""Tokens of what is predicted."""
HERE, QUICK = 16_384, 1024
"""Tokens of what is measured; longer segments are cut to that."""
FIRST: Final = tuple(256 << power for power in range(9))
QUICK_FIRST: Final = (256, 1024, 65_536)
KEPT, BLOCK = 0.05, 128
SERIES: Final = {
    "dilated, one branch": (ORANGE, "^"),
    "dilated, three branches": (RED, "s"),
    "dilated_sparse, one branch": (GREEN, "v"),
    "dilated_sparse, three branches": (BLUE, "o"),
}
"""Colour and marker of each series."""


def cases(quick: bool = False) -> list[StudyConfig]:
    """The configs by series, then by the first segment."""
    configs = []
    for series in SERIES:
        for first in QUICK_FIRST if quick else FIRST:
            count = 3 if "three" in series else 1
            lengths, rates = (first, min(4 * first, SEQ), SEQ)[:count], (1, 4, 16)[:count]
            if "sparse" in series:
                config = sparse(lengths, rates, block=BLOCK, sparsity_ratio=KEPT)
            else:
                config = dilated(lengths, rates)
            configs.append(StudyConfig(f"{series}, first {first:,}", config, series, first))
    return configs


def steps(scope: Scope) -> list[Job]:
    plan = Purpose(task(SEQ), gpus.find(SEEDS_CARD))
    return case_steps(cases(scope.quick), plan, here(scope, QUICK if scope.quick else HERE))


def draw(figure: Any, rows: Results) -> None:
    """Five panels over the first segment."""
    ticks = [row["x"] for row in rows if row["series"] == rows[0]["series"]]
    shown = ticks[:: 2 if len(ticks) > 5 else 1]

    def along(axes: Any) -> None:
        token_axis(axes.xaxis, shown)
        axes.set_xlabel("first segment, tokens")

    curves(figure, rows, five(rows), along, SERIES)
    title(
        figure,
        f"Segment lengths; dilated_sparse with {KEPT:.0%} of the blocks of {BLOCK}",
        f"{asked(rows[0]['here'])}; {asked(rows[0]['planned'])}; 8 heads x 64",
    )


def findings(rows: Results) -> Findings:
    memory = spread(held(row[part]) for row in rows for part in ("here", "planned"))
    alone = [row for row in rows if row["series"] == "dilated, one branch"]
    blocks = [row for row in rows if row["series"] == "dilated_sparse, three branches"]
    first, last = alone[0], alone[-1]
    longer = last["planned"]["seconds"] / first["planned"]["seconds"]
    time = spread(row["planned"]["seconds"] for row in blocks)
    mass = spread(row["quality"]["mass"] for row in blocks)
    return Findings(
        "Asked: what does the length of the first segment change in memory, time, mass and reach?",
        f"Found: memory {memory_words(memory)}; dilated with "
        f"{last['x']:,} instead of {first['x']:,} tokens takes {many(longer)} times the time (predicted, "
        f"{asked(first['planned'])}) and keeps {last['quality']['mass']:.0%} instead of "
        f"{first['quality']['mass']:.0%} of the mass; dilated_sparse with three branches and {KEPT:.0%} of "
        f"the blocks kept takes up to {time[1] / time[0] - 1:.0%} longer (predicted), its mass is "
        f"{mass[0]:.0%} to {mass[1]:.0%}.",
        "The original project counts a buffer as long as the segment, 2 to 128 MB, and calls 4,096 tokens "
        "the fastest: segments here are views and have no buffer, and a token's work "
        f"{'grows' if longer > 1 else 'does not grow'} with its segment.",
    )


STUDY = Study(steps, {"segments": table}, draw, findings)
