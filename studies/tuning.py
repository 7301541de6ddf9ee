"""Does tuning find something as fast as the models' pick, or faster? `planner study tuning`

Five questions on the CPU: `planner.tune` measures what the models recommend and what Optuna suggests from
there. Run it on a machine that does nothing else.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

from planner import tune
from planner.answers.tuned import Trial
from planner.question.dimensions import attention_kind
from planner.report.plot.figure import KINDS, RED, named, title
from planner.report.text.times import seconds
from planner.report.text.words import sizes
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study

Question = dict[str, Any]
SCENARIOS: Final[tuple[Question, ...]] = (
    {"vram": "48MB", "seq": 4096, "heads": 8, "head_dim": 64, "dtype": "float32"},
    {"vram": "48MB", "seq": 8192, "heads": 4, "head_dim": 128, "dtype": "bfloat16", "causal": True},
    {"vram": "64MB", "seq": 2048, "heads": 8, "head_dim": 64, "dtype": "bfloat16", "mode": "training"},
    {
        "vram": "48MB",
        "seq": 4096,
        "heads": 4,
        "head_dim": 64,
        "dtype": "float32",
        "mode": "training",
        "causal": True,
    },
    {"vram": "32MB", "seq": 16_384, "heads": 2, "head_dim": 64, "dtype": "float16", "causal": True},
)
"""The questions, as arguments of `tune`. A trial takes tenths of a second; budgets leave room for some
configs and not for others."""
TRIALS: Final = 30
QUICK: Final[Question] = {"vram": "16MB", "seq": 512, "heads": 2, "head_dim": 64, "dtype": "float32"}
QUICK_TRIALS: Final = 4
TICKS: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)
"""Ticks of speeds on a logarithmic axis."""


def scenario_row(question: Question, trials: int) -> Row:
    """One question, tuned from a cold start: all trials, and how the analytic pick does among them."""
    with TemporaryDirectory() as folder:
        tuned = tune(**question, trials=trials, storage=str(Path(folder) / "trials.journal"))
    if tuned.interrupted:  # an answer to whoever asked for one, but no row: the study stops and goes on later
        raise KeyboardInterrupt
    good = [trial.seconds for trial in tuned.trials if trial.good and trial.seconds]
    pick = tuned.analytic
    return {
        "asked": question,
        "seq": tuned.workload.seq,
        "sizes": sizes(tuned.workload),
        "speedup": tuned.speedup if pick.good else None,
        "rank": 1 + sum(one < pick.seconds for one in good) if pick.good and pick.seconds else None,
        "ran": len(good),
        "failed": dict(Counter(trial.kind for trial in tuned.trials if not trial.good)),
        "best": _figures(tuned.best),
        "analytic": _figures(pick),
        "trials": [_figures(trial) for trial in tuned.trials],
    }


def _figures(trial: Trial) -> Row:
    return {
        "number": trial.number,
        "attention": attention_kind(trial.config),
        "outcome": trial.kind,
        "seconds": trial.seconds,
        "predicted": trial.predicted,
        "allocated": trial.allocated,
        "config": trial.config.model_dump(mode="json", exclude_defaults=True),
    }


def steps(scope: Scope) -> list[Job]:
    """A step a question; quick, one small one."""
    questions, trials = ((QUICK,), QUICK_TRIALS) if scope.quick else (SCENARIOS, TRIALS)
    return [
        (f"question {number}", partial(scenario_row, one, trials)) for number, one in enumerate(questions)
    ]


def tuning_table(rows: Results) -> str:
    """Markdown: for each question the models' pick and the fastest, measured, and how the trials ended."""
    return markdown(
        (_cells(row) for row in rows),
        [
            "tokens",
            "asked",
            "models' pick",
            "measured",
            "predicted",
            "fastest",
            "measured",
            "times as fast",
            "pick's rank",
            "ran",
            "did not run within the budget",
        ],
    )


