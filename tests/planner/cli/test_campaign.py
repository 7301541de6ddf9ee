"""Whatever is typed and whatever a file holds: an answer or one clear line, soon, and nothing is harmed.

The seed is another one in each run; a failure's message has the one that repeats it.
"""

from __future__ import annotations

import io
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from planner.cli.main import app

ROOT = Path(__file__).resolve().parents[3]
SMALL, LARGE = (ROOT / "docs" / "examples" / f"{name}.json" for name in ("small", "large"))
SEED = int(os.environ.get("CAMPAIGN_SEED", time.time_ns() % 10**9))
LIMIT = 60
"""Seconds in which everything answers."""
CODES = {0, 1, 2, 3}

# fmt: off
COUNTS = ["1", "2", "7", "64", "100.7", "0", "-1", "1e3", "", "x", "nan", "inf", "1" * 40,
          "9" * 5000, "16777216",
          "1099511627777", "1K", "63.5", "0x10", "٣", "1,2", "99999999999999999999", " 8 ", "8;9",
          "%s", "'"]
TOKENS = ["1", "7", "512", "4096", "8K", "0.5K", "16K", "1.3K", *COUNTS]
BYTES = [
    "8GB", "500MB", "1MiB", "1", "0", "2.01GB", "1e9", "inf", "-8GB", "1000000TB", "9" * 31 + "GB",
    "nan", "",
]
FLOATS = ["0.1", "0.5", "1", "0", "nan", "inf", "-inf", "1e400", "-1", "1e-300", "x", "", "1e300", "0.01,0.1"]
LISTS = [
    "2K,4K", "512", "512,", ",", "128,256,384", "1,2", "1.9", "0", ",".join(["128"] * 40), "1,1e3",
    "a,b",
]
WORDS = [
    "", "x", "dense", "--", "-", "dilated", "cpu", "gtx1080", "h100", "rtx", "é", "a" * 3000, "../..",
    "*",
]
FILES = [
    str(SMALL), str(LARGE), "no.json", "/dev/null", "/dev/zero", ".", "/proc/self/mem", "", "a" * 300,
    "fifo",
]
VALUES = {
    "--seq": TOKENS, "--batch": COUNTS, "--heads": COUNTS, "--kv-heads": COUNTS, "--head-dim": COUNTS,
    "--dtype": ["float16", "bfloat16", "float32", "float64", "int8"], "--mode": ["inference",
    "training", "x"],
    "--causal": None, "--weights": None, "--vram": BYTES, "--device": ["cpu", "gtx1080", "h100", *WORDS],
    "--gpu": ["cpu", "gtx1080", "rtx4090", *WORDS], "--allocator": ["expandable_segments:True",
    "a:b", ":", *WORDS],
    "--display": ["headless", "desktop", "x"], "--others": BYTES, "--context": BYTES, "--threads": COUNTS,
    "--calibration": FILES, "--config": FILES, "--variant": ["dense", "dilated", "block_sparse",
    "adaptive", "x"],
    "--pattern": ["local_window", "global_local", "dilated_sparse", "x", ""],
    "--block-size": [*COUNTS, "128"],
    "--window": TOKENS, "--global-tokens": COUNTS, "--sparsity": FLOATS, "--segments": LISTS,
    "--rates": LISTS,
    "--format": ["table", "json", "yaml", "py", "x"], "--objective": ["speed", "seq", "quality", "x"],
    "--reserve": BYTES, "--layers": COUNTS, "--min-mass": FLOATS, "--max-seconds": FLOATS,
    "--profile": ["balanced", "local", "streaming", "retrieval", *WORDS], "--profile-from": FILES,
    "--trials": ["0", "2", *COUNTS[5:11]], "--sampler": ["tpe", "random", "cmaes", "gp", *WORDS],
    "--seed": COUNTS,
    "--storage": ["no/such/folder/x.journal", "sqlite:////no/x.db", "x://", ""], "--study": WORDS,
    "--branches": LISTS, "--workspace": BYTES, "--backend": ["auto", "sdpa", "flex", "x"],
    "--pool": ["auto", "on", "off", "x"], "--lines": None, "--name": WORDS,
    "--plot": ["out.png", "out.svg", "out.gif", "no/out.png", "/dev/null", "", "."], "--list": None,
    "--timeout": FLOATS, "--runs": COUNTS, "--cap": BYTES, "--learn": None, "--nonsense": WORDS,
    "--help": None,
}
WORKLOAD = [
    "--seq", "--batch", "--heads", "--kv-heads", "--head-dim", "--dtype", "--mode", "--causal",
    "--weights",
]
CONFIG = ["--config", "--variant", "--pattern", "--block-size", "--window", "--global-tokens", "--sparsity",
          "--segments", "--rates"]
