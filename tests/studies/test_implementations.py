"""The study of all kinds of attention beside each other."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from studies import implementations


@pytest.fixture
def rows(scope):
    return [run() for _, run in implementations.steps(scope)]


def test_every_kind_is_there(rows):
    kinds = {row["kind"] for row in rows}
    assert kinds == {"dense", "dilated", "local_window", "global_local", "dilated_sparse", "adaptive"}
    assert sum("multihead" in row["config"] for row in rows) == 2
    assert {row["seeds_ms"] for row in rows if "seeds_ms" in row} == {112.5, 117.3, 119.0, 120.5, 3011.9}


def test_the_fastest_comes_first_and_what_did_not_run_by_its_prediction(rows):
    rows[0]["here"]["seconds"] = None
    rows[0]["here"]["expected"]["seconds"] = 0.45
    names = [row["name"] for row in implementations.ordered(rows)]
    assert names.index("dense") == 3
    assert [
        line.split("|")[1].strip() for line in implementations.implementations_table(rows).splitlines()[2:]
    ] == names


def test_the_picture_has_both_devices(rows):
    figure = Figure(layout="constrained")
    implementations.draw(figure, rows)
    assert [axes.get_xlabel().replace("\n", " ") for axes in figure.axes][:2] == [
        "ms, CPU",
        "ms, GeForce GTX 1080",
    ]
    assert len(figure.axes[1].collections) == len(rows) + 5


def test_what_is_said_is_computed(rows):
    findings = implementations.findings(rows)
    assert "the fastest is dense with 100 ms, the slowest multihead 8192/1, 5% with 900 ms" in findings.answer
    assert "multihead" in findings.answer.partition("the largest")[2]
    assert "112.5 ms" in findings.original
    assert "3,011.9 ms" in findings.original
    rows[0]["here"]["seconds"] = rows[0]["here"]["allocated"] = None
    assert "the fastest is dilated" in implementations.findings(rows).answer
