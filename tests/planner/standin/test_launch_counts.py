"""The closed form of the number of launches equals what torch's host code launches, on every card.

`python tests/planner/standin/test_launch_counts.py` records the sample that a fast test holds the form to.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from planner import gpus
from planner.configs import columns_of
from planner.memory.dispatch import calls_of, lists_of, shape_of
from planner.memory.estimate import machine_of
from planner.memory.launches import launches_of
from planner.standin.zygote import Zygote
from studies.bench.dry import CARDS, DryCase, cases

pytestmark = [pytest.mark.slow, pytest.mark.dry]

RECORDED = Path(__file__).parents[1] / "memory" / "launch_rows.json"
KINDS = ("calls", "turned windows", "lists")
COUNT = int(os.environ.get("PLANNER_DRY_LAUNCHES", "60"))


def kind_of(case: DryCase) -> str | None:
    """What a case is made of: lists, windows that are not causal on a kernel whose windows are, or other
    whole calls; None for what nobody counts."""
    config, task, card = case
    if config.multihead or task.weights or config.variant == "adaptive":
        return None
    columns = columns_of(config, task.seq)
    shape = shape_of(columns, task, machine_of(gpus.find(card), task.dtype, None))
    if lists_of(columns, shape) is not None:
        return "lists"
    if calls_of(columns, shape) is None:
        return None
    turns = shape.windows == "causal" and config.variant == "block_sparse" and not task.causal
    return "turned windows" if turns else "calls"


def counted(zygote: Zygote, folder: Path, some: list[DryCase]) -> list[dict]:
    """A row for each case, by card."""
    rows = []
    for card in CARDS:
        mine = [
            {
                "card": card,
                "config": case.config.model_dump(mode="json", exclude_defaults=True),
                "workload": case.workload.model_dump(mode="json", exclude_defaults=True),
            }
            for case in some
            if case.card == card
        ]
        if not mine:
            continue
        log = folder / f"launches {card}"
        variables = {"STANDIN_LAUNCHES": str(log), "ATTENTION_TRUST_KERNELS": "1"}
        asked = {"log": str(log), "cases": mine}
        end = zygote.run("dry_launches", "run", asked, gpu=gpus.find(card), variables=variables)
        assert end.kind == "ok", end.value
        rows += [row | {"kernels": kernels} for row, kernels in zip(mine, end.value, strict=True)]
    return rows


def drawn(seed: int, count: int) -> list[DryCase]:
    """So many cases, equally many of each kind."""
    return [
        case
        for kind in KINDS
        for case in islice(
            (one for one in cases(seed, flex=0.0) if kind_of(one) == kind), count // len(KINDS)
        )
    ]


def test_every_kernel_is_counted(dry, seed, tmp_path):
    for (config, task, card), row in zip(
        sorted(drawn(seed, COUNT), key=lambda case: CARDS.index(case.card)),
        counted(dry, tmp_path, drawn(seed, COUNT)),
        strict=True,
    ):
        # There is no cuDNN in a dry run.
        machine = replace(machine_of(gpus.find(card), task.dtype, None), cudnn=False)
        launches = launches_of(config, task, machine)
        assert [launches.forward, launches.backward] == row["kernels"], row


def main(python: str, folder: str, seed: int = 1, count: int = 60) -> None:
    """Records what `count` cases launch."""
    from planner.standin.install import torch_for
    from planner.standin.interpreter import interpreter

    build, ahead = torch_for(interpreter(python))
    here = Path(__file__).parent
    with Zygote(gpus.find("rtx4090"), torch=build, ahead=ahead, path=[here]) as zygote:
        rows = counted(zygote, Path(folder), drawn(seed, count))
    RECORDED.write_text("[\n " + ",\n ".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.executable, *sys.argv[1:2])
