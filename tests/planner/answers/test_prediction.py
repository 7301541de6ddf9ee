"""Predicted time: its range, what it rests on, where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import planner
from attention import AttentionConfig, ConfigError, SparsePatternConfig
from planner import Workload, gpus
from planner.calibration import Rates, SpeedFit, load
from planner.memory.estimate import machine_of
from planner.memory.machines import Cpu
from planner.speed.call_time import JUDGED, measured_range
from planner.speed.rates import default_cpu_rates, default_rates
from planner.speed.seconds import seconds_of

DENSE = AttentionConfig(variant="dense")
WINDOW = AttentionConfig(
    variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window", block_size=64)
)


@pytest.mark.parametrize("config", [DENSE, WINDOW])
@pytest.mark.parametrize("card", ["gtx1080", "rtx4090", "h100-sxm"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_seconds_are_those_that_candidates_are_ranked_by(config, card, mode):
    workload, gpu = Workload(seq=16_384, mode=mode, causal=True), gpus.find(card)
    time = planner.predict_time(config, workload, card)
    machine = machine_of(gpu, workload.dtype, None)
    assert time.seconds == pytest.approx(seconds_of(config, workload, machine, default_rates(gpu)))
    assert 0.4 * time.seconds < time.low < time.seconds < time.high < 2.1 * time.seconds
    assert time.launches == planner.estimate(config, workload, card).launches
    assert "not measured here" in time.source


def test_a_call_that_waits_for_its_host_is_as_sure_as_judgement():
    time = planner.predict_time(DENSE, Workload(seq=16), "h100-sxm")
    assert (time.low / time.seconds, time.high / time.seconds) == pytest.approx(JUDGED)


def test_a_calibrations_range_is_of_its_held_out_errors():
    rates = default_cpu_rates(Cpu(2))
    errors = tuple(np.linspace(-0.2, 0.3, 101).tolist())
    fit = SpeedFit(rates=rates, fitted=100, held_out=101, errors=errors, median_error=0.1)
    low, high = measured_range(fit)
    inside = [low <= 1 / (1 + error) <= high for error in errors]
    assert 0.8 <= np.mean(inside) < 0.83
    assert measured_range(fit.model_copy(update={"errors": errors[:5]})) is None


def test_gpus_together_are_as_sure_as_one():
    workload = Workload(seq=65_536, gpus=4, causal=True)
    time = planner.predict_time(WINDOW, workload, "h100-sxm", link="nvlink4")
    shared = planner.estimate(WINDOW, workload, "h100-sxm", link="nvlink4")
    assert time.seconds == shared.sharing.seconds == shared.time.seconds
    assert time.low < time.seconds < time.high


def test_weights_have_no_time_and_their_estimate_has_none():
    workload = Workload(seq=64, weights=True)
    with pytest.raises(ConfigError, match="weights=True"):
        planner.predict_time(WINDOW, workload, "rtx4090")
    assert planner.estimate(WINDOW, workload, "rtx4090").time is None
    with pytest.raises(ConfigError, match="link"):
        planner.predict_time(DENSE, Workload(seq=64), "rtx4090", link="nvlink4")


def test_a_gpus_calibration_of_before_kernels_were_told_apart_is_refused(tmp_path):
    old = default_rates(gpus.find("rtx4090"))
    data = old.model_dump(mode="json")
    data["forward"]["float16"] = {"work": 1e-13, "pairs": 1e-12}
    with pytest.raises(ConfigError, match="earlier version, which did not tell kernels apart"):
        Rates(**data)
    written = Path(__file__).parents[2] / "written" / "calibration.json"
    calibration = load(written)
    path = tmp_path / "old.json"
    path.write_text(calibration.to_json().replace('"device":"cpu"', '"device":"rtx4090"'))
    with pytest.raises(ConfigError, match="make a new one with `planner calibrate`"):
        load(path)
