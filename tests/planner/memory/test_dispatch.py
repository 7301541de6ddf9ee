"""Which plan a config has: where FlexAttention runs, and where one kernel call is all, the planner and the
library say the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attention import AttentionConfig, build
from attention.ops import flex, kernels
from attention.ops.kernels import TRUST
from attention.sizes.flex import FLEX_SHARE, auto_leaves_flex
from planner.configs import Columns, columns_of
from planner.memory.dispatch import goes_apart, has_flex, plan_of, shape_of
from planner.memory.machines import Cpu, Cuda
from planner.workload import Workload

PATTERNS = {"local_window": 0, "global_local": 0, "dilated_sparse": 2}
"""With their branches."""
WORKLOADS = [
    Workload(seq=1, heads=2, kv_heads=1, head_dim=32),
    Workload(seq=1, heads=1, head_dim=64, causal=True, mode="training", dtype="bfloat16"),
    Workload(seq=1, batch=2, heads=2, kv_heads=1, head_dim=16, dtype="float32"),
]
AMPERE = Cuda((8, 0))
ROUNDED = 8 * 512
"""Of FlexAttention's lists, at most."""


def candidates(pattern: str, backend: str, seed: int = 0, n: int = 60) -> Columns:
    """Random ones of up to 4,096 blocks, few of sizes that FlexAttention does not take."""
    random = np.random.default_rng(seed)
    block = np.where(random.random(n) < 0.9, 2 ** random.integers(4, 8, n), random.integers(1, 200, n))
    blocks = 2 ** random.integers(0, 13, n)
    branches = PATTERNS[pattern]
    return Columns(
        "block_sparse",
        pattern,
        backend=backend,
        block_size=block,
        seq=np.maximum(block * blocks - random.integers(0, 3, n), 1),
        window=block * 2 ** random.integers(0, 12, n),
        global_tokens=2 ** random.integers(0, 10, n),
        sparsity_ratio=10 ** random.uniform(-3, 0, n),
        lengths=tuple(block * 2 ** random.integers(2, 13, n) for _ in range(branches)),
        rates=tuple(np.sort(2 ** random.integers(0, 4, (branches, n)), axis=0)),
    )


def each(columns: Columns, workload: Workload):
    for at in range(len(columns)):
        asked = workload.model_copy(update={"seq": columns.seq[at].item()})
        yield columns.config(at, asked), asked


def lists_of(config, workload, machine=AMPERE) -> int:
    """Bytes of FlexAttention's lists, each of the eight rounded up to 512; 0 where SDPA runs."""
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
    monkeypatch.setenv(TRUST, "1")
    monkeypatch.setattr(kernels, "flash_is_built", lambda: True)
    columns = candidates(pattern, "auto")
    together = goes_apart(columns, workload, AMPERE) * np.ones(len(columns), bool)
    found = []
    for config, asked in each(columns, workload):
        taken = flex.resolve(config, *q_and_k(asked), asked.causal) == "flex"
        assert (lists_of(config, asked) > 0) == taken, (config, asked)
        found.append(taken)
    assert together.tolist() == found
    if auto_leaves_flex(pattern, AMPERE.windows(workload.head_dim, workload.itemsize)):
        assert not any(found)
        return
    # Among those whose blocks it takes there are some of either kind.
    fits = (columns.block_size >= 16) & (columns.block_size & (columns.block_size - 1) == 0)
    assert 0 < sum(found) < fits.sum()


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lists_are_at_most_a_sixteenth_of_the_floor_unless_flex_is_asked_for(pattern, workload):
    workload = workload.model_copy(update={"dtype": "float32"})  # in 16 bits windows are whole calls
    longer = 0
    for config, asked in each(candidates(pattern, "auto", seed=1), workload):
        assert FLEX_SHARE * (lists_of(config, asked) - ROUNDED) <= asked.floor
        forced, block = config.model_copy(update={"backend": "flex"}), config.pattern.block_size
        if block >= 16 and block & (block - 1) == 0:
            assert lists_of(forced, asked) > 0
            longer += FLEX_SHARE * (lists_of(forced, asked) - ROUNDED) > asked.floor
        assert lists_of(config.model_copy(update={"backend": "sdpa"}), asked) == 0
    assert longer > 0


def test_where_flex_runs_at_all():
    workload = Workload(seq=4096)
    assert has_flex(workload, AMPERE)
    assert not has_flex(workload, Cuda((7, 5)))
    assert not has_flex(workload, Cpu(2))
    assert not has_flex(workload.model_copy(update={"dtype": "float64"}), AMPERE)
    assert not has_flex(workload.model_copy(update={"head_dim": 8}), AMPERE)
    assert not has_flex(workload.model_copy(update={"head_dim": 320}), AMPERE)
    assert not has_flex(workload.model_copy(update={"weights": True}), AMPERE)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (2, 2), (4, 2)])
def test_one_kernel_call_over_everything_is_what_the_module_makes_of_it(heads, kv_heads):
    """Also of one token, whose only rate is 1."""
    branches = [((1,), (1,)), ((8,), (5,)), ((8,), (1,)), ((64,), (1,)), ((64,), (2,)), ((64, 64), (1, 2))]
    configs = [AttentionConfig(variant="dense")] + [
        AttentionConfig(variant="dilated", segment_lengths=lengths, dilation_rates=rates, uncovered="zero")
        for lengths, rates in branches
    ]
    for config in configs:
        module = build(config)
        for seq in (1, 7, 8, 64, 100):
            workload = Workload(seq=seq, heads=heads, kv_heads=kv_heads, head_dim=8, dtype="float32")
            columns = columns_of(config, seq)
            problem, _ = module._problem(shape_of(columns, workload, Cpu(2)))
            assert bool(goes_apart(columns, workload, Cpu(2))) == problem.whole, (config, seq)
            many = replace(columns, seq=np.array([seq, seq]))
            assert np.all(np.asarray(goes_apart(many, workload, Cpu(2)), bool) == problem.whole)


def test_candidates_are_apart_one_by_one_as_together():
    seq = np.array([1 << 18, 1 << 20])
    columns = Columns("block_sparse", "global_local", seq=seq, block_size=128, window=1024, global_tokens=64)
    workload = Workload(seq=1, head_dim=32, dtype="float32")  # in 16 bits they are whole calls
    assert goes_apart(columns, workload, AMPERE).tolist() == [True, False]
    assert np.all(goes_apart(replace(columns, backend="flex"), workload, AMPERE))
    for machine, backend in ((AMPERE, "sdpa"), (Cuda((7, 5)), "auto"), (Cpu(2), "auto")):
        assert not np.any(goes_apart(replace(columns, backend=backend), workload, machine))
    for at, apart in enumerate((True, False)):
        one = columns_of(columns.config(at, workload), int(seq[at]))
        assert bool(goes_apart(one, workload, AMPERE)) == apart


def test_a_config_has_its_plan_without_numpy_or_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from attention.config import AttentionConfig, SparsePatternConfig\n"
        "from planner.memory.machines import Cpu, Cuda\n"
        "from planner.memory.dispatch import plan_of\n"
        "from planner.workload import Workload\n"
        "window = SparsePatternConfig(pattern_type='local_window', local_window_size=512)\n"
        "for config in (AttentionConfig(variant='dense'),\n"
        "        AttentionConfig(variant='block_sparse', pattern=window),\n"
        "        AttentionConfig(variant='dilated', segment_lengths=(64, 512), dilation_rates=(1, 4))):\n"
        "    for machine in (Cpu(2), Cuda((8, 0))):\n"
        "        assert plan_of(config, Workload(seq=4096, mode='training'), machine).peak()[1]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
