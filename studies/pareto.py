"""What can be had for less memory, less time or less mass? `planner study pareto`

All candidates of the grid that `recommend` enumerates, their Pareto front, and the three picks from it, for
two questions. Nothing is measured: memory and time are predicted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import groupby
from typing import Any, Final

import numpy as np

from planner.answers.recommendation import Pick
from planner.question.asked import MIN_MASS, TRIALS
from planner.question.dimensions import attention_kind
from planner.report.plot.figure import INK, KINDS, MUTED, RED, TEXT, title
from planner.report.text import words
from planner.search.candidates import grid
from planner.search.picks import pick, unsurpassed
from planner.search.recommend import Answered, answered
from planner.search.solve import Table, enumerate_grid, exact, pareto
from studies.bench.panels import plain
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study, rounded_up

QUESTIONS: Final[Mapping[str, dict[str, Any]]] = {
    "8 GB, inference": {"vram": "8GB", "seq": 131_072},
    "H100, causal training": {
        "gpu": "h100-sxm",
        "seq": 131_072,
        "causal": True,
        "mode": "training",
        "dtype": "bfloat16",
    },
}
"""The questions by name, as arguments of `recommend`."""
SHOWN: Final = {
    "seconds": ("predicted ms", 1e3),
    "mb": ("memory, upper bound, MB", 1.0),
    "mass": ("mass of dense attention, %", 100.0),
}
"""The figures of a config that are shown: (label, factor to its unit) each."""
FAINT: Final = "#c3c9ce"
NAME: Final = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
"""The box behind the name of a pick, so that it can be read over candidates."""


def front_row(name: str, question: Mapping[str, Any], trials: int) -> Row:
    """One question: all candidates of the grid, the Pareto front and the picks."""
    outcome = answered(**question, trials=trials)
    answer = outcome.answer
    return {
        "name": name,
        "asked": dict(question),
        "on": answer.on,
        "task": words.task(answer.workload),
        "budget": answer.budget,
        "profile": answer.quality.profile,
        "grid": answer.search.grid,
        "passed": answer.search.passed,
        **_enumerated(outcome),
        "picks": [_point(one) for one in answer.alternatives],
    }


def _enumerated(outcome: Answered) -> Row:
    """`candidates`, column by column, and `front`, the fastest first."""
    scenario = outcome.scenario
    parts = grid(
        outcome.space,
        scenario.workload,
        flex=scenario.flex,
        windows=scenario.windows,
        free_length=scenario.free_length,
    )
    every = enumerate_grid(scenario, parts)
    points = (exact(scenario, every.table, int(index)) for index in pareto(scenario, every))
    # Trials may have found configs that the grid does not have.
    here = [*outcome.answer.alternatives, *(pick(point) for point in points if point is not None)]
    front = sorted(unsurpassed(here), key=lambda one: one.seconds)
    return {"candidates": distinct(every.table), "front": [_point(one) for one in front]}


def _point(one: Pick) -> Row:
    return {
        "role": one.role,
        "kind": attention_kind(one.config),
        "seconds": one.seconds,
        "mb": one.upper / 1e6,
        "mass": one.mass,
        "layers": one.layers,
        "config": one.config.model_dump(mode="json", exclude_defaults=True),
    }


def distinct(table: Table) -> dict[str, list[float]]:
    """Seconds, MB and mass of all candidates, each combination once: seconds to 2%, MB to 0.1% and mass to
    half a percent, which is what a picture can tell apart."""
    memory, seconds, mass = table.figures
    rounded = np.stack(
        [np.round(np.log(seconds) * 50), np.round(np.log(memory) * 1000), np.round(mass * 200)], axis=1
    )
    _, first = np.unique(rounded, axis=0, return_index=True)
    columns = {"seconds": seconds[first], "mb": memory[first] / 1e6, "mass": mass[first]}
    return {name: [float(f"{number:.4g}") for number in column] for name, column in columns.items()}


def steps(scope: Scope) -> list[Job]:
    """A step a question; quick, without trials."""
    trials = 0 if scope.quick else TRIALS
    return [(name, partial(front_row, name, question, trials)) for name, question in QUESTIONS.items()]


def picks_table(rows: Results) -> str:
    """The three picks of each question."""
    return markdown(
        (
            [
                row["name"],
                one["role"],
                one["kind"],
                *(_number(one[name], name) for name in SHOWN),
                one["layers"],
            ]
            for row in rows
            for one in row["picks"]
        ),
        ["question", "pick", "attention", *(label for label, _ in SHOWN.values()), "layers"],
    )


def front_table(rows: Results) -> str:
    """The front by kind of attention."""
    body = []
    for row in rows:
        ordered = sorted(row["front"], key=lambda point: str(point["kind"]))
        for kind, group in groupby(ordered, key=lambda point: str(point["kind"])):
            points = list(group)
            ranges = [
                " to ".join(_number(end(point[name] for point in points), name) for end in (min, max))
                for name in SHOWN
            ]
            body.append([row["name"], kind, len(points), *ranges])
    return markdown(body, ["question", "attention", "on the front", *(label for label, _ in SHOWN.values())])


def _number(number: float, name: str) -> str:
    return f"{number * SHOWN[name][1]:,.1f}"


def draw(figure: Any, rows: Results) -> None:
    """A line a question: mass and memory over time."""
    figure.set_size_inches(11, 1.2 + 3.7 * len(rows))
    for (mass, memory), row in zip(figure.subplots(len(rows), 2, squeeze=False), rows, strict=True):
        _cloud(mass, row, "mass")
        _cloud(memory, row, "mb")
        memory.set_ylabel(f"{SHOWN['mb'][0]} of {row['budget'] / 1e6:,.0f}")
        mass.axhline(100 * MIN_MASS, color=MUTED, linewidth=1, linestyle=":")
        mass.annotate(
            "the gate",
            (0.02, 100 * MIN_MASS),
            xycoords=("axes fraction", "data"),
            xytext=(0, -11),
            textcoords="offset points",
            fontsize=TEXT,
            color=MUTED,
        )
        mass.set_title(f"{row['on']}, {row['task']}", loc="left")
    kinds = {point["kind"]: KINDS[point["kind"]] for row in rows for point in row["front"]}
    empty = figure.axes[0]
    handles = [
        empty.scatter([], [], color=color, marker=marker, s=30, label=f"on the front: {kind}")
        for kind, (color, marker) in kinds.items()
    ]
    handles.append(empty.scatter([], [], color=FAINT, s=12, label="other candidates"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    title(figure, "Pareto front of memory, time and mass", "predicted; the picks in red")


def _cloud(axes: Any, row: Row, name: str) -> None:
    """Candidates faint, the front by kind, the best of two as a line, the picks by name; `name` over time."""
    label, scale = SHOWN[name]
    every, front = row["candidates"], row["front"]
    # As pixels: thousands of shapes would make a vector picture of megabytes.
    axes.scatter(
        _ms(every["seconds"]), [scale * y for y in every[name]], color=FAINT, s=3, zorder=1, rasterized=True
    )
    best = itertools.accumulate((scale * point[name] for point in front), max if name == "mass" else min)
    axes.plot(
        _ms(point["seconds"] for point in front),
        list(best),
        color=INK,
        linewidth=0.9,
        drawstyle="steps-post",
        zorder=2,
    )
    for point in front:
        color, marker = KINDS[point["kind"]]
        axes.scatter(1e3 * point["seconds"], scale * point[name], color=color, marker=marker, s=30, zorder=3)
    places: dict[tuple[float, float], list[str]] = {}
    for one in row["picks"]:
        places.setdefault((1e3 * one["seconds"], scale * one[name]), []).append(one["role"])
    for place, roles in places.items():
        axes.scatter(*place, s=150, facecolors="none", edgecolors=RED, linewidths=1.5, zorder=4)
        axes.annotate(
            ", ".join(roles),
            place,
            xytext=(-6, 8),
            textcoords="offset points",
            ha="right",
            color=RED,
            fontsize=TEXT,
            zorder=4,
            bbox=NAME,
        )
    axes.set(xscale="log", xlabel="predicted ms a call", ylabel=label)
    axes.margins(y=0.1)
    plain(axes.xaxis)
    axes.grid(axis="y")


def _ms(seconds: Iterable[float]) -> list[float]:
    return [1e3 * each for each in seconds]


def findings(rows: Results) -> Findings:
    clauses = []
    for row in rows:
        picks = "; ".join(
            f"{one['role']} {one['kind']}, {1e3 * one['seconds']:,.0f} ms, {one['mass']:.0%} of the mass"
            for one in row["picks"]
        )
        memory = [point["mb"] for point in row["front"]]
        apart = rounded_up(max(memory) / min(memory) - 1, 2)
        clauses.append(
            f"{row['name']}: of {row['grid']:,} candidates {row['passed']:,} pass and {len(row['front'])} "
            f"are on the Pareto front ({picks}), within {apart:.0%} of each other in memory"
        )
    return Findings(
        "Asked: what can be had for less memory, less time or less of dense attention's mass?",
        f"Found (predicted): {'. '.join(clauses)}.",
        "The original project weighs memory against speed alone, where there is no reason to attend to more; "
        f"with mass as a third aim there are {' and '.join(str(len(row['front'])) for row in rows)} to "
        "choose from.",
    )


STUDY = Study(
    steps,
    {"pareto": picks_table, "pareto-front": front_table},
    draw,
    findings,
    devices=("cpu",),
    independent=True,
)
