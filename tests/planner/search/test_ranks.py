"""Recommendations for calls that GPUs share."""

from __future__ import annotations

import shlex

import pytest

import planner
from attention.errors import ConfigError
from planner.answers.recommendation import Recommendation
from planner.answers.shared import SharedEstimate
from planner.question.space import Space
from planner.report.page.recommend import recommend_page
from planner.report.text.recommend import recommend_text
from planner.search.candidates import grid
from planner.search.evaluate import failed, point
from planner.search.recommend import answered
from planner.search.relax import NothingFitsError

SMALL = Space(
    variants=("dense", "dilated", "block_sparse"),
    patterns=("local_window", "global_local"),
    block_sizes=(128,),
    windows=(4096, 16_384),
    global_tokens=(64,),
    branches=(2,),
    segments=(4096, 65_536),
    workspaces=(1 << 20,),
)
SIZES = {"heads": 16, "kv_heads": 8, "head_dim": 64, "dtype": "bfloat16", "causal": True, "mode": "training"}


def test_the_answer_is_what_an_estimate_says_of_it():
    answer = planner.recommend(gpu="h100-sxm", seq="1M", gpus=8, space=SMALL, trials=4, **SIZES)
    assert isinstance(answer.memory, SharedEstimate)
    again = planner.estimate(answer.config, answer.workload, "h100-sxm")
    assert answer.memory == again
    assert answer.seconds == pytest.approx(again.sharing.seconds)
    assert answer.memory.upper <= answer.budget
    assert answer.config.sharding is not None
    assert answer.memory.sharing.exchange in ("keys", "heads")
    assert answer.alternatives[0].seconds == min(one.seconds for one in answer.pareto)
    assert Recommendation.from_json(answer.to_json()) == answer
    text = recommend_text(answer)
    head, _, _ = text.partition("as a program")
    assert max(map(len, head.splitlines()[2:])) <= 80
    for said in ("8 GPUs", "hidden", "; exchange "):
        assert said in head
    assert "How 8 GPUs share it" in recommend_page(answer, ())


@pytest.mark.parametrize(
    "task",
    [
        {"seq": 1 << 20, "mode": "inference"},
        pytest.param({"seq": 1 << 18}, marks=pytest.mark.slow),
        pytest.param({"seq": 1 << 17, "batch": 2}, marks=pytest.mark.slow),
    ],
)
def test_no_candidate_that_passes_is_much_faster(task):
    found = answered("24GB", gpu="h100-sxm", gpus=4, space=SMALL, trials=0, **{**SIZES, **task})
    scenario = found.scenario
    parts = grid(found.space, scenario.workload, windows=scenario.windows)
    configs = [part.config(at, scenario.workload) for part in parts for at in range(len(part))]
    every = [point(scenario, config, scenario.workload.seq) for config in configs]
    fastest = min(one.seconds for one in every if not failed(scenario, one))
    assert found.grid is not None
    assert found.grid.seconds <= 1.05 * fastest


def test_nothing_fits_says_how_many_gpus_would():
    asked = {"gpu": "h100-sxm", "seq": "12M", "space": SMALL, "layers": None, "min_mass": None, "trials": 0}
    with pytest.raises(NothingFitsError) as raised:
        planner.recommend(**asked, **SIZES)
    gpus = next(change.value for change in raised.value.changes if change.what == "gpus")
    assert f"--gpus {gpus}" in str(raised.value)
    assert planner.recommend(**asked, **SIZES, gpus=gpus).memory.sharing.ring == gpus


def test_the_longest_sequence_of_several_gpus_is_longer():
    asked = {"gpu": "h100-sxm", "space": Space(variants=("dense",), workspaces=(1 << 20,)), "trials": 0}
    one, four = (planner.recommend("24GB", gpus=gpus, **asked, **SIZES) for gpus in (1, 4))
    assert four.memory.upper <= four.budget
    assert 1.5 * one.workload.seq < four.workload.seq <= 4 * one.workload.seq


def test_adaptive_attention_is_shared_by_as_many_as_its_heads_allow():
    space = Space(variants=("adaptive",), block_sizes=(128,), ratios=(0.05,), workspaces=(1 << 20,))
    asked = {**SIZES, "heads": 4, "kv_heads": 2}
    answer = planner.recommend("24GB", "64K", gpu="h100-sxm", gpus=8, space=space, trials=0, **asked)
    assert answer.config.sharding is not None
    assert (answer.config.sharding.ring_size, answer.config.sharding.exchange) == (2, "heads")


def test_the_command_repeats_it():
    links = {"gpus": 16, "link": "nvlink4,ndr", "node": 8}
    answer = planner.recommend(gpu="h100-sxm", seq="1M", space=SMALL, trials=0, **links, **SIZES)
    words = shlex.split(answer.command)
    for name, value in links.items():
        assert words[words.index(f"--{name}") + 1] == str(value)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"link": "nvlink4"}, "is for several GPUs"),
        ({"gpus": 4, "queries": 1}, "fewer queries"),
        ({"gpus": 4, "link": "nvlink9"}, "is not known"),
    ],
)
def test_what_cannot_be_is_refused(options, why):
    with pytest.raises(ConfigError, match=why):
        planner.recommend(gpu="h100-sxm", seq="64K", **options)


def test_tuning_runs_on_one_device():
    with pytest.raises(ConfigError, match="gpus=8; leave gpus out, or choose for several"):
        planner.tune("1GB", "4K", gpus=8)
