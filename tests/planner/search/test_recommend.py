"""Recommendations: they fit, pass the gates, are the best that there is, and say why."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib.util import find_spec
from typing import get_args

import pytest
import torch

import planner
from attention.errors import ConfigError
from planner.answers.recommendation import Recommendation
from planner.quality.profiles import PRESETS
from planner.question.asked import NEEDED, Sampler
from planner.question.space import Space
from planner.search.candidates import FREE_BLOCK_SIZES, grid
from planner.search.climb import neighbours
from planner.search.evaluate import failed, point
from planner.search.recommend import answered
from planner.search.relax import NothingFitsError
from planner.search.solve import SAME

SMALL = Space(
    variants=("dense", "dilated", "block_sparse"),
    block_sizes=(64,),
    windows=(512, 2048),
    global_tokens=(64,),
    ratios=(0.05, 0.4),
    branches=(1, 2),
    segments=None,
    workspaces=(1 << 20,),
)
"""A space small enough to look at every config by itself."""
SCENARIOS = [
    {"vram": "8GB", "seq": 8192},
    {"vram": "600MB", "seq": 20_000, "gpu": "cpu", "dtype": "float32", "heads": 4, "causal": True},
    {"vram": "2GB", "seq": 16_384, "gpu": "gtx1080", "mode": "training"},
    {"vram": "8GB", "seq": 8192, "objective": "quality", "max_seconds": 0.01},
    {"vram": "40MB", "gpu": "cpu", "heads": 2, "dtype": "float32"},
    {"vram": "1GB", "gpu": "rtx4060", "kv_heads": 2, "layers": None},
    {"vram": "8GB", "seq": 8192, "min_mass": None, "layers": None},
]


FEW = Space(block_sizes=(64, 128), ratios=(0.01, 0.1), branches=(1, 2), workspaces=(1 << 20,))
"""A space that is quickly searched."""


def brute_force(scenario, space):
    """Every config of the grid by itself."""
    for columns in grid(
        space,
        scenario.workload,
        flex=scenario.flex,
        windows=scenario.windows,
        free_length=scenario.free_length,
    ):
        for at in range(len(columns)):
            yield columns.config(at, scenario.workload)


@pytest.mark.parametrize("asked", [s for s in SCENARIOS if "seq" in s])
def test_the_grid_s_answer_is_the_best_of_every_config_by_itself(asked):
    found = answered(**asked, space=SMALL, trials=0)
    scenario = found.scenario
    points = [point(scenario, config, scenario.workload.seq) for config in brute_force(scenario, SMALL)]
    good = [p for p in points if not failed(scenario, p)]
    if scenario.objective == "speed":
        assert found.answer.seconds == pytest.approx(min(p.seconds for p in good))
    else:
        assert found.answer.quality.mass == pytest.approx(max(p.mass for p in good))
    assert found.answer.search.grid == len(points)


@pytest.mark.parametrize("asked", SCENARIOS)
def test_every_pick_fits_and_passes_the_gates(asked):
    found = answered(**asked, trials=12, space=FEW)
    answer, scenario = found.answer, found.scenario
    assert answer.memory.upper <= answer.budget - answer.reserve
    assert [pick.role for pick in answer.alternatives] == ["fastest", "balanced", "widest"]
    for pick in (*answer.alternatives, *answer.pareto):
        again = point(scenario, pick.config, pick.seq)
        assert not failed(scenario, again)
        assert (again.memory.upper, again.seconds, again.mass) == (pick.upper, pick.seconds, pick.mass)
    fastest, balanced, widest = answer.alternatives
    assert fastest.seconds <= min(balanced.seconds, widest.seconds)
    assert fastest.mass <= balanced.mass <= widest.mass
    # With the length free a balanced one may be longer than the widest, and slower.
    assert balanced.seconds <= widest.seconds or scenario.free_length
    if answer.objective == "speed":
        assert fastest.config == answer.config
    assert answer.config in {pick.config for pick in answer.pareto}
    assert answer.search.grid >= answer.search.fit >= answer.search.passed


def test_the_longest_sequence_is_the_longest():
    found = answered("40MB", gpu="cpu", heads=2, dtype="float32", trials=0, space=FEW)
    answer, scenario = found.answer, found.scenario
    assert answer.objective == "seq"
    unit = answer.config.pattern.block_size if answer.config.pattern else 64
    longer = point(scenario, answer.config, answer.workload.seq + unit)
    assert "memory" in failed(scenario, longer)
    assert answer.memory.upper > 0.97 * answer.budget
    for config in list(brute_force(scenario, SMALL)):
        seq = planner.max_sequence(config, scenario.workload, "40MB", "cpu")
        if seq > answer.workload.seq * 1.002:
            assert failed(scenario, point(scenario, config, seq))


def test_what_is_reserved_is_left_over():
    free = planner.recommend("2GB", seq=32_768, trials=0)
    kept = planner.recommend("2GB", seq=32_768, reserve="500MB", trials=0)
    assert kept.memory.upper <= kept.budget - 500 * 10**6
    assert (free.budget, kept.budget, kept.reserve) == (2 * 10**9, 2 * 10**9, 500 * 10**6)
    with pytest.raises(ConfigError, match="reserve must be below"):
        planner.recommend("2GB", seq=1024, reserve="2GB")


def test_trials_never_make_it_worse():
    for objective in ("speed", "quality"):
        without = planner.recommend("8GB", 16_384, objective=objective, max_seconds=0.02, trials=0, space=FEW)
        with_trials = planner.recommend(
            "8GB", 16_384, objective=objective, max_seconds=0.02, trials=30, space=FEW
        )
        assert with_trials.search.trials == 30
        assert with_trials.search.gain >= 0
        if objective == "speed":
            assert with_trials.seconds <= without.seconds
        else:
            assert with_trials.quality.mass >= without.quality.mass


def test_the_same_question_has_the_same_answer_in_another_process():
    code = "import planner; print(planner.recommend('1GB', 16384, trials=15).to_json())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == planner.recommend("1GB", 16384, trials=15).to_json() + "\n"


def test_an_answer_survives_json_and_builds_a_module_that_runs():
    found = planner.recommend("8GB", 2048, dtype="float32", heads=2, head_dim=16, trials=5)
    again = Recommendation.from_json(found.to_json())
    assert again == found
    data = json.loads(found.to_json())
    assert data["schema_version"] == 1
    assert data["seed"] == 0
    assert set(data["versions"]) == {"attention-planner", "torch", "numpy", "optuna"}
    module = again.build()
    assert module.config == found.config
    q, k, v = torch.randn(3, 1, 2048, 2, 16).unbind()
    assert module(q, k, v).shape == q.shape


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(
            {"vram": "1.2GB", "seq": 131072, "mode": "training", "dtype": "float32"}, marks=pytest.mark.slow
        ),
        {"vram": "3GB", "reserve": "2GB", "seq": 524_288},
        {"vram": "700MB", "seq": 16_384, "gpu": "gtx1080", "batch": 4, "dtype": "float32"},
        {"vram": "8GB", "seq": 65_536, "max_seconds": 1e-5},
        {
            "vram": "8GB",
            "seq": 65_536,
            "space": Space(variants=("block_sparse",), windows=(128,), patterns=("local_window",)),
        },
    ],
)
def test_when_nothing_fits_each_relaxation_named_does_help(asked):
    with pytest.raises(NothingFitsError) as error:
        planner.recommend(**{"space": FEW, **asked}, trials=0)
    assert error.value.relaxations
    assert str(error.value.relaxations[0]) in str(error.value)
    for said in error.value.relaxations:
        option, value, *_ = shlex.split(said)
        name = option.removeprefix("--").replace("-", "_")
        kinds = {
            "vram": str,
            "seq": int,
            "min_mass": float,
            "layers": int,
            "max_seconds": float,
            "batch": int,
        }
        changed = kinds.get(name, str)(value)
        assert planner.recommend(**{"space": FEW, **asked, name: changed or None}, trials=0)


@pytest.mark.parametrize("asked", [{"seq": 4096}, {}, {"objective": "quality", "seq": 4096}])
def test_a_budget_below_the_context_alone(asked):
    with pytest.raises(NothingFitsError, match="what would: --vram"):
        planner.recommend("300MB", **asked, space=FEW)


def test_reasons():
    found = answered("8GB", 65_536, trials=10)
    why = found.answer.why
    assert why.runner_up is not None
    assert why.runner_up.config != found.answer.config
    assert why.binding in (None, *(one.constraint for one in why.without))
    for one in why.without:
        assert one.gain > 0
        assert one.pick.seconds < found.answer.seconds
        again = point(found.scenario, one.pick.config, one.pick.seq)
        assert one.constraint in failed(found.scenario, again)
    configs = {config for *_, config in neighbours(found.answer.config, found.answer.workload)}
    assert len(why.steps) <= len(configs)
    assert all(step.before != step.after for step in why.steps)
    pattern = found.answer.config.pattern
    assert pattern is None or "block_size" in {step.dimension for step in why.steps}


def test_no_single_step_within_the_space_would_be_better():
    answer = planner.recommend("8GB", 65_536)
    for step in answer.why.steps:
        beyond = step.dimension == "block_size" and int(step.after) < min(FREE_BLOCK_SIZES)
        if not step.failed and not beyond and step.dimension != "segment_lengths":
            assert step.seconds >= answer.seconds * (1 - 1e-9), step


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param({"vram": "8GB", "causal": True}, marks=pytest.mark.slow),
        {"vram": "1GB", "gpu": "cpu", "threads": 2},
        pytest.param(
            {"vram": "24GB", "gpu": "rtx4090", "mode": "training", "causal": True}, marks=pytest.mark.slow
        ),
        pytest.param({"vram": "8GB"}, marks=pytest.mark.slow),
    ],
)
def test_nothing_beside_the_longest_is_as_long_and_faster(asked):
    answer = planner.recommend(**asked)
    for pick in answer.alternatives:
        assert pick.seq <= answer.workload.seq * (1 + SAME)
        assert pick.seq < answer.workload.seq or pick.seconds >= answer.seconds


@pytest.mark.parametrize("limit", [pytest.param(0.5, marks=pytest.mark.slow), 5.0])
def test_the_longest_within_a_time_and_a_reach_is_found_where_memory_is_not_what_binds(limit):
    # At the longest that fits, windows that are fast enough do not reach far enough.
    asked = {
        "vram": "700MB",
        "gpu": "cpu",
        "threads": 2,
        "dtype": "float32",
        "causal": True,
        "max_seconds": limit,
    }
    answer = planner.recommend(**asked)
    assert answer.seconds <= limit
    assert answer.quality.layers <= 12
    assert answer.memory.upper < 0.9 * 700e6
    # There is nothing that is much longer: neither of the grid nor around it.
    longer = int(answer.workload.seq * 1.02)
    with pytest.raises(NothingFitsError):
        planner.recommend(**asked, seq=longer, trials=0)


def test_a_profile_changes_what_is_recommended():
    picks = {name: planner.recommend("8GB", 131072, profile=name, trials=0, space=FEW) for name in PRESETS}
    assert len({pick.config for pick in picks.values()}) > 1
    assert {pick.quality.profile for pick in picks.values()} == set(PRESETS)


def test_trials_are_kept_and_gone_on_with(tmp_path):
    asked = {"vram": "8GB", "seq": 16_384, "space": FEW}
    mine = {"storage": str(tmp_path / "studies.journal"), "study": "mine"}
    first = planner.recommend(**asked, trials=8, **mine)
    again = planner.recommend(**asked, trials=12, **mine)
    assert (first.search.trials, again.search.trials) == (8, 12)
    same = planner.recommend(**asked, trials=12, **mine)
    assert same.model_copy(update={"why": again.why}) == again
    with pytest.raises(ConfigError, match="another question"):
        planner.recommend(**asked | {"seq": 8192}, trials=12, **mine)
    sqlite = f"sqlite:///{tmp_path / 'studies.db'}"
    assert planner.recommend(**asked, trials=3, storage=sqlite).search.trials == 3


def test_what_an_earlier_run_found_is_not_lost(tmp_path, monkeypatch):
    # Without the last steps the answer is what trials found.
    monkeypatch.setattr("planner.search.recommend.climbed", lambda scenario, space, best: best)
    asked = {"vram": "8GB", "seq": 131_072, "space": FEW, "trials": 20}
    asked |= {"storage": str(tmp_path / "a.journal")}
    first = planner.recommend(**asked)
    assert first.search.gain > 0, "the case must be one in which trials beat the grid"
    assert planner.recommend(**asked).config == first.config


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_samplers_are_to_be_chosen_or_say_what_they_need(sampler):
    missing = [package for package in NEEDED.get(sampler, ()) if find_spec(package) is None]
    if missing:
        with pytest.raises(ConfigError, match=f"needs {missing[0]}.*pip install"):
            planner.recommend("8GB", 8192, trials=6, sampler=sampler, space=FEW)
        return
    assert planner.recommend("8GB", 8192, trials=6, sampler=sampler, space=FEW).search.trials == 6


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"seq": 1024}, "vram must be given"),
        ({"vram": "8GB", "seq": 1024, "objective": "seq"}, "finds the length"),
        ({"vram": "8GB", "objective": "speed"}, "needs seq"),
        ({"vram": "8GB", "seq": 1024, "objective": "fast"}, "objective must be one of"),
        ({"vram": "8GB", "seq": 1024, "profile": "none"}, "profile"),
        ({"vram": "8GB", "seq": 1024, "gpu": "gtx9999"}, "gtx9999"),
        ({"vram": "8GB", "seq": 1024, "min_mass": 1.5}, "min_mass"),
        ({"vram": "8GB", "seq": 1024, "layers": 0}, "layers"),
        ({"vram": "8GB", "seq": 1024, "max_seconds": 0.0}, "max_seconds"),
        ({"vram": "8GB", "seq": 1024, "heads": 8, "kv_heads": 3}, "kv_heads"),
        ({"vram": "8GB", "seq": 1024, "sampler": "magic"}, "sampler must be one of"),
        ({"vram": "8GB", "seq": 1024, "trials": -1}, "trials must be a whole number from 0 on, got -1"),
        ({"vram": "8GB", "seq": 1024, "gpu": "gtx1080", "dtype": "bfloat16"}, "bfloat16"),
        ({"vram": "8GB", "seq": 1024, "threads": 2}, "threads"),
        ({"vram": "8GB", "seq": 1024, "storage": "mysql://nowhere/x"}, "cannot be used"),
        ({"vram": "8GB", "seq": 1024, "storage": "/nowhere/at/all.journal"}, "cannot be used"),
    ],
)
def test_what_cannot_be_asked(asked, said):
    with pytest.raises(ConfigError, match=said):
        planner.recommend(**asked)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="sequence"):
        planner.recommend("8GB", sequence=1024)


WINDOWS = Space(variants=("block_sparse",), patterns=("local_window",), block_sizes=(64,))
CUT = {"gpu": "cpu", "dtype": "float32", "heads": 2, "layers": None, "min_mass": 0.5, "trials": 0}


def test_documents_fix_the_length():
    answer = planner.recommend(
        "1GB", documents=(512, 1024, 512), causal=True, sinks=True, space=WINDOWS, **CUT
    )
    assert answer.workload.seq == 2048
    assert answer.workload.documents == (512, 1024, 512)
    assert answer.memory.upper <= answer.budget
    assert "--documents 512,1024,512 --sinks" in answer.command
    assert answer.quality.mass >= 0.5


def test_the_longest_cache_has_all_tokens_that_ask():
    answer = planner.recommend("16MB", queries=1000, causal=True, space=WINDOWS, **CUT)
    assert answer.workload.seq > 1000
    assert answer.memory.upper <= answer.budget
    longer = answer.workload.model_copy(update={"seq": answer.workload.seq + 128})
    assert planner.estimate(answer.config, longer, "cpu").upper > answer.budget * 0.99


def test_what_does_not_take_fewer_queries_is_refused():
    with pytest.raises(ConfigError, match="fewer queries than keys: not taken"):
        planner.recommend("1GB", 2048, queries=1, space=Space(variants=("dense", "adaptive")), **CUT)
    with pytest.raises(ConfigError, match="which the documents fix"):
        planner.recommend("1GB", documents=(64, 64), objective="seq", **CUT)
