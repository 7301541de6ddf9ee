"""Does what is recommended fit, for real? `python -m studies.fits`

Random budgets on the CPU: recommend, build, run with every allocation counted, compare with the budget.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from statistics import median
from typing import Any, Final

import torch

from planner import recommend
from planner.batch import Batch
from planner.search.relax import NothingFitsError
from studies.records import Row, Step, at_least_one, collect, markdown

COMMAND = "python -m studies.fits"
SEED: Final = 3
BUDGETS = 100
LEAST, MOST = 64e6, 4e9
TIMEOUT: Final = 600.0
CPU = torch.device("cpu")


def question(number: int, least: float = LEAST, most: float = MOST) -> dict[str, Any]:
    """The n-th budget, and what is asked of it; `speed` at a length that may fit."""
    rng = random.Random(f"{SEED} {number}")
    budget = math.exp(rng.uniform(math.log(least), math.log(most)))
    asked: dict[str, Any] = {
        "vram": int(budget), "gpu": "cpu", "heads": rng.choice((2, 4, 8)),
        "head_dim": rng.choice((32, 64, 128)), "dtype": rng.choice(("float32", "bfloat16", "float16")),
        "mode": rng.choice(("inference", "training")), "causal": rng.random() < 0.5,
        "objective": ("speed", "seq")[number % 2],
    }  # fmt: skip
    if asked["objective"] == "speed":
        size = 4 if asked["dtype"] == "float32" else 2
        token = 4 * asked["heads"] * asked["head_dim"] * size * (2 if asked["mode"] == "training" else 1)
        asked["seq"] = max(int(budget / token * rng.uniform(0.3, 0.97)), 1)
    return asked


def budget_row(asked: dict[str, Any], batch: Batch) -> Row:
    """One budget: what was recommended, and what it took."""
    row: Row = {"asked": asked, "objective": asked["objective"], "budget": asked["vram"]}
    try:
        found = recommend(**asked, trials=0)
    except NothingFitsError as error:
        return row | {"outcome": "nothing fits", "relaxations": list(error.relaxations)}
    measured = batch.measure(found.config, found.workload)
    return row | {
        "outcome": measured.kind,
        "message": measured.message,
        "config": found.config.model_dump(mode="json", exclude_defaults=True),
        "seq": found.workload.seq,
        "upper": found.memory.upper,
        "allocated": measured.allocated,
    }


def fits_table(rows: list[Row]) -> str:
    """By objective and together."""
    ordered = sorted(rows, key=lambda row: row["objective"])
    groups = [(name, list(group)) for name, group in groupby(ordered, key=lambda row: row["objective"])]
    return markdown(
        [_fits(name, group) for name, group in [*groups, ("all", rows)]],
        ["objective", "budgets", "nothing fits", "did not run", "above the budget", "above the bound",
         "budget used, median", "most"],
    )  # fmt: skip


def _fits(name: str, rows: Sequence[Row]) -> list[str]:
    asked = [row for row in rows if row["outcome"] != "nothing fits"]
    good = [row for row in asked if row["outcome"] == "ok"]
    used = [row["allocated"] / row["budget"] for row in good]
    return [
        name, str(len(rows)), str(len(rows) - len(asked)), str(len(asked) - len(good)),
        str(sum(share > 1 for share in used)), str(sum(row["allocated"] > row["upper"] for row in good)),
        f"{median(used):.1%}" if used else "", f"{max(used):.1%}" if used else "",
    ]  # fmt: skip


def steps(count: int, batch: Batch) -> list[Step]:
    """A step a budget."""
    asked = [question(number) for number in range(count)]
    return [(f"{n} {one['objective']}", partial(budget_row, one, batch)) for n, one in enumerate(asked)]


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {"fits": ("fits", fits_table)}
"""The docs' tables: the study whose data they show, and what makes them from its rows."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, epilog=f"example: {COMMAND}")
    parser.add_argument("--budgets", type=at_least_one, default=BUDGETS, help=f"how many ({BUDGETS})")
    parser.add_argument("--quick", action="store_true", help="saves nothing")
    options = parser.parse_args(arguments)
    command = COMMAND if options.budgets == BUDGETS else f"{COMMAND} --budgets {options.budgets}"
    with Batch("cpu", timeout=TIMEOUT) as batch:
        rows = collect("fits", command, CPU, steps(options.budgets, batch), keep=not options.quick)
    print(fits_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
