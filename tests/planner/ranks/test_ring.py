"""Which ranks share a sequence, and what they refuse."""

import pytest

from attention import AttentionConfig, ConfigError, ShardingConfig, SparsePatternConfig
from attention.config import AdaptiveConfig
from planner.configs import Columns
from planner.ranks.ring import Ring, exchange_of, refuse_sharing, ring_of, shardings, share_of, way_text
from planner.workload import Workload

DENSE = AttentionConfig(variant="dense")
WINDOW = AttentionConfig(
    variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window", local_window_size=256)
)
LEARNED = AttentionConfig(
    variant="adaptive",
    pattern=SparsePatternConfig(pattern_type="local_window"),
    adaptive=AdaptiveConfig(num_heads=8, head_dim=64),
)


def shared(**fields):
    return DENSE.model_copy(update={"sharding": ShardingConfig(**fields)})


def test_a_ring_has_all_gpus_or_as_many_as_it_says():
    workload = Workload(seq=64, batch=5, gpus=8)
    assert ring_of(DENSE, workload) == Ring(8, 5)
    assert ring_of(shared(ring_size=4), workload) == Ring(4, 3)
    assert ring_of(shared(ring_size=3), Workload(seq=64)) == Ring(1, 1)
    with pytest.raises(ConfigError, match="ring_size=3 and gpus=8"):
        ring_of(shared(ring_size=3), workload)


@pytest.mark.parametrize(
    "config, fields, why",
    [
        (DENSE, {"weights": True}, "weights=True is for one GPU"),
        (DENSE, {"queries": 3}, "fewer queries than keys are for one GPU"),
        (shared(exchange="heads"), {"kv_heads": 2}, "kv_heads=2 and 4 ranks; use ring_size=2, or exchange"),
        (LEARNED, {"kv_heads": 2}, "kv_heads=2 and 4 ranks; use ring_size=2$"),
    ],
)
def test_what_ranks_do_not_share_is_refused(config, fields, why):
    with pytest.raises(ConfigError, match=why):
        refuse_sharing(config, Workload(seq=64, gpus=4, **fields))
    refuse_sharing(config, Workload(seq=64, **fields))


def test_what_moves_fewer_bytes_is_exchanged():
    workload = Workload(seq=65_536, gpus=8)
    assert exchange_of(DENSE, workload) == "heads"
    assert exchange_of(WINDOW, workload) == "keys"
    assert exchange_of(LEARNED, workload) == "heads"
    assert exchange_of(shared(exchange="keys"), workload) == "keys"
    assert exchange_of(DENSE, workload.model_copy(update={"kv_heads": 1})) == "keys"


@pytest.mark.parametrize(
    "columns, workload, ways",
    [
        (Columns("dense"), {"causal": True}, ["keys", "keys, zigzag", "heads"]),
        (Columns("dense"), {"kv_heads": 4}, ["keys"]),
        (Columns("block_sparse", "local_window"), {"causal": True}, ["keys", "heads"]),
        (Columns("block_sparse", "local_window", backend="flex"), {}, ["heads"]),
        (Columns("adaptive"), {"kv_heads": 4}, ["heads, in rings of 4"]),
        (Columns("dense"), {"batch": 8}, ["keys", "heads", "none"]),
        (Columns("dense"), {"batch": 6}, ["keys", "heads", "keys, in rings of 4", "heads, in rings of 4"]),
    ],
)
def test_ways_to_share_that_are_worth_trying(columns, workload, ways):
    found = shardings(columns, Workload(seq=4096, gpus=8, **workload))
    assert [way_text(one) for one in found] == ways


def test_a_rank_has_the_sequences_of_its_ring_and_its_heads():
    workload = Workload(seq=4096, gpus=8, batch=6, heads=16, kv_heads=8)
    rings = Columns("dense", sharding=ShardingConfig(ring_size=4, exchange="heads"))
    share = share_of(rings, workload)
    assert (share.batch, share.heads, share.groups, share.gpus) == (3, 4, 2, 1)
    keys = Columns("dense", sharding=ShardingConfig(exchange="keys"))
    assert share_of(keys, workload) == workload.model_copy(update={"gpus": 1})
