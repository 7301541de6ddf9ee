"""A calibration: which runs it makes, what it learns from them, and what it keeps when it is stopped."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from attention import AttentionConfig, AttentionPlannerError, ConfigError
from planner import files, gpus
from planner.api import calibrate
from planner.calibration import SMALL, Calibration, load, own_path, shipped
from planner.cli.main import app
from planner.fitting import speed as speed_fit
from planner.fitting.calibrate import calibration_of, most_informative, plan_runs, predicted
from planner.measuring import records
from planner.measuring import server as batch
from planner.measuring.measure import Environment, Measurement
from planner.workload import Workload

# The module; the attribute of the package is the function.
calibrating = importlib.import_module("planner.fitting.calibrate")
ROOT = Path(__file__).resolve().parents[3]
PLACE = Environment(
    device="a processor",
    capability="AVX2",
    torch="2.9",
    threads=2,
    python="3",
    system="Linux",
    settings={},
    date="2026-11-21T00:00:00+00:00",
)


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    """What is kept for the user is kept here."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def short(monkeypatch) -> None:
    """Runs of a moment each."""
    monkeypatch.setattr(calibrating, "SHORT", 64)
    monkeypatch.setattr(calibrating, "WORK", {"cpu": 1e6})
    monkeypatch.setattr(calibrating, "LONGEST", {"cpu": 300})
    monkeypatch.setattr(speed_fit, "RUNS", 0)


def measurement(config, workload, *, above: int = 0, **fields) -> Measurement:
    """One that lies `above` its prediction."""
    given = {"kind": "ok", "seconds": 0.1, "allocated": 0, "device": "cpu", "environment": PLACE, "runs": 1}
    found = Measurement(config=config, workload=workload, **(given | fields))
    if found.kind == "ok" and found.device == "cpu":
        return found.model_copy(update={"allocated": predicted(found, "cpu", None) + above})
    return found


class Measures:
    """In place of a batch; `log` has what it measured, `at` what happens at the n-th run."""

    def __init__(self, monkeypatch, **fields) -> None:
        self.log: list[tuple[AttentionConfig, Workload]] = []
        self.at: dict[int, object] = {}
        self.fields = fields
        monkeypatch.setattr(batch, "Batch", self.begun)

    def begun(self, *_: object, runs: int = 1, **__: object):
        self.fields["runs"] = runs
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, config, workload) -> Measurement:
        self.log.append((config, workload))
        what = self.at.get(len(self.log), {})
        if isinstance(what, BaseException):
            raise what
        return measurement(config, workload, **{**self.fields, **what})


def test_a_calibration_from_end_to_end(one_server, short, tmp_path):
    path, told = tmp_path / "new" / "c.json", []
    found = calibrate("cpu", seed=3, runs=6, path=path, threads=1, progress=lambda *line: told.append(line))
    assert load(path) == found
    assert [p.name for p in path.parent.iterdir()] == ["c.json"]
    assert (found.device, found.threads, found.fitted, len(found.errors), found.failed) == ("cpu", 1, 1, 5, 0)
    assert found.domain.longest >= 4 * found.fitted_longest
    assert "--seed 3 --threads 1" in found.command
    assert max(map(abs, found.errors)) < 0.1
    assert [line[:2] for line in told] == [(n, 6) for n in range(7)]


def test_it_is_kept_where_predictions_look_first(monkeypatch, short):
    Measures(monkeypatch)
    found = calibrate("cpu", runs=5)
    assert shipped("cpu") == found == load(own_path("cpu"))
    assert json.loads(own_path("cpu").read_text())["torch"] == "2.9"


def test_an_interrupted_calibration_goes_on_where_it_stopped(monkeypatch, short, tmp_path):
    path = tmp_path / "c.json"
    first = Measures(monkeypatch)
    first.at[8] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        calibrate("cpu", runs=10, path=path)
    assert not path.exists()
    second = Measures(monkeypatch)
    found = calibrate("cpu", runs=10, path=path)
    assert first.log[-1] == second.log[1]  # after the one that says where it is
    assert len(second.log) == 1 + 10 - 6
    whole = Measures(monkeypatch)
    assert calibrate("cpu", runs=10, path=tmp_path / "d.json") == found
    assert len(whole.log) == 11


