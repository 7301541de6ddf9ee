"""A measurement is the truth about one run, and whatever happens to the run is a measurement."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from shared_server import SharedServer

from attention import (
    AdaptiveConfig,
    AttentionConfig,
    ConfigError,
    MultiheadConfig,
    SparsePatternConfig,
    UnavailableError,
)
from planner.measuring import process
from planner.measuring.footprint import footprint, footprints
from planner.measuring.measure import Measurement, measure
from planner.measuring.records import read
from planner.workload import Workload

# The module: `planner.measure` is the function.
measuring = importlib.import_module("planner.measuring.measure")
ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
DENSE = AttentionConfig(variant="dense")
SMALL = Workload(seq=128, heads=2, head_dim=16, dtype="float32")
TENSOR = 128 * 2 * 16 * 4
LSE = 128 * 2 * 4


@pytest.fixture(scope="module")
def runs(server_of_all: SharedServer) -> dict[str, Measurement]:
    """Real measurements, in forks of one process, which is cheaper than a process each; that they are the
    same, test_server.py says."""
    multihead = MultiheadConfig(embed_dim=32, num_heads=2)
    sparse = AttentionConfig(
        variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window", block_size=16)
    )
    asked = {
        "inference": (DENSE, {}),
        "training": (DENSE, {"mode": "training"}),
        "weights": (sparse, {"weights": True, "causal": True, "kv_heads": 1}),
        "multihead": (DENSE.model_copy(update={"multihead": multihead}), {"mode": "training"}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "run", server_of_all.single)
        return {
            name: measure(config, SMALL.model_copy(update=changes), threads=1, runs=2)
            for name, (config, changes) in asked.items()
        }


def child(monkeypatch, script: str) -> None:
    """Measuring processes run this script; `answer` is where they answer."""
    start = f"import json, os, signal, sys, time; sys.stdin.read(); answer = int(sys.argv[1])\n{script}"
    monkeypatch.setattr(process, "command", lambda _, answer: [sys.executable, "-c", start, str(answer)])


# ---- what is measured


def test_a_dense_forward_is_counted_to_the_byte(runs):
    """The fused kernel's own scratch: per thread, scores, row sums and maxima, and output of 32 queries
    against 128 keys, in float32."""
    scratch = (32 * 128 + 2 * 32 + 32 * 16) * 4
    found = runs["inference"]
    assert found.allocated == SMALL.floor + LSE + scratch
    assert found.allocated_warm == found.allocated  # nothing is kept below 4,096 tokens
    assert found.largest == (scratch, TENSOR, LSE)


@pytest.mark.parametrize("name", ["inference", "training", "weights", "multihead"])
def test_what_ran_says_where_and_survives_json(runs, name):
    found = runs[name]
    assert found.kind == "ok", found.message
    assert found.seconds > 0
    assert found.spread >= 0
    assert found.resident > 0
    assert (found.reserved, found.device_peak, found.message) == (None, None, None)
    where = found.environment
    assert (where.torch, where.threads, where.backend, where.kernel) == (torch.__version__, 1, "sdpa", "cpu")
    assert Measurement.from_json(found.to_json()) == found


def test_training_counts_gradients_in_and_out(runs):
    assert runs["training"].allocated >= 8 * TENSOR + LSE  # q, k, v, out and their gradients


def test_weights_are_asked_for(runs):
    plain = 3 * TENSOR  # q and out; k and v with one head of two
    assert runs["weights"].allocated >= plain + runs["weights"].workload.seq * 2 * 16 * 4


def test_parameters_of_multihead_and_their_gradients_count(runs):
    parameters = 4 * (32 * 32 + 32) * 4
    assert runs["multihead"].allocated >= 2 * parameters + 5 * TENSOR  # x, q, k, v, out


def test_memory_that_runs_out_is_a_value(one_server):
    found = measure(DENSE, Workload(seq=1 << 16), cap_bytes=50 << 20)
    assert (found.kind, found.requested, found.cap_bytes) == ("oom", 64 << 20, 50 << 20)
    assert found.available <= 50 << 20
    assert "cap_bytes" in found.message
    assert found.allocated is None


def test_what_the_library_refuses_is_an_error_with_its_words(one_server):
    config = AttentionConfig(variant="dense", backend="flex")
    found = measure(config, SMALL)
    assert found.kind == "error"
    assert "UnavailableError: backend='flex'" in found.message


# ---- what can happen to a process


def test_a_process_that_the_system_kills_ran_out_of_memory(monkeypatch):
    child(monkeypatch, 'os.write(answer, b\'{"stage": "halfway"}\\n{"outc\'); os.kill(os.getpid(), 9)')
    found = measure(DENSE, SMALL)
    assert found.kind == "oom"
    assert "killed the process while halfway" in found.message


def test_a_hang_ends_with_the_timeout_and_takes_its_children_along(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    child(monkeypatch, f"pid = os.fork(); pid and open({str(pid)!r}, 'w').write(str(pid)); time.sleep(600)")
    begin = time.monotonic()
    found = measure(DENSE, SMALL, timeout=1)
    assert (found.kind, time.monotonic() - begin < 60) == ("timeout", True)
    assert "not done after 1 s" in found.message
    assert gone(int(pid.read_text()))


@pytest.mark.parametrize(
    "script, kind, message",
    [
        ("signal.raise_signal(signal.SIGSEGV)", "crash", "SIGSEGV while starting"),
        ("sys.stderr.write('what it said'); sys.exit(3)", "crash", "code 3 while starting; .* what it said"),
        ("print('x' * 10**6); print('the end'); sys.exit(1)", "crash", "code 1 .*the end"),
        ("sys.stderr.write('std::bad_alloc'); os.abort()", "oom", "bad_alloc"),
        ("pass", "crash", "ended with code 0"),
    ],
)
def test_every_other_end_is_a_crash_with_its_reason(monkeypatch, script, kind, message):
    child(monkeypatch, script)
    found = measure(DENSE, SMALL)
    assert found.kind == kind
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        raise AssertionError(found.message)


def test_what_is_printed_is_never_taken_for_the_answer(monkeypatch):
    child(
        monkeypatch,
        "print('{\"outcome\": 1}'); os.write(answer, json.dumps({'outcome': {'kind': 'ok', 'seconds': 2.0}})"
        ".encode() + b'\\n')",
    )
    assert measure(DENSE, SMALL).seconds == 2.0


def test_ctrl_c_kills_the_process(tmp_path):
    pid = tmp_path / "pid"
    sleep = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid()) + '.'); time.sleep(600)"
    code = (
        "import importlib, sys; from attention import AttentionConfig\n"
        "from planner.workload import Workload\n"
        "m = importlib.import_module('planner.measuring.measure')\n"
        "from planner.measuring import process\n"
        f"process.command = lambda _, answer: [sys.executable, '-c', {sleep!r}]\n"
        "m.measure(AttentionConfig(variant='dense'), Workload(seq=8))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text().endswith(".")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.send_signal(signal.SIGINT)
    _, said = parent.communicate(timeout=60)
    assert b"KeyboardInterrupt" in said
    assert gone(int(pid.read_text()[:-1]))


def gone(pid: int) -> bool:
    """Whether a process ends within a while; one that waits for its parent to notice has."""
    for _ in range(500):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


# ---- what is refused before anything starts


@pytest.mark.parametrize(
    "config, message",
    [
        (
            AttentionConfig(variant="dense", multihead=MultiheadConfig(embed_dim=64, num_heads=4)),
            "multihead has heads=4, kv_heads=4, the workload heads=2, kv_heads=2",
        ),
        (
            AttentionConfig(
                variant="dense", multihead=MultiheadConfig(embed_dim=32, num_heads=2, kv_heads=1)
            ),
            "kv_heads=1",
        ),
        (
            AttentionConfig(
                variant="adaptive",
                pattern=SparsePatternConfig(),
                adaptive=AdaptiveConfig(num_heads=2, head_dim=8),
            ),
            "adaptive has head_dim=8, the workload head_dim=16",
        ),
    ],
)
def test_config_and_workload_must_agree(monkeypatch, config, message):
    monkeypatch.setattr(process, "command", None)
    with pytest.raises(ConfigError, match=message):
        measure(config, SMALL)


@pytest.mark.parametrize(
    "options",
    [{"device": "tpu"}, {"timeout": 0}, {"timeout": float("nan")}, {"runs": 0}, {"runs": None},
     {"threads": 0}, {"cap_bytes": 0}, {"cap_bytes": 1.5}, {"runs": True}],
)  # list of small dicts  # fmt: skip
def test_arguments_that_cannot_be_right_are_refused(monkeypatch, options):
    monkeypatch.setattr(process, "command", None)
    with pytest.raises(ConfigError, match=next(iter(options))):
        measure(DENSE, SMALL, **options)


def test_a_gpu_that_is_hidden_is_unavailable(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UnavailableError, match="CUDA"):
        measure(DENSE, SMALL, "cuda")


@pytest.mark.gpu
def test_a_gpu_tells_its_three_peaks():
    found = measure(DENSE, SMALL.model_copy(update={"seq": 4096}), "cuda")
    assert found.kind == "ok", found.message
    assert SMALL.floor * 32 < found.allocated <= found.reserved
    assert found.device_peak is None or found.device_peak > found.reserved


@pytest.mark.parametrize(
    "module", ["planner.measuring.measure", "planner.measuring.records", "planner.measuring.footprint"]
)
def test_imports_no_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# ---- counting


def test_blocks_freed_unseen_do_not_disturb_a_later_count():
    """torch remembers the size of what an earlier count saw allocated, and would report it for whatever
    lies at that address later."""
    kept, size = [], 64 << 20  # so large that it has pages of its own, and its address is used again

    def keep() -> None:
        kept.append(torch.empty(size, dtype=torch.uint8))

    assert footprint(keep, CPU).kept == size
    address = kept.pop().data_ptr()
    others = [torch.empty(size, dtype=torch.uint8) for _ in range(10)]
    again = [other for other in others if other.data_ptr() == address]
    if not again:
        pytest.skip("the allocator did not use the address again")
    del others

    def drop() -> None:
        again[0] = torch.empty(64, dtype=torch.uint8)

    assert footprint(drop, CPU) == (64, 64, (64,))


def test_runs_share_one_count():
    kept = []

    def keep() -> torch.Tensor:
        kept.append(torch.empty(1000, dtype=torch.uint8))
        return torch.empty(500, dtype=torch.uint8)

    first, cleared, last = footprints([keep, kept.clear, lambda: torch.empty(200, dtype=torch.uint8)], CPU)
    assert first == (1500, 1500, (1000, 500))
    assert cleared == (1000, 0, ())  # what was returned was dropped before
    assert last == (200, 200, (200,))


def test_backward_is_counted_in_order():
    x = torch.ones(1000, requires_grad=True)
    found = footprint(lambda: (x * x).sum().backward(), CPU)
    assert found.kept >= x.nbytes
    assert found.peak < 8 * x.nbytes


# ---- closed standard streams


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_closed_standard_stream_is_no_crash_of_what_is_measured(closed, tmp_path):
    # With nothing in place of the streams, as a daemon may be started.
    code = (
        f"import os\nfor file in {closed}: os.close(file)\n"
        "from planner.measuring.measure import measure\nfrom planner.measuring.server import Batch\n"
        "import planner.measuring.process, sys\n"
        'child = "import json, os, sys; sys.stdin.readline(); assert all(os.fstat(n) for n in range(3)); "\n'
        "child += \"say = lambda said: os.write(int(sys.argv[1]), json.dumps(said).encode() + b'\\\\n'); \"\n"
        "child += \"say({'outcome': {'kind': 'ok', 'seconds': 1.0}}); \"\n"
        "child += \"say({'ended': {'code': 0, 'timed_out': False}})\"\n"
        "planner.measuring.process.command = lambda _, answer: [sys.executable, '-c', child, str(answer)]\n"
        "from attention import AttentionConfig\nfrom planner.workload import Workload\n"
        "asked = AttentionConfig(variant='dense'), Workload(seq=64)\n"
        "with Batch() as batch: found = [measure(*asked), batch.measure(*asked)]\n"
        f"open({str(tmp_path / 'found')!r}, 'w').write(' '.join(one.to_json() for one in found))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    found = (tmp_path / "found").read_text()
    assert found.count('"kind":"ok"') == 2, found


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("asked", [
    "measure --variant dense --seq 64 --append records",
    "tune --vram 200MB --seq 256 --dtype float32 --trials 1 --runs 1 --append records --storage t.journal",
])  # a command line that just fits without more indentation  # fmt: skip
def test_a_command_with_a_closed_stream_records_what_happened(asked, streams, tmp_path):
    script = f"{sys.executable} -m planner {asked} {streams}"
    done = subprocess.run(
        script, shell=True, cwd=tmp_path, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0
    assert [record.kind for record in read(tmp_path / "records")] == ["ok"]
