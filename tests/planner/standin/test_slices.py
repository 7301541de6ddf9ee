"""Calls of the efficient kernel whose queries are cut into slices: bytes and kernels are what torch's host
code takes and launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import planner
from attention import AttentionConfig, SparsePatternConfig
from planner import gpus
from planner.memory.estimate import machine_of
from planner.memory.launches import launches_of
from planner.workload import Workload

pytestmark = [pytest.mark.slow, pytest.mark.dry]

CASES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("gtx1060", {"block_size": 32, "local_window_size": 207_360}, {"seq": 207_365}),
    (
        "gtx1060",
        {"local_window_size": 99_072},
        {"seq": 443_890, "heads": 2, "head_dim": 128, "causal": False},
    ),
    ("t4", {"local_window_size": 54_528}, {"seq": 119_879, "head_dim": 100, "dtype": "float32"}),
    ("v100-pcie-32gb", {"local_window_size": 40_064}, {"seq": 90_001, "heads": 2, "batch": 2}),
    ("rtx5070", {"local_window_size": 59_392}, {"seq": 127_124, "dtype": "float32", "causal": False}),
)


@pytest.mark.parametrize("card, pattern, sizes", CASES)
def test_plans_and_launches_are_what_dry_runs_take(card, pattern, sizes, dry, tmp_path):
    pattern = SparsePatternConfig(pattern_type="global_local", global_tokens=1024, **pattern)
    config = AttentionConfig(variant="block_sparse", pattern=pattern, backend="sdpa", workspace_bytes=4 << 20)
    task = Workload(**({"heads": 1, "dtype": "float16", "mode": "training", "causal": True} | sizes))
    log = tmp_path / "launches"
    asked = {"config": config.model_dump(mode="json"), "workload": task.model_dump(mode="json")}
    variables = {"STANDIN_LAUNCHES": str(log), "ATTENTION_TRUST_KERNELS": "1"}
    arguments = {"log": str(log), **asked}
    end = dry.run("dry_cut_calls", "run", arguments, gpu=gpus.find(card), variables=variables)
    assert end.kind == "ok", end.value
    estimate = planner.estimate(config, task, card, dry=True)
    assert (estimate.allocated, estimate.reserved) == (end.value["allocated"], end.value["reserved"])
    launches = launches_of(config, task, replace(machine_of(gpus.find(card), task.dtype, None), cudnn=False))
    assert [launches.forward, launches.backward] == end.value["kernels"]
