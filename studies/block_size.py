"""What does the block size change? `planner study block-size`

Blocks of 16 to 512 tokens with as many tokens kept a row, causal: there a window ends at any block, so that
every size keeps just as many.
"""

from __future__ import annotations

from typing import Any, Final

from attention.config import AttentionConfig
from planner import gpus
from planner.report.plot.figure import KINDS, title, token_axis
from studies.bench.panels import curves
from studies.bench.records import Job
from studies.bench.study import Findings, Results, Scope, Study
from studies.bench.trade_offs import (
    FLEX_CARD,
    Purpose,
    StudyConfig,
    adaptive,
    asked,
    case_steps,
    five,
    held,
    here,
    memory_words,
    slower,
    sparse,
    spread,
    steady,
    table,
    task,
)

SEQ, QUICK = 16_384, 2048
SIZES, QUICK_SIZES = (16, 32, 64, 128, 256, 512), (16, 128)
SERIES: Final = ("local_window", "global_local", "dilated_sparse", "adaptive")


def config_of(kind: str, size: int, seq: int, kept: int) -> AttentionConfig:
    """A config of a kind that keeps `kept` tokens a row where causality permits them, in blocks of a size. A
    causal window keeps its own block beside what it looks back to; of global_local a third is global."""
    if kind == "local_window":
        return sparse(kind="local_window", block=size, local_window_size=kept - size)
    if kind == "global_local":
        window = 2 * kept // 3 - size
        return sparse(kind="global_local", block=size, local_window_size=window, global_tokens=kept // 3)
    if kind == "adaptive":
        return adaptive(size, kept / seq)
    return sparse((seq // 8, seq // 2, seq), (1, 4, 16), block=size, sparsity_ratio=kept / seq)


def cases(seq: int, sizes: tuple[int, ...]) -> list[StudyConfig]:
    """A config of each kind and block size; each row keeps as many tokens as three of the largest blocks."""
    kept = 3 * sizes[-1]
    return [
        StudyConfig(f"{kind}, blocks of {size}", config_of(kind, size, seq, kept), kind, size, {"kept": kept})
        for kind in SERIES
        for size in sizes
    ]


def steps(scope: Scope) -> list[Job]:
    seq, sizes = (QUICK, QUICK_SIZES) if scope.quick else (SEQ, SIZES)
    plan = Purpose(task(seq, causal=True), gpus.find(FLEX_CARD))
    return case_steps(cases(seq, sizes), plan, here(scope, seq, causal=True))


def draw(figure: Any, rows: Results) -> None:
    """Five panels over the block size."""
    sizes = [row["x"] for row in rows if row["series"] == rows[0]["series"]]

    def along(axes: Any) -> None:
        token_axis(axes.xaxis, sizes)
        axes.set_xlabel("block, tokens")

    curves(figure, rows, five(rows), along, {kind: KINDS[kind] for kind in SERIES})
    title(
        figure,
        f"Block sizes, {rows[0]['kept']:,} tokens kept a row",
        f"{asked(rows[0]['here'])}; {asked(rows[0]['planned'])}; 8 heads x 64",
    )


def findings(rows: Results) -> Findings:
    memory = spread(held(row["here"]) for row in rows)
    changes, as_reported = [], True
    for kind in SERIES:
        mine = [row for row in rows if row["series"] == kind]
        small, large = mine[0], mine[-1]
        ratio = slower(large, small)
        gained = large["quality"]["mass"] - small["quality"]["mass"]
        took = "an unknown time, as one did not run," if ratio is None else f"{ratio:.2f} times the time"
        changes.append(f"{kind} {took} and {100 * gained:+.1f} points of mass")
        as_reported &= ratio is not None and ratio < 1 and gained < 0
    sizes = [row["x"] for row in rows]
    beside = "too calls large blocks faster and less flexible, but"
    if not as_reported:
        beside = "calls large blocks faster and less flexible, which not all are here, and"
    return Findings(
        f"Asked: what does the block size change where every row keeps {rows[0]['kept']:,} tokens?",
        f"Found: blocks of {max(sizes)} instead of {min(sizes)} take, {asked(rows[0]['here'])}: "
        f"{'; '.join(changes)}; memory there {memory_words(memory)}.",
        f"The original project {beside} counts them among what doubles memory: "
        + (
            "here a call is cut to the workspace, whatever the block."
            if steady(memory)
            else f"here the most is {memory[1] / memory[0]:.1f} times the least."
        ),
    )


STUDY = Study(steps, {"block-size": table}, draw, findings)
