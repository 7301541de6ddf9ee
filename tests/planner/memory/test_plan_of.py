"""Which plan a config has: where FlexAttention runs, the planner and the library say the same."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attention.ops import flex
from attention.sizes.flex import FLEX_SHARE
from planner.configs import Columns
from planner.memory.machines import Cpu, Cuda
from planner.memory.plan import goes_flex, has_flex, plan_of
from planner.workload import Workload

PATTERNS = {"local_window": 0, "global_local": 0, "dilated_sparse": 2}
"""With their branches."""
WORKLOADS = [
    Workload(seq=1, heads=2, kv_heads=1, head_dim=32),
    Workload(seq=1, heads=1, head_dim=64, causal=True, mode="training", dtype="bfloat16"),
    Workload(seq=1, batch=2, heads=2, kv_heads=1, head_dim=16, dtype="float32"),
]
AMPERE = Cuda((8, 0))


def candidates(pattern: str, backend: str, seed: int = 0, n: int = 60) -> Columns:
    """Random ones of up to 4,096 blocks, few of sizes that FlexAttention does not take."""
    random = np.random.default_rng(seed)
    block = np.where(random.random(n) < 0.9, 2 ** random.integers(4, 8, n), random.integers(1, 200, n))
    blocks = 2 ** random.integers(0, 13, n)
    branches = PATTERNS[pattern]
    return Columns(
        "block_sparse", pattern, backend=backend, block_size=block,
        seq=np.maximum(block * blocks - random.integers(0, 3, n), 1),
        window=block * 2 ** random.integers(0, 12, n), global_tokens=2 ** random.integers(0, 10, n),
        sparsity_ratio=10 ** random.uniform(-3, 0, n),
        lengths=tuple(block * 2 ** random.integers(2, 13, n) for _ in range(branches)),
        rates=tuple(np.sort(2 ** random.integers(0, 4, (branches, n)), axis=0)),
    )  # fmt: skip


def each(columns: Columns, workload: Workload):
    for at in range(len(columns)):
        asked = workload.model_copy(update={"seq": columns.seq[at].item()})
        yield columns.config(at, asked), asked


def lists_of(config, workload, machine=AMPERE) -> int:
    """Bytes of FlexAttention's lists; 0 where SDPA runs."""
    plan = plan_of(config, workload, machine)
    return sum(int(buffer.bytes) for buffer in plan.buffers if buffer.name == "block lists")


def q_and_k(workload: Workload):
    """As far as the library's rules look at them."""
    dtype = getattr(torch, workload.dtype)
    for heads in (workload.heads, workload.groups):
        shape = torch.Size((workload.batch, workload.seq, heads, workload.head_dim))
        yield SimpleNamespace(
            device=torch.device("cuda", 0), dtype=dtype, shape=shape, nbytes=shape.numel() * dtype.itemsize
        )


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_auto_is_what_the_library_makes_of_it(pattern, workload, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: AMPERE.capability)
    columns = candidates(pattern, "auto")
    together = goes_flex("auto", columns.rows(workload.causal), columns.seq, workload)
    found = []
    for config, asked in each(columns, workload):
        taken = flex.resolve(config, *q_and_k(asked), asked.causal) == "flex"
        assert (lists_of(config, asked) > 0) == taken, (config, asked)
        found.append(taken)
    assert together.tolist() == found
    # Among those whose blocks it takes there are some of either kind.
    fits = (columns.block_size >= 16) & (columns.block_size & (columns.block_size - 1) == 0)
    assert 0 < sum(found) < fits.sum()


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lists_are_at_most_a_sixteenth_of_the_floor_unless_flex_is_asked_for(pattern, workload):
    longer = 0
    for config, asked in each(candidates(pattern, "auto", seed=1), workload):
        assert FLEX_SHARE * lists_of(config, asked) <= asked.floor
        forced, block = config.model_copy(update={"backend": "flex"}), config.pattern.block_size
        if block >= 16 and block & (block - 1) == 0:
            assert lists_of(forced, asked) > 0
            longer += FLEX_SHARE * lists_of(forced, asked) > asked.floor
        assert lists_of(config.model_copy(update={"backend": "sdpa"}), asked) == 0
    assert longer > 0


def test_where_flex_runs_at_all():
    workload = Workload(seq=4096)
    assert has_flex(workload, AMPERE)
    assert not has_flex(workload, Cuda((7, 5)))
    assert not has_flex(workload, Cpu(2))
    assert not has_flex(workload.model_copy(update={"dtype": "float64"}), AMPERE)
    assert not has_flex(workload.model_copy(update={"weights": True}), AMPERE)