PLACE = ["--vram", "--allocator", "--display", "--others", "--context", "--threads", "--calibration"]
GATES = ["--reserve", "--layers", "--min-mass", "--max-seconds", "--profile", "--profile-from"]
SPACE = [*CONFIG[1:], "--branches", "--workspace", "--backend", "--pool"]
OPTIONS = {
    "recommend": [*WORKLOAD[:-1], *PLACE, *GATES, *SPACE, "--gpu", "--objective", "--trials",
    "--sampler", "--seed",
                  "--storage", "--study", "--plot", "--format"],
    "tune": [*WORKLOAD[1:-1], *GATES, *SPACE, "--sampler", "--seed", "--study", "--timeout",
    "--runs", "--learn",
             "--format"],
    "gpus": ["--name", "--format"],
    "estimate": [*WORKLOAD, *CONFIG, *PLACE, "--device", "--lines", "--plot", "--format"],
    "max-seq": [*WORKLOAD[1:], *CONFIG, *PLACE, "--device", "--format"],
    "compare": [*WORKLOAD, *PLACE, "--device", "--plot", "--format"],
    "show": [*WORKLOAD[:1], "--heads", "--head-dim", "--causal", *CONFIG[1:], "--profile",
    "--plot", "--format"],
    "measure": ["--timeout", "--runs", "--cap", "--nonsense"],
    "report": ["--storage", "--study"],
    "study": ["--list", "--format"],
    "calibrate": ["--runs", "--seed", "--threads"],
}
BEGINNINGS = {
    "recommend": ["--vram 8GB --seq 4K --trials 0", "--gpu gtx1080 --seq 2K --trials 2",
    "--vram 1MB --seq 8K", ""],
    "tune": ["--vram 1MB --seq 64K", ""],
    "estimate": ["--variant dense --seq 4K", "--variant block_sparse --seq 4K", f"--config {SMALL} --seq 8K",
                 "--variant adaptive --seq 1K",
                 "--variant dilated --segments 512,1K --rates 1,2 --seq 4K", ""],
    "max-seq": ["--vram 8GB --variant dense", "--vram 1GB --variant block_sparse --pattern local_window", ""],
    "compare": [f"{SMALL} {LARGE} --seq 8K", f"{SMALL} {SMALL}", "a b"],
    "show": [str(SMALL), "--variant block_sparse", "no.json",
    "--variant dilated --segments 512 --rates 1", ""],
    "measure": ["--variant dense --seq 0", ""],
    "report": ["no.json", str(SMALL), "--out out.html", ""],
    "study": ["nosuch", ""],
    "calibrate": ["--device nosuch"],
}
# fmt: on


def command_line(random: random.Random) -> list[str]:
    """Any command with any of its options, valid, odd and hostile."""
    name = random.choice([*OPTIONS, "recommend", "estimate", "estimate", "show", "max-seq"])
    line = [name, *shlex.split(random.choice(BEGINNINGS.get(name, [""])))]
    for option in random.sample(OPTIONS[name], min(len(OPTIONS[name]), random.choice([0, 1, 1, 2, 2, 3, 5]))):
        values = VALUES[option]
        line += [option] if values is None else [option, random.choice(values)]
    if random.random() < 0.1:
        line.insert(random.randrange(len(line) + 1), random.choice([*WORDS, "--help", "--nonsense", "-x"]))
    return line


class _Hang(Exception):
    pass


def _stop(*_):
    raise _Hang


