"""The study of the models' speed, and the docs' examples."""

import json
from pathlib import Path

import pytest
import torch

from attention.config import AttentionConfig
from planner.memory.machines import Cuda
from planner.memory.peaks import peaks
from planner.workload import Workload
from studies import model_speed
from studies.bench.study import Scope

DOCS = Path(__file__).resolve().parents[2] / "docs"


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
    assert "over their bar: 1,000 candidates" in model_speed.findings([row]).answer
    assert "all 1 bars are kept" in model_speed.findings([{**row, "seconds": 0.1}]).answer


@pytest.mark.parametrize("path", sorted((DOCS / "examples").glob("*.json")), ids=lambda path: path.name)
def test_examples_are_configs_as_they_stand(path):
    assert AttentionConfig.model_validate(json.loads(path.read_text()))
