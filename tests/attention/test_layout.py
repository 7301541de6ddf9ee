"""Layouts equal the rules of their patterns, stay small at a million tokens, and need no torch."""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from edges import by_token
from hypothesis import assume, given
from hypothesis import strategies as st

from attention.config import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.errors import ConfigError, InputError
from attention.layout import (
    BranchRows,
    Layout,
    build_layout,
    column_dtype,
    columns_by_row,
    count_active,
    kept_columns,
    kept_hull,
    row_budget,
    widest_rows,
)
from attention.reference import multiplicity

MILLION = 1 << 20


def dilated_sparse(branches, ratio, block_size=4):
    """A dilated_sparse config; segments of `branches` in blocks."""
    return AttentionConfig(
        variant="block_sparse",
        segment_lengths=[n * block_size for n, _ in branches],
        dilation_rates=[r for _, r in branches],
        pattern=SparsePatternConfig(
            pattern_type="dilated_sparse", sparsity_ratio=ratio, block_size=block_size
        ),
    )


def patterned(pattern_type, **fields):
    return AttentionConfig(
        variant="block_sparse", pattern=SparsePatternConfig(pattern_type=pattern_type, **fields)
    )


def dilated(lengths, rates):
    return AttentionConfig(variant="dilated", segment_lengths=lengths, dilation_rates=rates)


def rows_of(layout):
    return [layout.row(i).tolist() for i in range(layout.blocks)]


