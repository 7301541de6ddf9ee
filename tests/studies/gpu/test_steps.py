"""What a GPU is asked, an oracle that would notice, and figures that follow from rows."""

from __future__ import annotations

import pytest

from attention import AttentionConfig
from planner import gpus
from planner.fitting.calibrate import plan_runs, plan_timed
from planner.measuring.measure import Environment, Measurement
from planner.memory.estimate import estimate
from planner.workload import Workload
from studies.gpu import checks, steps
from studies.gpu.page import page
from studies.gpu.results import PARTS, SAME, above_the_bound, bytes_summary, calibrated

FACTS = {
    "kind": "cpu", "device": "a CPU", "version": "0.1", "code": "c0de", "torch": "2.13.0", "driver": None,
    "capability": "AVX512", "device_bytes": None, "power_limit": None, "cuda": None, "python": "3.11.7",
    "system": "Linux", "cores": 2,
}  # what a device tells, a table  # fmt: skip
PLACE = Environment(
    device="a CPU",
    capability="AVX512",
    torch="2.13.0",
    python="3.11.7",
    system="Linux",
    threads=2,
    settings={},
    date="2026-11-30T00:00:00+00:00",
)


def test_the_most_useful_comes_first_and_all_of_it_comes_once():
    listed = steps.steps("cuda", gpus.find("h200"))
    labels = [step.label for step in listed]
    assert len(set(labels)) == len(labels)
    assert {step.part for step in listed} == set(PARTS)
    parts = list(dict.fromkeys(step.part for step in listed))
    assert parts == ["checks", "peers", "length", "memory", "dry runs", "calibration"]
    first = {step.name.partition(",")[0] for step in listed[:16]}
    assert first == {name.partition(",")[0] for name in checks.attentions()}
    ahead = labels[: next(n for n, label in enumerate(labels) if label.startswith("calibration"))]
    assert sum("backend" in label for label in ahead if label.startswith("checks")) == 4
    assert sum(label.startswith("memory: held out") for label in ahead) > 10


def test_dry_runs_that_are_recorded_are_those_of_cards_whose_kernels_take_the_same():
    for key, like in (("h200", {"h100-sxm", "gh200"}), ("rtx4090", {"rtx4090"})):
        assert {row["card"] for row in steps.recorded_dry_runs(gpus.find(key))} == like
    assert not list(steps.recorded_dry_runs(gpus.find("gtx1650")))


def test_a_card_that_is_not_known_has_no_dry_runs_and_no_predictions():
    unknown = {**FACTS, "kind": "cuda", "device": "NVIDIA RTX 9999", "device_bytes": 1 << 35}
    assert steps.known_card(unknown) is None
    assert "dry runs" not in {step.part for step in steps.steps("cuda", None)}
    place = PLACE.model_copy(update={"device": "NVIDIA RTX 9999"})
    row = steps.row_of(measured(AttentionConfig(variant="dense"), Workload(seq=64), 1000, place, "cuda"))
    assert "predicted" not in row
    assert "not known" in row["unpredicted"]


@pytest.fixture(scope="module")
def case():
    _, config, workload = next(iter(checks.cases()))
    small = workload.model_copy(update={"seq": 40, "batch": 1})
    return {
        "config": config.model_dump(mode="json"),
        "workload": small.model_dump(mode="json"),
        "device": "cpu",
    }


def test_a_check_holds_a_call_to_the_oracle(case, monkeypatch):
    row = checks.check(**case)
    assert "outcome" not in row
    assert all(row["errors"][name] <= limit for name, limit in row["allowed"].items())
    right = checks._output
    monkeypatch.setattr(checks, "_output", lambda result: 1.05 * right(result))
    wrong = checks.check(**case)
    assert wrong["outcome"] == "wrong"
    assert wrong["message"].startswith("out: error")


def test_numbers_that_are_none_are_wrong(case, monkeypatch):
    right = checks._output
    monkeypatch.setattr(checks, "_output", lambda result: right(result) * float("nan"))
    assert checks.check(**case)["outcome"] == "wrong"


def measured(config, workload, allocated, place=PLACE, device="cpu") -> Measurement:
    return Measurement(
        config=config,
        workload=workload,
        device=device,
        kind="ok",
        allocated=allocated,
        allocated_warm=allocated,
        reserved=None if device == "cpu" else allocated,
        seconds=0.01,
        spread=0.0,
        runs=1,
        environment=place,
    )


def rows_of(part: str, samples, held_out: bool, more: float) -> dict[str, dict]:
    made = {}
    for number, (config, workload) in enumerate(samples):
        taken = round(estimate(config, workload, "cpu", threads=2).allocated * more)
        row = steps.row_of(measured(config, workload, taken))
        about = {"part": part, "name": f"{held_out} {number}", "held_out": held_out}
        made[f"{part}: {held_out} {number}"] = about | row | {name: FACTS[name] for name in SAME}
    return made


def content_of(rows: dict) -> dict:
    content = {"command": "the command", "environment": FACTS, "sessions": [], "rows": rows, "missing": []}
    return content | {"calibration": calibrated(content)}


@pytest.fixture(scope="module")
def whole():
    """Data of a device that takes 1% more than predicted, and of one that takes it 100 times."""
    fitted, held_out = plan_runs("cpu", 3, 50)
    ahead, apart = plan_timed("cpu", 3)
    rows = rows_of("memory", fitted, False, 1.01) | rows_of("memory", held_out[:20], True, 1.01)
    rows |= rows_of("calibration", ahead[:12], False, 1.0) | rows_of("calibration", apart[:8], True, 1.0)
    return rows


def test_measured_rows_make_a_calibration_and_figures_of_how_far_bytes_are_off(whole):
    content = content_of(whole)
    calibration = content["calibration"]["calibration"]
    assert len(calibration["errors"]) == 20
    assert calibration["speed"]["fitted"] == 12
    summary = bytes_summary(list(whole.values()), "predicted")["allocated"]
    assert summary["least"] == pytest.approx(1 / 1.01 - 1, rel=1e-3)
    assert not above_the_bound([row for row in whole.values() if row["part"] == "calibration"])
    shown = page(content)
    assert "Bytes: 20 held-out runs" in shown
    assert "Seconds: fitted to 12 runs" in shown


def test_too_few_rows_make_no_calibration(whole):
    few = {label: row for label, row in whole.items() if row["name"] != "True 0" and row["part"] != "memory"}
    assert "too few" in content_of(few)["calibration"]["none"]


def test_the_page_names_what_went_wrong_and_what_is_older(whole):
    row = next(iter(whole.values()))
    above = dict(row, measurement={**row["measurement"], "allocated": 10**12})
    failed = {**row, "part": "checks", "name": "dense", "outcome": "wrong", "message": "dq: error 1 of 0.1"}
    older = {**row, "code": "another"}
    shown = page(content_of({"a": above, "b": failed, "c": older}))
    assert "- checks: dense: **wrong**, dq: error 1 of 0.1" in shown
    assert "1 more rows are of other code" in shown
    assert f"Above the upper bound:\n\n- {row['name']}: 1,000,000,000,000 bytes, of " in shown
