"""One command for a GPU: rows are kept as they are made, whatever one of them meets; all parts, on a CPU."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from attention import AttentionPlannerError, ConfigError
from studies.gpu import run
from studies.gpu.__main__ import main
from studies.gpu.results import SAME
from studies.gpu.run import TimeUpError, begin, carry_out, is_done, within
from studies.gpu.steps import PlannedRow, Tools
from studies.gpu.worker import Worker

FACTS = {
    "kind": "cuda", "device": "NVIDIA H200", "version": "0.1", "code": "c0de", "torch": "2.13.0",
    "driver": "590", "capability": "9.0", "device_bytes": 150_109_945_856, "multiprocessors": 132,
    "power_limit": "700 W", "cuda": "13.0", "python": "3.11.7", "system": "Linux", "cores": 16,
    "machine": "cuda-nvidia-h200",
}  # what a device tells, a table  # fmt: skip


def ok(tools: Tools) -> dict:
    return {"outcome": "ok", "figure": 1}


def fails(tools: Tools) -> dict:
    raise ConfigError("not so")


def interrupted(tools: Tools) -> dict:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
    return {}


def sleeps(tools: Tools) -> dict:
    time.sleep(5)
    return {"outcome": "ok"}


def step(name: str, make=ok, seconds: float = 60.0) -> PlannedRow:
    return PlannedRow("checks", name, seconds, make)


@pytest.fixture
def content(tmp_path: Path) -> dict:
    return begin(tmp_path / "gpu.json", "the command", FACTS)


def names(content: dict) -> dict[str, str]:
    return {row["name"]: row["outcome"] for row in content["rows"].values()}


def test_a_row_that_fails_is_recorded_and_the_run_goes_on(content):
    todo = [step("a"), step("b", fails), step("c", sleeps, 0.02), step("d")]
    kept: list[int] = []
    assert not carry_out(content, todo, Tools("cpu"), 60, lambda now: kept.append(len(now["rows"])))
    assert names(content) == {"a": "ok", "b": "error", "c": "timeout", "d": "ok"}
    assert content["rows"]["checks: b"]["message"] == "ConfigError: not so"
    assert "0.02 s" in content["rows"]["checks: c"]["message"]
    assert kept == [1, 2, 3, 4]


def test_what_is_done_is_not_done_again_unless_code_or_versions_are_others(content):
    tried: list[str] = []

    def noted(tools: Tools) -> dict:
        tried.append("again")
        return {"outcome": "ok"}

    todo = [step("a", noted)]
    for _ in range(2):
        carry_out(content, todo, Tools("cpu"), 60, lambda _: None)
    assert len(tried) == 1
    for name in SAME:
        content["environment"] = {**FACTS, name: "another"}
        assert not is_done(content, todo[0])
    carry_out(content, todo, Tools("cpu"), 60, lambda _: None)
    assert len(tried) == 2
    assert [session["rows"] for session in content["sessions"]] == [1, 0, 1]


def test_an_interrupt_keeps_what_is_done_and_the_same_command_goes_on_there(content):
    todo = [step("a"), step("b", interrupted), step("c")]
    assert carry_out(content, todo, Tools("cpu"), 60, lambda _: None)
    assert names(content) == {"a": "ok"}
    assert not carry_out(content, [todo[0], step("b"), todo[2]], Tools("cpu"), 60, lambda _: None)
    assert list(names(content)) == ["a", "b", "c"]


def test_the_end_of_the_minutes_cuts_a_row_off_without_recording_it(content):
    todo = [step("a"), step("b", sleeps), step("c")]
    assert not carry_out(content, todo, Tools("cpu"), 0.1, lambda _: None)
    assert names(content) == {"a": "ok"}


def test_within_ends_what_takes_too_long_and_nothing_else():
    with pytest.raises(TimeUpError), within(0.01):
        time.sleep(5)
    with within(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_data_that_is_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('{"rows": []}')
    with pytest.raises(AttentionPlannerError, match="not what an earlier run left"):
        begin(path, "the command", FACTS)


def test_whatever_a_function_meets_is_an_outcome_and_the_next_is_answered():
    worker = Worker()
    try:
        assert worker.ask("builtins", "dict", figure=1) == {"outcome": "ok", "figure": 1}
        refused = worker.ask("planner.gpus", "find", name="MI300X")
        assert refused["outcome"] == "refused"
        assert "not an NVIDIA card" in refused["message"]
        assert worker.ask("numpy", "empty", shape=1 << 50)["outcome"] == "oom"
        wrong = worker.ask("json", "loads", s="{")
        assert wrong["outcome"] == "error"
        assert wrong["message"].startswith("JSONDecodeError: ")
        assert worker.ask("os", "_exit", status=3) == {
            "outcome": "crash",
            "message": "its process ended with code 3",
        }
        assert worker.ask("builtins", "dict")["outcome"] == "ok"
    finally:
        worker.end()


def test_every_part_runs_end_to_end(tmp_path, one_server):
    peers = "peers: dense, 1 x 256 tokens, 2 heads x 32, float32, inference"
    flash = "checks: dense, bfloat16, causal, backend flash"
    wanted = ("checks: dense, bfloat16, causal", flash, peers, "length: local_window, 256 tokens, training")
    measured = ("memory: fitted 0:", "calibration: fitted 0.0:")
    done = run.run("cpu", 3, tmp_path, lambda step: step.label in wanted or step.label.startswith(measured))
    assert not done["interrupted"]
    assert done["missing"] == []
    rows = done["rows"]
    assert {label: row["outcome"] for label, row in rows.items()} == {
        label: "refused" if label == flash else "ok" for label in rows
    }
    assert len(rows) == len(wanted) + len(measured)
    assert "it runs on CUDA only" in rows[flash]["message"]
    assert {"ours", "SDPA", "SDPA, flash", "SDPA, math"} <= {*rows[peers]["ratios"], *rows[peers]["absent"]}
    assert rows[peers]["ratios"]["ours"] == 1.0
    assert next(row for row in rows.values() if row["part"] == "memory")["predicted"]["allocated"] > 0
    data, text = done["files"]
    assert json.loads(data.read_text())["rows"] == json.loads(json.dumps(rows))
    shown = text.read_text()
    for part in ("Checks against", "Beside PyTorch", "By length", "Bytes", "None yet: 1 runs of bytes"):
        assert part in shown
    assert "All of it ran." in shown


def test_the_command_says_what_it_wrote_and_stops_when_the_minutes_are_over(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "steps", lambda *_: [step("a"), step("b", sleeps)])
    monkeypatch.setattr(run, "facts_of", lambda *_: FACTS)
    assert main(["--minutes", "0.005", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("1 rows, 0 wrong or failed, 1 not reached\nwrote ")
    page = (tmp_path / "gpu.cuda-nvidia-h200.md").read_text()
    assert "Not reached: 1 rows, the first `checks: b`" in page
    monkeypatch.setattr(run, "steps", lambda *_: [step("b", interrupted)])
    assert main(["--minutes", "1", "--out", str(tmp_path)]) == 130
    monkeypatch.setattr(run, "steps", lambda *_: [step("b", fails)])
    assert main(["--minutes", "1", "--out", str(tmp_path)]) == 1


def test_a_device_that_is_not_there_is_said(tmp_path, capsys, monkeypatch):
    told = {"outcome": "refused", "message": "there is no CUDA device"}
    monkeypatch.setattr(Worker, "ask", lambda *_, **__: told)
    assert main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "studies.gpu: error: there is no CUDA device\n"
    with pytest.raises(SystemExit):
        main(["--minutes", "0"])
