"""Files that version 0.1.0 wrote before modules had their present places: each is read, and gone on with.

What is in tests/written/ was printed or kept by the commands beside each test, and is never written anew.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import planner
from attention import AttentionConfig
from planner import MemoryEstimate, Recommendation, Space, Tuned
from planner.answers.comparison import side
from planner.answers.read import read_answer
from planner.calibration import load
from planner.measuring import records
from planner.measuring.measure import Environment, Measurement
from planner.report.page.answer import answer_page
from planner.search.tune import stored

WRITTEN = Path(__file__).parent / "written"
QUESTION = {
    "vram": "64MB",
    "seq": 512,
    "heads": 2,
    "head_dim": 16,
    "dtype": "float32",
    "space": Space(variants=("dense", "dilated")),
}
"""Of `planner tune --vram 64MB --seq 512 --heads 2 --head-dim 16 --dtype float32 --variant dense,dilated
--trials 3 --runs 1 --storage STORAGE --study lengths`."""


LATER = (
    ("kernel", ""),
    ("edges", "block"),
    ("launches", None),
    ("time", None),
    ("low", None),
    ("high", None),
)
"""Fields that came later, and what they are where nothing was said."""


def read(name: str):
    return json.loads((WRITTEN / name).read_text())


def as_then(value):
    """What is written of it today, without what that version did not say."""

    def without_later(value):
        if isinstance(value, dict):
            return {key: without_later(item) for key, item in value.items() if (key, item) not in LATER}
        return [without_later(item) for item in value] if isinstance(value, list) else value

    return without_later(json.loads(value.to_json()))


def test_a_config():
    text = (WRITTEN / "config.json").read_text()
    config = AttentionConfig.from_json(text)
    assert as_then(config) == json.loads(text)
    assert planner.estimate(config, planner.Workload(seq=1024, heads=4, head_dim=16)).upper > 0


def test_an_estimate():
    """`planner estimate --seq 2K --variant dilated --segments 512,1024 --rates 1,2 --format json`"""
    old = read("estimate.json")
    estimate = MemoryEstimate(**old)
    assert as_then(estimate) == old
    assert side(WRITTEN / "estimate.json", lambda config: None).estimate == estimate


def test_a_recommendation():
    """`planner recommend --vram 64MB --seq 2K --gpu cpu --dtype float32 --variant dense,dilated --trials 4
    --format json`"""
    answer = read_answer(WRITTEN / "recommendation.json").found
    assert isinstance(answer, Recommendation)
    assert as_then(answer) == read("recommendation.json")
    assert answer.config.variant in answer_page(WRITTEN / "recommendation.json", None, None)


def test_what_tuning_printed():
    answer = read_answer(WRITTEN / "tuned.json").found
    assert isinstance(answer, Tuned)
    assert as_then(answer) == read("tuned.json")
    assert answer.best.config.variant in answer_page(WRITTEN / "tuned.json", None, None)


def test_records():
    """`--append records.jsonl` of tuning"""
    runs = records.read(WRITTEN / "records.jsonl")
    assert [run.kind for run in runs] == ["ok"] * 3
    lines = (WRITTEN / "records.jsonl").read_text().splitlines()
    assert [json.loads(run.to_json()) for run in runs] == [json.loads(line) for line in lines]


def test_a_calibration():
    """`planner calibrate --runs 14 --out calibration.json`"""
    calibration = load(WRITTEN / "calibration.json")
    assert json.loads(calibration.to_json()) == read("calibration.json")
    assert calibration.speed is not None


def unmeasured(config, workload):
    """Stands for a run, where this machine's models recommend another config than those that were tried."""
    place = Environment(python="3", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")
    return Measurement(
        config=config,
        workload=workload,
        device="cpu",
        kind="ok",
        runs=1,
        environment=place,
        seconds=10.0,
        allocated=1 << 20,
    )


def went_on(storage: str) -> None:
    """The same question goes on in its study, where everything that was asked for is there already."""
    before = stored(storage, "lengths")
    answer = planner.tune(**QUESTION, trials=3, runs=1, storage=storage, study="lengths", measure=unmeasured)
    assert answer.kept == 3
    assert [trial.config for trial in answer.trials[:3]] == [trial.config for trial in before.trials]


def test_a_journal(tmp_path):
    shutil.copy(WRITTEN / "journal.log", tmp_path)
    went_on(str(tmp_path / "journal.log"))


def test_an_sqlite_study(tmp_path):
    """The database is kept as the statements that make it."""
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.executescript((WRITTEN / "study.sql").read_text())
    database.close()
    went_on(f"sqlite:///{tmp_path / 'study.db'}")
