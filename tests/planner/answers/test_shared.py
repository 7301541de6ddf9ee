"""Estimates of calls that GPUs share: how they share them, what they exchange, and how long that takes."""

import json

import pytest

import planner
from attention import AdaptiveConfig, AttentionConfig, ConfigError, ShardingConfig, SparsePatternConfig
from planner.answers.comparison import compare, side
from planner.answers.shared import SharedEstimate
from planner.gpus import generic
from planner.memory.estimate import estimate as of_one
from planner.report.text.compare import comparison_data, comparison_text
from planner.report.text.estimate import estimate_text
from planner.workload import Workload

DENSE = AttentionConfig(variant="dense")
WINDOW = AttentionConfig(
    variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window", local_window_size=1024)
)
SIZES = {"seq": 65_536, "heads": 16, "kv_heads": 8, "head_dim": 64, "dtype": "bfloat16", "causal": True}


def task(**fields):
    return Workload(**{**SIZES, "mode": "training", "gpus": 8, **fields})


def test_one_gpu_is_estimated_as_ever():
    workload = task(gpus=1)
    one = planner.estimate(WINDOW, workload, "rtx4090")
    time = planner.predict_time(WINDOW, workload, "rtx4090")
    assert one == of_one(WINDOW, workload, "rtx4090").model_copy(update={"time": time})
    assert type(one) is planner.MemoryEstimate


def test_a_causal_window_is_shared_by_keys_and_its_halo_is_all_that_moves():
    sharing = planner.estimate(WINDOW, task(), "h100-sxm").sharing
    assert (sharing.ring, sharing.exchange, sharing.shards, sharing.tokens) == (8, "keys", "contiguous", 8192)
    halo = 2 * 1024 * 8 * 64 * 2
    assert (sharing.forward.sent, sharing.forward.received) == (halo, halo)
    assert (sharing.backward.sent, sharing.backward.received) == (2 * halo, 2 * halo)
    assert (sharing.link, sharing.node) == ("nvlink4", None)
    assert "as such devices usually have" in sharing.joined
    assert sharing.seconds == pytest.approx(sharing.forward.seconds + sharing.backward.seconds)
    assert sharing.forward.exposed == 0 < sharing.backward.exposed
    assert sharing.notes[0].startswith("nobody has run several GPUs here")


def test_dense_attention_is_shared_by_heads_where_they_move_fewer_bytes():
    sharing = planner.estimate(DENSE, task(causal=False, mode="inference"), "h100-sxm").sharing
    assert (sharing.exchange, sharing.backward) == ("heads", None)
    assert sharing.forward.hidden == 0
    few = planner.estimate(DENSE, task(causal=False, kv_heads=4), "h100-sxm").sharing
    assert few.exchange == "keys"


def test_what_a_config_says_of_sharding_holds():
    zigzag = DENSE.model_copy(
        update={"sharding": ShardingConfig(shards="zigzag", exchange="keys", ring_size=4)}
    )
    sharing = planner.estimate(zigzag, task(), "h100-sxm").sharing
    assert (sharing.ring, sharing.exchange, sharing.shards, sharing.tokens) == (4, "keys", "zigzag", 16_384)


def test_a_slower_link_takes_longer_and_two_levels_are_told_apart():
    slow, fast = (
        planner.estimate(DENSE, task(gpus=16), "h100-sxm", link=link, node=8).sharing
        for link in ("nvlink4,eth10", "nvlink4,ndr")
    )
    assert (slow.link, slow.node) == ("nvlink4,eth10", 8)
    assert "as named" in slow.joined
    assert slow.seconds > fast.seconds
    assert slow.forward.sent == fast.forward.sent


def test_of_many_ranks_it_says_how_many_were_looked_at():
    sharing = planner.estimate(WINDOW, task(seq=1 << 22, gpus=64), "h100-sxm").sharing
    assert any("of 64 ranks" in note for note in sharing.notes)


def test_where_no_speed_is_known_the_bytes_are():
    sharing = planner.estimate(WINDOW, task(dtype="float64"), "cpu", threads=2).sharing
    assert sharing.seconds is not None
    unknown = generic(8 * 10**9)
    bare = type(unknown)(**{**unknown.__dict__, "rates": {"float32": 1e12}})
    estimate = planner.estimate(WINDOW, task(), bare)
    sharing = estimate.sharing
    assert (sharing.seconds, sharing.forward.seconds, sharing.forward.exposed) == (None, None, None)
    assert sharing.forward.sent == 2 * 1024 * 8 * 64 * 2
    assert "no speed of bfloat16 is known" in sharing.speed
    assert "no speed of bfloat16 is known" in " ".join(estimate_text(estimate, None, lines=False).split())


def test_on_cpus_nothing_hides():
    sharing = planner.estimate(WINDOW, task(dtype="float32"), "cpu", threads=1).sharing
    assert (sharing.link, sharing.forward.hidden) == ("gloo", 0)
    assert sharing.forward.exposed > 0


def test_it_is_read_back_and_compared(tmp_path):
    paths = []
    for gpus in (4, 8):
        estimate = planner.estimate(WINDOW, task(gpus=gpus), "h100-sxm")
        assert SharedEstimate.from_json(estimate.to_json()) == estimate
        paths.append(tmp_path / f"{gpus}.json")
        paths[-1].write_text(estimate.to_json())
    both = compare(*(side(path, pytest.fail) for path in paths))
    assert both.asked == {"ring": (4, 8), "gpus": (4, 8)}
    text = comparison_text(both, ("4.json", "8.json"))
    assert "sent by a GPU" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    data = json.loads(json.dumps(comparison_data(both)))
    assert [data["sharing"][name]["ring"] for name in "ab"] == [4, 8]


def test_it_is_shown_in_80_columns():
    estimate = planner.estimate(WINDOW, task(gpus=16), "h100-sxm")
    lines = estimate_text(estimate, None, lines=False).splitlines()
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    assert "16 GPUs      up to 4,096 tokens each, contiguous; they exchange keys" in text
    assert "link         nvlink4,ndr, nodes of 8" in text
    assert "traffic      forward 2.10 MB sent, 2.10 MB received, at most, by a GPU" in text


LEARNED = AttentionConfig(
    variant="adaptive", pattern=SparsePatternConfig(), adaptive=AdaptiveConfig(num_heads=16, head_dim=64)
)


@pytest.mark.parametrize(
    "config, fields, options, why",
    [
        (DENSE, {"gpus": 1}, {"link": "nvlink4"}, "link is for several GPUs"),
        (DENSE, {"gpus": 1}, {"node": 8}, "node is for several GPUs"),
        (DENSE, {}, {"link": "token-ring"}, "'token-ring' is not known; there are nvlink2"),
        (DENSE, {}, {"link": "nvlink4,ndr", "node": 3}, "node must divide the GPUs"),
        (LEARNED, {"kv_heads": 4}, {}, "kv_heads=4 and 8 ranks; use ring_size=4"),
        (DENSE, {"queries": 1}, {}, "fewer queries than keys are for one GPU"),
    ],
)
def test_what_cannot_be_shared_is_refused(config, fields, options, why):
    with pytest.raises(ConfigError, match=why):
        planner.estimate(config, task(**fields), "h100-sxm", **options)


def test_measurements_are_of_one_device():
    with pytest.raises(ConfigError, match="a measurement is of one device, and the workload of 8 GPUs"):
        planner.measure(DENSE, task())
