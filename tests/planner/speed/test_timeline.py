"""Seconds of ranks: what hides what, which links carry what, and which rank takes longest."""

import pytest

from attention import AttentionConfig, ConfigError, ShardingConfig, SparsePatternConfig
from planner.gpus import find as card_of
from planner.memory.estimate import machine_of
from planner.ranks.links import Network, find, network_of
from planner.speed.rates import default_rates
from planner.speed.seconds import seconds_of
from planner.speed.timeline import exchange_seconds, longest_rank
from planner.workload import Workload

H100 = card_of("h100-sxm")
RATES = default_rates(H100)
NVLINK, NDR, SLOW = find("nvlink4"), find("ndr"), find("eth10")
RING = AttentionConfig(variant="dense", sharding=ShardingConfig(exchange="keys"))
ZIGZAG = AttentionConfig(variant="dense", sharding=ShardingConfig(exchange="keys", shards="zigzag"))
WINDOW = AttentionConfig(
    variant="block_sparse",
    pattern=SparsePatternConfig(pattern_type="local_window", local_window_size=4096, edges="token"),
)


def task(**fields):
    sizes = {"seq": 1 << 18, "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "gpus": 8}
    return Workload(**{**sizes, "causal": True, "mode": "training", **fields})


def timed(config, workload, network=None):
    machine = machine_of(H100, workload.dtype, None)
    return longest_rank(config, workload, machine, RATES, network or network_of(workload.gpus, H100))


def test_an_exchange_takes_its_busier_direction_on_its_slower_link():
    network = Network(NVLINK, NDR, 4)
    inside, between = {1: (370 * 10**7, 0), 2: (0, 370 * 10**7)}, {5: (45 * 10**7, 9 * 10**7)}
    assert exchange_seconds([inside], network, 0) == pytest.approx(0.01 + 2 * NVLINK.alpha)
    assert exchange_seconds([inside, between], network, 0) == pytest.approx(0.01 + 2 * NVLINK.alpha)
    assert exchange_seconds([between, between], network, 0) == pytest.approx(0.02 + 2 * NDR.alpha)
    # The third of a node has its next peer in another one.
    assert exchange_seconds([{1: (45 * 10**7, 0)}], network, 0, 3) == pytest.approx(0.01 + NDR.alpha)
    assert exchange_seconds([], network, 0) == 0


@pytest.mark.parametrize("config", [RING, ZIGZAG, WINDOW])
def test_what_is_hidden_and_what_is_exposed_add_up(config):
    for network in (Network(NVLINK), Network(SLOW)):
        slowest = timed(config, task(), network)
        for one in (slowest.forward, slowest.backward):
            assert one.hidden + one.exposed == pytest.approx(one.exchange)
            assert one.compute + one.exposed == pytest.approx(one.seconds)
            assert max(one.compute, one.exchange) <= one.seconds


def test_a_fast_link_hides_behind_computing_and_a_slow_one_does_not():
    fast, slow = (timed(RING, task(), Network(link)) for link in (NVLINK, SLOW))
    assert fast.forward.exposed < 1e-3 * fast.forward.compute
    assert slow.forward.exposed > slow.forward.compute
    # The last gradients on their way home hide behind nothing.
    assert fast.backward.exposed > 0


def test_zigzag_nearly_doubles_the_efficiency_of_a_causal_ring():
    ring, zigzag = timed(RING, task()), timed(ZIGZAG, task())
    assert (ring.rank, ring.exchange) == (7, "keys")
    assert ring.seconds / zigzag.seconds == pytest.approx(15 / 8, rel=0.05)


def test_a_causal_window_keeps_its_seconds_and_bytes_on_more_gpus_with_as_many_tokens_each():
    few, many = timed(WINDOW, task()), timed(WINDOW, task(seq=1 << 23, gpus=256))
    assert few.most == many.most == ((16_777_216, 16_777_216), (33_554_432, 33_554_432))
    assert many.seconds == pytest.approx(few.seconds, rel=0.2)
    assert many.looked_at < 10


def test_heads_wait_for_all_that_they_exchange():
    heads = AttentionConfig(variant="dense", sharding=ShardingConfig(exchange="heads"))
    workload = task(mode="inference")
    slowest = timed(heads, workload)
    assert slowest.backward is None
    assert slowest.forward.hidden == 0
    # (2 H + 2 K) tokens d s (W - 1) / W, at the share of a link that collectives get
    nbytes = 80 * (1 << 15) * 256 * 7 // 8
    assert slowest.most[0] == (nbytes, nbytes)
    assert slowest.forward.exposed == pytest.approx(nbytes / (0.6 * NVLINK.beta) + 4 * 7 * NVLINK.alpha)
    machine = machine_of(H100, workload.dtype, None)
    share = workload.model_copy(update={"heads": 4, "kv_heads": 1, "gpus": 1})
    assert slowest.forward.compute == pytest.approx(seconds_of(heads, share, machine, RATES))


def test_rings_that_lie_across_nodes_otherwise_than_the_first_one_count():
    three = RING.model_copy(update={"sharding": ShardingConfig(exchange="keys", ring_size=3)})
    workload, alone = task(gpus=12, batch=4, causal=False), task(gpus=3, causal=False)
    network = Network(NVLINK, SLOW, 4)  # the first of four rings is in one node, the second in two
    within = timed(three, alone, Network(NVLINK))
    assert timed(three, workload, network).forward.exchange > 100 * within.forward.exchange


def test_seconds_of_types_that_have_no_rate_are_refused():
    with pytest.raises(ConfigError, match="rates"):
        longest_rank(RING, task(), machine_of("cpu", "bfloat16", 1), RATES, Network(NVLINK))


def test_the_last_of_a_thousand_causal_ranks_takes_longest():
    slowest = timed(RING, task(seq=100 << 20, gpus=1024))
    assert slowest.rank == 1023
