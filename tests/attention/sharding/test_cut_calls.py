"""Whole calls of a part meet the pairs that its queries have among its keys."""

from __future__ import annotations

import random

import numpy as np
import pytest
from whole_cases import WHOLE, met, shape_of

from attention import AttentionConfig, SparsePatternConfig
from attention.reference import multiplicity
from attention.sharding.cut_calls import cut_calls
from attention.sharding.needs import Source
from attention.sharding.parts import joined_placement, own_placement, source_placement
from attention.sharding.whole_parts import listed_part, whole_part
from attention.sizes.whole_calls import CallPart, WholeCall, backward_cut, forward_cut

SEQ = 100


def ranges(rng: random.Random) -> tuple[tuple[int, int], tuple[int, int]]:
    """Some tokens, and the same or others that meet none of them."""
    first, second, third, fourth = sorted(rng.sample(range(SEQ + 1), 4))
    pairs = [((first, second), (third, fourth)), ((third, fourth), (first, second)), ((first, fourth),) * 2]
    return rng.choice(pairs)


@pytest.mark.pairwise
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (12, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("config", WHOLE.values(), ids=WHOLE.keys())
def test_parts_meet_the_pairs_that_the_oracle_counts(config, causal, heads):
    rng = random.Random(f"{config} {causal} {heads}")
    whole = shape_of(SEQ, *heads, causal=causal)
    expected = multiplicity(config, SEQ, heads[0], causal).numpy()
    for _ in range(5):
        queries, keys = ranges(rng)
        part = whole_part(config, queries, own_placement(*keys), whole)
        pairs = expected[:, slice(*queries), slice(*keys)]
        for cut_of in (forward_cut, backward_cut, lambda call, _: CallPart(2, 1)):
            np.testing.assert_array_equal(met(part.calls, part.shape, cut_of), pairs)
        assert bool(part.calls) == pairs.any()
        assert part.calls == () or part.calls[0].first
        covered = sum(call.first * call.queries * call.views for call in part.calls if call.step == 1)
        assert part.covers == (covered == queries[1] - queries[0])


@pytest.mark.parametrize("causal", [False, True])
def test_lists_are_calls_where_nothing_cuts_their_blocks(causal):
    pattern = SparsePatternConfig(pattern_type="dilated_sparse", block_size=16, sparsity_ratio=0.5)
    config = AttentionConfig(
        variant="block_sparse", pattern=pattern, segment_lengths=(64,), dilation_rates=(2,)
    )
    whole = shape_of(250, causal=causal)
    rows, _ = joined_placement([Source(0, 16, 64, 1)], [(128, 250)], 16)
    part = listed_part(config, (128, 250), rows, whole)
    assert (part.first, part.calls.before, part.calls.blocks(part.shape)) == (8, 3, 11)
    assert [(group.rows, group.tokens) for group in part.calls.groups] == [(7, 16), (1, 10)]
    assert [(call.start - part.shape.origin, call.key_start) for call in part.calls.own] == (
        [(0, 48), (112, 160)] if causal else []
    )
    for queries, key in (((130, 250), 16), ((128, 200), 16), ((128, 250), 20)):
        rows, _ = joined_placement([Source(0, key, 64, 1)], [queries], 16)
        assert listed_part(config, queries, rows, whole) is None
    assert listed_part(config, (128, 250), rows, whole._replace(windows="causal")) is None


def test_views_that_lose_nothing_stay_together():
    blocks = WholeCall("blocks", 10, 10, 0, 10, views=8, view_step=10, right=0, first=True)
    first, middle, last = cut_calls([blocks], (25, 75), (0, 62))
    assert (first.start, first.length, first.key_start, first.key_length) == (25, 5, 10, 10)
    assert (middle.start, middle.views, middle.right) == (30, 4, 0)
    assert (last.start, last.length, last.key_start, last.key_length, last.right) == (70, 5, 60, 2, 3)
    assert [call.first for call in (first, middle, last)] == [True, True, True]
    assert [call.name for call in (first, middle, last)] == ["blocks", "blocks, 2", "blocks, 3"]


def test_a_window_that_is_cut_is_a_window_of_what_sees_something():
    window = WholeCall("window", 0, 40, 0, 40, left=5, right=0, first=True)
    (halo,) = cut_calls([window], (10, 20), (0, 10))
    assert (halo.start, halo.length, halo.key_start, halo.key_length) == (10, 5, 5, 5)
    assert (halo.left, halo.right) == (0, None)
    (own,) = cut_calls([window], (10, 20), (10, 20))
    assert (own.left, own.right) == (5, 0)
    (few,) = cut_calls([window], (10, 13), (10, 13))
    assert (few.left, few.right) == (None, 0)
    assert cut_calls([window], (10, 20), (20, 30)) == cut_calls([window], (16, 20), (0, 10)) == ()


@pytest.mark.parametrize(
    "heads, rate, rows, offsets, views",
    [
        ((8, 8), 4, 1, 1, 4),
        ((8, 2), 4, 1, 1, 4),
        ((8, 2), 16, 1, 4, 2),
        ((8, 2), 16, 16, 1, 8),
        ((8, 2), 16, 2, 4, 2),
        ((8, 2), 3, 1, 8, 1),
    ],
)
def test_offsets_that_lie_in_equal_steps_are_views(heads, rate, rows, offsets, views):
    config = AttentionConfig(
        variant="dilated", segment_lengths=(256,), dilation_rates=(rate,), uncovered="zero"
    )
    source = Source(0, 0, 96, rows)
    part = whole_part(config, (96, 192), source_placement(source), shape_of(256, *heads))
    assert [(call.offsets, call.views) for call in part.calls] == [(offsets, views)]
    parts = [both for call in part.calls for both in call.spans(part.shape)]
    assert len(parts) == offsets
    assert sum(queries.batch * queries.heads for queries, _ in parts) == heads[0]