def brute_force_row(config, i, blocks, causal):
    """Key blocks of row i, block by block: every block's priority, then the best of them."""
    pattern, size = config.pattern, config.pattern.block_size
    allowed = range(i + 1) if causal else range(blocks)
    if pattern.pattern_type == "dilated_sparse":
        priority = {}
        for t, (length, rate) in enumerate(config.branches):
            n = length // size
            mates = [c for c in allowed if c // n == i // n and (c - i) % rate == 0 and c != i]
            for m, c in enumerate(sorted(mates, key=lambda c: (abs(c - i), c))):
                priority[c] = min(priority.get(c, (m, t)), (m, t))
        budget = max(1, int(pattern.sparsity_ratio * blocks + 0.5))
        return sorted([i, *sorted(priority, key=priority.__getitem__)[: budget - 1]])
    window = pattern.local_window_size // (size if causal else 2 * size)
    row = {c for c in allowed if abs(c - i) <= window}
    if pattern.pattern_type == "global_local":
        shared = -(-pattern.global_tokens // size)
        row |= {c for c in allowed if c < shared or i < shared}
    return sorted(row)


@st.composite
def block_sparse_configs(draw):
    pattern = SparsePatternConfig(
        pattern_type=draw(st.sampled_from(["local_window", "global_local", "dilated_sparse"])),
        sparsity_ratio=draw(st.floats(0.01, 1.0)),
        block_size=draw(st.integers(1, 5)),
        local_window_size=draw(st.integers(1, 60)),
        global_tokens=draw(st.integers(1, 30)),
    )
    branches = draw(st.lists(st.tuples(st.integers(1, 14), st.integers(1, 7)), min_size=1, max_size=4))
    return AttentionConfig(
        variant="block_sparse",
        segment_lengths=[n * pattern.block_size for n, _ in branches],
        dilation_rates=[r for _, r in branches],
        pattern=pattern,
    )


@given(config=block_sparse_configs(), seq=st.integers(1, 130), causal=st.booleans())
def test_rows_equal_brute_force(config, seq, causal):
    layout = build_layout(config, seq, causal)
    expected = [brute_force_row(config, i, layout.blocks, causal) for i in range(layout.blocks)]
    assert rows_of(layout) == expected


@given(config=block_sparse_configs(), seq=st.integers(1, 60), causal=st.booleans())
def test_blocks_of_windows_that_end_at_the_token_are_those_that_hold_a_pair(config, seq, causal):
    config = by_token(config)
    assume(config.token_edges)
    layout = build_layout(config, seq, causal)
    assert layout.active == count_active(config, seq, causal)
    size, pairs = layout.block_size, multiplicity(config, seq, 1, causal)[0]
    for i, row in enumerate(rows_of(layout)):
        seen = pairs[i * size : (i + 1) * size].any(dim=0).nonzero().ravel() // size
        assert row == seen.unique().tolist()


@given(config=block_sparse_configs(), seq=st.integers(1, 400), causal=st.booleans())
def test_rows_ascend_keep_their_own_block_and_their_budget(config, seq, causal):
    layout = build_layout(config, seq, causal)
    assert layout.row_ptr[0] == 0
    assert layout.row_ptr[-1] == layout.active == count_active(config, seq, causal)
    for i, row in enumerate(rows_of(layout)):
        assert row == sorted(set(row))
        assert i in row
        assert row[0] >= 0
        assert row[-1] <= (i if causal else layout.blocks - 1)
        if config.pattern.pattern_type == "dilated_sparse":
            assert len(row) <= row_budget(config, seq)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "branches, blocks, ratio",
    [
        ([(7, 1), (11, 3)], 1000, 0.01),  # a period of 77 blocks and a tail
        ([(700, 1), (900, 2), (1100, 5)], 1000, 0.06),  # no period, rows of many slabs
        ([(10_000, 1), (10_000, 64)], 1000, 0.05),  # one segment, offsets far apart
        ([(1000, r) for r in range(1, 9)], 1000, 0.1),  # meets of up to eight branches
        ([(16, 1), (16, 1), (32, 1)], 1000, 1.0),  # repeated branches, budget never reached
        ([(64, 64), (64, 65), (5, 9)], 500, 0.5),  # rates that reach no other block
    ],
)
def test_long_layouts_equal_brute_force(branches, blocks, ratio, causal):
    config = dilated_sparse(branches, ratio)
    layout = build_layout(config, 4 * blocks - 3, causal)
    assert count_active(config, 4 * blocks - 3, causal) == layout.active
    for i in [*range(0, blocks, 37), *range(blocks - 20, blocks)]:
        assert layout.row(i).tolist() == brute_force_row(config, i, blocks, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_the_widest_rows_are_found_without_looking_at_all(causal):
    rng = random.Random(causal)
    for _ in range(600):
        blocks = rng.randint(1, 150)
        branches = tuple((rng.randint(1, blocks + 5), rng.randint(1, 9)) for _ in range(rng.randint(1, 4)))
        kept = BranchRows.over(branches, blocks, causal).kept(np.arange(blocks), blocks)
        expected = int(kept.max()), int(kept[:-1].max(initial=0))
        assert widest_rows(branches, blocks, causal) == expected, (branches, blocks)


def test_slabs_do_not_show(monkeypatch):
    configs = [
        dilated_sparse([(50, 1), (70, 3)], 0.1),
        patterned("local_window", block_size=4, local_window_size=40),
        patterned("global_local", block_size=4, local_window_size=8, global_tokens=20),
    ]
    whole = [build_layout(config, 799, causal=False) for config in configs]
    monkeypatch.setattr("attention.layout._SLAB", 7)
    for config, expected in zip(configs, whole, strict=True):
        np.testing.assert_array_equal(build_layout(config, 799, causal=False).cols, expected.cols)


# Examples worked out by hand


def test_local_window_is_centred_or_looks_back():
    config = patterned("local_window", block_size=4, local_window_size=8)  # 1 block a side, or 2 back
    assert rows_of(build_layout(config, 18, causal=False)) == [
        [0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4],
    ]
    assert rows_of(build_layout(config, 18, causal=True)) == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_window_below_a_block_keeps_the_own_block():
    config = patterned("local_window", block_size=4, local_window_size=3)
    assert rows_of(build_layout(config, 10, causal=False)) == [[0], [1], [2]]
    assert rows_of(build_layout(config, 10, causal=True)) == [[0], [1], [2]]


def test_global_local_sees_and_is_seen_by_the_first_blocks():
    config = patterned("global_local", block_size=4, local_window_size=4, global_tokens=5)  # 2 blocks
    assert rows_of(build_layout(config, 20, causal=False)) == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [0, 1, 2],
        [0, 1, 3],
        [0, 1, 4],
    ]
    assert rows_of(build_layout(config, 20, causal=True)) == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 3, 4],
    ]


def test_more_global_tokens_than_there_are_keep_everything():
    config = patterned("global_local", block_size=4, local_window_size=1, global_tokens=10**12)
    assert rows_of(build_layout(config, 9, causal=False)) == [[0, 1, 2]] * 3