def _cells(row: Row) -> list[str]:
    pick, best = row["analytic"], row["best"]
    failed = ", ".join(f"{count} {kind}" for kind, count in row["failed"].items())
    return [
        f"{row['seq']:,}",
        row["sizes"],
        pick["attention"],
        seconds(pick["seconds"]) if pick["seconds"] else pick["outcome"],
        seconds(pick["predicted"]),
        best["attention"],
        seconds(best["seconds"]),
        f"{row['speedup']:.2f}" if row["speedup"] else "",
        str(row["rank"] or ""),
        str(row["ran"]),
        failed or "none",
    ]


def speeds(row: Row) -> list[tuple[str, float]]:
    """Kind of each trial that ran, and its speed as a multiple of the pick's or, if that did not run, of the
    best trial's."""
    base = row["analytic"]["seconds"] or row["best"]["seconds"]
    return [
        (trial["attention"], base / trial["seconds"]) for trial in row["trials"] if trial["outcome"] == "ok"
    ]


def draw(figure: Any, rows: Results) -> None:
    """Every trial's speed against the models' pick, a line a question."""
    figure.set_size_inches(9.5, 1.9 + 0.75 * len(rows))
    axes = figure.add_subplot()
    axes.axvline(1, color=RED, linewidth=1, zorder=0)
    for place, row in enumerate(rows):
        for kind, speed in speeds(row):
            color, marker = KINDS[kind]
            axes.scatter(speed, place, color=color, marker=marker, s=34, alpha=0.7)
        named(axes, 1, place, _summary(row), xycoords=("axes fraction", "data"))
    points = [pair for row in rows for pair in speeds(row)]
    for kind in dict.fromkeys(kind for kind, _ in points):
        axes.scatter([], [], color=KINDS[kind][0], marker=KINDS[kind][1], s=34, label=kind)
    axes.set_yticks(range(len(rows)), [f"{row['seq']:,} tokens, {_task(row)}" for row in rows])
    minimum, maximum = min(speed for _, speed in points), max(speed for _, speed in points)
    axes.set(
        xscale="log",
        xlabel="speed against the models' pick, measured (right of 1: faster)",
        xlim=(minimum / 1.2, maximum * 1.2),
        ylim=(len(rows) - 0.5, -0.5),
    )
    axes.set_xticks([tick for tick in TICKS if minimum / 1.2 < tick < maximum * 1.2])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x")
    figure.legend(loc="outside lower center", ncols=6)
    title(figure, "What tuning finds beside the models' pick", "every trial measured on the CPU")


def _task(row: Row) -> str:
    """The question in a second and third line."""
    heads, *rest = row["sizes"].split(", ")[1:]
    return f"{heads}\n{', '.join(rest)}"


def _summary(row: Row) -> str:
    failed = sum(row["failed"].values())
    beside = f"\n{failed} did not run" if failed else ""
    if not row["rank"]:
        return f"the pick did not run{beside}"
    return f"best {row['speedup']:.2f} x the pick's speed\npick is no. {row['rank']} of {row['ran']}{beside}"


def findings(rows: Results) -> Findings:
    good = [row for row in rows if row["rank"]]
    faster = [row["speedup"] for row in good if row["speedup"] > 1]
    gain = "nothing faster than a pick that ran in any question"
    if len(good) == len(rows):
        gain = "nothing faster in any question"
    if faster:
        gain = (
            f"something faster in {len(faster)} of {len(rows)} questions, by a factor of "
            f"{median(faster):.2f} in their median and {max(faster):.2f} at most"
        )
    failed = sum(sum(row["failed"].values()) for row in rows)
    measured = sum(len(row["trials"]) for row in rows)
    ranks = ", ".join(f"{row['rank']} of {row['ran']}" for row in good)
    pick = f"the models' pick is number {ranks} of what ran" if good else "the models' pick never ran"
    if 0 < len(good) < len(rows):
        pick += f", did not run in {len(rows) - len(good)} of {len(rows)} questions"
    return Findings(
        "Asked: does tuning find, by measurement, something as fast as what the models recommend, or faster?",
        f"Found: {gain}; {pick}, and {failed} of {measured} trials did not run within the budget.",
        "The original project times five dilations at 16,384 tokens on one card by hand and recommends the "
        "best of them for every length; nothing else was tried.",
    )


STUDY = Study(steps, {"tuning": tuning_table}, draw, findings, devices=("cpu",), independent=True)
