"""The plan of attention over lists as few calls: of arrays what it is of ints, and in bounds."""

from __future__ import annotations

import numpy as np
import pytest

from attention import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.sizes.list_calls import backward_cut_of, backward_sums, forward_cut_of, list_calls
from planner.configs import Columns, columns_of
from planner.memory.dispatch import lists_of, plan_of, planned, shape_of
from planner.memory.machines import Cpu, Cuda
from planner.workload import Workload

AMPERE = Cuda((8, 0))
causal_or_not = pytest.mark.parametrize("causal", [False, True])


def columns(variant: str, n: int = 60) -> Columns:
    random = np.random.default_rng(3)
    block = 2 ** random.integers(4, 9, n)
    fields = {"pattern_type": "dilated_sparse"} if variant == "block_sparse" else {}
    return Columns(
        variant,
        **fields,
        backend="sdpa",
        block_size=block,
        seq=np.maximum(block * random.integers(1, 600, n) - random.integers(0, 20, n), 1),
        sparsity_ratio=10 ** random.uniform(-3, 0, n),
        workspace=2 ** random.integers(16, 25, n),
        lengths=tuple(block * 2 ** random.integers(2, 9, n) for _ in range(2)),
        rates=tuple(np.sort(2 ** random.integers(0, 4, (2, n)), axis=0)),
    )


@causal_or_not
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("variant", ["block_sparse", "adaptive"])
def test_many_candidates_have_the_plans_that_each_has(variant, mode, causal):
    many = columns(variant)
    workload = Workload(seq=1, heads=8, kv_heads=2, head_dim=64, mode=mode, causal=causal, dtype="float16")
    together = planned(many, workload, AMPERE, apart=False)
    assert len(set(together.phases)) == len(together.phases)
    for at, peak in enumerate(together.peaks().tolist()):
        seq = int(many.seq[at])
        asked = workload.model_copy(update={"seq": seq})
        config = many.config(at, asked)
        assert plan_of(config, asked, AMPERE).peak()[1] == peak, (config, asked)


def config_of(variant: str, **fields) -> AttentionConfig:
    pattern = SparsePatternConfig(pattern_type="dilated_sparse", block_size=128, sparsity_ratio=0.05)
    if variant == "adaptive":
        return AttentionConfig(
            variant="adaptive", pattern=pattern, adaptive=AdaptiveConfig(num_heads=32, head_dim=128), **fields
        )
    branches = {"segment_lengths": (2048, 8192, 32_768), "dilation_rates": (1, 2, 4)}
    return AttentionConfig(variant=variant, pattern=pattern, **branches, **fields)


@causal_or_not
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("seq", [32_768, 30_714, 131_072])
@pytest.mark.parametrize("variant", ["block_sparse", "adaptive"])
def test_it_takes_little_more_than_its_tensors(variant, seq, mode, causal):
    workload = Workload(
        seq=seq, heads=32, kv_heads=8, head_dim=128, mode=mode, causal=causal, dtype="bfloat16"
    )
    plan = plan_of(config_of(variant, backend="sdpa"), workload, AMPERE)
    floor = workload.floor * (2 if mode == "training" else 1)
    # An adaptive attention's own are its choice, its parameters and cuBLAS's workspaces.
    own = ("sparse_indices", "parameters")
    beside = sum(b.bytes for b in plan.buffers if b.component in own or "cuBLAS" in b.name)
    assert plan.peak()[1] <= floor * 1.05 + (64 << 20) + beside


@causal_or_not
@pytest.mark.parametrize("variant", ["block_sparse", "adaptive"])
def test_parts_cover_all_lists_and_fit_their_room(variant, causal):
    config = config_of(variant, backend="sdpa")
    for seq in (100, 30_714, 131_072):
        workload = Workload(seq=seq, heads=32, kv_heads=8, head_dim=128, causal=causal, dtype="bfloat16")
        shape = shape_of(columns_of(config, seq), workload, AMPERE)
        calls = list_calls(config, shape)
        sums = backward_sums(calls, shape)
        assert sums.itemsize == 4
        for group in calls.groups:
            for cut, lanes in (
                (forward_cut_of(calls, group, shape), calls.lanes),
                (backward_cut_of(calls, group, sums, shape), sums.kv_heads * calls.lanes_of_kv),
            ):
                assert 1 <= cut.lanes <= lanes
                assert 1 <= cut.rows <= max(group.rows, 1)
                assert cut.blocks == max(group.width, 1)


def test_where_lists_are_no_calls():
    config = config_of("block_sparse")
    for machine, dtype in ((Cpu(2), "bfloat16"), (AMPERE, "float32"), (Cuda((7, 5)), "float16")):
        workload = Workload(seq=4096, dtype=dtype)
        columns = columns_of(config, 4096)
        assert lists_of(columns, shape_of(columns, workload, machine)) is None