def test_what_another_torch_measured_is_not_taken(monkeypatch, short, tmp_path):
    path = tmp_path / "c.json"
    Measures(monkeypatch).at[8] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        calibrate("cpu", runs=10, path=path)
    other = Measures(monkeypatch, environment=PLACE.model_copy(update={"torch": "2.10"}))
    assert calibrate("cpu", runs=10, path=path).torch == "2.10"
    assert len(other.log) == 11


@pytest.mark.parametrize("kind", ["oom", "crash", "timeout"])
def test_a_run_that_dies_is_counted_and_loses_nothing_else(monkeypatch, short, tmp_path, kind):
    runs = Measures(monkeypatch)
    runs.at[9] = {"kind": kind, "seconds": None, "message": "it died"}
    found = calibrate("cpu", runs=10, path=tmp_path / "c.json")
    assert (found.fitted, len(found.errors), found.failed) == (2, 7, 1)


def test_nothing_to_calibrate_with_says_why(monkeypatch, short, tmp_path):
    died = {"kind": "crash", "seconds": None, "message": "no such instruction"}
    runs = Measures(monkeypatch)
    runs.at = dict.fromkeys(range(2, 8), died)
    with pytest.raises(AttentionPlannerError, match="no such instruction"):
        calibrate("cpu", runs=6, path=tmp_path / "c.json")
    Measures(monkeypatch, **died)
    with pytest.raises(AttentionPlannerError, match="nothing can be measured on this cpu: no such"):
        calibrate("cpu", runs=6, path=tmp_path / "c.json")


