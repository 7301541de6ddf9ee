"""Estimates: what the seeds measured, sums that add up, budgets that hold, refusals that say what to do."""

from __future__ import annotations

import pytest

import planner
from attention.config import AdaptiveConfig, AttentionConfig, MultiheadConfig, SparsePatternConfig
from attention.errors import ConfigError
from planner import gpus
from planner.memory.allocator_settings import MIN_BLOCK
from planner.memory.estimate import MemoryEstimate, estimate, max_sequence
from planner.workload import Workload

MIB = 1 << 20
CUBLAS = 8_519_680
"""What the seeds' processes had from products before: a workspace."""
WINDOW = AttentionConfig(
    variant="block_sparse",
    pattern=SparsePatternConfig(pattern_type="local_window", block_size=64, local_window_size=128),
    workspace_bytes=65536,
)
BASE = AttentionConfig(
    variant="block_sparse",
    segment_lengths=(2048,),
    dilation_rates=(1,),
    pattern=SparsePatternConfig(sparsity_ratio=0.01, block_size=64),
)
"""The setting that the seeds recommend and measured."""
BRANCHES = {"segment_lengths": (2048, 4096), "dilation_rates": (1, 2)}
CONFIGS = {
    "dense": AttentionConfig(variant="dense"),
    "dilated": AttentionConfig(variant="dilated", **BRANCHES),
    "local_window": WINDOW,
    "global_local": AttentionConfig(
        variant="block_sparse", pattern=SparsePatternConfig(pattern_type="global_local")
    ),
    "dilated_sparse": AttentionConfig(variant="block_sparse", pattern=SparsePatternConfig(), **BRANCHES),
    "adaptive": AttentionConfig(
        variant="adaptive", pattern=SparsePatternConfig(), adaptive=AdaptiveConfig(num_heads=8, head_dim=64)
    ),
    "multihead": AttentionConfig(variant="dense", multihead=MultiheadConfig(embed_dim=512, num_heads=8)),
}


# ---- the seeds' measurements


@pytest.mark.parametrize(
    "tokens, kilobytes",
    [(2048, 7.88), (4096, 5.89), (8192, 4.90), (16384, 4.40), (32768, 4.16), (65536, 4.03)],
)
def test_the_seeds_memory_per_token_on_a_gtx_1080(tokens, kilobytes):
    """The table "Memory Scaling Verification" of the Block-Sparse Comprehensive Benchmark Report of
    2025-07-07 (BlockSparseBase, 8 heads x 64, float16, GTX 1080). Its unit is MiB x 1000 / tokens."""
    found = planner.estimate(BASE, Workload(seq=tokens), "gtx1080")
    assert (found.allocated + CUBLAS) / MIB * 1000 / tokens == pytest.approx(kilobytes, rel=0.005)


def test_the_seeds_memory_at_65536_tokens_on_a_gtx_1080():
    """264.2 MB (MiB) for BlockSparseBase: "Maximum Sequence Length Analysis" of the same report."""
    found = planner.estimate(BASE, Workload(seq=65536), "gtx1080")
    assert (found.allocated + CUBLAS) / MIB == pytest.approx(264.2, rel=0.005)


# ---- sums


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("causal", [False, True])
def test_components_and_lines_sum_to_the_peak(name, mode, dtype, causal):
    workload = Workload(seq=5000, mode=mode, dtype=dtype, causal=causal)
    here = estimate(CONFIGS[name], workload, "cpu", threads=2)
    assert sum(here.components.values()) == here.allocated == here.reserved == here.device == here.needed
    card = estimate(CONFIGS[name], workload, "rtx4060")
    inside = sum(card.components.values()) - card.components["context"]
    assert inside <= card.allocated <= card.reserved
    # What the allocator rounds up: to 512 bytes, and where less than 1 MiB of a block would be left over.
    assert card.allocated - inside <= len(card.lines) * (MIB + MIN_BLOCK)
    assert card.device == card.reserved + card.components["context"]
    assert card.needed <= card.device <= card.upper
    for found in (here, card):
        assert found.allocated >= workload.floor
        assert min(found.components.values()) > 0
        for component, count in found.components.items():
            assert sum(line.bytes for line in found.lines if line.component == component) == count
        assert {line.component for line in found.lines} == set(found.components)


@pytest.mark.parametrize("device", ["cpu", "gtx1080"])
@pytest.mark.parametrize("name", CONFIGS)
def test_json_round_trip(name, device):
    found = estimate(CONFIGS[name], Workload(seq=3000), device)
    assert MemoryEstimate.from_json(found.to_json()) == found


