"""Every token has one holder, shards are even, and they end where blocks and segments do."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from attention.config import AttentionConfig, ShardingConfig, SparsePatternConfig
from attention.errors import InputError
from attention.sharding.shards import Shards, shards_of, unit_of

some_shards = st.builds(
    Shards, seq=st.integers(1, 60), world=st.integers(1, 9), unit=st.integers(1, 20), zigzag=st.booleans()
)


@given(some_shards)
@example(Shards(83, 4, unit=2, zigzag=True))
def test_every_token_has_one_holder(shards: Shards):
    held = [shards.positions(rank) for rank in range(shards.world)]
    assert sorted(np.concatenate(held).tolist()) == list(range(shards.seq))
    for rank, positions in enumerate(held):
        assert positions.size == shards.tokens(rank)
        assert (np.diff(positions) > 0).all()
        assert {shards.owner(token) for token in positions.tolist()} <= {rank}
    assert shards.fullest == max(positions.size for positions in held)


@given(some_shards)
def test_chunks_are_whole_units_dealt_as_evenly_as_they_go(shards: Shards):
    edges = [shards.edge(chunk) for chunk in range(shards.chunks + 1)]
    assert (edges[0], edges[-1]) == (0, shards.seq)
    units = np.diff([-(-edge // shards.unit) for edge in edges])
    assert all(edge % shards.unit == 0 or edge == shards.seq for edge in edges)
    assert units.max() - units.min() <= 1
    assert (np.diff(units) <= 0).all()


def test_pieces_lie_in_the_order_of_the_sequence_and_are_never_empty():
    assert Shards(10, 3).pieces(0) == ((0, 4),)
    assert Shards(10, 3).pieces(2) == ((7, 10),)
    assert Shards(10, 3, unit=4).pieces(2) == ((8, 10),)
    assert Shards(2, 3).pieces(2) == ()
    assert Shards(9, 2, zigzag=True).pieces(0) == ((0, 3), (7, 9))
    assert Shards(9, 2, zigzag=True).pieces(1) == ((3, 5), (5, 7))
    assert Shards(3, 2, zigzag=True).pieces(0) == ((0, 1),)
    assert Shards(1, 2, zigzag=True).positions(1).tolist() == []


@given(st.lists(some_shards, min_size=1, max_size=5), st.booleans())
def test_arrays_of_shards_are_each_of_them(many: list[Shards], zigzag: bool):
    columns = Shards(*(np.array(column)[:, None] for column in list(zip(*many, strict=True))[:3]), zigzag)
    ranks = np.arange(9)
    tokens, begins = columns.tokens(ranks), columns.edge(ranks)
    owners = columns.owner(np.zeros_like(columns.seq))
    for n, shards in enumerate(one._replace(zigzag=zigzag) for one in many):
        for rank in range(shards.world):
            assert tokens[n, rank] == shards.tokens(rank)
            assert begins[n, rank] == shards.edge(rank)
        assert owners[n, 0] == shards.owner(0)


def block_sparse(pattern_type: str, edges: str = "block") -> AttentionConfig:
    return AttentionConfig(
        variant="block_sparse",
        segment_lengths=(32,),
        dilation_rates=(1,),
        pattern=SparsePatternConfig(pattern_type=pattern_type, block_size=16, edges=edges),
    )


@pytest.mark.parametrize(
    "seq, world, unit",
    [
        (4096, 1, 4096),
        (4096, 8, 512),
        (4096, 3, 128),
        (17 * 512, 16, 64),
        (30714, 4, 512),
        (131072, 8, 16384),
        (1 << 20, 3, 32768),
        (52, 4, 1),
        (3, 4, 1),
    ],
)
def test_tokens_are_dealt_in_the_largest_powers_of_two_that_leave_ranks_even(seq: int, world: int, unit: int):
    assert shards_of(AttentionConfig(variant="dense"), seq, world) == Shards(seq, world, unit)


@given(st.integers(1, 5000), st.integers(1, 40))
def test_no_rank_is_much_fuller_than_the_mean(seq: int, world: int):
    shards = shards_of(AttentionConfig(variant="dense"), seq, world)
    assert shards.unit == 1 or shards.tokens(0) * world * 16 <= seq * 17


def test_units_of_many_sequences_are_those_of_each():
    seqs = np.array([1, 3, 52, 4096, 30714, 131072, 1 << 20])
    for world in (1, 3, 8):
        units = [Shards(int(seq), world, unit_of(int(seq), world)).unit for seq in seqs]
        assert unit_of(seqs, world).tolist() == units


def test_attentions_of_all_kinds_share_tokens():
    pattern = SparsePatternConfig(pattern_type="local_window", block_size=24)
    configs = (
        AttentionConfig(variant="dense"),
        AttentionConfig(variant="dilated", segment_lengths=(48, 480), dilation_rates=(1, 5)),
        AttentionConfig(variant="block_sparse", pattern=pattern),
    )
    assert len({shards_of(config, 1000, 6) for config in configs}) == 1


def test_zigzag_is_two_chunks_a_rank():
    zigzag = AttentionConfig(variant="dense", sharding=ShardingConfig(shards="zigzag"))
    assert shards_of(zigzag, 4096, 4) == Shards(4096, 4, 512, zigzag=True)


@pytest.mark.parametrize("seq, world", [(0, 2), (5, 0)])
def test_no_shards_of_nothing(seq: int, world: int):
    with pytest.raises(InputError, match=f"at least 1 token and 1 rank, got seq={seq} and world={world}"):
        shards_of(AttentionConfig(variant="dense"), seq, world)


def test_shards_needs_and_traffic_import_no_torch():
    code = "import sys, attention.sharding.traffic; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