def run_here(line):
    """(exit code, stdout, stderr, what went wrong) of a command line in this process."""
    before = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(LIMIT)
    try:
        result = CliRunner().invoke(app, line, prog_name="planner", env={"COLUMNS": "80"})
    except _Hang:
        return 0, "", "", f"not done after {LIMIT} s"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    wrong = None if isinstance(result.exception, SystemExit | None) else repr(result.exception)
    return result.exit_code, result.stdout, result.stderr, wrong


def run_apart(line):
    """The same in a process of its own."""
    try:
        result = subprocess.run(
            [sys.executable, "-m", "planner", *line],
            capture_output=True,
            text=True,
            timeout=LIMIT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    except subprocess.TimeoutExpired:
        return 0, "", "", f"not done after {LIMIT} s"
    wrong = next(
        (what for what in ("Traceback", "Warning", "Exception ignored") if what in result.stderr), None
    )
    return result.returncode, result.stdout, result.stderr, wrong


def faults(line, outcome) -> list[str]:
    """What is wrong with an outcome; nothing if all is well."""
    code, out, err, wrong = outcome
    found = [wrong] if wrong else []
    if code not in CODES:
        found.append(f"exit code {code}")
    if "Traceback" in err or "Traceback" in out:
        found.append("a traceback")
    if code in (2, 3) and out and "max-seq" not in line:
        found.append("data on stdout beside an error")
    if len(err) > 20_000:
        found.append(f"{len(err)} characters of error")
    return [f"{one}: planner {shlex.join(line)[:600]}\n{err[-600:]}" for one in found]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    os.mkfifo("fifo")
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_any_command_line_gets_an_answer_or_a_reason(folder):
    draw = random.Random(SEED)
    found = []
    for at in range(600):
        line = command_line(draw)
        found += faults(line, run_here(line) if at % 30 else run_apart(line))
        stray = {path.name for path in folder.iterdir()} - {"fifo", "out.png", "out.svg", "out.html", "data"}
        if stray:
            found.append(f"left {sorted(stray)}: planner {shlex.join(line)[:600]}")
            break
    assert not found, f"CAMPAIGN_SEED={SEED}, {len(found)} faults\n" + "\n".join(found)


# Files.


def bomb(path: Path, size: int) -> None:
    """q and k of zeros that unpack to much more than they take."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("q", "k"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": (size // 256, 1, 64)}
                )
                for _ in range(size >> 20):
                    file.write(bytes(1 << 20))


def hostile_files(folder: Path, draw: random.Random) -> list[Path]:
    """A hundred files that nobody should give a program."""
    texts: list[bytes] = [
        b"", b" ", b"\0", b"{", b"[", b"nul", b"null", b"0", b'""', b"[]", b"{}", b"[" * 100_000,
        b'{"a":' * 100_000, b"\xef\xbb\xbf{}", '{"variant": "dense"}'.encode("utf-16"), b"NaN",
        b"Infinity", b"1e999",
        b"9" * 100_000, b'{"variant": NaN}', b'{"variant": "dense", "variant": "dilated"}',
        b'{"variant": "dense", "schema_version": 99}', b'{"variant": "dense", "schema_version": true}',
        b'{"variant": "dense", "scale": 1e999}', b'{"variant": "dense", "scale": NaN}', b'{"config": 3}',
        b'{"config": {"variant": "dense"}, "workload": {"seq": 1e9}}', b'{"config": [], "pareto": []}',
        b'{"config": {"variant": "dense"}, "workload": {"seq": "x", "batch": []}}',
        b'{"best": 1, "trials": 2}',
        b'{"best": {}, "trials": [], "config": {}}', b'{"components": {}}', b'{"environment": {}}',
        b'{"components": {}, "config": {"variant": "dense"}, "workload": {"seq": 1}}',
        b'{"memory": {"components": 1}}',
        b'{"variant": "dense", "\\ud800": 1}', b'{"variant": "\\u0000"}', b"\x1f\x8b\x08\0", b"PK\x03\x04",
        b"\x80\x04\x95", b"#!/bin/sh\nrm -rf /\n",
        b'{"variant": "dilated", "segment_lengths": [' + b"1," * 3_000_000 + b'1], "dilation_rates": [1]}',
        b'{"variant": "dilated", "segment_lengths": [' + b'"x",' * 1_000_000 + b'1], "dilation_rates": [1]}',
        b'{"variant": "block_sparse", "pattern": {"block_size": 63.5}}',
        b'{"variant": "adaptive", "pattern": {}, "adaptive": {"num_heads": 99999999999, "head_dim": 1}}',
    ]  # list of short bytes  # fmt: skip
    whole = SMALL.read_bytes()
    while len(texts) < 90:
        torn = bytearray(whole)
        for _ in range(draw.choice([0, 1, 3])):
            torn[draw.randrange(len(torn))] = draw.randrange(256)
        texts.append(bytes(torn[: draw.randrange(len(torn))] if draw.random() < 0.5 else torn))
    made = []
    for number, text in enumerate(texts):
        made.append(folder / f"{number}.json")
        made[-1].write_bytes(text)
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "dangling.json").symlink_to("nowhere")
    with open(folder / "sparse.json", "wb") as file:
        file.truncate(1 << 30)
    (folder / "unreadable.json").write_bytes(whole)
    (folder / "unreadable.json").chmod(0)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "socket.json"))
    made += [
        folder / f"{name}.json"
        for name in ("folder", "pipe", "loop", "dangling", "sparse", "unreadable", "socket", "none")
    ]
    return [*made, Path("/dev/zero"), Path("/dev/full")]


TAKING = (
    "estimate --seq 1K --config",
    "max-seq --vram 1GB --config",
    f"compare --seq 1K {SMALL}",
    "show",
    "report --out out.html",
    "estimate --variant dense --seq 1K --calibration",
    "measure --config",
)
"""Where a file is taken."""


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_any_file_is_read_or_refused(folder):
    draw = random.Random(SEED)
    (folder / "files").mkdir()
    found = []
    for file in hostile_files(folder / "files", draw):
        for command in TAKING:
            line = [*shlex.split(command), str(file)]
            if command == "measure --config":
                line += ["--seq", "0"]
            found += faults(line, run_here(line))
    assert not found, f"CAMPAIGN_SEED={SEED}, {len(found)} faults\n" + "\n".join(found)


def tensors(folder: Path, draw: random.Random) -> list[Path]:
    """Archives of q and k that are none, or want more memory than they should."""
    q = np.ones((8, 2, 4), np.float32)
    good, packed = io.BytesIO(), io.BytesIO()
    np.savez(good, q=q, k=q)
    np.savez_compressed(packed, q=q, k=q)
    texts = [b"", b"PK\x03\x04", b"\x93NUMPY"]
    for _ in range(60):
        torn = bytearray(draw.choice([good, packed]).getvalue())
        for _ in range(draw.choice([1, 2, 8])):
            torn[draw.randrange(len(torn))] = draw.randrange(256)
        texts.append(bytes(torn))
    made = []
    for number, text in enumerate(texts):
        made += [folder / f"{number}.npz", folder / f"{number}.safetensors"]
        for path in made[-2:]:
            path.write_bytes(text)
    bomb(folder / "bomb.npz", 1 << 27)
    (folder / "folder.npz").mkdir()
    os.mkfifo(folder / "pipe.npz")
    os.mkfifo(folder / "pipe.safetensors")
    with open(folder / "sparse.safetensors", "wb") as file:
        file.truncate(1 << 30)
    return [
        *made,
        *(
            folder / n
            for n in (
                "bomb.npz",
                "folder.npz",
                "pipe.npz",
                "pipe.safetensors",
                "sparse.safetensors",
                "none.npz",
            )
        ),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_any_tensors_are_read_or_refused(folder):
    found = []
    (folder / "files").mkdir()
    for file in tensors(folder / "files", random.Random(SEED)):
        line = ["recommend", "--vram", "1", "--seq", "16", "--trials", "0", "--profile-from", str(file)]
        found += faults(line, run_here(line))
    assert not found, f"CAMPAIGN_SEED={SEED}, {len(found)} faults\n" + "\n".join(found)
