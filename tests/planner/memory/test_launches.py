"""Launches in closed form: what dry runs launched, kernel for kernel, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import planner
from attention import AdaptiveConfig, AttentionConfig, MultiheadConfig, SparsePatternConfig
from attention.layout import build_layout
from planner import gpus
from planner.configs import Columns, columns_of
from planner.memory.dispatch import plan_of, planned, shape_of
from planner.memory.estimate import machine_of
from planner.memory.launches import launches, launches_of
from planner.memory.list_launches import ListedRows
from planner.report.text.estimate import estimate_text
from planner.workload import Workload

ROWS, CUT = (
    json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
    for name in ("launch_rows.json", "cut_rows.json")
)
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
    machine = replace(machine_of(gpus.find(row["card"]), task.dtype, None), cudnn=False)
    counted = launches_of(config, task, machine)
    assert [counted.forward, counted.backward] == row["kernels"]
    assert counted.number == sum(row["kernels"])


@pytest.mark.parametrize("row", CUT, ids=named)
def test_dry_runs_of_fewer_queries_and_documents_launched_as_many(row):
    """tests/planner/standin/test_cut_calls.py records them."""
    config, task = AttentionConfig(**row["config"]), Workload(**row["workload"])
    machine = replace(machine_of(gpus.find(row["card"]), task.dtype, None), cudnn=False)
    counted = launches_of(config, task, machine)
    assert [counted.forward, counted.backward] == row["kernels"]


def test_dilated_branches_whose_heads_begin_at_other_queries_are_not_counted():
    config = AttentionConfig(variant="dilated", segment_lengths=(256, 1000), dilation_rates=(1, 4))
    task = Workload(seq=4096, queries=511, dtype="float16")
    assert launches_of(config, task, A100) is None
    assert launches_of(config, task.model_copy(update={"queries": 512}), A100) is not None


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("edges", ["block", "token"])
@pytest.mark.parametrize("card", ["a100-sxm4-80gb", "t4"])
@pytest.mark.parametrize("queries", [None, 1, 90])
def test_many_candidates_are_each_as_one(queries, card, edges, causal):
    machine = machine_of(gpus.find(card), "float16", None)
    task = Workload(seq=100, batch=2, heads=6, kv_heads=3, head_dim=40, mode="training", causal=causal)
    task = task.model_copy(update={"queries": queries})
    seq, window = np.array([100, 4096, 65_537, 777]), np.array([128, 512, 1024, 64])
    columns = Columns(
        "block_sparse", "global_local", seq=seq, block_size=64, window=window, global_tokens=64, edges=edges
    )
    many = launches(columns, task, machine)
    together = planned(columns, task, machine, apart=False).peaks()
    for n in range(len(seq)):
        pattern = SparsePatternConfig(
            pattern_type="global_local",
            block_size=64,
            local_window_size=int(window[n]),
            global_tokens=64,
            edges=edges,
        )
        config = AttentionConfig(variant="block_sparse", pattern=pattern)
        alone = task.model_copy(update={"seq": int(seq[n])})
        one = launches_of(config, alone, machine)
        assert (many.forward[n], many.backward[n], many.attention[n]) == one
        assert together[n] == plan_of(config, alone, machine).peak()[1]


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


def test_nothing_is_said_of_what_a_gpu_decides():
    """What an adaptive attention chooses, and what the engines of cuDNN's attention launch."""
    h100 = machine_of(gpus.find("h100-sxm"), "float16", None)
    task = Workload(seq=4096, heads=8, head_dim=64)
    assert launches_of(DENSE, task, h100) is None
    assert launches_of(DENSE.model_copy(update={"backend": "flash"}), task, h100).number == 1
    adaptive = AttentionConfig(
        variant="adaptive",
        pattern=SparsePatternConfig(sparsity_ratio=0.1),
        adaptive=AdaptiveConfig(num_heads=8, head_dim=64),
    )
    assert launches_of(adaptive, task, A100) is None


def test_lists_that_are_cut_into_very_many_parts_are_not_counted():
    pattern = SparsePatternConfig(block_size=16, sparsity_ratio=0.3)
    config = AttentionConfig(
        variant="block_sparse",
        pattern=pattern,
        segment_lengths=(4096, 65_536),
        dilation_rates=(1, 4),
        workspace_bytes=1 << 16,
        backend="sdpa",
    )
    task = Workload(seq=1 << 20, heads=8, head_dim=128)
    assert launches_of(config, task, A100) is None
    assert launches_of(config, task.model_copy(update={"seq": 4096}), A100).number > 0


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_blocks_that_rows_gather_are_those_of_the_layout(causal):
    for lengths, rates, seq, ratio in (
        ((64, 256), (1, 3), 1000, 0.1),
        ((512,), (5,), 4096, 0.05),
        ((128, 1024, 96), (2, 4, 1), 2500, 0.3),
    ):
        config = AttentionConfig(
            variant="block_sparse",
            pattern=SparsePatternConfig(block_size=16, sparsity_ratio=ratio),
            segment_lengths=lengths,
            dilation_rates=rates,
        )
        shape = shape_of(
            columns_of(config, seq), Workload(seq=seq, heads=2, head_dim=64, causal=causal), A100
        )
        rows, layout = ListedRows.of(config, shape), build_layout(config, seq, causal)
        lists = [
            set(layout.row(i).tolist()) - ({i} if causal else set()) or {0} for i in range(layout.blocks)
        ]
        assert rows.gathered.tolist() == [len(some) for some in lists]
        for begin, end in ((0, layout.blocks), (0, 3), (7, 9), (20, 51), (layout.blocks - 4, layout.blocks)):
            assert rows.different(begin, end) == len(set.union(*lists[begin:end]))


def test_an_estimate_shows_them():
    task = Workload(seq=32_768, heads=64, kv_heads=8, head_dim=128, mode="training", causal=True)
    estimate = planner.estimate(DENSE, task, "a100-sxm4-80gb")
    assert estimate.launches == 21
    assert "\nlaunches     21 kernels\n" in estimate_text(estimate, None, lines=False) + "\n"
    on_cpu = planner.estimate(DENSE, Workload(seq=64))
    assert on_cpu.launches is None
    assert "launches" not in estimate_text(on_cpu, None, lines=False)
