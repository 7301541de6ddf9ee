"""Studies of the memory model: they print what they say, and the docs show it."""

import json
from pathlib import Path

import pytest
import torch

from attention.config import AttentionConfig
from planner.memory.kernels import Cuda
from planner.memory.many import peaks
from planner.workload import Workload
from studies import model_speed, seeds_configurations
from studies.study import Scope

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_docs_show_what_the_study_of_settings_prints(capsys):
    assert seeds_configurations.main([]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed in (DOCS / "memory.md").read_text()


def test_the_settings_are_those_of_the_seeds():
    small, large = (
        AttentionConfig.from_json((DOCS / "examples" / f"{name}.json").read_bytes())
        for name in ("small", "large")
    )
    assert small.branches == ((2048, 1),)
    assert large.branches == ((65536, 1), (131072, 2))
    assert (small.pattern.block_size, small.pattern.sparsity_ratio) == (64, 0.01)
    assert (large.pattern.block_size, large.pattern.sparsity_ratio) == (256, 0.02)


def test_both_settings_stay_near_the_floor():
    found = seeds_configurations.comparison()
    floor = found.a.estimate.workload.floor
    assert floor == 4 * 131_072 * 8 * 64 * 2
    assert all(floor < side.estimate.allocated < 1.03 * floor for side in (found.a, found.b))


def test_the_candidates_that_are_timed_are_all_there():
    groups = model_speed.candidates(1000)
    assert sum(map(len, groups)) == 1000
    assert all(peaks(group, Workload(seq=1), Cuda((8, 0))).min() > 0 for group in groups)


def test_a_quick_run_times_arrays_and_estimates():
    labels = [label for label, _ in model_speed.steps(Scope(torch.device("cpu"), quick=True))]
    assert sum("1,000 candidates" in label for label in labels) == 4
    assert sum("one estimate" in label for label in labels) == 2


def test_what_is_over_its_bar_is_said():
    row = {"what": "1,000 candidates", "seconds": 0.3, "processor_seconds": 0.3, "at_most": 0.25}
    assert "over their bar: 1,000 candidates" in model_speed.said([row]).found
    assert "all 1 bars are kept" in model_speed.said([{**row, "seconds": 0.1}]).found


@pytest.mark.parametrize("path", sorted((DOCS / "examples").glob("*.json")), ids=lambda path: path.name)
def test_examples_are_configs_as_they_stand(path):
    assert AttentionConfig.model_validate(json.loads(path.read_text()))
