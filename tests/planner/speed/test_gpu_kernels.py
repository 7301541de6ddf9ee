"""Seconds of a GPU's kernel call: what makes it longer, what does not, and what is not known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from attention.errors import ConfigError
from planner import gpus
from planner.speed.gpu_kernels import (
    COEFFICIENTS,
    KERNELS,
    STEPS,
    UNITS,
    SequenceCall,
    call_units,
    card_class,
    efficient_kernel,
    fitted,
    kernel_costs,
    kernel_name,
    kernel_seconds,
    range_of,
    visible_keys,
)

H100 = gpus.find("h100-sxm")
CALL = SequenceCall("flash2", "float16", 2, 16, 16, 128, 8192, 8192)


def units(**changed):
    sizes = {"lanes": 32, "kv_lanes": 32, "queries": 4096, "keys": 4096, "visible": 4096, "causal": 0}
    return call_units("flash2", "forward", **sizes | {"head_dim": 64, "workers": 132} | changed)


def test_units_of_a_call_that_fills_the_card_are_its_pairs_channels_and_numbers():
    pairs = 32 * 4096 * 4096
    assert units() == {"work": pairs * 64, "pairs": pairs, "numbers": 4 * 32 * 4096 * 64, "calls": 1}


def test_fewer_tiles_than_multiprocessors_take_as_long_as_one_tile():
    few = {"lanes": 2, "kv_lanes": 2, "queries": 512}
    one = call_units(
        "efficient64", "forward", keys=4096, visible=4096, causal=0, head_dim=64, workers=132, **few
    )
    assert one["pairs"] == 132 * 64 * 4096
    # Flash attention splits the keys among those that would be idle.
    assert units(**few)["pairs"] == max(2 * 512 * 4096, 132 * 128 * 256)


def test_under_a_causal_mask_half_of_the_longest_tile_is_waited_for():
    full, half = units()["pairs"], units(causal=1, visible=2048)["pairs"]
    assert half == full / 2 + 132 * 128 * 4096 / 2


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_arrays_equal_singles(kernel, step):
    rng = np.random.default_rng(0)
    queries, keys = (2 ** rng.integers(4, 15, 20) for _ in range(2))
    causal = rng.integers(0, 2, 20)
    sizes = {"kv_lanes": 4, "lanes": 8, "head_dim": 64, "workers": 100}
    many = call_units(kernel, step, queries=queries, keys=keys, visible=keys / 2, causal=causal, **sizes)
    for at in range(20):
        one = call_units(
            kernel,
            step,
            queries=int(queries[at]),
            keys=int(keys[at]),
            visible=int(keys[at]) / 2,
            causal=int(causal[at]),
            **sizes,
        )
        for unit in UNITS:
            assert np.broadcast_to(many[unit], 20)[at] == pytest.approx(one[unit]), unit


def test_a_window_sees_as_many_keys_as_its_mask_and_the_edges_of_its_steps():
    assert visible_keys(8192, 8192, None, None) == 8192
    assert visible_keys(8192, 8192, None, 0) == pytest.approx((8192 + 128) / 2)
    assert visible_keys(65_536, 65_536, 1023, 0) == pytest.approx(1024 + 128, rel=0.01)
    assert visible_keys(512, 512, 10_000, 10_000) == 512


@pytest.mark.parametrize("step", STEPS)
def test_longer_wider_and_more_are_slower_and_fewer_kv_heads_no_slower(step):
    base = kernel_seconds(CALL, step, H100)
    for more in ({"queries": 16_384, "keys": 16_384}, {"head_dim": 192}, {"batch": 4}):
        assert kernel_seconds(CALL._replace(**more), step, H100) > 1.3 * base
    assert 0.9 * base < kernel_seconds(CALL._replace(kv_heads=2), step, H100) <= base
    assert kernel_seconds(CALL._replace(causal=True), step, H100) < 0.65 * base
    assert kernel_seconds(CALL._replace(causal=True, window=512), step, H100) < 0.3 * base


@pytest.mark.parametrize("gpu", gpus.known(), ids=lambda gpu: gpu.key)
def test_no_kernel_is_faster_than_the_peak_allows(gpu):
    kernel = "cudnn" if gpu.capability[0] in (9, 10) else kernel_name(gpu.capability, 128, 2)
    call = CALL._replace(kernel=kernel, queries=65_536, keys=65_536)
    peak = gpu.rates["float16" if gpu.capability >= (7, 0) else "float32"]
    light = 4 * 2 * 16 * 65_536**2 * 128 / peak
    assert light / 1.11 < kernel_seconds(call, "forward", gpu) < 12 * light
    assert kernel_seconds(call, "backward", gpu) > 1.5 * kernel_seconds(call, "forward", gpu)


def test_the_kernel_follows_from_card_channels_and_type():
    assert kernel_name((8, 9), 128, 2) == "flash2"
    assert kernel_name((7, 5), 128, 2) == "efficient128"
    assert kernel_name((8, 0), 64, 4) == "efficient64"
    assert kernel_name((8, 0), 512, 2) == efficient_kernel(512) == "efficient256"
    assert kernel_name((9, 0), 64, 8) == "plain"


def test_a_generation_that_nobody_knows_is_refused():
    odd = type(H100)(**{**H100.__dict__, "capability": (13, 0), "name": "NVIDIA R100"})
    with pytest.raises(ConfigError, match="NVIDIA R100 is not known"):
        card_class(odd)


def test_generations_that_nobody_published_are_like_another_with_the_widest_range():
    for name, like in (("jetson-thor", "blackwell"), ("gtx970", "pascal")):
        card = gpus.find(name)
        assert card_class(card) == like
        assert range_of("efficient128", "forward", card, "float32") == fitted().ranges["unseen"]


def test_a_range_holds_the_prediction_and_is_wider_where_nobody_measured():
    for kernel in ("flash2", "cudnn", "efficient64", "flex"):
        for step in STEPS:
            low, high = range_of(kernel, step, H100, "float16")
            assert 0.5 < low <= 1 <= high < 2.5
    known, unseen = (
        range_of("flash2", "backward", gpus.find(card), "float16") for card in ("rtx4090", "rtx5090")
    )
    assert unseen[1] - unseen[0] > known[1] - known[0]


def test_coefficients_come_from_the_script_and_cover_what_they_are_to():
    data = json.loads(COEFFICIENTS.read_text())
    assert data["command"] == "python -m studies.bench.published_fit"
    assert 0.8 <= data["covered"] < 0.9
    assert all(value >= 0 for value in data["coefficients"].values())
    assert set(data["unseen"]) < set(data["coefficients"])
    costs = kernel_costs("flash2", "forward", H100, "float16", data["coefficients"])
    assert costs == kernel_costs("flash2", "forward", H100, "float16")
