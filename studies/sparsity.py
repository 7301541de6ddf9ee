"""What does the fraction of blocks kept change? `planner study sparsity`

From a thousandth of the blocks to all, nearest first, spread over three rates, and chosen by a scorer; and
from which fraction on dense attention is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from attention.config import AttentionConfig
from planner import gpus
from planner.report.plot.figure import BLUE, GREEN, KINDS, title
from studies.bench.panels import Curves, curves
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study, together
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
    slower,
    sparse,
    spread,
    steady,
    table,
    task,
)

SEQ: Final = 131_072
"""Tokens of what is predicted."""
HERE, QUICK = 8192, 1024
"""Tokens of what is measured, dense attention included."""
LONGEST: Final = 10.0
"""Seconds of a call up to which it is measured: dense attention has to be among them."""
BLOCK: Final = 64
FRACTIONS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
QUICK_FRACTIONS: Final = (0.01, 0.1, 1.0)
SERIES: Final = {
    "nearest blocks": (GREEN, "v"),
    "spread over rates 1, 4, 16": (BLUE, "o"),
    "adaptive": KINDS["adaptive"],
}
"""Colour and marker of each series."""
DENSE: Final = "dense"


def cases(fractions: Sequence[float]) -> list[StudyConfig]:
    """Dense attention, then the configs by series and fraction; their segments cover the whole sequence."""
    configs = [StudyConfig(DENSE, AttentionConfig(variant="dense"), DENSE, 1.0)]
    for series in SERIES:
        for fraction in fractions:
            if series == "adaptive":
                config = adaptive(BLOCK, fraction)
            else:
                rates = (1, 4, 16) if "rates" in series else (1,)
                config = sparse((SEQ,) * len(rates), rates, block=BLOCK, sparsity_ratio=fraction)
            configs.append(StudyConfig(f"{series}, {fraction:.1%}", config, series, fraction))
    return configs


def steps(scope: Scope) -> list[Job]:
    fractions, seq = (QUICK_FRACTIONS, QUICK) if scope.quick else (FRACTIONS, HERE)
    return case_steps(
        cases(fractions), Purpose(task(SEQ), gpus.find(FLEX_CARD)), here(scope, seq, longest=LONGEST)
    )


def against(rows: Results) -> dict[str, Callable[[Row], float | None]]:
    """A row's time as a multiple of dense attention's: measured and predicted here, planned on the card."""
    dense = rows[0]
    mine, card = dense["here"]["expected"]["seconds"], dense["planned"]["seconds"]
    return {
        "measured": lambda row: slower(row, dense),
        "expected": lambda row: float(row["here"]["expected"]["seconds"] / mine),
        "planned": lambda row: float(row["planned"]["seconds"] / card),
    }


def break_even(points: Sequence[tuple[float, float]]) -> float:
    """The fraction of blocks up to which dense attention is slower, from (fraction, multiple of its time),
    ascending: where the multiple first comes to 1, by a line over the logarithms of both. 0 for none, 1 for
    all; NaN without points."""
    if not points:
        return math.nan
    below: tuple[float, float] | None = None
    for x, y in points:
        if y >= 1:
            if below is None:
                return 0.0
            share = -math.log(below[1]) / math.log(y / below[1])
            return float(below[0] * (x / below[0]) ** share)
        below = x, y
    return 1.0


def evens(rows: Results) -> dict[str, dict[str, float]]:
    """`break_even` by series, for each way of knowing the time."""
    return {
        series: {
            way: break_even(
                [(row["x"], y) for row in rows if row["series"] == series and (y := of(row)) is not None]
            )
            for way, of in against(rows).items()
        }
        for series in SERIES
    }


def _share(even: float, digits: int = 0) -> str:
    """A break-even as a percentage, or `unknown`."""
    return "unknown" if math.isnan(even) else f"{even:.{digits}%}"


def even_table(rows: Results) -> str:
    """Markdown: the fraction of blocks up to which sparse attention is the faster one."""
    mine, card = rows[0]["here"], rows[0]["planned"]
    return markdown(
        ([series, *(_share(even, 1) for even in ways.values())] for series, ways in evens(rows).items()),
        ["faster than dense up to", f"measured ({asked(mine)})", "predicted", f"predicted ({asked(card)})"],
    )


def draw(figure: Any, rows: Results) -> None:
    """Five panels over the fraction."""
    mine, card, ratio = rows[0]["here"], rows[0]["planned"], against(rows)
    rule = (1.0, "dense attention")

    def along(axes: Any) -> None:
        axes.set(xscale="log", xlabel="blocks kept, % (at least one a row)")
        axes.set_xticks([0.001, 0.01, 0.1, 1], ["0.1", "1", "10", "100"])

    panels = (
        Curves(
            f"time, times dense attention's,\n{mine['on']} (line: predicted)",
            ratio["expected"],
            ratio["measured"],
            log=True,
            rule=rule,
        ),
        Curves(
            f"predicted time, times dense\nattention's, {card['on']}", ratio["planned"], log=True, rule=rule
        ),
        *five(rows)[2:],
    )
    curves(figure, rows[1:], panels, along, SERIES)
    title(figure, f"Sparsity, blocks of {BLOCK}", f"{asked(mine)}; {asked(card)}; 8 heads x 64")


def findings(rows: Results) -> Findings:
    mine, card = rows[0]["here"], rows[0]["planned"]
    measured, planned = (
        "; ".join(f"{series} {_share(ways[way])}" for series, ways in evens(rows).items())
        for way in ("measured", "planned")
    )
    tenth = next(row for row in rows[1:] if row["x"] == 0.1)
    memory = {
        adaptive: spread(
            held(row[part])
            for row in rows[1:]
            for part in ("here", "planned")
            if (row["series"] == "adaptive") == adaptive
        )
        for adaptive in (False, True)
    }
    matters = [
        name
        for name, figures in (
            ("memory", memory[False]),
            ("time", spread(row["planned"]["seconds"] for row in rows[1:])),
            ("mass", spread(row["quality"]["mass"] for row in rows[1:])),
        )
        if not steady(figures)
    ]
    how = "it is what matters" if "memory" not in matters else "it matters"
    return Findings(
        "Asked: what does the fraction of blocks kept change, and up to where is sparse attention faster "
        "than dense?",
        f"Found: it is faster up to this fraction of the blocks: {measured} ({asked(mine)}); {planned} "
        f"(predicted, {asked(card)}); a tenth of the blocks, {tenth['series']}, keeps "
        f"{tenth['quality']['mass']:.0%} of the mass.",
        "The original project calls sparsity what matters for memory; here "
        f"{how} for {together(matters or ['none'])}: "
        f"dilated_sparse holds {memory[False][0]:.2f} to {memory[False][1]:.2f} times q, k, v and out at "
        f"every fraction; adaptive, which stores a list of blocks for each row, up to {memory[True][1]:.2f}.",
    )


STUDY = Study(steps, {"sparsity": table, "sparsity-break-even": even_table}, draw, findings)
