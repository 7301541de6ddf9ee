"""The closed forms count what the plans of all ranks move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded import DENSE, cases, dilated, listed, longnet, windowed

from attention.sharding.needs import stages
from attention.sharding.ranges import Band, Sight, sight, sight_of
from attention.sharding.rows import most_of_one, rows_between, rows_received, source_rows
from attention.sharding.shards import Shards, shards_of

groups = st.sampled_from([(4, 4), (8, 2), (6, 1)])


def moved(config, shards, causal, heads, kv_heads) -> np.ndarray:
    """[rank, peer]: rows that a rank receives of a peer, a source at a time."""
    rows = np.zeros((shards.world, shards.world), int)
    for rank in range(shards.world):
        for stage in stages(config, shards, rank, causal):
            for peer, begin, end, rate in stage:
                rows[rank, peer] += source_rows(end - begin, rate, heads, kv_heads)
    return rows


def is_even(config, shards) -> bool:
    """Whether no branches meet in mid-stride, nor end lists where a row might."""
    if config.variant == "dilated":
        rates = {rate for length, rate in config.branches}
        edges = (shards.unit, *config.segment_lengths)
        return all(edge % rate == 0 for edge in edges for rate in rates)
    return config.pattern is None or config.pattern.pattern_type != "dilated_sparse"


@settings(max_examples=50)
@given(cases(60), groups)
def test_closed_forms_equal_the_sum_of_sources(case, group):
    check_rows(*case, group)


@pytest.mark.slow
@settings(max_examples=1000)
@given(cases(200), groups)
def test_closed_forms_equal_the_sum_of_sources_widely(case, group):
    check_rows(*case, group)


def check_rows(config, shards, causal, _, group):
    expected, view = moved(config, shards, causal, *group), sight_of(config, shards.seq, causal)
    for rank in range(shards.world):
        between = [rows_between(view, shards, rank, peer, causal, *group) for peer in range(shards.world)]
        received = rows_received(view, shards, rank, causal, *group)
        most = most_of_one(view, shards, rank, causal, *group)
        assert sum(between) == received
        assert most >= max(between)
        if is_even(config, shards):
            assert between == expected[rank].tolist()
        else:
            assert (between >= expected[rank]).all()
        if config.variant == "dense" and not shards.zigzag:
            # The fullest rank may be the one that asks, a token ahead of its peers.
            assert 0 <= most - expected[rank].max() <= group[1]


@pytest.mark.parametrize("world", [4, 8, 16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("alpha", [2, 4])
def test_the_nearest_peer_sends_most_of_nested_branches(alpha, causal, world):
    config = longnet(64, 4, alpha)
    shards = Shards(64 * alpha**3 * 2, world, 64)
    expected, view = moved(config, shards, causal, 8, 2), sight_of(config, shards.seq, causal)
    for rank in range(world):
        near = [expected[rank, peer] for peer in (rank - 1, rank + 1) if 0 <= peer < world]
        assert most_of_one(view, shards, rank, causal, 8, 2) == expected[rank].max() == max(near)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        windowed(64, 1000),
        windowed(64, 300, 100),
        longnet(256, 5),
        dilated((300, 1), (1000, 3)),
        listed(8, 0.1, (16, 1), (64, 4)),
    ],
    ids=["dense", "window", "global", "longnet", "uneven", "listed"],
)
def test_all_ranks_at_once_are_each_of_them(config, causal):
    shards = shards_of(config, 4096 - 5, 16)
    view, ranks = sight_of(config, shards.seq, causal), np.arange(16)
    between = rows_between(view, shards, ranks[:, None], ranks, causal, 8, 2)
    received = rows_received(view, shards, ranks, causal, 8, 2)
    most = most_of_one(view, shards, ranks, causal, 8, 2)
    for rank in range(16):
        assert received[rank] == rows_received(view, shards, rank, causal, 8, 2)
        assert most[rank] == most_of_one(view, shards, rank, causal, 8, 2)
        for peer in range(16):
            assert between[rank, peer] == rows_between(view, shards, rank, peer, causal, 8, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_many_attentions_are_each_of_them(causal):
    windows, sizes, worlds = np.array([100, 1000, 5000]), np.array([16, 64, 128]), np.array([4, 8, 3])
    many = sight(
        "block_sparse", "global_local", 4000, causal, size=sizes, window=windows, global_tokens=windows // 10
    )
    dealt = Shards(4000, worlds, sizes)
    received = rows_received(many, dealt, worlds // 2, causal, 8, 2)
    for n, (window, size, world) in enumerate(
        zip(windows.tolist(), sizes.tolist(), worlds.tolist(), strict=True)
    ):
        config = windowed(size, window, window // 10)
        view, shards = sight_of(config, 4000, causal), Shards(4000, world, size)
        assert received[n] == rows_received(view, shards, world // 2, causal, 8, 2)


def test_ten_thousand_candidates_are_bounded_at_once():
    lengths = [np.full(10_000, 2048 << n) + np.arange(10_000) // 5000 for n in range(5)]
    view = sight("dilated", None, 1 << 24, False, lengths=lengths, rates=[1 << n for n in range(5)])
    shards = Shards(1 << 24, 1024, 2048)
    most = most_of_one(view, shards, 500, False, 8, 8)
    assert most.shape == (10_000,)
    assert (most <= rows_received(view, shards, 500, False, 8, 8)).all()


def test_what_each_of_a_thousand_ranks_receives_is_of_all_its_peers():
    ranks, shards = np.arange(1024), Shards(100_000_000, 1024)
    view = sight_of(longnet(2048, 14), 100_000_000, True)
    between = rows_between(view, shards, ranks[:, None], ranks, True, 8, 8)
    assert (between.sum(axis=1) == rows_received(view, shards, ranks, True, 8, 8)).all()


def test_lists_are_bounded_by_their_segments_and_their_farthest_block():
    config = listed(8, 0.1, (16, 1), (64, 4))
    assert sight_of(config, 800, True) == Sight((Band(128, 1, 9 * 8, 8), Band(512, 1, 4 * 9 * 8, 8)))
    assert sight_of(listed(8, 1.0, (16, 1 << 30)), 1 << 36, True).bands[0].reach < 1 << 63
