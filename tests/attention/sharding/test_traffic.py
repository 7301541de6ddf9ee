"""Traffic in bytes: the same from both ends, and the figures of the formulas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sharded import DENSE, cases, listed, longnet, windowed

from attention.config import ShardingConfig
from attention.sharding.needs import stages
from attention.sharding.shards import Shards, shards_of
from attention.sharding.traffic import Traffic, fewer_bytes, traffic

SIZES = {"batch": 2, "heads": 8, "kv_heads": 4, "head_dim": 16, "itemsize": 2}


def of(config, shards, rank, causal, exchange="keys", training=True, documents=None, **changes) -> Traffic:
    return traffic(
        config,
        shards,
        rank,
        causal,
        **SIZES | changes,
        training=training,
        exchange=exchange,
        documents=documents,
    )


@given(cases(), st.sampled_from(["keys", "heads"]))
def test_what_a_rank_sends_is_what_its_peer_receives(case, exchange):
    config, shards, causal, documents = case
    all_ranks = [
        of(config, shards, rank, causal, exchange, documents=documents) for rank in range(shards.world)
    ]
    for rank, mine in enumerate(all_ranks):
        for way in ("forward", "backward"):
            for peer, (sent, received) in getattr(mine, way).items():
                assert peer != rank
                assert getattr(all_ranks[peer], way)[rank] == (received, sent)


@given(cases())
def test_rows_of_a_source_are_those_of_its_lanes(case):
    """Counted head by head: of each kv head, the tokens of each remainder that one of its query heads has."""
    config, shards, causal, documents = case
    for rank in range(shards.world):
        rows = dict.fromkeys(range(shards.world), 0)
        for stage in stages(config, shards, rank, causal, documents):
            for peer, begin, end, rate in stage:
                lanes = {(head // 2, head % rate) for head in range(8)}
                rows[peer] += -(-(end - begin) // rate) * len(lanes)
        forward = of(config, shards, rank, causal, documents=documents, training=False).forward
        visiting = config.pattern is not None and config.pattern.pattern_type == "global_local"
        if not visiting or causal:
            assert {peer: r for peer, (_, r) in forward.items() if r} == {
                peer: count * 2 * 2 * 16 * 2 for peer, count in rows.items() if count
            }


def test_a_window_moves_its_halo_forward_and_twice_and_its_gradient_back():
    shards = Shards(4096, 4, unit=64)
    pair = 2 * 256 * 2 * 4 * 16 * 2  # k and v, tokens, batch, kv heads, channels, bytes
    mine = of(windowed(64, 256), shards, 1, True)
    assert mine.forward == {0: (0, pair), 2: (pair, 0)}
    assert mine.backward == {0: (pair, pair), 2: (pair, pair)}
    assert of(windowed(64, 256), shards, 1, True, training=False) == Traffic(mine.forward, {})


@pytest.mark.parametrize("itemsize, travel", [(2, 4), (4, 4), (8, 8)])
def test_gradients_travel_in_single_precision_where_that_is_asked_for(itemsize, travel):
    shards, tokens = Shards(4096, 4, unit=64), 2 * 256 * 2 * 4 * 16
    config = windowed(64, 256).model_copy(update={"sharding": ShardingConfig(travel="float32")})
    mine = of(config, shards, 1, True, itemsize=itemsize)
    assert mine.forward == {0: (0, tokens * itemsize), 2: (tokens * itemsize, 0)}
    assert mine.backward[0] == (tokens * travel, tokens * itemsize)


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("seq", [8192, 131072])
def test_a_windows_bytes_depend_on_neither_length_nor_ranks(world, seq):
    config = windowed(128, 1024)
    last = of(config, shards_of(config, seq, world), world - 1, True)
    pair = 2 * 1024 * 2 * 4 * 16 * 2
    assert last.forward == {world - 2: (0, pair)}


def test_global_queries_cost_their_owner_what_the_reference_says():
    """For each other rank g H (2d + 1) numbers forward, the log-sum-exp in 4 bytes here; 4d + 1 backward."""
    config, shards = windowed(4, 4, shared=3), Shards(64, 4, unit=4)
    mine = of(config, shards, 0, False)
    rows, keys = 2 * 4 * 8, 2 * 4 * 2 * 4 * 16 * 2  # batch, g in whole blocks, heads; global keys of the peer
    out, lse = rows * 16 * 2, rows * 4
    assert mine.forward == dict.fromkeys((1, 2, 3), (out + keys, out + lse))
    assert mine.backward == dict.fromkeys((1, 2, 3), (3 * out + lse + keys, out + keys))


def test_longnets_bytes_per_rank_follow_its_annuli():
    config = longnet(2048, 4)
    shards = shards_of(config, 8 * 2048, 8)
    for rank in range(8):
        forward = of(config, shards, rank, False, kv_heads=8, training=False).forward
        assert sum(received for _, received in forward.values()) == 3072 * 2 * 2 * 8 * 16 * 2


def test_kv_heads_that_query_heads_share_come_once_for_each_remainder():
    config = longnet(2048, 3)
    shards = shards_of(config, 4 * 2048, 4)
    alone, shared = (of(config, shards, 0, False, kv_heads=k, training=False).forward[1][1] for k in (8, 4))
    assert shared == alone  # (4096, 2): two heads a group, both remainders
    far = [of(config, shards, 0, False, kv_heads=k, training=False).forward[2][1] for k in (8, 4, 1)]
    assert far == [far[0], far[0], far[0] // 2]  # (8192, 4): of 8 heads all four remainders, once


def test_heads_move_all_of_them_once():
    """(2H + 2K) L d s (W - 1) / W bytes a rank, forward and backward alike."""
    shards = Shards(1024, 4)
    mine = of(DENSE, shards, 2, False, "heads")
    total = 2 * (2 * 8 + 2 * 4) * 256 * 16 * 2 * 3 // 4
    assert sum(sent for sent, _ in mine.forward.values()) == total
    assert mine.forward == mine.backward
    ragged = of(DENSE, Shards(1026, 4), 3, False, "heads")
    part = 2 * 16 * 2
    assert ragged.forward[0] == (256 * 4 * part + 257 * 2 * part, 257 * 4 * part + 256 * 2 * part)
    assert ragged.backward[0] == (256 * 2 * part + 257 * 4 * part, 257 * 2 * part + 256 * 4 * part)


@given(cases(), st.sampled_from([(8, 8), (8, 4), (12, 2)]))
def test_the_exchange_of_fewer_bytes_is_that_of_which_all_ranks_send_fewer(case, group):
    config, shards, causal, _ = case
    if config.pattern is not None and config.pattern.pattern_type == "dilated_sparse":
        return
    heads, kv_heads = group
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": 16, "itemsize": 2}
    total = {
        exchange: sum(
            sent
            for rank in range(shards.world)
            for sent, _ in of(
                config, shards, rank, causal, exchange, False, batch=1, **sizes
            ).forward.values()
        )
        for exchange in ("keys", "heads")
    }
    chosen = fewer_bytes(config, shards, causal, **sizes)
    if kv_heads % shards.world:
        assert chosen == "keys"
    elif config.variant != "dilated":
        assert chosen == ("heads" if total["heads"] < total["keys"] else "keys")


def test_heads_are_fewer_bytes_for_dense_attention_from_some_ranks_on():
    """From W > 1 + H / K on, where keys are not causal."""
    for world in (2, 4, 8):
        some = {"heads": 32, "kv_heads": 8, "head_dim": 128, "itemsize": 2}
        chosen = fewer_bytes(DENSE, Shards(1 << 20, world), False, **some)
        assert chosen == ("heads" if world > 5 else "keys")
    assert fewer_bytes(windowed(128, 4096), Shards(1 << 20, 8, 128), True, **some) == "keys"


def test_ranks_without_tokens_exchange_no_keys_and_the_heads_of_others():
    config = listed(4, 1.0, (8, 1))
    shards = shards_of(config, 9, 8)
    assert of(config, shards, 7, False) == Traffic({}, {})
    heads = of(config, shards, 7, False, "heads", kv_heads=8)
    assert set(heads.forward) == {0, 1, 2}
