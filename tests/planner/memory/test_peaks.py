"""Peaks of many candidates at once are those of the single configs, to the byte."""

from __future__ import annotations

import numpy as np
import pytest

from attention.config import AttentionConfig, MultiheadConfig, SparsePatternConfig
from attention.errors import ConfigError
from attention.layout import row_blocks, row_budget
from planner.configs import Columns
from planner.memory.dispatch import plan_of
from planner.memory.machines import Cpu, Cuda
from planner.memory.peaks import AT_ONCE, peaks
from planner.workload import Workload

PATTERNS = ["local_window", "global_local"]
KINDS = [
    ("dense", None, 0),
    *(("dilated", None, branches) for branches in (1, 2, 3, 4)),
    *(("block_sparse", pattern, 0) for pattern in PATTERNS),
    *(("block_sparse", "dilated_sparse", branches) for branches in (1, 2, 3, 4)),
    ("adaptive", None, 0),
]
MACHINES = {
    "cpu": lambda dtype: Cpu(3, frozenset(), dtype),
    "cpu-unit": lambda dtype: Cpu(2, frozenset({dtype} & {"float16", "bfloat16"}), dtype),
    "pascal": lambda dtype: Cuda((6, 1)),
    "ampere": lambda dtype: Cuda((8, 0)),
}
AT_A_TIME = 4


def candidates(random, variant, pattern, branches, n=AT_A_TIME, **fields) -> Columns:
    """Random ones, of sizes that are powers of two and of others."""

    def sizes(low, high):
        return np.where(
            random.random(n) < 0.7, 2 ** random.integers(low, high, n), random.integers(2**low, 2**high, n)
        )

    columns = {"seq": sizes(0, 18), "workspace": sizes(16, 26), **fields}
    rates = np.sort(2 ** random.integers(0, 4, (branches, n)), axis=0)
    lengths = [np.maximum(sizes(4, 18), 8) for _ in range(branches)]
    if variant == "dilated":
        rates[:1] = 1
    elif pattern or variant == "adaptive":
        block = sizes(2, 9)
        columns |= {
            "block_size": block,
            "window": sizes(0, 13),
            "global_tokens": sizes(0, 10),
            "sparsity_ratio": 10 ** random.uniform(-3, 0, n),
        }
        lengths = [length // block * block + block for length in lengths]
    return Columns(variant, pattern, lengths=tuple(lengths), rates=tuple(rates), **columns)


def check(columns: Columns, workload: Workload, machine) -> None:
    found = peaks(columns, workload, machine)
    assert found.dtype == np.int64
    for at, peak in enumerate(found):
        config = columns.config(at, workload)
        seq = columns.seq[at].item() if isinstance(columns.seq, np.ndarray) else columns.seq
        one = plan_of(config, workload.model_copy(update={"seq": seq}), machine)
        assert one.peak()[1] == peak, (config, seq)


def check_all(random, variant, pattern, branches, mode, machine, n=AT_A_TIME):
    for dtype, causal, kv_heads in (
        ("float16", False, None),
        ("float16", True, 2),
        ("float32", True, None),
        ("float32", False, 2),
    ):
        workload = Workload(seq=1, dtype=dtype, mode=mode, causal=causal, kv_heads=kv_heads, batch=2)
        check(candidates(random, variant, pattern, branches, n), workload, MACHINES[machine](dtype))


every_kind = pytest.mark.parametrize("variant, pattern, branches", KINDS)
every_mode = pytest.mark.parametrize("mode", ["inference", "training"])
every_machine = pytest.mark.parametrize("machine", MACHINES)


@every_machine
@every_mode
@every_kind
def test_every_entry_is_the_peak_of_its_config(variant, pattern, branches, mode, machine):
    check_all(np.random.default_rng(branches), variant, pattern, branches, mode, machine)


@pytest.mark.slow
@every_machine
@every_mode
@every_kind
def test_every_entry_of_many_is_the_peak_of_its_config(variant, pattern, branches, mode, machine, seed):
    check_all(np.random.default_rng([seed, branches]), variant, pattern, branches, mode, machine, n=100)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize(
    "fields",
    [
        {"pool": "off"},
        {"pool": "on"},
        {"pool": "on", "pool_bytes": 1 << 20},
        {"seq": 131072},
        {"workspace": 1 << 20},
        {"backend": "sdpa"},
        {"cache_entries": 1},
        {"cache_bytes": 0},
    ],
    ids=str,
)
def test_what_is_equal_for_all_candidates_counts(fields, mode):
    random = np.random.default_rng(0)
    workload = Workload(seq=1, mode=mode, causal=True)
    for variant, pattern, branches in (("dilated", None, 2), ("block_sparse", "local_window", 0)):
        check(candidates(random, variant, pattern, branches, **fields), workload, Cuda((8, 0)))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("variant, pattern, branches", KINDS)
def test_projections_around_it_count(variant, pattern, branches, mode, checkpoint):
    outer = MultiheadConfig(embed_dim=256, num_heads=8, checkpoint=checkpoint)
    columns = candidates(np.random.default_rng(1), variant, pattern, branches, multihead=outer)
    check(columns, Workload(seq=1, head_dim=32, mode=mode, causal=True), Cpu(2, frozenset(), "float16"))


def test_more_candidates_than_are_evaluated_together():
    random = np.random.default_rng(0)
    columns = candidates(random, "block_sparse", "local_window", 0, n=2 * AT_ONCE + 5)
    found = peaks(columns, Workload(seq=1), Cuda((8, 0)))
    some = np.array([0, AT_ONCE - 1, AT_ONCE, len(columns) - 1])
    assert len(found) == len(columns)
    assert found[some].tolist() == peaks(columns.take(some), Workload(seq=1), Cuda((8, 0))).tolist()


def test_no_arrays_are_one_candidate():
    check(Columns("dense", seq=4096), Workload(seq=1), Cuda((8, 0)))


def test_weights_are_refused():
    with pytest.raises(ConfigError, match="one config at a time"):
        peaks(Columns("dense", seq=np.array([1])), Workload(seq=1, weights=True), Cuda((8, 0)))


def test_budgets_of_rows_are_rounded_alike_one_by_one_and_together():
    random = np.random.default_rng(0)
    blocks = random.integers(1, 5000, 3000)
    ratios = np.where(random.random(3000) < 0.5, (random.integers(0, 5000, 3000) + 0.5) / blocks, 0.01)
    ratios = np.clip(ratios, 1e-4, 1.0)
    together = row_blocks(ratios, blocks)
    for ratio, count, kept in zip(ratios.tolist(), blocks.tolist(), together.tolist(), strict=True):
        config = AttentionConfig(
            variant="block_sparse",
            segment_lengths=(1,),
            dilation_rates=(1,),
            pattern=SparsePatternConfig(block_size=1, sparsity_ratio=ratio),
        )
        assert row_budget(config, count) == kept