def test_dilated_sparse_one_branch_takes_the_nearest_smaller_first():
    config = dilated_sparse([(8, 1)], ratio=0.5)  # 4 of 8 blocks
    assert rows_of(build_layout(config, 32, causal=False)) == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 5],
        [3, 4, 5, 6],
        [4, 5, 6, 7],
        [4, 5, 6, 7],
    ]
    assert rows_of(build_layout(config, 32, causal=True))[2:5] == [[0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4]]


def test_dilated_sparse_branches_take_turns():
    # Row 4 of 9: (9, 1) offers 3 5 2 6 ..., (9, 2) offers 2 6 0 8. Turns: 3 2 | 5 6 | (2) 0 | (6) 8.
    expected = {1: [4], 2: [3, 4], 3: [2, 3, 4], 4: [2, 3, 4, 5], 5: [2, 3, 4, 5, 6], 6: [0, 2, 3, 4, 5, 6]}
    for budget, row in expected.items():
        layout = build_layout(dilated_sparse([(9, 1), (9, 2)], ratio=budget / 9), 36, causal=False)
        assert layout.row(4).tolist() == row


def test_exhausted_branches_leave_their_share_to_the_others():
    # Row 1: the segment of 2 offers block 0 alone, the segment of 8 everything else.
    layout = build_layout(dilated_sparse([(2, 1), (8, 1)], ratio=5 / 8), 32, causal=False)
    assert layout.row(1).tolist() == [0, 1, 2, 3, 4]
    # All branches exhausted: the rest of the budget stays unused.
    layout = build_layout(dilated_sparse([(2, 1), (4, 2)], ratio=1.0), 32, causal=False)
    assert layout.row(5).tolist() == [4, 5, 7]


def test_dense_keeps_every_block():
    config = AttentionConfig(variant="dense")
    assert rows_of(build_layout(config, 129, causal=False)) == [[0, 1, 2]] * 3
    assert rows_of(build_layout(config, 129, causal=True)) == [[0], [0, 1], [0, 1, 2]]
    assert build_layout(config, 129, causal=False, block_size=43).density == 1.0


@given(
    branches=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=3),
    seq=st.integers(1, 60),
    size=st.integers(1, 9),
    causal=st.booleans(),
)
def test_dilated_keeps_the_blocks_that_share_a_segment(branches, seq, size, causal):
    config = AttentionConfig(
        variant="dilated",
        uncovered="zero",
        segment_lengths=[s for s, _ in branches],
        dilation_rates=[min(s, r) for s, r in branches],
    )
    pairs = {
        (p // size, key // size)
        for s, _ in branches
        for p in range(seq)
        for key in range(seq)
        if p // s == key // s and (not causal or key // size <= p // size)
    }
    layout = build_layout(config, seq, causal, block_size=size)
    assert {(i, c) for i, row in enumerate(rows_of(layout)) for c in row} == pairs
    assert count_active(config, seq, causal, block_size=size) == layout.active == len(pairs)


def test_dilated_blocks_that_straddle_segments_keep_both():
    layout = build_layout(dilated([96], [1]), 256, causal=False)  # block 1 is in two segments
    assert rows_of(layout) == [[0, 1], [0, 1, 2], [1, 2], [3]]


# The value itself


def test_layout_describes_itself():
    layout = build_layout(patterned("local_window", block_size=4, local_window_size=8), 18, causal=False)
    assert (layout.seq, layout.block_size, layout.blocks, layout.active) == (18, 4, 5, 13)
    assert layout.counts.tolist() == [2, 3, 3, 3, 2]
    assert layout.row_ptr.dtype == np.int64
    assert layout.cols.dtype == np.uint16
    assert layout.nbytes == 6 * 8 + 13 * 2
    assert layout.density == 13 / 25


def test_layout_is_read_only():
    layout = build_layout(AttentionConfig(variant="dense"), 100, causal=False)
    for array in (layout.row_ptr, layout.cols, layout.row(0)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        layout.seq = 1
    assert isinstance(layout, Layout)


def test_columns_widen_only_when_they_must():
    assert column_dtype(65_536) is np.uint16
    assert column_dtype(65_537) is np.uint32
    config = dilated_sparse([(65_536, 1)], ratio=3 / 65_536, block_size=1)  # one period of all blocks
    narrow, wide = build_layout(config, 65_536, causal=False), build_layout(config, 65_539, causal=False)
    assert (narrow.cols.dtype, wide.cols.dtype) == (np.uint16, np.uint32)
    assert narrow.row(65_535).tolist() == [65_533, 65_534, 65_535]
    assert wide.row(65_537).tolist() == [65_536, 65_537, 65_538]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        dilated_sparse([(32, 1)], 0.01, 64),
        dilated_sparse([(32, 1), (64, 2), (128, 4)], 0.01, 64),
        dilated_sparse([(1024, 1), (2048, 2)], 0.01, 64),
        dilated_sparse([(16_384, 1)], 0.01, 64),
        dilated_sparse([(16_384, 1), (16_384, 4)], 0.01, 64),
        dilated_sparse([(1000, 1), (1023, 2), (1025, 3)], 0.01, 64),
        patterned("local_window", block_size=64, local_window_size=8192),
        patterned("global_local", block_size=64, local_window_size=8192, global_tokens=1024),
    ],
)
def test_a_million_tokens_at_one_percent_stay_small(config, causal):
    tracemalloc.start()
    try:
        layout = build_layout(config, MILLION, causal)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert layout.density < 0.0101
    assert layout.nbytes < 10e6
    assert peak < 40e6
    assert layout.active == count_active(config, MILLION, causal)
    assert layout.row(8000).tolist() == brute_force_row(config, 8000, 16_384, causal)


