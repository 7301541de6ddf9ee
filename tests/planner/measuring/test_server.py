"""A batch of runs: each in a process of its own, and none takes another along."""

from __future__ import annotations

import sys

import pytest

from attention import AttentionConfig, ConfigError, SparsePatternConfig
from planner.measuring import process
from planner.measuring import server as batch
from planner.measuring.measure import measure
from planner.measuring.server import Batch
from planner.workload import Workload

DENSE = AttentionConfig(variant="dense")
SMALL = Workload(seq=64, heads=2, head_dim=8, dtype="float32", mode="training")
OK = "{'outcome': {'kind': 'ok', 'seconds': 1.0, 'allocated': int(os.getpid())}}"


def server(monkeypatch, script: str) -> None:
    """Servers run this for each task: `n` counts a server's tasks, `say` answers."""
    start = (
        "import json, os, sys, time; answer = int(sys.argv[1])\n"
        "def say(line): os.write(answer, json.dumps(line).encode() + b'\\n')\n"
        f"for n, line in enumerate(sys.stdin):\n    task = json.loads(line); {script}"
    )
    monkeypatch.setattr(process, "command", lambda _, answer: [sys.executable, "-c", start, str(answer)])


def test_a_batch_measures_what_single_runs_do(monkeypatch, server_of_all):
    # In forks of a server that other tests had runs in, too; the single run is a process of its own.
    monkeypatch.setattr(batch, "_Server", lambda variables: server_of_all)
    sparse = AttentionConfig(
        variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window", block_size=16)
    )
    refused = DENSE.model_copy(update={"backend": "flex"})
    with Batch(threads=1) as runs:
        first, error, last = [runs.measure(c, SMALL) for c in (DENSE, refused, sparse)]
        again = runs.measure(DENSE, SMALL)
    single = measure(DENSE, SMALL, threads=1)
    assert (first.kind, error.kind, last.kind) == ("ok", "error", "ok")
    assert "UnavailableError: backend='flex'" in error.message
    assert again.allocated == first.allocated == single.allocated
    assert again.allocated_warm == first.allocated_warm == single.allocated_warm
    assert again.largest == first.largest == single.largest
    assert first.environment.threads == 1
    assert first.environment.kernel == "cpu"


def test_a_run_that_takes_too_long_costs_only_itself(one_server):
    with Batch(timeout=0.05) as runs:
        slow = runs.measure(DENSE, SMALL.model_copy(update={"seq": 4096, "heads": 16}))
        assert slow.kind == "timeout"
        assert "not done after 0.05 s" in slow.message


def test_a_server_that_dies_is_started_again(monkeypatch):
    server(
        monkeypatch,
        f"n == 1 and os.kill(os.getpid(), 11); say({OK}); say({{'ended': {{'code': 0, "
        "'timed_out': False}})",
    )
    with Batch() as runs:
        found = [runs.measure(DENSE, SMALL) for _ in range(4)]
    assert [one.kind for one in found] == ["ok", "crash", "ok", "crash"]
    assert "SIGSEGV" in found[1].message
    assert found[0].allocated != found[2].allocated


def test_what_a_killed_run_leaves_is_not_taken_for_an_answer(monkeypatch):
    server(
        monkeypatch,
        "os.write(answer, b'{\"outcome\": {\"ki'); os.write(answer, b'\\n'); "
        "say({'ended': {'code': -9, 'timed_out': False}})",
    )
    with Batch() as runs:
        found = [runs.measure(DENSE, SMALL) for _ in range(2)]
    assert [one.kind for one in found] == ["oom", "oom"]


def test_a_server_that_is_not_heard_of_is_ended(monkeypatch):
    monkeypatch.setattr(batch, "START_SECONDS", 0.1)
    server(monkeypatch, "time.sleep(600)")
    with Batch(timeout=0.1) as runs:
        assert runs.measure(DENSE, SMALL).kind == "timeout"


def test_what_a_server_prints_is_told_of_a_crash(monkeypatch):
    server(
        monkeypatch,
        "print('earlier', flush=True) if not n else sys.exit('the end'); "
        f"say({OK}); say({{'ended': {{'code': 0, 'timed_out': False}}}})",
    )
    with Batch() as runs:
        assert runs.measure(DENSE, SMALL).kind == "ok"
        crash = runs.measure(DENSE, SMALL)
    assert crash.kind == "crash"
    assert "the end" in crash.message
    assert "earlier" not in crash.message


def test_arguments_are_checked_before_anything_starts(monkeypatch):
    monkeypatch.setattr(process, "command", None)
    with pytest.raises(ConfigError, match="runs"):
        Batch(runs=0)
