"""How far are predicted seconds of GPU kernels from what others published? `planner study published`

Each published measurement (`studies/bench/published.csv`) beside what the planner predicts: with the shipped
coefficients, and with fits that did not see its file, its repository or its card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Final

import numpy as np

from planner.fitting.speed import rank_correlation
from planner.report.plot.figure import COLORS, named, title
from studies.bench.published import Published, read_published
from studies.bench.published_fit import HeldOut, RatioRange, held_out, least_level, ranges
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study

GROUPS: Final[dict[str, Callable[[Published], str]]] = {
    "file": lambda row: row.source,
    "repository": lambda row: row.repository,
    "card": lambda row: row.card,
}
"""What is left out, by what the rows call it."""
ELSEWHERE: Final = 10
"""Rows of a kernel in other repositories from which one repository is left out."""
QUICK: Final = ("h100-sxm", "h200")
"""Cards of a quick run, of cuDNN's rows alone."""


@cache
def _measured(quick: bool) -> tuple[Published, ...]:
    rows = read_published()
    return tuple(row for row in rows if not quick or (row.kernel == "cudnn" and row.card in QUICK))


@cache
def _left_out(quick: bool, what: str) -> dict[Published, HeldOut]:
    return {found.row: found for found in held_out(_measured(quick), GROUPS[what])}


@cache
def _ranges_without(quick: bool, source: str) -> dict[str, RatioRange]:
    """The ranges that the errors of all other files give."""
    found = list(_left_out(quick, "file").values())
    return ranges([one for one in found if one.row.source != source], _level(quick))


@cache
def _level(quick: bool) -> float:
    return least_level(list(_left_out(quick, "file").values()))


def measured_row(quick: bool, number: int) -> Row:
    """The figures of a measurement, in milliseconds."""
    one = _measured(quick)[number]
    row: Row = one.model_dump(mode="json", exclude={"read_from", "notes"})
    row |= {"predicted": 1e3 * one.predicted(), "without": {}, "unseen": {}}
    others = [other for other in _measured(quick) if other.kernel == one.kernel]
    for what in GROUPS:
        found = _left_out(quick, what)[one]
        row["without"][what] = 1e3 * found.predicted
        row["unseen"][what] = found.unseen
    row["low"], row["high"] = _ranges_without(quick, one.source)[_left_out(quick, "file")[one].kind]
    row["elsewhere"] = sum(other.repository != one.repository for other in others)
    return row


def steps(scope: Scope) -> list[Job]:
    return [
        (f"measurement {number}", partial(measured_row, scope.quick, number))
        for number in range(len(_measured(scope.quick)))
    ]


def errors(rows: Iterable[Row], what: str = "") -> np.ndarray[Any, np.dtype[np.float64]]:
    """|predicted / published - 1| of rows, with the shipped coefficients or without their file, repository or
    card."""
    return np.array(
        [abs((row["without"][what] if what else row["predicted"]) / row["ms"] - 1) for row in rows]
    )


def _cells(rows: Results, what: str = "") -> list[str]:
    found = errors(rows, what)
    if not found.size:
        return ["0", "", ""]
    return [f"{found.size}", f"{np.median(found):.1%}", f"{np.quantile(found, 0.9):.1%}"]


def told(rows: Results, what: str) -> Results:
    """The rows that are held out, of which other rows tell something."""
    return [
        row
        for row in rows
        if not row["unseen"][what] and (what != "repository" or row["elsewhere"] >= ELSEWHERE)
    ]


def _by(rows: Results, *names: str) -> dict[tuple[Any, ...], Results]:
    groups: dict[tuple[Any, ...], Results] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return dict(sorted(groups.items()))