def test_what_else_is_on_the_card_is_counted_once():
    def device(**options) -> int:
        return estimate(WINDOW, Workload(seq=4096), "rtx4060", **options).device

    alone = device(context_bytes=0)
    assert device(context_bytes=5 * MIB) == alone + 5 * MIB
    assert device(context_bytes=0, others_bytes=7 * MIB) == alone + 7 * MIB
    assert device(context_bytes=0, display="desktop") > alone


def test_more_threads_take_more():
    found = [estimate(WINDOW, Workload(seq=4096), "cpu", threads=n).allocated for n in (1, 2, 16)]
    assert found == sorted(set(found))


# ---- the longest sequence


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("device", [None, "cpu", "gtx1080"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_longest_sequence_is_the_longest(name, device, mode):
    budget, config = 2 * 10**9, CONFIGS[name]
    seq = max_sequence(config, Workload(seq=1, mode=mode), budget, device)
    unit = config.pattern.block_size if config.pattern else 64
    on = device or gpus.generic(budget)
    assert seq > 0
    assert seq % unit == 0
    assert estimate(config, Workload(seq=seq, mode=mode), on).upper <= budget
    assert estimate(config, Workload(seq=seq + unit, mode=mode), on).upper > budget


@pytest.mark.parametrize("name", CONFIGS)
def test_more_memory_is_never_a_shorter_sequence(name):
    budgets = [n * 10**8 for n in (7, 8, 20, 240)]
    found = [max_sequence(CONFIGS[name], Workload(seq=1), budget) for budget in budgets]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_a_longer_one_that_fits_without_flex_lists_is_found():
    """From 511,617 tokens on they are more than a sixteenth of q, k, v and out. This card's flash attention
    does not train so many channels, so that FlexAttention is tried for windows."""
    config = WINDOW.model_copy(
        update={"pattern": SparsePatternConfig(pattern_type="global_local", local_window_size=1024)}
    )
    workload, budget = Workload(seq=1, heads=4, kv_heads=1, head_dim=200), 2_860_000_000
    auto, sdpa, lists = (
        max_sequence(config.model_copy(update={"backend": backend}), workload, budget, "rtxa5000")
        for backend in ("auto", "sdpa", "flex")
    )
    assert lists < 511_616 < sdpa == auto
    between = workload.model_copy(update={"seq": 511_488})
    assert estimate(config, between, "rtxa5000").upper > budget


def test_a_budget_below_one_block_is_no_sequence_at_all():
    assert max_sequence(WINDOW, Workload(seq=1), 1000, "cpu") == 0
    assert max_sequence(WINDOW, Workload(seq=1), "1MB") == 0  # the context alone is more


def test_a_budget_may_be_text():
    assert max_sequence(WINDOW, Workload(seq=1), "8GB") == max_sequence(WINDOW, Workload(seq=1), 8 * 10**9)
    with pytest.raises(ConfigError, match="vram 'much' is not understood"):
        max_sequence(WINDOW, Workload(seq=1), "much")


# ---- refusals


@pytest.mark.parametrize(
    "config, workload, device, options, said",
    [
        (WINDOW, {}, "voodoo2", {}, "nearest are .*`planner gpus` lists all"),
        (WINDOW, {"dtype": "bfloat16"}, "gtx1080", {}, "needs compute capability 8.0; use float16"),
        (WINDOW.model_copy(update={"backend": "flex"}), {}, "cpu", {}, "CUDA only; use backend='auto'"),
        (WINDOW.model_copy(update={"backend": "flex"}), {}, "gtx1080", {}, "use backend='auto' or 'sdpa'"),
        (WINDOW, {}, "rtx4060", {"display": "tv"}, "display must be 'headless' or 'desktop'"),
        (WINDOW, {}, "rtx4060", {"others_bytes": -1}, "others_bytes must not be negative"),
        (WINDOW, {}, "rtx4060", {"allocator": "nonsense:1"}, "nonsense"),
    ],
)
def test_refusals_say_what_to_do(config, workload, device, options, said):
    with pytest.raises(ConfigError, match=said):
        estimate(config, Workload(seq=4096, **workload), device, **options)


def test_what_a_card_is_to_be_taken_with_is_a_note():
    dense, workload = AttentionConfig(variant="dense"), Workload(seq=128)
    for name in ("rtx4070laptop", "gb10"):
        assert gpus.caution(gpus.find(name)) in estimate(dense, workload, name).notes
    assert not any("laptop" in note for note in estimate(dense, workload, "rtx4070").notes)
