"""The plan of a second call, with what the first left in pool and caches: against what is counted."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from attention import AttentionConfig, MultiheadConfig, SparsePatternConfig
from attention.sizes.row_bounds import window_rows
from attention.sizes.tiles import sparse_extent
from planner.configs import Columns
from planner.measuring.call import call_of
from planner.measuring.footprint import footprints
from planner.memory.dispatch import case_of, plan_of
from planner.memory.machines import Cpu, this_cpu
from planner.memory.plans import tiles as plans
from planner.memory.table import Plan, PlanTable
from planner.workload import Workload

CASES = 7
SLACK = 4096
"""Bytes that a plan may be off whatever the peak."""


def machine(dtype: str) -> Cpu:
    return replace(this_cpu(dtype), threads=torch.get_num_threads())


def measured(config: AttentionConfig, workload: Workload) -> tuple[int, int]:
    """Peaks of a first and of a second call."""
    call = call_of(config, workload, torch.device("cpu"))
    call.start_cold()
    cold, _, warm = footprints([call, call.drop_gradients, call], torch.device("cpu"))
    return call.nbytes + cold.peak, call.nbytes + warm.peak


def plan(config: AttentionConfig, workload: Workload, warm: bool = True) -> Plan:
    return plan_of(config, workload, machine(workload.dtype), warm=warm)


def windowed(**options) -> AttentionConfig:
    """A causal local window, with a mask."""
    pattern = SparsePatternConfig(pattern_type="local_window", block_size=16, local_window_size=64)
    return AttentionConfig(variant="block_sparse", pattern=pattern, **options)


def random_case(rng: random.Random) -> tuple[AttentionConfig, Workload]:
    heads = rng.choice([1, 2, 4])
    workload = Workload(
        seq=rng.choice([1, 100, 256, rng.randint(2, 400)]),
        heads=heads,
        kv_heads=rng.choice([n for n in (1, 2, 4) if heads % n == 0]),
        head_dim=rng.choice([4, 8, 16]),
        dtype=rng.choice(["bfloat16", "float32", "float64"]),
        mode=rng.choice(["inference", "training"]),
        causal=rng.random() < 0.7,
    )
    options = {
        "workspace_bytes": rng.choice([1 << 16, 1 << 20]),
        "pool": rng.choice(["auto", "off", "on", "on"]),
        "pool_bytes": rng.choice([None, None, 1, 1 << 17, 1 << 20]),
        "cache_entries": rng.choice([0, 1, 2, 100]),
        "cache_bytes": rng.choice([0, 1 << 10, 1 << 13, 64 << 20]),
    }
    branched = {"segment_lengths": (64, 256), "dilation_rates": (1, rng.choice([1, 2, 3]))}
    if rng.random() < 0.3:
        options["multihead"] = MultiheadConfig(
            embed_dim=heads * workload.head_dim,
            num_heads=heads,
            kv_heads=workload.kv_heads,
            checkpoint=rng.random() < 0.5,
        )
    match rng.choice(["dense", "dilated", "block_sparse", "block_sparse", "window"]):
        case "dense":
            workload = workload.model_copy(update={"seq": min(workload.seq, 300)})
            return AttentionConfig(variant="dense", **options), workload
        case "dilated":
            return AttentionConfig(variant="dilated", **branched, **options), workload
        case "window":
            return windowed(**options), workload
    kind = rng.choice(["global_local", "dilated_sparse"])
    pattern = SparsePatternConfig(
        pattern_type=kind, block_size=32, local_window_size=64, global_tokens=16, sparsity_ratio=0.3
    )
    return AttentionConfig(variant="block_sparse", pattern=pattern, **branched, **options), workload


def test_random_second_calls_take_what_their_plans_say():
    rng, errors = random.Random(3), []
    for _ in range(CASES):
        config, workload = random_case(rng)
        found, expected = measured(config, workload)[1], plan(config, workload).peak()[1]
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
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("pool_bytes", [1, None])
@pytest.mark.parametrize("cache_entries", [0, 100])
def test_first_and_second_calls_are_exact_to_the_byte(cache_entries, pool_bytes, dtype, mode):
    config = windowed(pool="on", pool_bytes=pool_bytes, cache_entries=cache_entries)
    workload = Workload(seq=160, heads=2, head_dim=16, dtype=dtype, mode=mode, causal=True)
    expected = tuple(plan(config, workload, warm).peak()[1] for warm in (False, True))
    assert measured(config, workload) == expected


def kept(found: Plan, component: str) -> int:
    """Bytes of a component that are there before the call begins."""
    return found.components("inputs").get(component, 0)


def test_only_pools_that_keep_the_arena_have_it_before_the_call():
    workload = Workload(seq=512, heads=2, head_dim=16, dtype="bfloat16", mode="training")
    for options, keeps in (({"pool": "on"}, 1), ({"pool": "on", "pool_bytes": 1}, 0), ({"pool": "off"}, 0)):
        assert (kept(plan(windowed(**options), workload), "memory_pool") > 0) == keeps
        assert not kept(plan(windowed(**options), workload, warm=False), "memory_pool")


def test_a_mask_is_there_from_its_third_use_on():
    """Forward and backward ask for one mask in single precision, and for two where backward widens; a
    cache keeps what was asked for before."""
    sizes = {"seq": 512, "heads": 2, "head_dim": 16, "causal": True}
    one = Workload(dtype="float32", mode="training", **sizes)
    assert kept(plan(windowed(), one), "pattern_cache") > 0
    assert not kept(plan(windowed(), Workload(dtype="bfloat16", mode="training", **sizes)), "pattern_cache")
    assert not kept(plan(windowed(), Workload(dtype="float32", **sizes)), "pattern_cache")
    for options in ({"cache_entries": 0}, {"cache_bytes": 0}, {"cache_bytes": 100}):
        assert not kept(plan(windowed(**options), one), "pattern_cache")


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_give_what_ints_give(dtype, mode):
    columns = {
        "seq": [16, 100, 512, 5000, 512],
        "workspace": [1 << 16, 1 << 18, 1 << 20, 1 << 24, 1 << 16],
        "pool": [0, 1, 1, 1, 0],
        "pool_bytes": [1, 1, 1 << 20, 1 << 62, 1 << 62],
        "entries": [0, 1, 2, 100, 100],
        "bytes": [0, 1 << 10, 1 << 20, 1 << 26, 1 << 12],
    }
    workload = Workload(seq=1, heads=2, head_dim=16, dtype=dtype, mode=mode, causal=True)

    def peak_plan(seq, workspace, pool, pool_bytes, entries, cache_bytes):
        case = case_of(Columns("dense", seq=seq, workspace=workspace), workload, machine(dtype))
        case = case._replace(
            warm=True, pool=pool, pool_bytes=pool_bytes, cache_entries=entries, cache_bytes=cache_bytes
        )
        table = PlanTable()
        plans.inputs(table, case)
        rows = window_rows(16, -(-seq // 16), 64, 0, True)
        plans.program(table, case, plans.once(case.shape, partial(sparse_extent, rows)))
        return table.done()

    found = peak_plan(*(np.array(column) for column in columns.values())).peaks()
    each = [peak_plan(*sizes).peak()[1] for sizes in zip(*columns.values(), strict=True)]
    assert found.tolist() == each
