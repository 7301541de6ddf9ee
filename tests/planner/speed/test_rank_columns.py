"""Seconds of ranks for many candidates at once, against those of one config, step by step."""

import time
from dataclasses import replace

import numpy as np
import pytest

from attention import AttentionConfig, ConfigError, MultiheadConfig, ShardingConfig, SparsePatternConfig
from planner.configs import Columns, columns_of
from planner.gpus import find as card_of
from planner.memory.estimate import machine_of
from planner.ranks.links import network_of
from planner.speed.rank_columns import rank_seconds
from planner.speed.rates import default_rates
from planner.speed.timeline import longest_rank
from planner.workload import Workload

BRANCHES = {"segment_lengths": (4096, 16_384, 65_536, 262_144), "dilation_rates": (1, 4, 16, 64)}


def sparse(kind, **fields):
    branches = (
        {"segment_lengths": (8192, 65_536), "dilation_rates": (1, 4)} if kind == "dilated_sparse" else {}
    )
    pattern = SparsePatternConfig(pattern_type=kind, local_window_size=4096, **fields)
    return AttentionConfig(variant="block_sparse", pattern=pattern, **branches)


CONFIGS = {
    "dense": AttentionConfig(variant="dense"),
    "dilated": AttentionConfig(variant="dilated", **BRANCHES),
    "window": sparse("local_window"),
    "token window": sparse("local_window", edges="token"),
    "global": sparse("global_local", global_tokens=128),
    "lists": sparse("dilated_sparse", sparsity_ratio=0.01),
}


def task(**fields):
    sizes = {"seq": 1 << 20, "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "float16", "gpus": 8}
    return Workload(**{**sizes, "mode": "training", **fields})


def place(card, workload):
    gpu = card_of(card)
    return machine_of(gpu, workload.dtype, None), default_rates(gpu), network_of(workload.gpus, gpu)


@pytest.mark.parametrize("card", ["h100-sxm", "rtx4090", "v100-sxm2-32gb"])
@pytest.mark.parametrize("gpus, seq", [(8, 1 << 20), (64, 1 << 22)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_keys_take_nearly_what_the_longest_rank_takes(name, causal, gpus, seq, card):
    workload = task(seq=seq, gpus=gpus, causal=causal)
    config = CONFIGS[name].model_copy(update={"sharding": ShardingConfig(exchange="keys")})
    exact = longest_rank(config, workload, *place(card, workload)).seconds
    (close,) = rank_seconds(columns_of(config, seq), workload, *place(card, workload), "keys")
    assert close == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_heads_take_what_the_first_rank_takes(name, mode):
    workload = task(mode=mode)
    config = CONFIGS[name].model_copy(update={"sharding": ShardingConfig(exchange="heads")})
    exact = longest_rank(config, workload, *place("h100-sxm", workload)).seconds
    (same,) = rank_seconds(columns_of(config, workload.seq), workload, *place("h100-sxm", workload), "heads")
    assert same == pytest.approx(exact, rel=1e-9)


def test_zigzag_is_for_dense():
    workload = task(causal=True)
    columns = columns_of(CONFIGS["dense"], workload.seq)
    one, other = (
        rank_seconds(columns, workload, *place("h100-sxm", workload), "keys", zigzag=zigzag)[0]
        for zigzag in (False, True)
    )
    assert other < 0.6 * one


def many(count):
    """Windows, global tokens among them, of lengths of their own."""
    rng = np.random.default_rng(1)
    return Columns(
        "block_sparse",
        "global_local",
        seq=rng.integers(1 << 18, 1 << 22, count),
        block_size=2 ** rng.integers(5, 9, count),
        window=rng.integers(512, 16_384, count),
        global_tokens=rng.integers(1, 512, count),
    )


@pytest.mark.parametrize("exchange", ["keys", "heads"])
def test_many_have_what_each_has_by_itself(exchange):
    columns, workload = many(20), task(causal=True)
    together = rank_seconds(columns, workload, *place("h100-sxm", workload), exchange)
    apart = [
        rank_seconds(columns.take(np.array([at])), workload, *place("h100-sxm", workload), exchange)[0]
        for at in range(20)
    ]
    assert together == pytest.approx(apart, rel=1e-9)


def test_ten_thousand_take_half_a_second():
    workload = task(causal=True, gpus=1024)
    columns = replace(many(10_000), seq=100 << 20)
    begun = time.process_time()
    found = rank_seconds(columns, workload, *place("h100-sxm", workload), "keys")
    assert found.shape == (10_000,)
    assert (found > 0).all()
    assert time.process_time() - begun < 2  # on a busy machine


def test_what_is_not_predicted_is_refused():
    workload = task()
    columns = columns_of(CONFIGS["window"], workload.seq)
    outer = MultiheadConfig(embed_dim=4096, num_heads=32, kv_heads=8)
    with pytest.raises(ConfigError, match="without documents and projections"):
        rank_seconds(replace(columns, multihead=outer), workload, *place("h100-sxm", workload), "keys")
    many_ranks = task(gpus=16)
    with pytest.raises(ConfigError, match="multiple of the ranks, got 8 and 16"):
        rank_seconds(columns, many_ranks, *place("h100-sxm", many_ranks), "heads")
    adaptive = replace(columns, variant="adaptive", pattern_type=None)
    with pytest.raises(ConfigError, match="exchange heads"):
        rank_seconds(adaptive, workload, *place("h100-sxm", workload), "keys")
