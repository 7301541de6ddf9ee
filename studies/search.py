"""How near does the search come to the exact optimum? `planner study search`

Random questions: what `recommend` answers against the exact optimum of the grid, and Optuna alone from a cold
start against the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from statistics import median
from typing import Any, Final

import numpy as np

from planner.gpus import known
from planner.question.asked import Sampler
from planner.report.plot.figure import BLUE, COLORS, INK, RED, named, title
from planner.search.evaluate import gain
from planner.search.recommend import answered, better
from planner.search.refine import refine
from planner.search.relax import NothingFitsError
from planner.workload import Workload
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study

SEED: Final = 7
SCENARIOS, TRIALS = 200, 300
SAMPLERS: Final[tuple[Sampler, ...]] = ("tpe", "random", "nsga2")
COUNTS: Final = (10, 30, 100, 300)
NEAR: Final = 0.05
COMPARED: Final = 24
"""Questions that samplers are compared on."""


def scenario(number: int) -> dict[str, Any]:
    """The arguments of `recommend` for the n-th random question: a budget of 1 to 80 GB, 1K to 2M tokens,
    heads, dtype, mode, objective, card."""
    rng = random.Random(f"{SEED} {number}")
    objective = ("speed", "seq", "quality")[number % 3]
    gpu = rng.choice([card for card in known() if card.rates.get("float16")])
    dtypes = ["float16", "float32"] + ["bfloat16"] * (gpu.capability >= (8, 0))
    budget = min(np.exp(rng.uniform(np.log(1e9), np.log(80e9))), float(gpu.usable_bytes))
    heads = rng.choice((1, 4, 8, 16, 32))
    options: dict[str, Any] = {
        "vram": int(budget),
        "gpu": gpu.key,
        "heads": heads,
        "head_dim": rng.choice((32, 64, 128)),
        "kv_heads": rng.choice((None, max(heads // 4, 1))),
        "dtype": rng.choice(dtypes),
        "mode": rng.choice(("inference", "training")),
        "causal": rng.random() < 0.5,
        "objective": objective,
    }
    if objective != "seq":
        sizes = {name: options[name] for name in ("heads", "head_dim", "kv_heads", "dtype")}
        token = Workload(seq=1, **sizes).floor * (2 if options["mode"] == "training" else 1)
        maximum = max(min(2 << 20, (budget - 1e9) * 0.9 / token), 1025)
        options["seq"] = round(np.exp(rng.uniform(np.log(1024), np.log(maximum))))
    if objective == "quality":
        options["max_seconds"] = float(np.exp(rng.uniform(np.log(1e-3), np.log(3))))
    return options


def scenario_row(options: dict[str, Any], trials: int) -> Row:
    """One question, answered by `recommend` and by Optuna alone."""
    row: Row = {"part": "answer", "asked": options, "objective": options["objective"], "trials": trials}
    try:
        outcome = answered(**options)
    except NothingFitsError as error:
        return row | {"outcome": "nothing fits", "relaxations": list(error.relaxations)}
    alone = refine(outcome.scenario, outcome.space, [], trials=trials).best
    best = outcome.grid
    assert best is not None
    answer = better(outcome.scenario, best, outcome.best)
    assert answer is not None
    return row | {
        "outcome": "ok",
        "grid": outcome.answer.search.grid,
        "answer": gain(outcome.scenario, best, answer),
        "cold": None if alone is None else gain(outcome.scenario, best, alone),
    }


def gaps_table(rows: list[Row]) -> str:
    """Markdown: gaps by objective and together, as a share of seconds or tokens, as a difference of mass."""
    rows = [row for row in rows if row["part"] == "answer"]
    ordered = sorted(rows, key=lambda row: row["objective"])
    groups = [(name, list(group)) for name, group in groupby(ordered, key=lambda row: row["objective"])]
    return markdown(
        [_gaps(name, group) for name, group in [*groups, ("all", rows)]],
        [
            "objective",
            "questions",
            "nothing fits",
            "answer worse than the grid's optimum by more than 1%",
            "answer better, median",
            "answer better, most",
            "cold: within 5%",
            "cold: within 1%",
            "cold: nothing found",
            "cold: better than the grid",
        ],
    )


def _gaps(name: str, rows: Sequence[Row]) -> list[str]:
    good = [row for row in rows if row["outcome"] == "ok"]
    counts = [name, str(len(rows)), str(len(rows) - len(good))]
    if not good:
        return [*counts, "", "", "", "", "", "", ""]
    answers = np.array([row["answer"] for row in good])
    cold = np.array([-1.0 if row["cold"] is None else row["cold"] for row in good])
    return [
        *counts,
        str(int((answers < -0.01).sum())),
        f"{np.median(answers):.2%}",
        f"{answers.max():.2%}",
        f"{(cold >= -0.05).mean():.1%}",
        f"{(cold >= -0.01).mean():.1%}",
        str(sum(row["cold"] is None for row in good)),
        f"{(cold > 0).mean():.1%}",
    ]


def sampler_row(number: int, sampler: Sampler, counts: Sequence[int]) -> Row:
    """One question answered by one sampler from a cold start, with more and more trials: the gap between its
    best and the grid's optimum each time (in the objective; None where nothing fits)."""
    row: Row = {"part": "sampler", "question": number, "sampler": sampler, "objective": None, "gaps": {}}
    options = scenario(number)
    try:
        outcome = answered(**options, trials=0)
    except NothingFitsError:
        return row | {"outcome": "nothing fits"}
    assert outcome.grid is not None
    for trials in counts:
        best = refine(outcome.scenario, outcome.space, [], trials=trials, sampler=sampler).best
        row["gaps"][str(trials)] = None if best is None else gain(outcome.scenario, outcome.grid, best)
    return row | {"objective": options["objective"], "outcome": "ok"}


