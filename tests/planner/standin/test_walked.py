"""The ways of CUDA are walked to their ends on cards that are not there, so that the first person with a GPU
does not meet the first traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import planner
from planner.gpus import find
from planner.measuring.measure import WALKED
from planner.standin.environment import environment
from planner.standin.torch_build import TorchBuild

pytestmark = [pytest.mark.slow, pytest.mark.dry]

TESTS = Path(__file__).parents[2]
PLAIN = "not flex"
FLEX = "blocks and (flex_lists or flex_is and float16 and causal and 100-1)"
"""Every block of FlexAttention once: compiling takes up to a minute."""


@pytest.mark.parametrize("card, chosen", [("rtx4090", PLAIN), ("t4", PLAIN), ("rtx4090", FLEX)])
def test_the_calls_of_gpu_tests_run(card: str, chosen: str, dry_build: tuple[TorchBuild, str | None]):
    torch, ahead = dry_build
    variables = environment(find(card), torch=torch, ahead=ahead)
    variables["PYTHONPATH"] += f":{TESTS}:{TESTS / 'attention'}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "walked", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, str(TESTS / "attention" / "test_gpu.py")],
        cwd=TESTS.parent,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > (5 if chosen == FLEX else 700)


@pytest.fixture
def walk(dry_build: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a command of the planner on a card that is not there, in a folder of its own; its exit code."""
    monkeypatch.setenv(WALKED, "1")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent), prepend=":")
    monkeypatch.chdir(tmp_path)

    # Not a card that has FlexAttention, which takes up to a minute to compile.
    def run(*arguments: str, gpu: str = "gtx1080") -> planner.DryRun:
        return planner.dry_run([sys.executable, "-m", "planner", *arguments], gpu=gpu)

    return run


def test_measure(walk):
    sizes = ("--variant", "dense", "--seq", "4096", "--mode", "training")
    ended = walk("measure", *sizes, "--device", "cuda")
    assert ended.exit_code == 0, ended
    assert ended.used


def test_calibrate(walk, tmp_path):
    ended = walk("calibrate", "--device", "cuda", "--runs", "2", "--out", "card.json")
    assert ended.exit_code == 0, ended
    calibration = json.loads((tmp_path / "card.json").read_text())
    assert calibration["device"] == "gtx1080"
    assert calibration["speed"]["fitted"] > 0


def test_tune(walk):
    ended = walk("tune", "--vram", "2GB", "--seq", "2048", "--device", "cuda", "--trials", "2", "--runs", "1")
    assert ended.exit_code == 0, ended


def test_a_recommendation_is_verified(walk):
    ended = walk(
        "recommend", "--vram", "2GB", "--seq", "4096", "--gpu", "gtx1080", "--verify", "--trials", "0"
    )
    assert ended.exit_code == 0, ended


@pytest.mark.parametrize("name", ["config-impact", "memory-pool"])
def test_a_study(name: str, walk, tmp_path):
    ended = walk("study", name, "--quick", "--device", "cuda", "--out", "studied")
    assert ended.exit_code == 0, ended
    assert {path.suffix for path in (tmp_path / "studied").iterdir()} >= {".json", ".md", ".svg"}


GPU_DAY = """
from collections import Counter
from pathlib import Path
from studies.gpu.run import run

seen = Counter()


def first_two(step):
    seen[step.part] += 1
    return step.part != "peers" and seen[step.part] <= 2  # those compile for a minute


run("cuda", 20, Path("found"), first_two)
"""


def test_the_command_for_a_gpu(dry_build: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What it computes is nothing, for kernels do nothing; all that it asks of CUDA, drivers and processes is
    asked."""
    monkeypatch.setenv(WALKED, "1")
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent), prepend=":")
    monkeypatch.chdir(tmp_path)
    ended = planner.dry_run([sys.executable, "-c", GPU_DAY], gpu="rtx3050")
    assert ended.exit_code == 0, ended
    (path,) = (tmp_path / "found").glob("*.json")
    data = json.loads(path.read_text())
    assert data["environment"]["device"] == "NVIDIA GeForce RTX 3050"
    assert data["missing"] == []
    rows = list(data["rows"].values())
    assert len(rows) == 10
    reasons = [(row["name"], row["outcome"], row.get("message")) for row in rows]
    assert {row["outcome"] for row in rows if row["part"] != "checks"} == {"ok"}, reasons
    assert rows[0]["kernel"].startswith("flash"), reasons
    for row in rows:
        if row["part"] == "dry runs":  # of the same card, run dry once more
            assert row["measurement"]["allocated"] == row["dry"]["allocated"]
