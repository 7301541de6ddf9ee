"""The sweep of dry runs: its cases are the same each time, and its rows say how far predictions are."""

import json
import math
from itertools import islice
from pathlib import Path
from unittest import mock

import pytest

from planner import gpus
from planner.memory.dry_runs import Checked, DryRuns, dry_runs
from planner.ranks.ring import exchange_of, refuse_sharing
from planner.workload import refuse_features
from studies.bench import dry
from studies.bench.dry_ranks import WORLDS

ROWS = Path(__file__).parents[2] / "planner" / "memory" / "dry_rows.json"


def recorded():
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    return [
        {"seed": 1, "number": n, "kind": "ok", "torch": "2.13.0", "device": row["reserved"] + 10**9, **row}
        for n, row in enumerate(rows)
    ]


def test_cases_are_the_same_for_the_same_seed_and_reach_all_cards():
    found = list(islice(dry.cases(5), 120))
    assert found == list(islice(dry.cases(5), 120))
    assert found[:9] != list(islice(dry.cases(6), 9))
    assert {case.card for case in found} == set(dry.CARDS)
    assert {gpus.find(card).architecture for card in dry.CARDS} == {
        "Pascal",
        "Volta",
        "Turing",
        "Ampere",
        "Ada",
        "Hopper",
        "Blackwell",
    }
    assert any(dry.goes_flex(case) for case in found)
    assert not any(dry.goes_flex(case) for case in islice(dry.cases(5, flex=0), 40))


def test_recorded_rows_are_predicted_to_the_byte():
    found = dry.errors(recorded())
    figures = dry.summary(found)
    assert figures["cases"] == len(found) == len(recorded())
    assert figures["allocated exact"] == figures["reserved exact"] == 1
    assert all(dry.described(error) for error in found)


@pytest.mark.parametrize("more, margin", [(0, 0.01), (dry.SEGMENTS * dry.SEGMENT, 0.01)])
def test_the_margin_is_never_below_the_least(more, margin):
    rows = [row | {"reserved": row["reserved"] + more} for row in recorded()[:1]]
    assert dry.margin(dry.errors(rows)) == pytest.approx(margin)


def test_the_margin_is_the_least_step_above_all():
    row = recorded()[0]
    beyond = 1.0312 * row["reserved"] + dry.SEGMENTS * dry.SEGMENT
    assert dry.margin(dry.errors([row | {"reserved": math.floor(beyond)}])) == pytest.approx(0.0325)


def test_the_domain_is_what_sets_and_checks_the_margin():
    rows = [row for row in recorded() if row["workload"].get("dtype") != "float64"]
    with_sinks, without = (
        [row | {"seed": seed, "workload": row["workload"] | fields} for row in rows[:9]]
        for seed, fields in ((3, {"sinks": True}), (2, {}))
    )
    plain, featured = dry.errors(rows[9:19]), dry.errors(with_sinks)
    alone = dry.checked(plain, dry.errors([*without, *with_sinks]))
    assert alone.domain.features == ()
    assert [draw.seed for draw in alone.checked_by] == [2, 3]
    both = dry.checked([*plain, *featured], dry.errors([row | {"seed": 4} for row in with_sinks]))
    assert both.domain.features == ("sinks",)
    assert [(draw.seed, draw.cases) for draw in both.set_by] == [(1, 10), (3, 9)]


def test_cases_of_ranks_can_be_shared():
    found = list(islice(dry.cases(5, ranks=True), 60))
    assert found == list(islice(dry.cases(5, ranks=True), 60))
    assert {case.workload.gpus for case in found} == set(WORLDS)
    kinds = {(exchange_of(case.config, case.workload), case.config.variant) for case in found}
    assert len(kinds) == 7  # adaptive exchanges heads alone
    for config, workload, _ in found:
        refuse_sharing(config, workload)
        refuse_features(config, workload)


def test_runs_of_ranks_are_written_beside_those_of_one_gpu(monkeypatch, tmp_path):
    path, there = tmp_path / "runs.json", dry_runs()
    monkeypatch.setattr(dry, "PATH", path)
    path.write_bytes(there.to_json().encode())
    of_ranks = there.ranks.model_copy(update={"margin": 0.5})
    dry.write_runs(of_ranks)
    assert DryRuns.from_json(path.read_bytes()) == there.model_copy(update={"ranks": of_ranks})
    of_one = Checked(**{name: value for name, value in there if name != "ranks"} | {"margin": 0.25})
    dry.write_runs(of_one)
    assert DryRuns.from_json(path.read_bytes()) == there.model_copy(
        update={"ranks": of_ranks, "margin": 0.25}
    )


def test_rows_that_are_there_want_no_cuda_build(monkeypatch, tmp_path):
    monkeypatch.setattr(dry, "Batch", mock.Mock(side_effect=AssertionError))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in recorded()[:2]))
    assert dry.sweep(path, 1, 2) == dry.sweep(path, 1, 0) == recorded()[:2]


def test_what_failed_is_no_error():
    assert dry.errors([{"kind": "oom", "card": "t4"}, {"kind": "refused", "card": "t4"}]) == []
