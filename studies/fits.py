"""Does what is recommended fit, for real? `planner study fits`; for GPUs, `studies.bench.dry_fits`

Random budgets on the CPU: recommend, build, run with every allocation counted, compare with the budget. Rows
of dry runs say how much of a card was taken instead, and how a run of 5% more tokens ended.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from statistics import median
from typing import Any, Final

from planner import recommend
from planner.measuring.server import Batch
from planner.report.plot.figure import BLUE, GREEN, ORANGE, RED, title
from planner.search.relax import NothingFitsError
from studies.bench.panels import plain
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study

SEED: Final = 3
BUDGETS = 100
MINIMUM, MAXIMUM = 64e6, 4e9
TIMEOUT: Final = 600.0
PATIENCE: Final = 20.0
"""Predicted seconds of a call for the longest sequence."""


def question(number: int, minimum: float = MINIMUM, maximum: float = MAXIMUM) -> dict[str, Any]:
    """The arguments of `recommend` for the n-th budget, from `minimum` to `maximum` bytes: objective `speed`
    at a length that may fit, or `seq` with a limit on seconds. Gates are looser than usual, or the largest
    budgets would be for calls of minutes."""
    rng = random.Random(f"{SEED} {number}")
    budget = math.exp(rng.uniform(math.log(minimum), math.log(maximum)))
    options: dict[str, Any] = {
        "vram": int(budget),
        "gpu": "cpu",
        "heads": rng.choice((2, 4, 8)),
        "head_dim": rng.choice((32, 64, 128)),
        "dtype": rng.choice(("float32", "bfloat16", "float16")),
        "mode": rng.choice(("inference", "training")),
        "causal": rng.random() < 0.5,
        "objective": ("speed", "seq")[number % 2],
        "layers": None,
        "min_mass": rng.choice((0.3, 0.5, 0.8)),
    }
    if options["objective"] == "speed":
        size = 4 if options["dtype"] == "float32" else 2
        token = (
            4 * options["heads"] * options["head_dim"] * size * (2 if options["mode"] == "training" else 1)
        )
        options["seq"] = max(int(budget / token * rng.uniform(0.3, 0.97)), 1)
    else:
        options["max_seconds"] = PATIENCE
    return options


def budget_row(options: dict[str, Any], batch: Batch) -> Row:
    """One budget: what was recommended, and what it allocated when run."""
    row: Row = {"asked": options, "objective": options["objective"], "budget": options["vram"]}
    try:
        answer = recommend(**options)
    except NothingFitsError as error:
        return row | {"outcome": "nothing fits", "relaxations": list(error.relaxations)}
    measured = batch.measure(answer.config, answer.workload)
    return row | {
        "outcome": measured.kind,
        "message": measured.message,
        "config": answer.config.model_dump(mode="json", exclude_defaults=True),
        "seq": answer.workload.seq,
        "upper": answer.memory.upper,
        "allocated": measured.allocated,
    }


def fits_table(rows: list[Row]) -> str:
    """Markdown: the outcomes by objective and together."""
    ordered = sorted(rows, key=lambda row: row["objective"])
    groups = [(name, list(group)) for name, group in groupby(ordered, key=lambda row: row["objective"])]
    head = ["objective", "budgets", "nothing fits", "did not run", "above the budget", "above the bound"]
    head += ["budget used, median", "most", *["5% more tokens run out"] * _dry(rows)]
    return markdown([_fits(name, group) for name, group in [*groups, ("all", rows)]], head)


def _fits(name: str, rows: Sequence[Row]) -> list[str]:
    answered = [row for row in rows if row["outcome"] != "nothing fits"]
    good = [row for row in answered if row["outcome"] == "ok"]
    used = list(map(_used, good))
    out, tried = _longer(good)
    return [
        name,
        str(len(rows)),
        str(len(rows) - len(answered)),
        str(len(answered) - len(good)),
        str(sum(share > 1 for share in used)),
        str(sum(_taken(row) > row["upper"] for row in good)),
        f"{median(used):.1%}" if used else "",
        f"{max(used):.1%}" if used else "",
        *[f"{out} of {tried}" if tried else ""] * _dry(rows),
    ]


def steps(scope: Scope) -> list[Job]:
    """A step a budget; quick, few and small ones."""
    if scope.quick:
        questions = [question(number, 3e6, 8e6) for number in range(6)]
    else:
        questions = [question(number) for number in range(BUDGETS)]
    batch = scope.batch(timeout=TIMEOUT)
    return [(f"{n} {one['objective']}", partial(budget_row, one, batch)) for n, one in enumerate(questions)]


def _ran(rows: Results) -> Results:
    return [row for row in rows if row["outcome"] == "ok"]


def _dry(rows: Sequence[Row]) -> bool:
    """Whether the rows are of cards that were not there."""
    return any(row.get("about") == "dry" for row in rows)


def _taken(row: Row) -> int:
    """The bytes that a budget is compared with: what a card lost, or what was allocated on the CPU."""
    count: int = row["taken"] if "taken" in row else row["allocated"]
    return count


def _used(row: Row) -> float:
    """The share of the budget that was taken."""
    return float(_taken(row) / row["budget"])


def _longer(rows: Sequence[Row]) -> tuple[int, int]:
    """Of the runs of 5% more tokens: how many ran out of memory, and how many there are."""
    ends = [row["longer"] for row in rows if "longer" in row]
    return ends.count("oom"), len(ends)


def _above(rows: Results) -> Results:
    """The rows that took more than their budget."""
    return [row for row in _ran(rows) if _used(row) > 1]


def _verdict(above: int, ran: int) -> str:
    if above:
        return f"the bound that was checked did not keep {above} of {ran} within the budget"
    return "the budget is met by a bound that was checked"


def draw(figure: Any, rows: Results) -> None:
    """Share of the budget that was taken, by budget."""
    axes, dry = figure.add_subplot(), _dry(rows)
    series = [("speed", BLUE, "o", "the fastest at a length"), ("seq", ORANGE, "^", "the longest sequence")]
    series += [("quality", GREEN, "s", "the most mass at a length")] * dry
    for objective, color, marker, name in series:
        mine = [row for row in _ran(rows) if row["objective"] == objective]
        shares = [100 * _used(row) for row in mine]
        budgets = [row["budget"] / (1e9 if dry else 1e6) for row in mine]
        axes.scatter(budgets, shares, c=color, marker=marker, s=26, label=name)
    axes.axhline(100, color=RED, linewidth=1)
    axes.annotate(
        "the budget",
        (0, 100),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        color=RED,
    )
    maximum = 100 * max(map(_used, _ran(rows)))
    axes.set(
        xscale="log",
        xlabel=f"budget, {'GB' if dry else 'MB'}",
        ylabel=f"{'taken from the card' if dry else 'allocated'} at the peak, % of the budget",
        ylim=(0, max(112, 1.05 * maximum)),
    )
    plain(axes.xaxis)
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    above = len(_above(rows))
    headline = (
        f"{above} of {len(_ran(rows))} answers take more than their budget"
        if above
        else ("What is recommended fits")
    )
    how = "random budgets of GPUs, each answer run dry on a card of that size"
    title(figure, headline, how if dry else "random budgets on the CPU, every allocation counted")


def findings(rows: Results) -> Findings:
    good, above = _ran(rows), len(_above(rows))
    longest = [_used(row) for row in good if row["objective"] == "seq"]
    fills = (
        f"; where the longest sequence was asked for, the median answer takes {median(longest):.1%} of it"
        if longest
        else ""
    )
    out, tried = _longer(good)
    if tried:
        fills += f", and {out} of {tried} run out with 5% more tokens"
    failed = sum(row["outcome"] not in ("ok", "nothing fits") for row in rows)
    lost = f"{failed} did not run, " if failed else ""
    return Findings(
        f"Asked: for {len(rows)} random budgets, does what `recommend` answers stay within the budget when "
        f"it is built and run{' dry, on a card of that size' if _dry(rows) else ''}?",
        f"Found: {len(good)} answers ran, {lost}{above} of them above the budget{fills}.",
        "The original project recommends by hand and reports running out of memory at 65,536 tokens with 264 "
        f"MB of 8 GB in use; here {_verdict(above, len(good))}.",
    )


STUDY = Study(steps, {"fits": fits_table}, draw, findings, devices=("cpu",))
