"""What compiled FlexAttention allocates is what its plan says: calls recorded in dry runs (torch 2.13)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attention import AttentionConfig
from planner.memory.allocator import replay
from planner.memory.allocator_settings import AllocatorSettings
from planner.memory.dispatch import plan_of
from planner.memory.machines import Cuda
from planner.workload import Workload

RECORDED = json.loads(Path(__file__).with_name("flex_calls.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("config, workload, measured", RECORDED)
def test_allocated_is_as_recorded(config, workload, measured):
    plan = plan_of(AttentionConfig(**config), Workload(**workload), Cuda((8, 9)))
    peak = replay(list(plan.events()), AllocatorSettings()).peak_allocated
    assert measured <= peak <= 1.001 * measured
