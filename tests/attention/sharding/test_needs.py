"""What ranks fetch of each other is what their queries see, by the mask of the reference, and no more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from edges import by_token
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded import DENSE, branches, cases, dilated, listed, longnet, windowed

from attention.config import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.errors import ConfigError
from attention.reference import multiplicity
from attention.sharding.needs import Source, Visit, asking, deliveries, stages, visitors, visits
from attention.sharding.ranges import sight_of
from attention.sharding.rows import STAGE_SHARE, most_of_one
from attention.sharding.shards import Shards, shards_of

HEADS = 4


def visible(config: AttentionConfig, seq: int, causal: bool, documents=None) -> np.ndarray:
    """[HEADS, seq, seq]: whether head h's query q sees key k in some batch item."""
    pairs = multiplicity(config, seq, HEADS, causal).numpy() > 0
    if documents is None:
        return pairs
    numbers = [np.repeat(np.arange(len(lengths)), lengths) for lengths in documents]
    return pairs & np.any([item[:, None] == item for item in numbers], axis=0)


def fetched(some: Sequence[Sequence[Source]], seq: int) -> np.ndarray:
    """[HEADS, seq]: how often a rank fetches a token for a query head."""
    times = np.zeros((HEADS, seq), int)
    positions = np.arange(seq)
    for stage in some:
        for _, begin, end, rate in stage:
            for head in range(HEADS):
                times[head, begin:end] += positions[begin:end] % rate == head % rate
    return times


