"""Fewer queries than keys, and documents, as whole calls: bytes and kernels are what torch's host code takes
and launches, on four cards.

`python tests/planner/standin/test_cut_calls.py FOLDER` records what fast tests hold plans and launches to.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import planner
from attention import AttentionConfig, SparsePatternConfig
from planner import gpus
from planner.memory.estimate import machine_of
from planner.memory.launches import launches_of
from planner.standin.zygote import Zygote
from planner.workload import Workload

pytestmark = [pytest.mark.slow, pytest.mark.dry]

RECORDED = Path(__file__).parents[1] / "memory" / "cut_rows.json"
CARDS = ("rtx4090", "a100-sxm4-80gb", "t4", "h100-sxm")


def windowed(kind: str, edges: str, window: int) -> AttentionConfig:
    pattern = SparsePatternConfig(
        pattern_type=kind, block_size=32, local_window_size=window, global_tokens=40, edges=edges
    )
    return AttentionConfig(variant="block_sparse", pattern=pattern)


DENSE = AttentionConfig(variant="dense")
WINDOW = windowed("local_window", "token", 1023)
CASES: tuple[tuple[AttentionConfig, dict[str, Any]], ...] = (
    (DENSE, {"queries": 1}),
    (DENSE, {"queries": 512, "batch": 2, "mode": "training"}),
    (WINDOW, {"queries": 1}),
    (WINDOW, {"queries": 600, "mode": "training"}),
    (windowed("local_window", "block", 256), {"queries": 1000, "mode": "training"}),
    (windowed("global_local", "block", 256), {"queries": 1}),
    (windowed("global_local", "token", 255), {"queries": 700, "batch": 2, "mode": "training"}),
    (
        AttentionConfig(variant="dilated", segment_lengths=(256, 1000), dilation_rates=(1, 4)),
        {"queries": 512, "mode": "training"},
    ),
    (DENSE, {"documents": (1500, 96, 2500), "mode": "training", "batch": 2}),
    (WINDOW, {"documents": (1500, 96, 2500), "mode": "training"}),
    (WINDOW, {"documents": (1500, 96, 2500), "queries": 1}),
    (WINDOW, {"queries": 600, "sinks": True, "mode": "training"}),
)


def rows_of(zygote: Zygote, folder: Path) -> list[dict[str, Any]]:
    """What each case takes and launches on each card."""
    rows = []
    for card in CARDS:
        tiles = card == "t4"  # of documents
        dtype = "float16" if tiles else "bfloat16"
        mine = [
            {
                "card": card,
                "config": config.model_dump(mode="json", exclude_defaults=True),
                "workload": {"seq": 4096, "heads": 8, "kv_heads": 2, "causal": True, "dtype": dtype} | fields,
            }
            for config, fields in CASES
            if not (tiles and "documents" in fields)
        ]
        log = folder / f"launches {card}"
        variables = {"STANDIN_LAUNCHES": str(log), "ATTENTION_TRUST_KERNELS": "1"}
        for row in mine:
            asked = {"log": str(log), "config": row["config"], "workload": row["workload"]}
            end = zygote.run("dry_cut_calls", "run", asked, gpu=gpus.find(card), variables=variables)
            assert end.kind == "ok", end.value
            rows.append(row | end.value)
    return rows


def test_plans_and_launches_are_what_dry_runs_take(dry, tmp_path):
    for row in rows_of(dry, tmp_path):
        config, task = AttentionConfig(**row["config"]), Workload(**row["workload"])
        estimate = planner.estimate(config, task, row["card"], dry=True)
        assert (estimate.allocated, estimate.reserved) == (row["allocated"], row["reserved"]), row
        machine = replace(machine_of(gpus.find(row["card"]), task.dtype, None), cudnn=False)
        launches = launches_of(config, task, machine)
        assert [launches.forward, launches.backward] == row["kernels"], row


def main(python: str, folder: str) -> None:
    """Records what the cases take."""
    from planner.standin.install import torch_for
    from planner.standin.interpreter import interpreter

    build, ahead = torch_for(interpreter(python))
    here = Path(__file__).parent
    with Zygote(gpus.find("rtx4090"), torch=build, ahead=ahead, path=[here]) as zygote:
        rows = rows_of(zygote, Path(folder))
    RECORDED.write_text("[\n " + ",\n ".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.executable, *sys.argv[1:2])
