"""`planner recommend` and `planner tune` as commands: what is printed, exit codes, wrong requests."""

from __future__ import annotations

import contextlib
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import planner
from attention.errors import AttentionPlannerError
from planner.answers.recommendation import Recommendation
from planner.cli.main import app
from planner.cli.options_choose import build_space
from planner.measuring.measure import Environment, Measurement
from planner.question.space import Space
from planner.units import parse_bytes, parse_count

ROOT = Path(__file__).resolve().parents[3]
FEW = ["--block-size", "64,128", "--branches", "2", "--trials", "4"]
HERE = Environment(python="3.11", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")


def run(*arguments, **env):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", **env}, prog_name="planner")


def recommend(*arguments):
    return run("recommend", *arguments)


def test_the_answer_is_that_of_the_library_in_80_columns():
    result = recommend("--vram", "8GB", "--seq", "16K", *FEW)
    assert (result.exit_code, result.stderr) == (0, "")
    assert all(len(line) <= 80 for line in result.stdout.splitlines()), result.stdout
    found = planner.recommend("8GB", "16K", trials=4, space=Space(block_sizes=(64, 128), branches=(2,)))
    assert f"{found.quality.mass:.1%} of dense attention's mass" in result.stdout
    for word in ("fastest", "balanced", "widest", "the budget", "why", "runner-up", "one step", "searched"):
        assert word in result.stdout


def test_json_is_accepted_back(one_server, tmp_path):
    result = recommend("--vram", "1GB", "--seq", "4K", "--heads", "4", "--causal", "--format", "json", *FEW)
    found = Recommendation.from_json(result.stdout)
    assert (
        result.stdout
        == recommend(
            "--vram", "1GB", "--seq", "4K", "--heads", "4", "--causal", "--format", "json", *FEW
        ).stdout
    )
    kept = tmp_path / "answer.json"
    kept.write_text(result.stdout)
    estimated = run("estimate", "--config", str(kept), "--vram", "1GB", "--format", "json")
    data = json.loads(estimated.stdout)
    assert data["workload"] == found.workload.model_dump(mode="json")
    assert data["upper"] == found.memory.upper
    longer = run("estimate", "--config", str(kept), "--vram", "1GB", "--seq", "8K", "--format", "json")
    assert json.loads(longer.stdout)["workload"]["seq"] == 8192
    assert run("max-seq", "--config", str(kept), "--vram", "1GB").exit_code == 0
    assert run("compare", str(kept), str(kept)).exit_code == 0
    measured = run("measure", "--config", str(kept), "--runs", "1", "--format", "json")
    assert json.loads(measured.stdout)["config"] == found.config.model_dump(mode="json")


def test_other_formats():
    asked = ("--vram", "1GB", "--seq", "2K", "--dtype", "float32", "--heads", "2", "--head-dim", "16", *FEW)
    program = recommend(*asked, "--format", "py").stdout
    names: dict[str, object] = {}
    exec(program, names)
    assert names["out"].shape == (1, 2048, 2, 16)
    assert recommend(*asked, "--format", "yaml").stdout.startswith("schema_version: 1\n")


def test_where_nothing_fits_the_exit_code_is_3():
    result = recommend("--vram", "700MB", "--seq", "128K", *FEW)
    assert (result.exit_code, result.stdout) == (3, "")
    (line,) = result.stderr.splitlines()
    suggested = line.partition("what would: ")[2].split()[:2]
    assert suggested[0] == "--vram"
    assert recommend("--seq", "128K", *FEW, *suggested).exit_code == 0


def test_the_pareto_set_can_be_drawn(tmp_path):
    for name in ("a.png", "b.svg"):
        path = tmp_path / name
        result = recommend("--vram", "8GB", "--seq", "16K", *FEW, "--plot", str(path))
        assert result.exit_code == 0
        assert path.stat().st_size > 5000
    text = (tmp_path / "b.svg").read_text()
    assert "time of a call, predicted" in text.replace("<!-- ", "").replace(" -->", "")


def test_picks_can_be_verified(one_server):
    result = recommend(
        "--vram", "200MB", "--seq", "1K", "--gpu", "cpu", "--dtype", "float32", *FEW, "--verify",
        "--format", "json",
    )  # a command line  # fmt: skip
    assert result.exit_code == 0
    checked = json.loads(result.stdout)["verified"]
    assert checked
    assert all(one["kind"] == "ok" and one["allocated"] <= one["upper"] for one in checked)


def saved(path, seed=0):
    """A file of q and k."""
    random = np.random.default_rng(seed)
    np.savez(path, q=random.normal(size=(256, 2, 16)), k=random.normal(size=(256, 2, 16)))
    return path


def test_a_profile_of_the_users_own(tmp_path):
    path = saved(tmp_path / "mine.npz")
    result = recommend("--vram", "8GB", "--seq", "4K", *FEW, "--profile-from", str(path), "--format", "json")
    assert json.loads(result.stdout)["quality"]["profile"] not in ("balanced", "")


def test_it_imports_neither_torch_nor_rich():
    code = (
        "import sys\nfrom planner.cli.main import app\n"
        "try: app(['recommend', '--vram', '8GB', '--seq', '4K', '--trials', '2'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'rich', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# ---- wrong requests


WRONG = [
    ("recommend", "vram is missing|memory is missing"),
    ("recommend --seq 1K", "memory is missing"),
    ("recommend --gpu cpu --seq 1K", "memory is missing"),
    ("recommend --vram 8XB --seq 1K", "8XB"),
    ("recommend --vram -8GB --seq 1K", "-8GB"),
    ("recommend --vram 0 --seq 1K", "above 0"),
    ("recommend --vram GB --seq 1K", "GB"),
    ("recommend --vram 1e9 --seq 1K", "1e9"),
    ("recommend --vram nan --seq 1K", "nan"),
    ("recommend --vram 8GB --seq 0", "above 0"),
    ("recommend --vram 8GB --seq -5", "-5"),
    ("recommend --vram 8GB --seq 1Q", "1Q"),
    ("recommend --vram 8GB --seq 1.5.2K", "1.5.2K"),
    ("recommend --vram 8GB --seq 99999999999999999999999", "2\\^60"),
    ("recommend --vram 8GB --objective speed", "needs seq"),
    ("recommend --vram 8GB --seq 1K --objective seq", "finds the length"),
    ("recommend --vram 8GB --seq 1K --objective fast", "objective"),
    ("recommend --vram 8GB --seq 1K --gpu gtx9999", "gtx9999"),
    ("recommend --vram 8GB --seq 1K --gpu rtx", "rtx"),
    ("recommend --vram 8GB --seq 1K --heads 0", "heads"),
    ("recommend --vram 8GB --seq 1K --heads -1", "heads"),
    ("recommend --vram 8GB --seq 1K --heads eight", "heads"),
    ("recommend --vram 8GB --seq 1K --kv-heads 3", "kv_heads"),
    ("recommend --vram 8GB --seq 1K --head-dim 0", "head_dim"),
    ("recommend --vram 8GB --seq 1K --batch 0", "batch"),
    ("recommend --vram 8GB --seq 1K --dtype float8", "dtype"),
    ("recommend --vram 8GB --seq 1K --mode both", "mode"),
    ("recommend --vram 8GB --seq 1K --gpu gtx1080 --dtype bfloat16", "bfloat16"),
    ("recommend --vram 8GB --seq 1K --layers -1", "layers"),
    ("recommend --vram 8GB --seq 1K --min-mass 2", "min-mass"),
    ("recommend --vram 8GB --seq 1K --min-mass nan", "min_mass|min-mass"),
    ("recommend --vram 8GB --seq 1K --max-seconds 0", "max_seconds"),
    ("recommend --vram 8GB --seq 1K --max-seconds -1", "max_seconds"),
    ("recommend --vram 8GB --seq 1K --max-seconds nan", "max_seconds"),
    ("recommend --vram 8GB --seq 1K --profile none", "none"),
    ("recommend --vram 8GB --seq 1K --profile local --profile-from x.npz", "twice"),
    ("recommend --vram 8GB --seq 1K --profile-from missing.npz", "missing.npz"),
    ("recommend --vram 8GB --seq 1K --profile-from README.md", "README.md"),
    ("recommend --vram 8GB --seq 1K --profile-from tests", "tests"),
    ("recommend --vram 8GB --seq 1K --reserve 9GB", "reserve must be below"),
    ("recommend --vram 8GB --seq 1K --reserve lots", "lots"),
    ("recommend --vram 8GB --seq 1K --reserve -1GB", "-1GB"),
    ("recommend --vram 8GB --seq 1K --variant sparse", "variants"),
    ("recommend --vram 8GB --seq 1K --variant ,", "variants"),
    ("recommend --vram 8GB --seq 1K --pattern diagonal", "patterns"),
    ("recommend --vram 8GB --seq 1K --block-size 0", "block-size"),
    ("recommend --vram 8GB --seq 1K --block-size 64,,128", "block-size"),
    ("recommend --vram 8GB --seq 1K --block-size big", "big"),
    ("recommend --vram 8GB --seq 1K --window 0", "window"),
    ("recommend --vram 8GB --seq 1K --global-tokens x", "global-tokens"),
    ("recommend --vram 8GB --seq 1K --sparsity 2", "ratios"),
    ("recommend --vram 8GB --seq 1K --sparsity 0", "ratios"),
    ("recommend --vram 8GB --seq 1K --sparsity nan", "ratios"),
    ("recommend --vram 8GB --seq 1K --sparsity half", "half"),
    ("recommend --vram 8GB --seq 1K --branches 5", "at most 4"),
    ("recommend --vram 8GB --seq 1K --branches 0", "branches"),
    ("recommend --vram 8GB --seq 1K --segments 1K,2K --rates 1", "pair up"),
    ("recommend --vram 8GB --seq 1K --segments 2K,1K", "must not fall"),
    ("recommend --vram 8GB --seq 1K --rates 4,1", "must not fall"),
    ("recommend --vram 8GB --seq 1K --branches 2 --segments 1K", "contradict"),
    ("recommend --vram 8GB --seq 1K --variant dilated --rates 2,4", "first must be 1"),
    (
        "recommend --vram 8GB --seq 1K --variant block_sparse --pattern dilated_sparse --segments 100",
        "leave no candidate",
    ),
    ("recommend --vram 8GB --seq 1K --workspace 1", "workspace"),
    ("recommend --vram 8GB --seq 1K --workspace huge", "huge"),
    ("recommend --vram 8GB --seq 1K --backend cuda", "backend"),
    ("recommend --vram 8GB --seq 1K --gpu gtx1080 --backend flex", "flex|leave no candidate"),
    ("recommend --vram 8GB --seq 1K --gpu cpu --backend flex", "flex|leave no candidate"),
    ("recommend --vram 8GB --seq 1K --pool maybe", "pool"),
    ("recommend --vram 8GB --seq 1K --trials -1", "trials"),
    ("recommend --vram 8GB --seq 1K --trials many", "trials"),
    ("recommend --vram 8GB --seq 1K --sampler magic", "sampler"),
    ("recommend --vram 8GB --seq 1K --seed -1", "seed"),
    ("recommend --vram 8GB --seq 1K --trials 1 --storage postgresql://nowhere/db", "cannot be used"),
    ("recommend --vram 8GB --seq 1K --trials 1 --storage /nowhere/x.journal", "cannot be used"),
    ("recommend --vram 8GB --seq 1K --trials 1 --storage nonsense://x", "cannot be used"),
    ("recommend --vram 8GB --seq 1K --threads 2", "threads"),
    ("recommend --vram 8GB --seq 1K --gpu cpu --display desktop", "display"),
    ("recommend --vram 8GB --seq 1K --allocator nonsense:1", "nonsense"),
    ("recommend --vram 8GB --seq 1K --calibration missing.json", "missing.json"),
    ("recommend --vram 8GB --seq 1K --calibration README.md", "README.md"),
    ("recommend --vram 8GB --seq 1K --plot picture.gif", "picture.gif"),
    ("recommend --vram 8GB --seq 1K --plot /nowhere/x.png", "/nowhere/x.png"),
    ("recommend --vram 8GB --seq 1K --format xml", "format"),
    ("recommend --vram 8GB --seq 1K --nonsense", "nonsense"),
    ("recommend --vram 8GB --seq 1K extra", "extra"),
    ("tune --vram 8GB", "seq"),
    ("tune --seq 1K", "vram"),
    ("tune --vram 8GB --seq 1K --device tpu", "device"),
    ("tune --vram 8GB --seq 1K --device cuda", "CUDA|cuda"),
    ("tune --vram 8GB --seq 1K --trials 0", "trials"),
    ("tune --vram 8GB --seq 1K --timeout 0", "timeout"),
    ("tune --vram 8GB --seq 1K --timeout nan", "timeout"),
    ("tune --vram 8GB --seq 1K --runs 0", "runs"),
    ("tune --vram 8GB --seq 1K --layers -1", "layers"),
    ("tune --vram 8GB --seq 1K --max-seconds 0", "max_seconds"),
    ("tune --vram 8GB --seq 1K --profile none", "none"),
    ("tune --vram 8GB --seq 1K --profile local --profile-from x.npz", "twice"),
    ("tune --vram 8GB --seq 1K --profile-from missing.npz", "missing.npz"),
    ("tune --vram 8GB --seq 1K --storage /nowhere/x.journal", "cannot be used"),
    ("estimate --variant dense --vram 8GB", "length is missing"),
    ("estimate --config README.md --seq 1K", "README.md"),
]


@pytest.mark.parametrize("line, said", WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_request_gets_exit_code_2_and_one_message(line, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = run(*line.split())
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert "Traceback" not in result.stderr
    message = result.stderr.strip().splitlines()
    if message[0].startswith("planner: "):
        assert len(message) == 1
    assert re.search(said, " ".join(message)), message


def test_there_are_enough_wrong_requests():
    assert len(WRONG) >= 60


TEXT = st.text(max_size=30) | st.from_regex(r"[0-9.,eE+-]{0,12}[KMGTiB]{0,4}", fullmatch=True)


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_sizes_and_counts_are_numbers_or_refused(text):
    for parse in (parse_bytes, parse_count):
        with contextlib.suppress(AttentionPlannerError):
            assert 0 < parse(text) <= 2**60


OPTIONS = ("variant", "pattern", "block_size", "window", "global_tokens", "sparsity", "branches", "segments",
           "rates", "workspace")  # list of words  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(OPTIONS), TEXT, max_size=3))
def test_restrictions_are_a_space_or_refused(options):
    with contextlib.suppress(AttentionPlannerError):
        assert isinstance(build_space(**options), Space)


# ---- tune


@pytest.fixture
def tune(tmp_path, monkeypatch, asked_once):
    """Tunes three trials of half a second each, and keeps them in one place."""

    def measure(self, config, workload):
        return Measurement(
            config=config,
            workload=workload,
            device="cpu",
            kind="ok",
            runs=1,
            environment=HERE,
            seconds=0.5,
            allocated=1 << 20,
        )

    def tuned(*more):
        asked = ("--vram", "1GB", "--seq", "4K", "--trials", "3", "--block-size", "64", "--branches", "2")
        return run("tune", *asked, "--storage", str(tmp_path / "t.journal"), *more)

    monkeypatch.setattr("planner.measuring.server.Batch.measure", measure)
    return tuned


def test_tuning_prints_each_trial_and_the_result(tune):
    result = tune()
    assert result.exit_code == 0
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["planner"] * 3
    assert "3 of 3: 500 ms" in result.stderr
    assert all(len(line) <= 80 for line in result.stdout.splitlines()), result.stdout
    assert "3 measured" in result.stdout
    again = json.loads(tune("--format", "json").stdout)
    assert again["kept"] == 3
    assert "build(config, device)" in tune("--format", "py").stdout


def test_a_measured_profile_has_a_study_of_its_own_that_goes_on(tune, tmp_path):
    def found(*more):
        result = tune("--format", "json", *more)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    path, other = saved(tmp_path / "balanced.npz"), tmp_path / "other"
    other.mkdir()
    preset, mine = found(), found("--profile-from", str(path))
    assert (mine["kept"], mine["quality"]["profile"]) == (0, "balanced.npz")
    assert " --profile-from FILE " in mine["command"]
    repeated = shlex.split(mine["command"].replace("FILE", str(path)))[2:]
    assert found(*repeated)["study"] == mine["study"] != preset["study"]
    moved = shutil.copy(path, other)
    assert found("--profile-from", moved)["kept"] == 3
    saved(path, seed=1)
    assert found("--profile-from", str(path))["study"] not in (mine["study"], preset["study"])
    refused = tune("--study", mine["study"], "--profile-from", str(path))
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "answers another question" in refused.stderr
    page = tmp_path / "page.html"
    kept = ("--storage", mine["storage"], "--study", mine["study"], "--out", str(page))
    assert run("report", *kept).exit_code == 0
    text = html.unescape(page.read_text())
    assert mine["command"] in text
    assert "profile 'balanced.npz'" in text


def test_tuning_within_a_limit_of_time(tune):
    result = tune("--max-seconds", "0.4")
    assert result.exit_code == 0
    *_, note = result.stderr.splitlines()
    assert note == "planner: note: the fastest takes 0.5 s, more than the 0.4 s of --max-seconds"
    assert "note" not in tune("--max-seconds", "0.6").stderr
    nothing = tune("--max-seconds", "1e-9")
    assert (nothing.exit_code, nothing.stdout) == (3, "")
    option, value = re.search(r"(--max-seconds) ([^,\s]+)", nothing.stderr).groups()
    assert tune(option, value).exit_code == 0
