"""Which attention is fastest and which leanest at 16K tokens? `planner study implementations`

All kinds at the length at which the reports of the original project compare its own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from attention.config import AttentionConfig, MultiheadConfig
from planner import gpus
from planner.report.plot.figure import BLUE, ORANGE, RED, title
from studies.bench.panels import Panel, Series, beside
from studies.bench.records import Job, Row
from studies.bench.study import Findings, Results, Scope, Study
from studies.bench.trade_offs import (
    HEAD_DIM,
    HEADS,
    MASS,
    SEEDS_CARD,
    Purpose,
    StudyConfig,
    adaptive,
    asked,
    case_steps,
    dilated,
    held,
    here,
    memory_panel,
    seconds,
    seeds_kb,
    sparse,
    table,
    task,
)

SEQ, QUICK = 16_384, 1024
BLOCK: Final = 64
LONGEST: Final = 10.0
"""Seconds of a call up to which it is measured: dense attention takes several."""
SEEDS_KB: Final = 4.40
"""Memory per token of what the reports call base, in their unit of 1/1000 MiB."""


def cases() -> list[StudyConfig]:
    """The kinds; those of the reports in their settings, with the milliseconds that they give."""
    multihead = MultiheadConfig(embed_dim=HEADS * HEAD_DIM, num_heads=HEADS)
    projected = {
        length: sparse((length,), (1,), sparsity_ratio=0.05).model_copy(update={"multihead": multihead})
        for length in (4096, 8192)
    }
    base = partial(sparse, sparsity_ratio=0.01)
    return [
        StudyConfig("dense", AttentionConfig(variant="dense"), ""),
        StudyConfig("dilated 2048/1 4096/2 8192/4", dilated((2048, 4096, 8192), (1, 2, 4)), ""),
        StudyConfig("local_window 1024", sparse(kind="local_window", local_window_size=1024), ""),
        StudyConfig("global_local 1024, 64 global", sparse(kind="global_local", local_window_size=1024), ""),
        StudyConfig("dilated_sparse 4096/1, 1%", base((4096,), (1,)), "", more=_seeds(120.5, SEEDS_KB)),
        StudyConfig(
            "dilated_sparse 2048/1 4096/2, 1%", base((2048, 4096), (1, 2)), "", more=_seeds(117.3, SEEDS_KB)
        ),
        StudyConfig("adaptive, 5%", adaptive(BLOCK, 0.05), "", more=_seeds(3011.9)),
        StudyConfig("multihead 4096/1, 5%", projected[4096], "", more=_seeds(119.0)),
        StudyConfig("multihead 8192/1, 5%", projected[8192], "", more=_seeds(112.5)),
    ]


def _seeds(ms: float, kb: float | None = None) -> dict[str, float | None]:
    return {"seeds_ms": ms, "seeds_kb": kb}


def steps(scope: Scope) -> list[Job]:
    plan = Purpose(task(SEQ), gpus.find(SEEDS_CARD))
    return case_steps(cases(), plan, here(scope, QUICK if scope.quick else SEQ, longest=LONGEST))


def ordered(rows: Results) -> Results:
    """The rows, the fastest first."""
    return sorted(rows, key=lambda row: row["here"]["seconds"] or row["here"]["expected"]["seconds"])


def implementations_table(rows: Results) -> str:
    """Markdown: the implementations, the fastest first."""
    return table(
        ordered(rows),
        {
            "original project, ms": lambda row: str(row.get("seeds_ms") or ""),
            "original project, KB a token": lambda row: str(row.get("seeds_kb") or ""),
            "predicted KB a token, as it counts": lambda row: f"{seeds_kb(row['planned']):.2f}",
        },
    )


def draw(figure: Any, rows: Results) -> None:
    """Time here and on the card, memory, mass; the fastest first."""
    rows = ordered(rows)
    mine, card = rows[0]["here"], rows[0]["planned"]
    here_time = Panel(
        f"ms,\n{mine['on']}",
        (
            Series(
                f"predicted, {mine['on']}",
                lambda row: 1e3 * row["here"]["expected"]["seconds"],
                BLUE,
                "o",
                hollow=True,
            ),
            Series(f"measured, {mine['on']}", _measured_ms, BLUE),
        ),
        log=True,
    )
    card_time = Panel(
        f"ms,\n{card['on']}",
        (
            Series(
                f"predicted, {card['on']}",
                lambda row: 1e3 * row["planned"]["seconds"],
                ORANGE,
                "D",
                hollow=True,
            ),
            Series(f"reported, {card['on']}", lambda row: row.get("seeds_ms"), RED, "X"),
        ),
        log=True,
    )
    beside(figure, rows, (here_time, card_time, memory_panel(rows[0], lambda row: row.get("seeds_kb")), MASS))
    title(figure, "Implementations, the fastest first", f"{asked(mine)}; {asked(card)}; 8 heads x 64")


def _measured_ms(row: Row) -> float | None:
    measured = seconds(row)
    return None if measured is None else 1e3 * measured


def _kind(row: Row) -> str:
    return "multihead" if "multihead" in row["config"] else str(row["kind"])


def findings(rows: Results) -> Findings:
    mine = rows[0]["here"]
    ran = [row for row in ordered(rows) if seconds(row)]
    by_memory = sorted(ran, key=lambda row: row["here"]["allocated"])
    fast, slow, lean, fat = ran[0], ran[-1], by_memory[0], by_memory[-1]
    seeds = [row for row in rows if "seeds_ms" in row]
    first, last = (pick(seeds, key=lambda row: float(row["seeds_ms"])) for pick in (min, max))
    ours = [f"{1e3 * row['planned']['seconds']:.1f} ms" for row in (first, last)]
    summary = (
        f"the fastest is {fast['name']} with {_measured_ms(fast):,.0f} ms, the slowest {slow['name']} with "
        f"{_measured_ms(slow):,.0f} ms; the leanest is {lean['name']} with {held(lean['here']):.2f} times q, "
        f"k, v and out, the largest {fat['name']} with {held(fat['here']):.2f}"
    )
    if len(ran) == 1:
        summary = (
            f"{fast['name']} alone ran, with {_measured_ms(fast):,.0f} ms and {held(lean['here']):.2f} times "
            "q, k, v and out"
        )
    lost = f"; {len(rows) - len(ran)} of {len(rows)} did not run" if len(ran) < len(rows) else ""
    return Findings(
        f"Asked: which attention is fastest and which takes least memory at {mine['seq']:,} tokens?",
        f"Found: {asked(mine)}: {summary}{lost}.",
        f"The original project has {_kind(first)} as the fastest ({first['seeds_ms']:,} ms) and "
        f"{_kind(last)} as the slowest ({last['seeds_ms']:,} ms); predicted for its card are "
        f"{' and '.join(ours)}: its "
        "implementations step through pairs of blocks in Python, and some are not attention.",
    )


STUDY = Study(steps, {"implementations": implementations_table}, draw, findings)
