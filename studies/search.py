"""How near does the search come to the exact optimum? `python -m studies.search`

Random questions: what `recommend` answers against the exact optimum of the grid, and Optuna alone from a cold
start against the same.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, Final

import numpy as np
import torch

from planner.gpus import known
from planner.recommendation import better, question
from planner.search.refine import refine
from planner.search.relax import NothingFitsError
from planner.search.scenario import gain
from planner.workload import Workload
from studies.records import Row, Step, at_least_one, collect, markdown

COMMAND = "python -m studies.search"
SEED: Final = 7
SCENARIOS, TRIALS = 200, 300
CPU = torch.device("cpu")


def scenario(number: int) -> dict[str, Any]:
    """A question, the n-th: budget 1 to 80 GB, 1K to 2M tokens, heads, dtype, mode, objective, card."""
    rng = random.Random(f"{SEED} {number}")
    objective = ("speed", "seq", "quality")[number % 3]
    gpu = rng.choice([card for card in known() if card.rates.get("float16")])
    dtypes = ["float16", "float32"] + ["bfloat16"] * (gpu.capability >= (8, 0))
    budget = min(np.exp(rng.uniform(np.log(1e9), np.log(80e9))), float(gpu.usable_bytes))
    heads = rng.choice((1, 4, 8, 16, 32))
    asked: dict[str, Any] = {
        "vram": int(budget), "gpu": gpu.key, "heads": heads, "head_dim": rng.choice((32, 64, 128)),
        "kv_heads": rng.choice((None, max(heads // 4, 1))), "dtype": rng.choice(dtypes),
        "mode": rng.choice(("inference", "training")), "causal": rng.random() < 0.5, "objective": objective,
    }  # fmt: skip
    if objective != "seq":
        sizes = {name: asked[name] for name in ("heads", "head_dim", "kv_heads", "dtype")}
        token = Workload(seq=1, **sizes).floor * (2 if asked["mode"] == "training" else 1)
        most = max(min(2 << 20, (budget - 1e9) * 0.9 / token), 1025)
        asked["seq"] = round(np.exp(rng.uniform(np.log(1024), np.log(most))))
    if objective == "quality":
        asked["max_seconds"] = float(np.exp(rng.uniform(np.log(1e-3), np.log(3))))
    return asked


def scenario_row(asked: dict[str, Any], trials: int) -> Row:
    """One question, answered, and asked of Optuna alone."""
    row: Row = {"asked": asked, "objective": asked["objective"]}
    try:
        found = question(**asked)
    except NothingFitsError as error:
        return row | {"outcome": "nothing fits", "relaxations": list(error.relaxations)}
    alone = refine(found.scenario, found.space, [], trials=trials).best
    best = found.grid
    assert best is not None
    answer = better(found.scenario, best, found.best)
    assert answer is not None
    return row | {
        "outcome": "ok",
        "grid": found.answer.search.grid,
        "answer": gain(found.scenario, best, answer),
        "cold": None if alone is None else gain(found.scenario, best, alone),
    }


def gaps_table(rows: list[Row]) -> str:
    """By objective and together; of seconds and tokens a share, of mass a difference."""
    ordered = sorted(rows, key=lambda row: row["objective"])
    groups = [(name, list(group)) for name, group in groupby(ordered, key=lambda row: row["objective"])]
    return markdown(
        [_gaps(name, group) for name, group in [*groups, ("all", rows)]],
        ["objective", "questions", "nothing fits", "answer worse than the grid's optimum by more than 1%",
         "answer better, median", "answer better, most", "cold: within 5%", "cold: within 1%",
         "cold: nothing found", "cold: better than the grid"],
    )  # fmt: skip


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


def steps(count: int, trials: int) -> list[Step]:
    """A step a question."""
    asked = [scenario(number) for number in range(count)]
    return [(f"{n} {one['objective']}", partial(scenario_row, one, trials)) for n, one in enumerate(asked)]


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {"search": ("search", gaps_table)}
"""The docs' tables: the study whose data they show, and what makes them from its rows."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, epilog=f"example: {COMMAND}")
    parser.add_argument("--scenarios", type=at_least_one, default=SCENARIOS, help=f"questions ({SCENARIOS})")
    parser.add_argument("--trials", type=at_least_one, default=TRIALS, help=f"of Optuna alone ({TRIALS})")
    parser.add_argument("--quick", action="store_true", help="saves nothing")
    options = parser.parse_args(arguments)
    usual: Any = {"scenarios": SCENARIOS, "trials": TRIALS}
    asked = [f"--{name} {getattr(options, name)}" for name in usual if getattr(options, name) != usual[name]]
    rows = collect(
        "search", " ".join([COMMAND, *asked]), CPU, steps(options.scenarios, options.trials),
        keep=not options.quick,
    )  # fmt: skip
    print(gaps_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
