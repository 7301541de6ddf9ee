"""The studies about recommendations: their rows and the figures in their tables."""

from __future__ import annotations

import pytest

from planner.measuring.measure import Environment, Measurement
from planner.report.plot.figure import drawn
from studies import fits, min_mass, search

HERE = Environment(python="3.11", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")


def cells(table: str, line: int) -> list[str]:
    return [cell.strip() for cell in table.splitlines()[line].strip("|").split("|")]


def test_questions_are_of_all_objectives_and_the_same_each_time():
    asked = [search.scenario(number) for number in range(60)]
    assert asked == [search.scenario(number) for number in range(60)]
    assert {one["objective"] for one in asked} == {"speed", "seq", "quality"}
    assert all(("seq" in one) == (one["objective"] != "seq") for one in asked)
    assert all(1e8 < one["vram"] <= 80e9 for one in asked)
    assert len({one["gpu"] for one in asked}) > 10


def test_a_row_has_the_answer_and_the_cold_start_against_the_grid():
    asked = {"vram": "2GB", "seq": 4096, "gpu": "gtx1080", "objective": "speed"}
    row = search.scenario_row(asked, trials=8)
    assert row["outcome"] == "ok"
    assert row["answer"] >= 0
    assert row["cold"] is None or row["cold"] > -1
    nothing = search.scenario_row({**asked, "vram": "300MB"}, trials=2)
    assert nothing["outcome"] == "nothing fits"


def test_gaps_are_counted():
    rows = [
        {"objective": "speed", "outcome": "ok", "answer": 0.0, "cold": -0.04},
        {"objective": "speed", "outcome": "ok", "answer": 0.2, "cold": 0.1},
        {"objective": "seq", "outcome": "ok", "answer": -0.02, "cold": None},
        {"objective": "seq", "outcome": "nothing fits"},
    ]
    rows = [{"part": "answer", **row} for row in rows]
    table = search.gaps_table(rows)
    assert cells(table, -1) == ["all", "4", "1", "1", "0.00%", "20.00%", "66.7%", "33.3%", "1", "33.3%"]
    assert cells(table, 2)[:4] == ["seq", "2", "1", "1"]


class Batch:
    def __init__(self, share):
        self.share = share

    def measure(self, config, workload):
        return Measurement(
            config=config,
            workload=workload,
            device="cpu",
            kind="ok",
            runs=1,
            environment=HERE,
            seconds=1.0,
            allocated=self.share,
        )


def test_budgets_are_compared_with_what_was_taken():
    asked = fits.question(1)
    assert asked == fits.question(1)
    assert asked["objective"] == "seq"
    assert 64e6 <= asked["vram"] <= 4e9
    row = fits.budget_row({**asked, "vram": 70_000_000}, Batch(68_000_000))
    assert (row["outcome"], row["allocated"], row["budget"]) == ("ok", 68_000_000, 70_000_000)
    table = fits.fits_table([row, {**row, "allocated": 71_000_000}, {**row, "outcome": "nothing fits"}])
    assert cells(table, -1)[:5] == ["all", "3", "1", "0", "1"]
    assert cells(table, -1)[-1] == "101.4%"


def fit(numbers):
    """How many of a sample of `planner study fits` have an answer; with small budgets."""
    from planner.measuring.server import Batch as Real

    with Real("cpu", timeout=120) as batch:
        rows = [fits.budget_row(fits.question(number, 3e6, 8e6), batch) for number in numbers]
    asked = [row for row in rows if row["outcome"] != "nothing fits"]
    assert all(row["outcome"] == "ok" for row in asked)
    assert all(row["allocated"] <= row["upper"] <= row["budget"] for row in asked)
    for row in asked:
        if row["objective"] == "seq":  # a length is a multiple of the block, or of 64
            longer = 1 + row["config"].get("pattern", {}).get("block_size", 64) / row["seq"]
            assert row["allocated"] * longer / row["budget"] > 0.9, row
    return len(asked)


def test_what_is_recommended_fits_for_real(one_server):
    assert fit(range(2)) >= 1


@pytest.mark.slow
def test_what_is_recommended_for_many_fits_for_real(seed):
    assert fit(range(seed, seed + 20)) >= 5


@pytest.mark.parametrize("name", min_mass.KNOWN)
def test_known_layouts_keep_some_mass(name):
    row = min_mass.known_row(name)
    assert len(row["mass"]) == len(min_mass.PRESETS) * len(min_mass.LENGTHS)
    assert all(0 < mass <= 1 for mass in row["mass"].values())
    assert name in min_mass.known_table([row])


def test_where_no_config_keeps_the_mass_the_study_says_so():
    rows = [
        {
            "profile": profile,
            "card": "h100",
            "seq": 1,
            "seconds": dict.fromkeys(map(str, (*min_mass.LEVELS, 1.0))),
        }
        for profile in min_mass.PRESETS
    ]
    assert drawn(["png"], lambda figure: min_mass.draw(figure, rows))
    assert "cannot be had" in min_mass.findings(rows).answer


def test_prices_are_shares_of_dense_time():
    seconds = {str(level): level for level in (*min_mass.LEVELS, 1.0)}
    rows = [
        {"profile": profile, "card": "h100", "seq": 1, "seconds": seconds} for profile in min_mass.PRESETS
    ]
    assert cells(min_mass.prices_table(rows), 2)[1:3] == ["50.0%", "60.0%"]
