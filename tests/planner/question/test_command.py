"""The command that an answer says repeats it does."""

from __future__ import annotations

import json
import shlex

import pytest
from typer.testing import CliRunner

from planner import gpus
from planner.cli.main import app
from planner.quality.profiles import PRESETS
from planner.question.command import recommend_command, tune_command
from planner.question.space import Space

FEW = "--variant block_sparse --pattern local_window,global_local --block-size 64 --layers 0"


def answer(line):
    found = CliRunner().invoke(app, [*shlex.split(line)[1:], "--format", "json"])
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)


@pytest.mark.parametrize(
    "line",
    [
        f"planner recommend --vram 8GB --seq 16K --trials 1 {FEW}",
        pytest.param(
            f"planner recommend --gpu gtx1080 --causal --reserve 1.5GB {FEW} --trials 0 --heads 2 "
            "--kv-heads 1",
            marks=pytest.mark.slow,
        ),
        f"planner recommend --vram 1GB --gpu cpu --seq 4000 --max-seconds 0.5 {FEW} --trials 0 "
        "--objective quality",
        "planner recommend --vram 7.75GiB --seq 8K --layers 0 --min-mass 0.5 --profile local --seed 3 "
        "--mode training --dtype float32 --variant dilated --segments 1K,8K --rates 1,2 --trials 1",
        f"planner recommend --gpu h100 --seq 8K --display desktop --others 1GB --context 300MB {FEW} "
        "--trials 2 --allocator expandable_segments:True --workspace 1MiB,4MiB --sampler random",
        f"planner recommend --vram 2GB --gpu cpu --documents 1Kx3,100 --queries 8 --sinks {FEW} --trials 0",
    ],
)
def test_what_it_says_gives_the_same_answer(line):
    first = answer(line)
    assert answer(first["command"]) == first


def test_what_has_no_text_is_a_file_and_a_storage_is_left_out():
    own = PRESETS["local"].model_copy(update={"name": "mine"})
    asked = {"profile": own, "calibration": object(), "storage": "postgresql://me:secret@there/x"}
    said = recommend_command("8GB", "1M", asked)
    assert said == "planner recommend --vram 8GB --seq 1M --calibration FILE --profile-from FILE"
    assert "--profile local" in recommend_command(1 << 33, 5, {"profile": PRESETS["local"]})
    assert tune_command("8GB", "1M", "cpu", {}, {"profile": own, "max_seconds": 0.5}) == (
        "planner tune --vram 8GB --seq 1M --max-seconds 0.5 --profile-from FILE"
    )


def test_usual_values_are_not_said():
    asked = {
        "gpu": gpus.generic(8 * 10**9),
        "objective": "speed",
        "batch": 1,
        "kv_heads": None,
        "layers": 12,
        "min_mass": 0.8,
        "reserve": 0,
        "space": Space(),
        "trials": 24,
    }
    assert recommend_command(8 * 10**9, 131072, asked) == "planner recommend --vram 8GB --seq 128K"
    assert tune_command("1GB", 4096, "cuda", {"--trials": (5, 30), "--timeout": (120.0, 120.0)}, {}) == (
        "planner tune --vram 1GB --seq 4K --device cuda --trials 5"
    )