def _far(gap: float | None) -> float:
    """The distance to the optimum: 0 at it or beyond, 1 where the sampler has no config that fits."""
    return 1.0 if gap is None else min(max(-gap, 0.0), 1.0)


def near(rows: Results) -> dict[str, dict[int, float]]:
    """The share of questions within 5% of the grid's optimum, by sampler and number of trials."""
    by_sampler: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["part"] == "sampler" and row["outcome"] == "ok":
            for trials, gap in row["gaps"].items():
                by_sampler.setdefault(row["sampler"], {}).setdefault(int(trials), []).append(_far(gap))
    return {
        name: {n: sum(gap <= NEAR for gap in gaps) / len(gaps) for n, gaps in by.items()}
        for name, by in by_sampler.items()
    }


def samplers_table(rows: Results) -> str:
    """Markdown: distance to the optimum by sampler and trials: median, and how often within 5%."""
    by_sampler: dict[str, list[Row]] = {}
    for row in rows:
        if row["part"] == "sampler" and row["outcome"] == "ok":
            by_sampler.setdefault(row["sampler"], []).append(row)
    if not by_sampler:
        return "No sampler was asked a question that something fits."
    counts = list(next(iter(by_sampler.values()))[0]["gaps"])
    body = []
    for name, mine in by_sampler.items():
        gaps = [[_far(row["gaps"][count]) for row in mine] for count in counts]
        body.append([name, *(f"{median(g):.1%}; {sum(x <= NEAR for x in g)} of {len(g)}" for g in gaps)])
    return markdown(body, ["sampler", *(f"{count} trials" for count in counts)])


def steps(scope: Scope) -> list[Job]:
    """A step a question, and one for each question that samplers are compared on."""
    scenarios, trials = (3, 30) if scope.quick else (SCENARIOS, TRIALS)
    samplers: tuple[Sampler, ...] = SAMPLERS[:2] if scope.quick else SAMPLERS
    counts = [count for count in COUNTS if count <= trials]
    questions: list[Job] = [
        (f"question {n} {one['objective']}", partial(scenario_row, one, trials))
        for n, one in enumerate(map(scenario, range(scenarios)))
    ]
    return questions + [
        (f"{sampler} on {number}", partial(sampler_row, number, sampler, counts))
        for number in range(min(scenarios, COMPARED))
        for sampler in samplers
    ]