def cards_table(rows: Results) -> str:
    """Markdown: predicted over published by kernel and card, and the order within a card."""
    body = []
    for (kernel, card, step), mine in _by(rows, "kernel", "card", "step").items():
        ratios = np.array([row["predicted"] / row["ms"] for row in mine])
        low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
        body.append([kernel, card, step, f"{len(mine)}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    return markdown(body, ["kernel", "card", "pass", "rows", "predicted / published", "8 of 10"])


def order_table(rows: Results) -> str:
    """Markdown: rank correlation within a card, and its error with the card left out."""
    body = []
    for (card,), mine in _by(rows, "card").items():
        known = told(mine, "card")
        alone = sorted({f"{row['kernel']} {row['step']}" for row in mine if row["unseen"]["card"]})
        body.append(
            [card, f"{len(mine)}", f"{order(mine):.3f}", *_cells(known, "card"), ", ".join(alone) or "-"]
        )
    head = ["card", "rows", "rank correlation", "told by others", "median", "90%", "alone in their class"]
    return markdown(body, head)


def order(rows: Results) -> float:
    """Spearman's rank correlation of predicted and published times."""
    return rank_correlation(
        np.array([row["predicted"] for row in rows]), np.array([row["ms"] for row in rows])
    )


def held_out_table(rows: Results) -> str:
    """Markdown: errors of what a fit did not see, by what was left out and by kernel."""
    body = []
    for what in GROUPS:
        known = told(rows, what)
        body.append([what, "all", *_cells(known, what)])
        for (kernel, step), mine in _by(known, "kernel", "step").items():
            body.append([what, f"{kernel}, {step}", *_cells(mine, what)])
        unseen = [row for row in rows if row["unseen"][what]]
        body.append([what, "alone in their class", *_cells(unseen, what)])
    return markdown(body, ["left out", "kernel and pass", "rows", "median error", "90%"])


def single_table(rows: Results) -> str:
    """Markdown: kernels on generations of cards that one file alone tells of."""
    body = [
        [kernel, card, step, f"{len(mine)}", *_cells(mine, "file")[1:], mine[0]["source"].partition("@")[0]]
        for (kernel, card, step), mine in _by(
            [row for row in rows if row["unseen"]["file"]], "kernel", "card", "step"
        ).items()
    ]
    return markdown(body, ["kernel", "card", "pass", "rows", "median error", "90%", "the one source"])


def draw(figure: Any, rows: Results) -> None:
    """Predicted without its file over published, a color for each kernel."""
    axes = figure.add_subplot()
    ends = [min(row["ms"] for row in rows), max(row["ms"] for row in rows)]
    axes.plot(ends, ends, color="#999999", linewidth=1)
    for color, ((kernel,), mine) in zip(COLORS, _by(rows, "kernel").items(), strict=False):
        points = [(row["ms"], row["without"]["file"]) for row in mine]
        axes.plot(*zip(*points, strict=True), color=color, linestyle="", marker="o", markersize=3, alpha=0.6)
        named(axes, *max(points), kernel, color, xytext=(6, -3), ha="left")
    axes.set(xscale="log", yscale="log", xlabel="published, ms", ylabel="predicted without its file, ms")
    axes.grid()
    title(figure, _headline(rows), "published measurements of attention kernels on GPUs")


def _headline(rows: Results) -> str:
    known = errors(told(rows, "file") or rows, "file")
    return f"Half of what the fit did not see is within {np.median(known):.0%}"


def coverage(rows: Results) -> float:
    """Share of the rows in ranges that other files give, as predicted without their file."""
    inside = [row["low"] <= row["ms"] / row["without"]["file"] <= row["high"] for row in rows]
    return float(np.mean(inside))


def findings(rows: Results) -> Findings:
    known = told(rows, "file") or rows
    found = errors(known, "file")
    orders = [order(mine) for mine in _by(rows, "card").values() if len(mine) > 2]
    right = (
        ""
        if not orders
        else f", and times on one card are in the right order (rank correlation {min(orders):.3f} or more)"
    )
    return Findings(
        "Asked: how far are predicted seconds of attention kernels from what others measured on GPUs?",
        f"Found: {len(known)} measurements that a fit without their file can tell of are off by "
        f"{np.median(found):.1%} in the median and {np.quantile(found, 0.9):.1%} at the ninth decile; ranges "
        f"that other files give cover {coverage(rows):.0%} of all{right}.",
        "The original project measured on one card and says nothing of others, so there is nothing to hold "
        "against it.",
    )


STUDY = Study(
    steps,
    {
        "published": cards_table,
        "published-held-out": held_out_table,
        "published-cards": order_table,
        "published-single": single_table,
    },
    draw,
    findings,
    devices=("cpu",),
    independent=True,
)
