"""The study of the front of memory, time and mass."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from studies import pareto

ASKED = {"vram": "2GB", "seq": 8192}


@pytest.fixture(scope="module")
def row():
    return pareto.front_row("small", ASKED, 0)


def test_nothing_on_the_front_surpasses_another(row):
    front = row["front"]
    assert len(front) > 3
    assert [one["seconds"] for one in front] == sorted(one["seconds"] for one in front)
    for one in front:
        for other in front:
            as_good = (
                other["seconds"] <= one["seconds"],
                other["mb"] <= one["mb"],
                other["mass"] >= one["mass"],
            )
            assert other is one or not all(as_good)


def test_the_picks_are_three_and_pass(row):
    assert [one["role"] for one in row["picks"]] == ["fastest", "balanced", "widest"]
    assert all(one["mass"] >= 0.8 for one in row["picks"])
    assert row["picks"][0]["seconds"] == min(one["seconds"] for one in row["picks"])


def test_candidates_that_a_picture_can_tell_apart_are_kept(row):
    columns = row["candidates"]
    assert len({len(column) for column in columns.values()}) == 1
    count = len(columns["mass"])
    assert 100 < count <= row["grid"]
    assert len(set(zip(*columns.values(), strict=True))) == count


def test_the_tables_name_picks_and_kinds(row):
    assert len(pareto.picks_table([row]).splitlines()) == 2 + 3
    kinds = {one["kind"] for one in row["front"]}
    assert len(pareto.front_table([row]).splitlines()) == 2 + len(kinds)


def test_the_picture_has_mass_and_memory_over_time(row):
    figure = Figure(layout="constrained")
    pareto.draw(figure, [row])
    mass, memory = figure.axes
    assert mass.get_ylabel() == "mass of dense attention, %"
    assert memory.get_ylabel() == "memory, upper bound, MB of 2,000"
    assert mass.get_xlabel() == "predicted ms a call"
    shown = {name for text in mass.texts for name in text.get_text().split(", ")}
    assert shown == {"the gate", "fastest", "balanced", "widest"}


def test_what_is_said_is_computed(row):
    findings = pareto.findings([row])
    assert (
        f"of {row['grid']:,} candidates {row['passed']:,} pass and {len(row['front'])} are" in findings.answer
    )


def test_both_questions_are_asked():
    assert [asked["seq"] for asked in pareto.QUESTIONS.values()] == [131_072, 131_072]
