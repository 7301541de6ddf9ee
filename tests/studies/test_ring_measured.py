"""`planner study ring-measured`: two ranks of a small call, the table, the picture and the sentences."""

from __future__ import annotations

import copy

import pytest
import torch
from matplotlib.figure import Figure

from attention.errors import AttentionPlannerError
from studies import ring_measured as measured
from studies.bench.rank_runs import run_on_ranks
from studies.bench.study import Scope

WINDOW = next(one for one in measured.attentions() if one.name == "local_window")


@pytest.fixture(scope="module")
def rows():
    two = measured.measured_row(WINDOW, 2, 512, 256)
    none = dict.fromkeys(("sent", "traffic", "out", "gradients"), 0)
    return [two | none | {"world": 1, "peak": two["upper"], "planned": two["upper"]}, two]


def test_ranks_send_hold_and_compute_what_is_planned(rows):
    two = rows[1]
    assert two["as_said"]
    # A window of 1,023 keys fetches all that is before a rank, forward and backward.
    assert two["sent"] == two["traffic"] == 2 * 256 * 2 * 4 * 64 * 4
    assert two["peak"] <= two["upper"]
    assert abs(two["peak"] / two["planned"] - 1) < 0.01
    assert 0 < two["gradients"] < 1e-13


@pytest.mark.slow
def test_a_rank_that_fails_is_said():
    with pytest.raises(AttentionPlannerError, match=r"rank . of 2: .*there_is_no_such"):
        run_on_ranks(2, "studies.ring_measured:there_is_no_such")


def test_a_step_has_a_label_of_its_own():
    labels = [label for label, _ in measured.steps(Scope(torch.device("cpu"), quick=False))]
    assert len(labels) == len(set(labels)) == 24
    assert len(measured.steps(Scope(torch.device("cpu"), quick=True))) == 4


def test_table_picture_and_sentences_have_the_rows_figures(rows):
    table = measured.measured_table(rows)
    assert f"| local_window | 2 | {rows[1]['peak'] / 2**20:.2f} |" in table
    figure = Figure(layout="constrained")
    measured.draw(figure, rows)
    assert [axes.get_xlabel() for axes in figure.axes] == ["ranks", "ranks"]
    answer = measured.findings(rows).answer
    assert "in 1 of 1 cases every rank sent what `traffic` says" in answer
    assert "a causal window sends 1.00 MiB on each number of ranks" in answer
    other = copy.deepcopy(rows)
    other[1]["as_said"] = False
    assert "in 0 of 1 cases" in measured.findings(other).answer