def global_tokens(config: AttentionConfig, seq: int, causal: bool) -> int:
    pattern = config.pattern
    if causal or pattern is None or pattern.pattern_type != "global_local":
        return 0
    size = 1 if config.token_edges else pattern.block_size
    return min(-(-pattern.global_tokens // size) * size, seq)


@given(cases())
def test_a_rank_fetches_what_its_queries_see_and_global_queries_visit_their_keys(case):
    check_needs(*case)


@pytest.mark.slow
@settings(max_examples=2000)
@given(cases(200))
def test_a_rank_fetches_what_its_queries_see_widely(case):
    check_needs(*case)


def check_needs(config, shards, causal, documents):
    seq, pairs = shards.seq, visible(config, shards.seq, causal, documents)
    first = global_tokens(config, seq, causal)
    for rank in range(shards.world):
        own = shards.positions(rank)
        times = fetched(stages(config, shards, rank, causal, documents), seq)
        assert times.max() <= 1
        assert not times[:, own].any()
        wanted = pairs[:, own[own >= first]].any(axis=1)
        wanted[:, own] = False
        if config.variant == "dilated":
            assert (times >= wanted).all()
        elif config.pattern is None or config.pattern.pattern_type != "dilated_sparse" or not documents:
            assert (times == wanted).all()
        visiting = np.zeros(seq, bool)
        for _, begin, end in visits(config, shards, rank, causal, documents):
            visiting[begin:end] = True
        seen = pairs[:, :first][:, :, own].any(axis=(0, 2))
        seen[own[own < first]] = False
        assert visiting[:first].tolist() == seen.tolist()
        assert not visiting[first:].any()


@given(cases())
def test_what_a_rank_fetches_is_what_its_peers_deliver(case):
    config, shards, causal, documents = case
    ranks = range(shards.world)
    plans = [stages(config, shards, rank, causal, documents) for rank in ranks]
    sent = [deliveries(config, shards, rank, causal, documents) for rank in ranks]
    guests = [visits(config, shards, rank, causal, documents) for rank in ranks]
    gone = [visitors(config, shards, rank, causal, documents) for rank in ranks]
    assert len({len(plan) for plan in (*plans, *sent)}) == 1
    for rank in ranks:
        for peer in ranks:
            for mine, theirs in zip(plans[rank], sent[peer], strict=True):
                wanted = [s._replace(peer=rank) for s in mine if s.peer == peer]
                assert wanted == [s for s in theirs if s.peer == rank]
            coming = [visit._replace(peer=rank) for visit in guests[rank] if visit.peer == peer]
            assert coming == [visit for visit in gone[peer] if visit.peer == rank]


@given(cases())
def test_sources_and_visits_lie_in_one_piece_of_their_peer_and_ascend(case):
    config, shards, causal, documents = case
    for rank in range(shards.world):
        plan = stages(config, shards, rank, causal, documents)
        for some in (*plan, visits(config, shards, rank, causal, documents)):
            assert [one.begin for one in some] == sorted({one.begin for one in some})
            for peer, begin, end, *_ in some:
                assert peer != rank
                assert any(low <= begin < end <= high for low, high in shards.pieces(peer))


@given(cases(), st.data())
def test_queries_that_do_not_ask_see_none_of_the_keys(case, data):
    config, shards, causal, _ = case
    edges = st.integers(0, shards.seq)
    (first, stop), (begin, end) = (sorted((data.draw(edges), data.draw(edges))) for _ in range(2))
    if first == stop or begin == end:
        return
    sees = visible(config, shards.seq, causal)[:, :, begin:end].any(axis=(0, 2))
    low, high = asking(config, shards.seq, (first, stop), (begin, end), causal)
    inside = np.flatnonzero(sees[first:stop]) + first
    assert all(low <= query < high for query in inside)
    windows = config.pattern is not None and config.pattern.pattern_type == "local_window"
    if (windows or config.variant == "dense") and low < high:
        assert (sees[low], sees[high - 1]) == (True, True)


# Stages


def peers(plan) -> list[list[int]]:
    return [[source.peer for source in stage] for stage in plan]


def test_dense_goes_round_the_ring():
    shards = Shards(16, 4)
    assert peers(stages(DENSE, shards, 1, False)) == [[0], [3], [2]]
    assert peers(stages(DENSE, shards, 1, True)) == [[0], [], []]
    assert stages(DENSE, shards, 2, True)[1] == (Source(0, 0, 4, 1),)
    assert peers(stages(DENSE, shards._replace(zigzag=True), 1, True)) == [[0], [3, 3], [2, 2]]


def test_dilated_takes_the_nearest_first():
    config = dilated((16, 1))
    assert peers(stages(config, Shards(16, 4), 1, False)) == [[0], [2], [3]]
    assert peers(stages(config, Shards(16, 4), 2, True)) == [[1], [0], []]


def test_dilated_takes_several_peers_that_bring_little_in_one_stage():
    config, shards = dilated((16, 1), (128, 8)), Shards(128, 8)
    assert peers(stages(config, shards, 6, True)) == [[4, 5], [2, 3], [0, 1], []]
    assert peers(stages(config, shards, 3, False)) == [[2, 4], [1, 5], [0, 6], [7]]


@settings(max_examples=50)
@given(
    branches.map(lambda some: dilated(*((max(pair), pair[1]) for pair in some))),
    st.integers(1, 120),
    st.integers(1, 9),
    st.booleans(),
)
def test_a_stage_of_dilated_attention_is_bounded(config, seq, world, causal):
    """By a part of a shard, or what one peer brings, and the last of its peers."""
    shards = shards_of(config, seq, world)
    sight = sight_of(config, shards.seq, causal)
    for rank in range(shards.world):
        most = most_of_one(sight, shards, rank, causal, 1, 1)
        apart = 0
        for stage in stages(config, shards, rank, causal):
            rows = sum(-(-(end - begin) // rate) for _, begin, end, rate in stage)
            assert rows < max(most, -(-shards.fullest // STAGE_SHARE)) + most or not rows
            distances = [abs(source.peer - rank) for source in stage]
            assert min(distances, default=apart) >= apart
            apart = max(distances, default=apart)


@pytest.mark.parametrize("tokens", [2048, 131_072])
def test_stages_of_longnet_grow_with_what_it_brings_alone(tokens):
    counts = []
    for world in (4, 64, 1024):
        config = longnet(2048, 1 + (tokens * world // 2048).bit_length() // 2, 4)
        counts.append(len(stages(config, shards_of(config, tokens * world, world), 0, True)))
    assert counts == ([3, 9, 15] if tokens == 2048 else [1, 1, 1])


def test_others_have_one_stage():
    config = windowed(2, 8, shared=1)
    assert stages(config, Shards(32, 4, unit=2), 2, True) == ((Source(0, 0, 2, 1), Source(1, 8, 16, 1)),)
    assert stages(config, Shards(32, 4, unit=2), 1, True) == ((Source(0, 0, 8, 1),),)
    assert stages(config, Shards(8, 1, unit=2), 0, True) == ()


def test_ranks_without_tokens_want_nothing_and_send_nothing():
    for config in (DENSE, windowed(2, 8, shared=3), listed(2, 1.0, (8, 1)), dilated((4, 1))):
        shards = shards_of(config, 3, 8)
        assert shards.tokens(7) == 0
        for plan in (stages, deliveries):
            assert not any(plan(config, shards, 7, False))
        assert visits(config, shards, 7, False) == visitors(config, shards, 7, False) == ()


def test_global_queries_travel_instead_of_keys():
    config, shards = windowed(4, 4, shared=3), Shards(32, 4, unit=4)
    assert visits(config, shards, 0, False) == ()
    assert visits(config, shards, 2, False) == (Visit(0, 0, 4),)
    assert visitors(config, shards, 0, False) == tuple(Visit(peer, 0, 4) for peer in (1, 2, 3))
    assert visits(config, shards, 2, True) == ()
    assert stages(config, shards, 0, False) == ((),)  # a window of 4 centred tokens is no block to a side


def test_adaptive_is_refused():
    config = AttentionConfig(
        variant="adaptive",
        pattern=SparsePatternConfig(block_size=4),
        adaptive=AdaptiveConfig(num_heads=2, head_dim=8),
    )
    with pytest.raises(ConfigError, match="exchange='heads'"):
        stages(config, Shards(32, 4, unit=4), 0, False)


# Figures of the reference


def received(config: AttentionConfig, shards: Shards, rank: int, causal: bool) -> int:
    """Tokens that a rank receives for a query head."""
    sources = sum(stages(config, shards, rank, causal), ())
    return sum((end - begin) // rate for _, begin, end, rate in sources)


@pytest.mark.parametrize("world, tokens, most", [(4, 2048, 6144), (8, 3072, 14336)])
def test_longnet_moves_annuli(world: int, tokens: int, most: int):
    """A shard as long as the first segment; the last branch has the whole sequence."""
    config = longnet(2048, world.bit_length())
    shards = shards_of(config, 2048 * world, world)
    assert shards.tokens(0) == 2048
    assert [received(config, shards, rank, False) for rank in range(world)] == [tokens] * world
    assert most == shards.seq - 2048


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("alpha, count", [(2, 3), (2, 5), (4, 2)])
def test_aligned_nested_branches_equal_the_annuli_and_brute_force(world, alpha, count, causal):
    """Per head the sum over branches of (s - max(L, s of the branch before)) / r: each in the part of the
    sequence that its segment covers, for causal attention before the rank."""
    config = longnet(16, count, alpha)
    seq = max(16 * alpha ** (count - 1), 16 * world)
    shards = shards_of(config, seq, world)
    own = shards.tokens(0)
    pairs = visible(config, seq, causal)
    for rank in range(world):
        times = fetched(stages(config, shards, rank, causal), seq)
        wanted = pairs[:, shards.positions(rank)].any(axis=1)
        wanted[:, shards.positions(rank)] = False
        assert (times == wanted).all()
        if not causal:
            sum_ = last = 0
            for length, rate in config.branches:
                sum_ += max(0, length - max(own, last)) // rate
                last = length
            assert times.sum(axis=1).tolist() == [sum_] * HEADS


@pytest.mark.parametrize("seq", [8192, 131072, 131072 - 77])
@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("window, size", [(1024, 128), (1000, 128), (100, 128), (4096, 64)])
def test_a_windows_halo_depends_on_nothing_else(seq, world, window, size):
    config = windowed(size, window)
    shards = shards_of(config, seq, world)
    for rank in range(world):
        begin, end = shards.edge(rank), shards.edge(rank + 1)
        left = min(window // size * size, begin)
        assert received(config, shards, rank, True) == left
        side = window // (2 * size) * size
        assert received(config, shards, rank, False) == min(side, begin) + min(side, seq - end)


def test_global_keys_come_once_beside_the_halo():
    config = windowed(64, 256, shared=100)
    shards = shards_of(config, 4096, 4)
    assert [received(config, shards, rank, True) for rank in range(4)] == [0, *[256 + 128] * 3]
    config = by_token(config)
    assert [received(config, shards, rank, True) for rank in range(4)] == [0, *[256 + 100] * 3]


def test_zigzag_halves_what_the_last_rank_of_causal_dense_attention_receives():
    """(2W - k - 2) L / 2 tokens at rank k."""
    shards = Shards(8 * 1000, 8, zigzag=True)
    for rank in range(8):
        assert received(DENSE, shards, rank, True) == (16 - rank - 2) * 500
        assert received(DENSE, shards, rank, False) == 7000
        assert received(DENSE, Shards(8000, 8), rank, True) == 1000 * rank


@settings(max_examples=30)
@given(config=branches.map(lambda some: listed(4, 0.2, *some)), seq=st.integers(100, 2000))
def test_lists_reach_no_further_than_their_rows(config, seq):
    shards = shards_of(config, seq, 4)
    for rank in range(4):
        for stage in stages(config, shards, rank, True):
            assert all(end <= shards.edge(rank) for _, _, end, _ in stage)


def test_a_hundred_million_tokens_on_a_thousand_ranks():
    for config in (
        DENSE,
        windowed(128, 4096, 64),
        longnet(1 << 16, 11),
        listed(128, 1e-4, (512, 1), (4096, 8)),
    ):
        shards = shards_of(config, 100_000_000, 1024)
        for rank in (0, 511, 1023):
            sources = [source for stage in stages(config, shards, rank, True) for source in stage]
            assert bool(sources) == (rank > 0)
            assert all(source.end <= shards.edge(rank) for source in sources)