def test_a_full_disk_is_said_and_what_was_measured_stays(monkeypatch, short, tmp_path):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "c.json"
    Measures(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(records, "append_whole", full)
        with pytest.raises(AttentionPlannerError, match=r"record was not kept: .*No space left"):
            calibrate("cpu", runs=6, path=path)
    with monkeypatch.context() as patched:
        patched.setattr(files, "_fresh", full)
        with pytest.raises(AttentionPlannerError, match=r"calibration was not kept: .*No space left"):
            calibrate("cpu", runs=6, path=path)
    assert [p.name for p in tmp_path.iterdir()] == ["c.json.records.jsonl"]
    again = Measures(monkeypatch)
    calibrate("cpu", runs=6, path=path)
    assert len(again.log) == 1


def test_a_folder_that_cannot_be_made_is_said_before_anything_long(monkeypatch, short, tmp_path):
    runs = Measures(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(AttentionPlannerError, match="cannot be made"):
        calibrate("cpu", runs=6, path=tmp_path / "file" / "c.json")
    assert len(runs.log) == 1


def test_the_command_prints_it_and_says_where_it_is(monkeypatch, short, tmp_path):
    path = tmp_path / "c.json"
    Measures(monkeypatch).at[4] = KeyboardInterrupt()
    arguments = ["calibrate", "--runs", "6", "--out", str(path)]
    stopped = CliRunner().invoke(app, arguments)
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert "the same command continues" in stopped.stderr
    Measures(monkeypatch)
    done = CliRunner().invoke(app, [*arguments, "--format", "json"])
    assert done.exit_code == 0
    assert Calibration.from_json(done.stdout) == load(path)
    assert str(path) in done.stderr.replace("\n", "")
    shown = CliRunner().invoke(app, arguments)
    assert "held-out errors" in shown.stdout


# ---- seconds


def test_seconds_are_fitted_to_runs_of_their_own(monkeypatch, short, tmp_path):
    monkeypatch.setattr(speed_fit, "RUNS", 8)
    told = []
    runs = Measures(monkeypatch, spread=0.1)
    found = calibrate("cpu", runs=6, path=tmp_path / "c.json", progress=lambda *line: told.append(line))
    assert len(runs.log) == 1 + 6 + 8
    assert [line[:2] for line in told] == [(n, 14) for n in range(15)]
    assert load(tmp_path / "c.json") == found
    assert (found.speed.fitted, found.speed.held_out, found.speed.noise) == (6, 2, 0.1)
    assert found.speed.rates.source.startswith("measured on a processor")
    without = calibrate("cpu", runs=6, path=tmp_path / "d.json", speed=False)
    assert len(runs.log) == 15 + 7
    assert without.speed is None
    assert without.command.endswith("--no-speed")
    memory = found.model_copy(update={"speed": None, "command": without.command})
    assert memory == without


def test_interrupted_timing_goes_on_where_it_stopped(monkeypatch, short, tmp_path):
    monkeypatch.setattr(speed_fit, "RUNS", 8)
    Measures(monkeypatch).at[1 + 6 + 5] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        calibrate("cpu", runs=6, path=tmp_path / "c.json")
    again = Measures(monkeypatch)
    assert calibrate("cpu", runs=6, path=tmp_path / "c.json").speed is not None
    assert len(again.log) == 1 + 4


def test_without_seconds_there_is_no_speed(monkeypatch, short, tmp_path):
    monkeypatch.setattr(speed_fit, "RUNS", 4)
    died = {"kind": "crash", "seconds": None, "message": "it died"}
    Measures(monkeypatch).at = dict.fromkeys(range(8, 12), died)
    assert calibrate("cpu", runs=6, path=tmp_path / "c.json").speed is None


# ---- which runs


def test_held_out_runs_are_longer_and_none_of_those_fitted_to():
    fitted, held_out = plan_runs("cpu", 0, 60)
    assert (len(fitted), len(held_out)) == (12, 48)
    longest = max(sample.workload.seq for sample in fitted)
    assert min(sample.workload.seq for sample in held_out) >= 4 * longest
    assert plan_runs("cpu", 0, 60) == (fitted, held_out)
    assert plan_runs("cpu", 1, 60) != (fitted, held_out)


@pytest.mark.parametrize("arguments", [("tpu", 0, 10), ("cpu", 0, 1), ("cpu", 0, 2.0), ("cpu", "x", 10)])
def test_arguments_that_cannot_be_right_are_refused(arguments):
    with pytest.raises(ConfigError):
        plan_runs(*arguments)


def test_the_most_informative_rows_add_most_to_the_determinant():
    rows = np.random.default_rng(0).normal(size=(30, 4))

    def gain(chosen: list[int]) -> float:
        x = rows[chosen]
        return float(np.linalg.slogdet(np.eye(4) / 1e3 + x.T @ x)[1])

    chosen = most_informative(rows.tolist(), 8)
    for n in range(8):
        assert gain(chosen[: n + 1]) == pytest.approx(
            max(gain([*chosen[:n], i]) for i in range(30) if i not in chosen[:n])
        )
    assert most_informative([[1.0, 0.0]] * 5 + [[0.0, 1.0]], 2) == [0, 5]


# ---- what is learnt


DENSE = AttentionConfig(variant="dense")


def test_terms_are_medians_and_errors_are_relative():
    short = [measurement(DENSE, Workload(seq=64), above=n) for n in (10_000, 0, 4096)]
    long = [measurement(DENSE, Workload(seq=n), above=8192) for n in (1024, 512)]
    found = calibration_of("cpu", short[0], short, long, "it")
    assert found.terms.overhead == 4096
    expected = [4096 / (m.allocated - 4096 + SMALL) for m in long]
    assert found.errors == pytest.approx(sorted(expected))
    assert (found.fitted_longest, found.domain.longest) == (64, 1024)
    less = [measurement(DENSE, Workload(seq=64), above=-500)] * 3
    assert calibration_of("cpu", short[0], less, long, "it").terms.overhead == 0


def test_on_a_gpu_the_device_peak_counts_and_where_unknown_reserved_and_context():
    gpu = next(gpu for gpu in gpus.known() if gpu.capability >= (8, 0))
    place = PLACE.model_copy(update={"device": gpu.name})

    def run(seq: int, **figures) -> Measurement:
        return measurement(DENSE, Workload(seq=seq), device="cuda", environment=place, **figures)

    context = 400 << 20
    short = [run(64, context=context, reserved=32 << 20, device_peak=context + (32 << 20))] * 3
    told = run(512, context=context, reserved=64 << 20, device_peak=context + (200 << 20))
    silent = run(512, reserved=64 << 20)
    found = calibration_of(gpu.key, short[0], short, [told, silent], "it")
    assert found.terms.context == context
    assert (found.name, found.threads) == (gpu.name, None)
    base = predicted(told, gpu.key, context) + found.terms.overhead
    peaks = (context + (64 << 20), context + (200 << 20))
    assert found.errors == pytest.approx([(peak - base) / (base + SMALL) for peak in peaks])


def test_importing_loads_no_torch_and_no_numpy():
    code = (
        "import sys; from planner import calibrate\nassert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
