"""The margin of GPU predictions, and recorded dry runs that the plans must give to the byte."""

import json
import math
from pathlib import Path

import pytest

from attention import AttentionConfig, ShardingConfig
from planner.memory.dry_runs import CHECKED, FLOAT64, SEGMENT, SEGMENTS, dry_bound, dry_runs
from planner.memory.estimate import estimate
from planner.workload import Workload

DENSE = AttentionConfig(variant="dense")
ROWS = [
    row
    for name in ("dry_rows.json", "cut_rows.json", "rank_rows.json")
    for row in json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
]


def named(row):
    pattern = (row["config"].get("pattern") or {}).get("pattern_type", "")
    parts = (row["card"], row["config"]["variant"], pattern, row["workload"].get("mode", "inference"))
    return " ".join(filter(None, parts))


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_the_plans_take_what_dry_runs_took(row):
    config, workload = AttentionConfig(**row["config"]), Workload(**row["workload"])
    found = estimate(config, workload, row["card"], dry=True, rank=row.get("rank"))
    assert (found.allocated, found.reserved) == (row["allocated"], row["reserved"])


@pytest.mark.parametrize("runs", [dry_runs(), dry_runs().ranks], ids=["one GPU", "ranks"])
def test_some_draws_set_the_margin_and_others_check_it(runs):
    assert not {draw.seed for draw in runs.set_by} & {draw.seed for draw in runs.checked_by}
    for draws in (runs.set_by, runs.checked_by):
        assert sum(draw.exceeded for draw in draws) == 0
        assert sum(draw.cases for draw in draws) >= 100
    assert len(runs.cards) >= 12


@pytest.mark.parametrize("fields", [{"queries": 8}, {"documents": (24, 40)}, {"sinks": True}])
def test_what_running_models_need_was_run_dry(fields):
    bound = dry_bound(DENSE, Workload(seq=64, causal=True, **fields), 10**9, 0)
    assert (bound.confidence, bound.notes) == (CHECKED, ())


def test_as_many_ranks_as_were_run_dry_are_checked():
    most = dry_runs().ranks.domain.ranks
    few = Workload(seq=64, gpus=most)
    assert dry_bound(DENSE, few, 10**9, 0).confidence == CHECKED
    many = few.model_copy(update={"gpus": 2 * most})
    wider = dry_bound(DENSE, many, 10**9, 0)
    assert wider.notes[0] == f"not among what was run dry: {2 * most} ranks"
    assert wider.upper > dry_bound(DENSE, few, 10**9, 0).upper
    rings = DENSE.model_copy(update={"sharding": ShardingConfig(ring_size=most)})
    assert dry_bound(rings, many, 10**9, 0).confidence == CHECKED


def test_the_bound_of_a_card_says_what_checked_it():
    bound = dry_bound(DENSE, Workload(seq=64), 10**9, 7)
    assert bound.upper == math.ceil(10**9 * (1 + dry_runs().margin) + SEGMENTS * SEGMENT + 7)
    assert bound.confidence == CHECKED


def test_in_float64_the_bound_is_twice_as_much():
    asked = Workload(seq=64, dtype="float64")
    bound = dry_bound(DENSE, asked, 10**9, 7)
    assert bound.upper == math.ceil(FLOAT64 * 10**9 * (1 + dry_runs().margin) + SEGMENTS * SEGMENT + 7)


def test_beyond_what_was_run_dry_the_margin_is_wider():
    bound = dry_bound(DENSE, Workload(seq=1 << 22), 10**9, 0)
    assert bound.upper > 10**9 * (1.01 + dry_runs().margin)
    assert "outside" in bound.confidence
    assert "4,194,304 tokens" in bound.notes[0]
