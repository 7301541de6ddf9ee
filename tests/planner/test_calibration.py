"""Calibrations: bounds that cover what they say, and files that are read whole or refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner import calibration
from planner.calibration import (
    LEVEL,
    OUTSIDE,
    ROUNDING,
    SMALL,
    UNMEASURED,
    Calibration,
    Domain,
    SpeedFit,
    Terms,
    bound_of,
    conformal,
    load,
)
from planner.memory.machines import Cpu
from planner.speed.rates import default_rates
from planner.workload import Workload

DENSE = AttentionConfig(variant="dense")
ERRORS = tuple(n / 10_000 for n in range(-100, 100))


def made(**changes) -> Calibration:
    fields = {
        "device": "cpu",
        "name": "a processor",
        "capability": "AVX2",
        "torch": "2.13.0",
        "threads": 2,
        "date": "2026-01-01",
        "command": "planner calibrate --device cpu",
        "terms": Terms(),
        "fitted": 40,
        "fitted_longest": 8192,
        "errors": ERRORS,
        "domain": Domain(variants=("dense",), dtypes=("float16",), modes=("inference",), longest=16384),
    }
    return Calibration(**(fields | changes))


@pytest.fixture(autouse=True)
def same_torch(monkeypatch):
    monkeypatch.setattr(calibration, "installed_torch", lambda: "2.13.0")


# ---- the conformal bound


def test_it_is_the_error_at_the_rank_that_the_level_asks_for():
    errors = list(range(199, 0, -1))
    assert conformal(errors) == (math.ceil(LEVEL * 200), LEVEL)
    assert conformal(errors, 0.5) == (100, 0.5)
    assert conformal(list(range(1, 100))) == (99, LEVEL)


def test_too_few_runs_are_the_largest_error_and_say_so():
    assert conformal([3.0, 1.0, 2.0]) == (3.0, 3 / 4)
    assert conformal([1.0]) == (1.0, 1 / 2)
    error, confidence = conformal(list(range(98)))
    assert (error, confidence) == (97, 98 / 99)
    assert confidence < LEVEL


@pytest.mark.parametrize("draw", ["normal", "standard_cauchy", "exponential", "random"])
@pytest.mark.parametrize("level, n", [(0.9, 19), (0.9, 100), (0.5, 7)])
def test_new_draws_stay_below_it_as_often_as_it_says(draw, level, n):
    random = np.random.default_rng(0)
    trials = 4000
    draws = getattr(random, draw)(size=(trials, n + 1))
    covered = sum(conformal(row[:n].tolist(), level)[0] >= row[n] for row in draws)
    noise = 3 * math.sqrt(level * (1 - level) / trials)
    assert covered / trials >= level - noise
    assert covered / trials <= level + 1 / (n + 1) + noise


# ---- bounds


def test_without_a_calibration_the_margin_is_judgement():
    bound = bound_of(None, DENSE, Workload(seq=64), 1000, explicit=False)
    assert bound.upper == math.ceil(1000 * (1 + UNMEASURED))
    assert "not measured" in bound.confidence
    assert len(bound.notes) == 1


def test_inside_what_was_measured_it_is_the_conformal_error():
    found = made(terms=Terms(overhead=500))
    bound = bound_of(found, DENSE, Workload(seq=64), 10**6, explicit=False)
    error, _ = conformal(ERRORS)
    assert bound.upper == math.ceil(10**6 + 500 + error * (10**6 + 500 + SMALL)) + ROUNDING
    assert "99.0% of 200 held-out runs" in bound.confidence
    assert bound.notes == ()


def test_errors_that_are_all_below_zero_do_not_lower_it():
    bound = bound_of(made(errors=(-0.5, -0.4)), DENSE, Workload(seq=64), 1000, explicit=False)
    assert bound.upper == 1000 + ROUNDING
    assert "66.7% of 2 held-out runs" in bound.confidence


@pytest.mark.parametrize(
    "config, workload, said",
    [
        (
            AttentionConfig(variant="dilated", segment_lengths=(64,), dilation_rates=(1,)),
            {},
            "variant dilated",
        ),
        (DENSE, {"dtype": "float32"}, "dtype float32"),
        (DENSE, {"mode": "training"}, "mode training"),
        (DENSE, {"seq": 16385}, "16,385 tokens (measured up to 16,384)"),
    ],
)
def test_outside_what_was_measured_the_margin_is_wider_and_a_note_says_why(config, workload, said):
    found = made()
    asked = Workload(**({"seq": 16384} | workload))
    inside = bound_of(found, DENSE, Workload(seq=16384), 10**9, explicit=False)
    bound = bound_of(found, config, asked, 10**9, explicit=False)
    assert bound.upper - ROUNDING - 10**9 >= OUTSIDE * (inside.upper - ROUNDING - 10**9)
    assert "outside what was measured" in bound.confidence
    assert [said in note for note in bound.notes] == [True]


def test_of_another_device_a_note_says_so():
    bound = bound_of(made(), DENSE, Workload(seq=64), 10**6, explicit=True, device="gtx1080")
    assert "the calibration is of cpu, the estimate for gtx1080" in bound.notes


def test_builds_of_one_release_are_the_same_torch(monkeypatch):
    monkeypatch.setattr(calibration, "installed_torch", lambda: "2.13.0+cu126")
    assert bound_of(made(), DENSE, Workload(seq=64), 10**6, explicit=False).notes == ()


def test_of_another_torch_it_is_used_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(calibration, "installed_torch", lambda: "2.9.1")
    found, workload = made(), Workload(seq=64)
    left = bound_of(found, DENSE, workload, 10**6, explicit=False)
    none = bound_of(None, DENSE, workload, 10**6, explicit=False)
    assert left.upper == none.upper
    assert left.confidence == none.confidence
    assert "torch 2.9.1 is installed: not used" in left.notes[0]
    used = bound_of(found, DENSE, workload, 10**6, explicit=True)
    assert "held-out runs" in used.confidence
    assert used.upper < left.upper
    assert "the calibration is of torch 2.13.0, torch 2.9.1 is installed" in used.notes


def test_without_torch_a_calibration_of_any_torch_is_used(monkeypatch):
    monkeypatch.setattr(calibration, "installed_torch", lambda: None)
    assert bound_of(made(), DENSE, Workload(seq=64), 1000, explicit=False).notes == ()


# ---- files


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(made().to_json())
    return path


def refusal(path) -> str:
    with pytest.raises(ConfigError) as error:
        load(path)
    said = str(error.value)
    assert str(path) in said
    assert "planner calibrate" in said
    return said


def changed(path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_file_gives_back_what_was_written(path):
    assert load(path) == made()
    assert load(str(path)) == made()


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.json")


def test_a_folder_is_no_file(tmp_path):
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_torn_file_is_refused(path, share):
    text = path.read_text()
    path.write_text(text[: int(len(text) * share)])
    assert "Invalid JSON" in refusal(path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_is_refused(path, version):
    changed(path, schema_version=version)
    assert "schema_version" in refusal(path)


@pytest.mark.parametrize(
    "fields, where",
    [
        ({"terms": {"overhead": -1}}, "terms: Terms: overhead"),
        ({"terms": {"context": -1}}, "terms: Terms: context"),
        ({"fitted": -3}, "fitted"),
        ({"fitted_longest": 0}, "fitted_longest"),
        ({"domain": {"variants": [], "dtypes": [], "modes": [], "longest": -1}}, "domain: Domain: longest"),
        ({"errors": []}, "errors"),
        ({"errors": ["much"]}, "errors"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_figures_that_cannot_be_are_refused(path, fields, where):
    changed(path, **fields)
    assert where in refusal(path)


# ---- with and without speed


def test_a_calibration_survives_json_with_speed_and_without():
    rates = default_rates(Cpu(2))
    fitted = SpeedFit(rates=rates, fitted=3, held_out=2, errors=(-0.1, 0.2), median_error=0.15)
    for found in (made(), made(speed=fitted)):
        assert Calibration.from_json(found.to_json()) == found
    old = json.loads(made().to_json())
    del old["speed"]  # written before there was any
    assert Calibration.from_json(json.dumps(old)).speed is None