def draw(figure: Any, rows: Results) -> None:
    """Left: questions within 5% of the optimum by trials and sampler. Right: how Optuna alone ends, by
    question."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ends: dict[float, list[str]] = {}
    for (name, by_count), color in zip(near(rows).items(), COLORS, strict=False):
        counts, shares = list(by_count), [100 * share for share in by_count.values()]
        left.plot(counts, shares, color=color, marker="o", markersize=4)
        ends.setdefault(shares[-1], []).append(name)
    for share, names in ends.items():
        named(left, counts[-1], share, "\n".join(names), INK)
    left.axhline(100, color=INK, linewidth=1)
    left.annotate(
        "enumeration",
        (0.02, 100),
        xycoords=("axes fraction", "data"),
        xytext=(0, -12),
        textcoords="offset points",
    )
    left.set(
        xscale="log",
        xlabel="trials from a cold start",
        ylabel="questions within 5% of the optimum, %",
        ylim=(-3, 105),
    )
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.margins(x=0.2)
    left.grid(axis="y")
    cold = np.sort([_far(row["cold"]) for row in _answered(rows)])
    right.plot(100 * np.arange(1, cold.size + 1) / cold.size, 100 * cold, color=BLUE, drawstyle="steps-post")
    right.axhline(5, color=RED, linewidth=1, linestyle="--")
    right.annotate("5%", (0, 5), xytext=(2, 3), textcoords="offset points", color=RED)
    right.set(xlabel="questions, %", ylabel=f"below the optimum, %, {_trials(rows)} trials", ylim=(-3, 105))
    right.grid(axis="y")
    close = _close(rows)
    title(
        figure,
        "Random questions: how near Optuna alone comes to the optimum of the grid"
        if close is None
        else f"Optuna alone comes within 5% of the grid's optimum in {close:.0%} of random questions",
        "analytic models",
    )


def _answered(rows: Results) -> Results:
    return [row for row in rows if row["part"] == "answer" and row["outcome"] == "ok"]


def _close(rows: Results) -> float | None:
    """The share of questions in which Optuna alone comes within 5%; None if none was answered."""
    good = _answered(rows)
    return sum(_far(row["cold"]) <= NEAR for row in good) / len(good) if good else None


def _trials(rows: Results) -> int:
    return int(next(row["trials"] for row in rows if row["part"] == "answer"))


def findings(rows: Results) -> Findings:
    good, close = _answered(rows), _close(rows)
    worse = sum(row["answer"] < -0.01 for row in good)
    better = sum(row["answer"] > 0.01 for row in good)
    maximum = max((row["answer"] for row in good), default=0.0)
    summary = f"none of {sum(row['part'] == 'answer' for row in rows)} questions has an answer"
    if close is not None:
        by = f", by up to {maximum:.0%}" if better else ""
        summary = (
            f"Optuna alone, cold, in {_trials(rows)} trials, comes within 5% in {close:.1%} of {len(good)} "
            f"questions; an answer starts from the optimum of the grid, and {worse} are worse than it by "
            f"more than 1%, {better} better{by}: between the grid's points nobody knows the "
            "optimum"
        )
    return Findings(
        "Asked: how far is the answer of `recommend` from the exact optimum of the enumerated grid, and how "
        "far does Optuna get alone?",
        f"Found: {summary}.",
        "The original project searches by hand over a few settings and cannot say how far from the best they "
        "are.",
    )


STUDY = Study(
    steps, {"search": gaps_table, "search-samplers": samplers_table}, draw, findings, devices=("cpu",)
)
