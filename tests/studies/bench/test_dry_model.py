"""The part of `planner study accuracy` about cards that are not there, from rows of a sweep to sentences."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from studies import accuracy
from studies.bench import dry, dry_model, records

ROWS = Path(__file__).parents[2] / "planner" / "memory" / "dry_rows.json"


def recorded():
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    more = {"seed": 1, "kind": "ok", "torch": "2.13.0", "message": ""}
    return [
        {**more, "number": n, "device": row["reserved"] + (426 << 20), **row} for n, row in enumerate(rows)
    ]


def committed():
    [data] = [data for data in records.load("accuracy") if dry_model.about_dry(data["rows"])]
    return data["rows"]


def test_rows_of_a_sweep_become_the_studys():
    lost = recorded()[0] | {"number": 1000, "kind": "oom", "message": "too much"}
    refused = {"seed": 1, "number": 1001, "kind": "refused", "card": "t4", "message": ""}
    rows = dry_model.published([*recorded(), lost, refused])
    assert len(rows) == len(recorded()) + 1
    assert len(dry_model.measured(rows)) == len(recorded())
    assert rows[0]["predicted"]["allocated"] == rows[0]["measured"]["allocated"]
    assert rows[-1]["message"] == "too much"
    assert json.loads(json.dumps(rows)) == rows


def test_a_bar_that_is_missed_is_said():
    rows = dry_model.published(recorded())
    assert "| runs above the upper bound | 0 | at most 0 | yes |" in dry_model.bars_table(rows)
    rows[0]["measured"]["device"] = 2 * rows[0]["predicted"]["upper"]
    assert "| runs above the upper bound | 1 | at most 0 | no |" in dry_model.bars_table(rows)
    assert "1 took more than the upper bound" in dry_model.findings(rows).answer
    assert "runs above the upper bound" in dry_model.findings(rows).answer.rpartition("not reached: ")[2]
    figure = Figure(layout="constrained")
    dry_model.draw(figure, rows)
    assert f"1 of {len(rows)} runs took more" in " ".join(figure.get_suptitle().split())


def test_peers_are_compared_on_the_cases_that_they_were_asked_about():
    rows = dry_model.published(recorded())
    assert dry_model.peers_table(rows) == ""
    rows[0]["peer"], rows[1]["peer"] = rows[0]["measured"]["allocated"] // 2, None
    lines = dry_model.peers_table(rows).splitlines()
    assert lines[-1] == "| MemTracker, in the dry run | 2 | 1 | 50.000% | 50.00% | 100.0% |"


def test_tables_of_runs_are_empty_for_dry_runs_and_the_other_way_round():
    runs = [data["rows"] for data in records.load("accuracy") if not dry_model.about_dry(data["rows"])]
    for name, table in accuracy.STUDY.tables.items():
        if name == "dry-model-peers" and not any("peer" in row for row in committed()):
            continue  # data that was made without
        assert bool(table(committed())) == name.startswith("dry-model")
        assert bool(table(runs[0])) != name.startswith("dry-model")


def test_the_committed_predictions_are_todays():
    for row in dry_model.measured(committed())[::40]:
        today = dry.predicted(dry.case_of(row))
        assert row["predicted"] == {
            "allocated": today.allocated,
            "reserved": today.reserved,
            "upper": today.upper,
        }, row["case"]
