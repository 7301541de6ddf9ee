"""The study of the fraction of blocks kept, and of where dense attention is as fast."""

from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure

from studies import sparsity


@pytest.fixture
def rows(scope):
    return [run() for _, run in sparsity.steps(scope)]


@pytest.mark.parametrize(
    "points, even",
    [
        ([(0.01, 0.1), (0.1, 0.5), (1.0, 2.0)], math.sqrt(0.1)),
        ([(0.01, 0.1), (1.0, 1.0)], 1.0),
        ([(0.01, 0.1), (1.0, 0.9)], 1.0),
        ([(0.01, 1.5), (1.0, 2.0)], 0.0),
        ([(0.1, 0.5), (0.2, 1.0), (0.3, 0.9), (1.0, 2.0)], 0.2),
    ],
)
def test_the_break_even_is_where_the_time_of_dense_is_first_reached(points, even):
    assert sparsity.break_even(points) == pytest.approx(even)


def test_without_dense_there_is_no_break_even(rows):
    rows[0]["here"]["seconds"] = None
    assert all(math.isnan(ways["measured"]) for ways in sparsity.evens(rows).values())


def test_dense_comes_first_and_every_series_has_every_fraction():
    cases = sparsity.cases(sparsity.FRACTIONS)
    assert cases[0].config.variant == "dense"
    for series in sparsity.SERIES:
        mine = [case for case in cases if case.series == series]
        assert [case.x for case in mine] == [case.config.pattern.sparsity_ratio for case in mine]
        assert [case.x for case in mine] == list(sparsity.FRACTIONS)


def test_times_are_multiples_of_dense(rows):
    ways = sparsity.against(rows)
    assert [of(rows[0]) for of in ways.values()] == [1, 1, 1]
    assert ways["measured"](rows[3]) == pytest.approx(4)
    assert ways["planned"](rows[1]) < 0.1


def test_the_table_has_a_line_a_series(rows):
    head, _, *lines = sparsity.even_table(rows).splitlines()
    assert "measured (CPU, 1,024 tokens, float32)" in head
    assert [line.split("|")[1].strip() for line in lines] == list(sparsity.SERIES)
    assert lines[0].split("|")[2].strip() == "0.0%"  # the stand-in has everything slower than dense


def test_the_picture_has_dense_as_a_level(rows):
    figure = Figure(layout="constrained")
    sparsity.draw(figure, rows)
    assert {axes.get_xlabel() for axes in figure.axes[:5]} == {"blocks kept, % (at least one a row)"}
    assert [text.get_text() for axes in figure.axes[:2] for text in axes.texts] == ["dense attention"] * 2


def test_what_is_said_is_computed(rows):
    findings = sparsity.findings(rows)
    assert "nearest blocks 0%; spread over rates 1, 4, 16 0%; adaptive 0% (CPU" in findings.answer
    tenth = rows[2]["quality"]["mass"]
    assert f"a tenth of the blocks, nearest blocks, keeps {tenth:.0%}" in findings.answer
