"""Layouts seen from afar equal the layouts, cell by cell, and take no longer for a million tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.config import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.errors import ConfigError
from attention.layout import build_layout
from attention.layout_cells import SAMPLED, row_counts, row_permitted, shares, taken, units
from attention.reference import multiplicity

MILLION = 1 << 20


@st.composite
def configs(draw):
    variant = draw(st.sampled_from(["dense", "dilated", "local_window", "global_local", "dilated_sparse"]))
    size = draw(st.integers(1, 5))
    branches = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=4))
    if variant == "dense":
        return AttentionConfig(variant="dense")
    if variant == "dilated":
        lengths = [length + rate for length, rate in branches]
        return AttentionConfig(
            variant="dilated",
            segment_lengths=lengths,
            dilation_rates=[rate for _, rate in branches],
            uncovered="zero",
        )
    pattern = SparsePatternConfig(
        pattern_type=variant,
        block_size=size,
        local_window_size=draw(st.integers(1, 40)),
        global_tokens=draw(st.integers(1, 20)),
        edges=draw(st.sampled_from(["block", "token"])),
        sparsity_ratio=draw(st.floats(0.02, 1.0)),
    )
    return AttentionConfig(
        variant="block_sparse",
        pattern=pattern,
        segment_lengths=[n * size for n, _ in branches],
        dilation_rates=[rate for _, rate in branches],
    )


def pairs(config, seq, causal, head):
    """[units, units], 1 where a pair is kept."""
    if config.variant == "dilated" or config.token_edges:
        return (multiplicity(config, seq, head + 1, causal)[head] > 0).numpy().astype(float)
    layout = build_layout(config, seq, causal)
    found = np.zeros((layout.blocks, layout.blocks))
    for row in range(layout.blocks):
        found[row, layout.row(row)] = 1
    return found


def cells(whole, rows, columns):
    """The means of the cells of `whole`."""
    at, to = (np.arange(min(n, len(whole)) + 1) * len(whole) // min(n, len(whole)) for n in (rows, columns))
    return np.array([[whole[a:b, c:d].mean() for c, d in pairwise(to)] for a, b in pairwise(at)])


@given(
    config=configs(),
    seq=st.integers(1, 60),
    causal=st.booleans(),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    head=st.integers(0, 5),
)
def test_cells_have_the_share_that_is_kept(config, seq, causal, rows, columns, head):
    whole = pairs(config, seq, causal, head)
    assert len(whole) == units(config, seq).number <= SAMPLED
    found = shares(config, seq, causal, rows, columns, head=head)
    np.testing.assert_allclose(found, cells(whole, rows, columns), atol=1e-12)
    np.testing.assert_array_equal(row_counts(config, seq, causal, head=head), whole.sum(axis=1))


@given(
    config=configs(),
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=4),
    asking=st.integers(1, 60),
    causal=st.booleans(),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
)
def test_cells_of_the_last_queries_and_of_documents(config, lengths, asking, causal, rows, columns):
    """A pair of units is kept where it is kept of the whole and has a pair of tokens of one document, the
    first of which asks."""
    seq = sum(lengths)
    origin = max(seq - asking, 0)
    size, count = units(config, seq)
    number = np.repeat(np.arange(len(lengths)), lengths)
    same = number[:, None] == number
    same[:origin] = False
    at = np.arange(seq) // size
    together = np.zeros((count, count))
    np.maximum.at(together, (at[:, None], at), same)
    whole = pairs(config, seq, causal, 0) * together
    permitted = np.tril(together) if causal else together
    first = origin // size
    given = {"origin": origin, "lengths": lengths}
    found = shares(config, seq, causal, rows, columns, **given)
    edges = np.arange(min(rows, count - first) + 1) * (count - first) // min(rows, count - first) + first
    to = np.arange(min(columns, count) + 1) * count // min(columns, count)
    expected = [[whole[a:b, c:d].mean() for c, d in pairwise(to)] for a, b in pairwise(edges)]
    np.testing.assert_allclose(found, np.array(expected), atol=1e-12)
    np.testing.assert_array_equal(row_counts(config, seq, causal, **given), whole.sum(axis=1)[first:])
    np.testing.assert_array_equal(row_permitted(config, seq, causal, **given), permitted.sum(axis=1)[first:])


LONG = [
    AttentionConfig(variant="dense"),
    AttentionConfig(variant="dilated", segment_lengths=[2048, 65536, MILLION], dilation_rates=[1, 8, 64]),
    AttentionConfig(
        variant="block_sparse",
        segment_lengths=[4096, MILLION],
        dilation_rates=[1, 3],
        pattern=SparsePatternConfig(block_size=16),
    ),
    AttentionConfig(
        variant="block_sparse", pattern=SparsePatternConfig(pattern_type="global_local", block_size=16)
    ),
]


@pytest.mark.parametrize("config", LONG, ids=["dense", "dilated", "dilated_sparse", "global_local"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_sample_of_rows_says_what_all_do(config, causal):
    seq = MILLION if config.variant != "dilated" else MILLION // 4
    few = shares(config, seq, causal, 8, 8)
    assert ((few >= 0) & (few <= 1)).all()
    # The first rows are global tokens' and looked at, however few they are.
    count, kept = units(config, seq).number, row_counts(config, seq, causal).mean()
    if config.pattern is None or config.pattern.pattern_type != "global_local":
        assert few.mean() == pytest.approx(kept / count, rel=0.1)
    if config.variant == "dilated" and not causal:
        assert few[0, 0] > few[0, 7] > 0


def test_a_length_that_no_array_could_have_is_seen_too():
    config = LONG[2]
    found = shares(config, 1 << 36, True, 4, 4)
    assert found[3, 3] > 0
    assert found[0, 3] == 0
    assert row_counts(LONG[3], 1 << 34, False).max() == (1 << 34) // 16


def test_a_head_takes_every_so_manyth_position():
    assert taken(8, 3, 1).tolist() == [1, 4, 7]
    assert taken(8, 3, 5).tolist() == [2, 5]


def test_adaptive_has_no_layout_to_see():
    config = AttentionConfig(
        variant="adaptive", pattern=SparsePatternConfig(), adaptive=AdaptiveConfig(num_heads=8, head_dim=64)
    )
    with pytest.raises(ConfigError, match="chosen from q and k"):
        shares(config, 4096, False, 4, 4)
