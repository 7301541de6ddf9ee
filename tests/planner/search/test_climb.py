"""The last steps from the best candidate."""

from __future__ import annotations

import pytest

from attention import AttentionConfig, SparsePatternConfig
from planner.question.space import Space
from planner.search.climb import STEPS, climbed, neighbours
from planner.search.evaluate import failed, gain, point
from planner.search.recommend import answered
from planner.search.suggest import parameters
from planner.workload import Workload

WINDOW = AttentionConfig(
    variant="block_sparse",
    pattern=SparsePatternConfig(
        pattern_type="global_local", block_size=64, local_window_size=640, global_tokens=128
    ),
)


def changed(config: AttentionConfig, factors: tuple[float, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, _, after, _ in neighbours(config, Workload(seq=4096), factors):
        found.setdefault(name, []).append(after)
    return found


def test_windows_and_global_tokens_stay_whole_blocks():
    assert changed(WINDOW, STEPS[0]) == {
        "block_size": ["32", "128"],
        "local_window_size": ["320", "1,280"],
        "global_tokens": ["64", "256"],
        "workspace_bytes": ["8 MiB", "32 MiB"],
    }
    assert changed(WINDOW, STEPS[1]) == {"local_window_size": ["448", "896"], "global_tokens": ["64", "192"]}
    # 8% of ten blocks and of two is less than a block, or just one.
    assert changed(WINDOW, STEPS[3]) == {"local_window_size": ["576", "704"]}


def test_segments_stay_multiples_and_ratios_below_one():
    config = AttentionConfig(variant="dilated", segment_lengths=[1024, 4096], dilation_rates=[1, 4])
    assert changed(config, STEPS[1])["segment_lengths"] == ["704,2880", "1408,5760"]
    sparse = SparsePatternConfig(block_size=64, sparsity_ratio=0.8)
    config = AttentionConfig(
        variant="block_sparse", pattern=sparse, segment_lengths=[4096], dilation_rates=[1]
    )
    assert changed(config, STEPS[1])["sparsity_ratio"] == ["0.56", "1"]


@pytest.mark.parametrize("objective", ["speed", "quality"])
def test_no_step_from_where_it_ends_is_better_and_passes(objective):
    limit = {"max_seconds": 0.05} if objective == "quality" else {}
    found = answered("8GB", 65_536, objective=objective, trials=0, **limit)
    assert found.grid is not None
    end = climbed(found.scenario, found.space, found.grid)
    assert gain(found.scenario, found.grid, end) >= 0
    assert not failed(found.scenario, end)
    for factors in STEPS:
        for *_, config in neighbours(end.config, found.scenario.workload, factors):
            if parameters(config, found.space, found.scenario.workload) is not None:
                other = point(found.scenario, config, end.seq)
                assert failed(found.scenario, other) or gain(found.scenario, end, other) <= 0


def test_a_window_between_the_grids_is_found():
    # The grid has windows of 1,024 and 1,536 tokens; what the gate of mass asks for lies between.
    found = answered("40GB", 81_687, gpu="a40", trials=0, space=Space(edges=("block",)))
    assert found.grid is not None
    end = climbed(found.scenario, found.space, found.grid)
    assert gain(found.scenario, found.grid, end) > 0.05


def test_restricted_dimensions_stay():
    space = Space(patterns=("global_local",), windows=(512, 1024, 4096), block_sizes=(64,))
    found = answered("8GB", 65_536, space=space, trials=0)
    assert found.grid is not None
    end = climbed(found.scenario, space, found.grid)
    assert end.config.pattern is not None
    assert end.config.pattern.local_window_size in (512, 1024, 4096)
    assert end.config.pattern.block_size == 64
