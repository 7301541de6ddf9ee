"""Launches in closed form: what dry runs launched, kernel for kernel, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import planner
from attention import AttentionConfig, MultiheadConfig, SparsePatternConfig
from planner import gpus
from planner.configs import Columns
from planner.memory.estimate import machine_of
from planner.memory.launches import launches, launches_of
from planner.report.text.estimate import estimate_text
from planner.workload import Workload

ROWS = json.loads((Path(__file__).parent / "launch_rows.json").read_text(encoding="utf-8"))
DENSE = AttentionConfig(variant="dense")
A100 = machine_of(gpus.find("a100-sxm4-80gb"), "float16", None)


def named(row):
    pattern = (row["config"].get("pattern") or {}).get("pattern_type", "")
    task = row["workload"]
    parts = (row["card"], row["config"]["variant"], pattern, task.get("mode", ""), f"{task['seq']} tokens")
    return " ".join(filter(None, parts))


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_dry_runs_launched_as_many(row):
    """tests/planner/standin/test_launch_counts.py records them, and holds many more to it."""
    config, task = AttentionConfig(**row["config"]), Workload(**row["workload"])
    counted = launches_of(config, task, machine_of(gpus.find(row["card"]), task.dtype, None))
    assert [counted.forward, counted.backward] == row["kernels"]
    assert counted.number == sum(row["kernels"])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("edges", ["block", "token"])
@pytest.mark.parametrize("card", ["a100-sxm4-80gb", "t4"])
def test_many_candidates_are_each_as_one(card, edges, causal):
    machine = machine_of(gpus.find(card), "float16", None)
    task = Workload(seq=1, batch=2, heads=6, kv_heads=3, head_dim=40, mode="training", causal=causal)
    seq, window = np.array([100, 4096, 65_537, 777]), np.array([128, 512, 1024, 64])
    columns = Columns(
        "block_sparse", "global_local", seq=seq, block_size=64, window=window, global_tokens=64, edges=edges
    )
    many = launches(columns, task, machine)
    if many is None:
        assert card == "t4"
        assert not causal
        return
    for n in range(len(seq)):
        pattern = SparsePatternConfig(
            pattern_type="global_local",
            block_size=64,
            local_window_size=int(window[n]),
            global_tokens=64,
            edges=edges,
        )
        config = AttentionConfig(variant="block_sparse", pattern=pattern)
        one = launches_of(config, task.model_copy(update={"seq": int(seq[n])}), machine)
        assert (many.forward[n], many.backward[n], many.attention[n]) == one


def test_a_checkpoint_launches_forward_twice():
    task = Workload(seq=4096, heads=8, head_dim=64, mode="training")
    plain, again = (
        launches_of(
            AttentionConfig(
                variant="dense", multihead=MultiheadConfig(embed_dim=512, num_heads=8, checkpoint=checkpoint)
            ),
            task,
            A100,
        )
        for checkpoint in (False, True)
    )
    assert again.forward == plain.forward
    assert again.backward == plain.backward + plain.forward


def test_nothing_is_said_of_a_cpu_and_of_weights():
    assert launches_of(DENSE, Workload(seq=64), machine_of("cpu", "float32", 1)) is None
    assert launches_of(DENSE, Workload(seq=64, weights=True), A100) is None


def test_an_estimate_shows_them():
    task = Workload(seq=32_768, heads=64, kv_heads=8, head_dim=128, mode="training", causal=True)
    estimate = planner.estimate(DENSE, task, "a100-sxm4-80gb")
    assert estimate.launches == 21
    assert "\nlaunches     21 kernels\n" in estimate_text(estimate, None, lines=False) + "\n"
    on_cpu = planner.estimate(DENSE, Workload(seq=64))
    assert on_cpu.launches is None
    assert "launches" not in estimate_text(on_cpu, None, lines=False)