def test_huge_numbers_in_a_config_are_harmless():
    for config in (
        dilated_sparse([(2**38, 1), (2**38, 2**38)], 1.0),
        patterned("local_window", block_size=4, local_window_size=2**38),
        dilated([2**38], [1]),
    ):
        assert set(rows_of(build_layout(config, 10, causal=False))[0]) >= {0}
        assert count_active(config, 10, causal=False) in (1, 9)


# Refusals


def test_adaptive_has_no_layout_before_it_runs():
    config = AttentionConfig(
        variant="adaptive",
        pattern=SparsePatternConfig(block_size=4, sparsity_ratio=0.5),
        adaptive=AdaptiveConfig(num_heads=2, head_dim=8),
    )
    for function in (build_layout, count_active):
        with pytest.raises(ConfigError, match=r"chosen from q and k.*module\.select"):
            function(config, 16, False)
    assert row_budget(config, 17) == 3  # 2.5 of 5 blocks rounds up


@pytest.mark.parametrize("ratio, seq, budget", [(0.01, 4, 1), (0.5, 12, 2), (0.49, 12, 1), (1.0, 13, 4)])
def test_row_budget_rounds_half_up_and_is_at_least_one(ratio, seq, budget):
    assert row_budget(dilated_sparse([(4, 1)], ratio), seq) == budget


@pytest.mark.parametrize("seq", [0, -3])
def test_no_layout_of_no_tokens(seq):
    for config in (AttentionConfig(variant="dense"), dilated_sparse([(2, 1)], 0.5)):
        with pytest.raises(InputError, match=f"at least 1 token, got seq={seq}"):
            build_layout(config, seq, causal=False)
        with pytest.raises(InputError, match=f"got seq={seq}"):
            count_active(config, seq, causal=False)


def test_block_size_belongs_to_the_pattern():
    config = dilated_sparse([(4, 1)], 0.5)
    assert build_layout(config, 16, causal=False, block_size=4).block_size == 4
    with pytest.raises(ConfigError, match="block_size=8 contradicts the pattern's block_size=4"):
        build_layout(config, 16, causal=False, block_size=8)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        build_layout(AttentionConfig(variant="dense"), 16, causal=False, block_size=0)


def test_budget_needs_a_pattern():
    with pytest.raises(ConfigError, match="no pattern"):
        row_budget(AttentionConfig(variant="dense"), 16)


def test_layouts_import_no_torch():
    code = "import sys, attention.layout; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "branches, ratio", [([(64, 1)], 0.1), ([(16, 1), (96, 4)], 0.2), ([(7, 1), (96, 3)], 0.4)]
)
def test_what_some_rows_keep_is_between_their_farthest_blocks(branches, ratio, causal):
    config, seq = dilated_sparse(branches, ratio), 96 * 4
    for first, stop in ((0, 32), (32, 64), (40, 96)):
        rows = np.arange(first, stop)
        each = [kept_columns(config, seq, causal, rows[at : at + 1]) for at in range(len(rows))]
        assert columns_by_row(config, seq, causal, rows).tolist() == np.concatenate(each).tolist()
        kept = kept_columns(config, seq, causal, rows)
        assert kept_hull(config, seq, causal, (first, stop)) == (kept[0], kept[-1] + 1)
