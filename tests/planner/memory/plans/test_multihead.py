"""The plan of an attention between projections: against what torch's profiler counts, and on arrays."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from attention import AttentionConfig, MultiheadConfig, SparsePatternConfig
from attention.sizes.tiles import dilated_extent
from planner.configs import Columns
from planner.measuring.call import call_of
from planner.measuring.footprint import footprints
from planner.memory.dispatch import case_of, plan_of
from planner.memory.machines import Cpu, this_cpu
from planner.memory.plans import tiles as plans
from planner.memory.plans.multihead import multihead
from planner.memory.table import PlanTable
from planner.workload import Workload

CASES = 9
SLACK = 4096
"""Bytes that a plan may be off whatever the peak."""


def machine(dtype: str) -> Cpu:
    return replace(this_cpu(dtype), threads=torch.get_num_threads())


def measured(config: AttentionConfig, workload: Workload) -> int:
    """Peak of a first call, and in training of its backward."""
    call = call_of(config, workload, torch.device("cpu"))
    call.start_cold()
    return call.nbytes + footprints([call], torch.device("cpu"))[0].peak


def predicted(config: AttentionConfig, workload: Workload) -> int:
    return plan_of(config, workload, machine(workload.dtype)).peak()[1]


def around(workload: Workload, bias=True, checkpoint=False, **options) -> AttentionConfig:
    """A config of projections for the workload's sizes."""
    parts = MultiheadConfig(
        embed_dim=workload.heads * workload.head_dim,
        num_heads=workload.heads,
        kv_heads=workload.kv_heads,
        bias=bias,
        checkpoint=checkpoint,
    )
    return AttentionConfig(multihead=parts, **{"variant": "dense", **options})


def random_case(rng: random.Random) -> tuple[AttentionConfig, Workload]:
    heads = rng.choice([1, 2, 4])
    workload = Workload(
        seq=rng.choice([1, 2, 17, 100, 256, rng.randint(2, 400)]),
        batch=rng.choice([1, 1, 2]),
        heads=heads,
        kv_heads=rng.choice([n for n in (1, 2, 4) if heads % n == 0]),
        head_dim=rng.choice([4, 8, 16, 33]),
        dtype=rng.choice(["float16", "bfloat16", "float32", "float64"]),
        mode=rng.choice(["inference", "training"]),
        causal=rng.random() < 0.5,
    )
    variant = rng.choice(["dense", "dilated", "block_sparse"])
    options = {"workspace_bytes": rng.choice([1 << 18, 1 << 22]), "pool": rng.choice(["auto", "off", "on"])}
    if variant == "dilated":
        options |= {"segment_lengths": (64, 256), "dilation_rates": (1, rng.choice([2, 3]))}
    if variant == "block_sparse":
        kind = rng.choice(["local_window", "global_local", "dilated_sparse"])
        options["pattern"] = SparsePatternConfig(
            pattern_type=kind,
            block_size=32,
            local_window_size=rng.choice([32, 64]),
            global_tokens=16,
            sparsity_ratio=rng.choice([0.1, 0.5]),
        )
        options |= {"segment_lengths": (64, 128), "dilation_rates": (1, rng.choice([1, 2]))}
    bias, checkpoint = rng.random() < 0.5, rng.random() < 0.5
    return around(workload, bias, checkpoint, variant=variant, **options), workload


def test_random_modules_take_what_their_plans_say():
    rng, errors = random.Random(7), []
    for _ in range(CASES):
        config, workload = random_case(rng)
        found, expected = measured(config, workload), predicted(config, workload)
        off = expected - found
        assert -max(SLACK, found // 200) <= off <= max(SLACK, found // 100), (
            config,
            workload,
            found,
            expected,
        )
        errors.append(abs(off) / found)
    assert statistics.median(errors) <= 0.001


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_few_tokens_take_what_the_parameters_and_their_gradients_take(dtype, checkpoint, bias, mode):
    workload = Workload(seq=2, batch=2, heads=4, kv_heads=2, head_dim=32, dtype=dtype, mode=mode)
    config = around(workload, bias, checkpoint, pool="off")
    assert predicted(config, workload) == measured(config, workload)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("variant", ["dense", "dilated"])
def test_training_is_exact_to_the_byte(variant, checkpoint):
    options = {"segment_lengths": (64, 256), "dilation_rates": (1, 2)} if variant == "dilated" else {}
    workload = Workload(seq=300, heads=4, head_dim=16, dtype="float32", mode="training", causal=True)
    config = around(workload, checkpoint=checkpoint, variant=variant, **options)
    assert predicted(config, workload) == measured(config, workload)


def test_the_components_are_the_modules():
    workload = Workload(seq=64, heads=4, kv_heads=2, head_dim=8, dtype="float32", mode="training")
    plan = plan_of(around(workload), workload, machine("float32"))
    phase, _ = plan.peak()
    found = plan.components(phase)
    weights = (64 + 32) * (32 + 1) * 4
    assert found["parameters"] == weights
    assert plan.components("inputs") == {"qkv": 64 * 32 * 4, "gradients": 64 * 32 * 4, "parameters": weights}
    # The input, and q, k and v.
    assert found["qkv"] == 64 * (32 + 32 + 16 + 16) * 4


def test_checkpointing_repeats_the_forward_pass():
    workload = Workload(seq=300, heads=2, head_dim=8, dtype="bfloat16", mode="training")
    options = {"variant": "dilated", "segment_lengths": (64, 256), "dilation_rates": (1, 2)}
    once, twice = (
        plan_of(around(workload, checkpoint=c, pool="on", **options), workload, machine("bfloat16"))
        for c in (False, True)
    )
    repeated = [name for name in once.phases if name.startswith(("input proj", "forward, "))]
    assert repeated
    assert all(f"unsaved {name}" in twice.phases and name in twice.phases for name in repeated)
    assert len(set(twice.phases)) == len(twice.phases)
    # Between the two, only the arena is there that the pool keeps, beside what the caller holds.
    assert set(twice.components("output projection")) - {"workspace"} == {
        "qkv",
        "output",
        "gradients",
        "parameters",
        "memory_pool",
    }


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_arrays_give_what_ints_give(checkpoint, mode):
    seqs, workspaces = (
        np.array([1, 33, 64, 500, 4097]),
        np.array([1 << 16, 1 << 18, 1 << 20, 1 << 16, 1 << 24]),
    )
    pools = np.array([0, 1, 1, 0, 1])
    workload = Workload(seq=1, heads=4, kv_heads=2, head_dim=8, dtype="bfloat16", mode=mode, causal=True)
    branches = ((64, 1), (256, 2))

    def plan(seq, workspace, pool):
        columns = Columns("dense", seq=seq, workspace=workspace)
        case = case_of(columns, workload, machine("bfloat16"))._replace(pool=pool)
        table = PlanTable()

        def attend(table, case):
            plans.program(table, case, plans.once(case.shape, partial(dilated_extent, branches)))

        multihead(table, case, attend, bias=True, checkpoint=checkpoint)
        return table.done()

    found = plan(seqs, workspaces, pools).peaks()
    each = [
        plan(*sizes).peak()[1]
        for sizes in zip(seqs.tolist(), workspaces.tolist(), pools.tolist(), strict=True)
    ]
    assert found.tolist() == each
