"""The study of dilation: the reports' settings as they name them and as their code ran them."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from attention.layout import build_layout
from planner.memory.cuda_process import blas_workspace
from studies import dilation


@pytest.fixture
def rows(scope):
    return [run() for _, run in dilation.steps(scope)]


def test_all_settings_of_the_reports_are_there_twice():
    found = {
        series: [case for case in dilation.cases() if case.series == series] for series in ("named", "kept")
    }
    for cases in found.values():
        assert [case.config.branches for case in cases] == [
            tuple(zip(lengths, rates, strict=True)) for lengths, rates, _ in dilation.SEEDS
        ]
        assert [case.more["seeds_ms"] for case in cases] == [ms for *_, ms in dilation.SEEDS]
    assert {case.config.pattern.sparsity_ratio for case in found["named"]} == {0.01}


def test_as_run_a_row_keeps_two_blocks_a_rate_beside_its_own():
    kept = [case for case in dilation.cases() if case.series == "kept"]
    layouts = [build_layout(case.config, dilation.SEQ, False) for case in kept]
    assert [int(layout.counts.max()) for layout in layouts] == [3, 5, 3, 3, 7]


def test_quick_has_the_five_and_one_of_each_other_kind():
    series = [case.series for case in dilation.cases(quick=True)]
    assert series == ["named"] * 5 + ["kept", "tokens", "sizes"]


def test_the_table_has_the_reports_figures_beside(rows):
    lines = dilation.dilation_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "| 530.0; 4.28; 4.40 |" in lines[6]
    planned = rows[0]["planned"]
    # Its process had multiplied before, so that cuBLAS held a workspace.
    there = planned["allocated"] + blas_workspace((6, 1)).bytes
    assert dilation.seeds_kb({**planned, "allocated": there}) == pytest.approx(dilation.SEEDS_KB, rel=0.005)


def test_the_picture_shows_time_memory_mass_and_reach(rows):
    figure = Figure(layout="constrained")
    dilation.draw(figure, rows)
    assert [axes.get_xlabel().replace("\n", " ") for axes in figure.axes] == [
        "time, times the first's",
        "memory, times q, k, v and out",
        "mass of dense attention, %",
        "reach, layers",
    ]
    assert figure.axes[0].get_xscale() == "log"
    assert len(figure.axes[0].get_yticklabels()) == len(rows)


def test_what_is_said_is_computed(rows):
    findings = dilation.findings(rows)
    assert "1.00 to 5.00 times the first's time (CPU, 2,048 tokens, float32)" in findings.answer
    assert "4.3 times the time at three rates" in findings.original
    assert "with as many blocks it is 6.0 times here" in findings.original
    rows[5]["here"]["seconds"] = None
    assert dilation.findings(rows).original.endswith("a Python step for each.")
