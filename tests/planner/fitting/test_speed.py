"""Fitting: rates that made synthetic seconds are found again, and the runs cover what seconds depend on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from attention.errors import AttentionPlannerError
from planner.calibration import Rates, SpeedFit
from planner.fitting.speed import (
    fit,
    held_out_errors,
    machine_of,
    nnls,
    plan_speed,
    rank_correlation,
    speed_fit,
    speed_runs,
)
from planner.gpus import find
from planner.measuring.measure import Environment, Measurement
from planner.memory.machines import Cpu
from planner.speed.rates import default_cpu_rates, default_rates
from planner.speed.seconds import seconds_of

PLACE = Environment(
    device="a processor",
    capability="AVX2",
    torch="2.13.0",
    threads=2,
    python="3",
    system="Linux",
    settings={},
    date="2026-11-21T00:00:00+00:00",
)


def other() -> Rates:
    """Rates of a CPU unlike the default one."""
    rng = np.random.default_rng(5)
    rates = default_cpu_rates(Cpu(2))
    shared = {name: rng.uniform(0.5, 6) for name in rates.backward["float32"]}
    steps = {
        "forward": {
            dtype: {
                name: cost
                * (
                    shared[name]
                    if name in ("launches", "tiles", "passes", "gathers", "scored", "ranked")
                    else rng.uniform(0.5, 6)
                )
                for name, cost in rates.forward[dtype].items()
            }
            for dtype in ("float32", "bfloat16", "float16")
        },
        "backward": {
            dtype: {name: cost * shared[name] for name, cost in rates.backward[dtype].items()}
            for dtype in ("float32", "bfloat16", "float16")
        },
    }
    return rates.model_copy(update=steps)


def measured(samples, rates: Rates, noise: float = 0.0, wild: int = 0) -> list[Measurement]:
    """Runs that take what the rates say; every `wild`-th five times as long."""
    rng = np.random.default_rng(3)
    found = []
    for n, (config, workload) in enumerate(samples):
        run = Measurement(
            config=config,
            workload=workload,
            device="cpu",
            kind="ok",
            seconds=1.0,
            spread=noise,
            runs=7,
            environment=PLACE,
        )
        seconds = seconds_of(config, workload, machine_of(run), rates) * np.exp(rng.normal(0, noise))
        seconds *= 5 if wild and n % wild == 0 else 1
        found.append(run.model_copy(update={"seconds": float(seconds)}))
    return found


@pytest.fixture(scope="module")
def runs():
    return plan_speed("cpu", 0, 168)


def test_known_rates_are_recovered(runs):
    truth = other()
    fitted, held_out = (measured(part, truth) for part in runs)
    rates = fit(fitted)
    errors = np.abs(held_out_errors(rates, held_out))
    assert np.median(errors) < 0.01
    assert np.quantile(errors, 0.9) < 0.05
    assert rates.source == "measured on a processor, torch 2.13.0, 2026-11-21T00:00:00+00:00"
    assert rates.forward["float32"]["work"] == pytest.approx(truth.forward["float32"]["work"], rel=0.2)


def test_noise_and_runs_that_went_wrong_do_little(runs):
    truth = other()
    found = speed_fit(measured(runs[0], truth, noise=0.05, wild=15), measured(runs[1], truth))
    assert (found.fitted, found.held_out) == (126, 42)
    assert found.median_error < 0.06
    assert found.rank_correlation > 0.98
    assert len(found.errors) == 42
    assert list(found.errors) == sorted(found.errors)
    assert SpeedFit.from_json(found.to_json()) == found
    assert "fitted to 126 timed runs" in found.summary()


def test_few_runs_leave_the_rest_to_defaults():
    truth = default_cpu_rates(Cpu(2))
    few = measured(speed_runs("cpu", 0, 3), truth)
    rates = fit(few)
    assert set(rates.forward) == {"float32", "bfloat16", "float16", "float64"}
    errors = held_out_errors(rates, measured(speed_runs("cpu", 9, 42), truth))
    assert np.median(np.abs(errors)) < 0.3


def test_runs_without_seconds_are_left_out():
    (sample,) = speed_runs("cpu", 0, 1)
    failed = Measurement(
        config=sample.config,
        workload=sample.workload,
        device="cpu",
        kind="oom",
        message="no",
        runs=7,
        environment=PLACE,
    )
    with pytest.raises(AttentionPlannerError, match="none of 1 timed runs gave seconds"):
        fit([failed])
    good = measured([sample], default_cpu_rates(Cpu(2)))
    assert len(held_out_errors(fit([*good, failed]), [failed])) == 0
    assert speed_fit(good, [failed]).held_out == 0


def test_runs_follow_from_the_seed_and_cover_everything(runs):
    assert runs == plan_speed("cpu", 0, 168)
    assert runs[0] != plan_speed("cpu", 1, 168)[0]
    assert not set(runs[0]) & set(runs[1])
    cells = Counter((s.workload.dtype, s.workload.mode) for s in runs[0])
    assert len(cells) == 6
    assert set(cells.values()) == {21}
    patterns = [s.config.pattern for s in runs[0] if s.config.pattern]
    assert {16, 32, 64, 128, 256, 512} == {pattern.block_size for pattern in patterns}
    assert {s.workload.head_dim for s in runs[0]} == {32, 64, 128}
    assert {s.workload.causal for s in runs[0]} == {True, False}


def test_nnls_solves_what_least_squares_would_and_stops_at_zero():
    rng = np.random.default_rng(0)
    a = rng.uniform(size=(40, 6))
    x = np.array([1.0, 0, 2, 0, 3, 0.5])
    assert nnls(a, a @ x) == pytest.approx(x, abs=1e-9)
    found = nnls(a, a @ np.array([1.0, -2, 2, 0, 3, 0.5]))
    assert (found >= 0).all()
    assert found[1] == 0
    slope = a.T @ (a @ np.array([1.0, -2, 2, 0, 3, 0.5]) - a @ found)
    assert (slope[found == 0] <= 1e-8).all()
    assert np.abs(slope[found > 0]).max() < 1e-8


def test_rank_correlation():
    values = np.array([1.0, 2, 3, 4])
    assert rank_correlation(values, values**3) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    assert rank_correlation(values[:1], values[:1]) == 0


def test_a_cpu_is_the_one_that_was_measured_wherever_it_is_fitted(monkeypatch, runs):
    here = Cpu(3, frozenset({"bfloat16", "float16"}))
    monkeypatch.setattr("planner.fitting.speed.this_cpu", lambda dtype: here)
    run = measured(runs[0][:1], default_cpu_rates(Cpu(2)))[0]

    def units(capability: str | None) -> frozenset[str]:
        place = PLACE.model_copy(update={"capability": capability})
        machine = machine_of(run.model_copy(update={"environment": place}))
        assert isinstance(machine, Cpu)
        return machine.units

    assert units("AVX2") == units("AVX512") == units("") == frozenset()
    assert units("AVX512, AMX") == {"bfloat16"}
    assert units("AVX512, AMX with float16") == {"bfloat16", "float16"}
    assert units(None) == here.units


def test_a_gpus_costs_are_recovered_where_host_and_device_run_side_by_side():
    place = PLACE.model_copy(
        update={"device": "NVIDIA GeForce RTX 4090", "capability": "8.9", "threads": None}
    )
    start = default_rates(find("rtx4090"))
    rng = np.random.default_rng(1)
    factors = {name: rng.uniform(0.6, 1.8) for name in start.backward["float16"]}
    steps = {
        step: {
            dtype: {name: cost * factors.get(name, 1.0) for name, cost in costs.items()}
            for dtype, costs in getattr(start, step).items()
        }
        for step in ("forward", "backward")
    }
    truth = start.model_copy(update=steps)
    runs = []
    for config, workload in speed_runs("cuda", 0, 70):
        run = Measurement(
            config=config,
            workload=workload,
            device="cuda",
            kind="ok",
            seconds=1.0,
            spread=0.0,
            runs=7,
            environment=place,
        )
        seconds = float(seconds_of(config, workload, machine_of(run), truth))
        runs.append(run.model_copy(update={"seconds": seconds}))
    rates = fit(runs[:56])
    before, after = (np.median(np.abs(held_out_errors(each, runs[56:]))) for each in (start, rates))
    assert after < 0.04 < before
