"""The study of segment lengths."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from studies import segments


@pytest.fixture
def rows(scope):
    return [run() for _, run in segments.steps(scope)]


def test_first_segments_go_from_256_to_all_tokens():
    cases = segments.cases()
    assert len(cases) == len({case.name for case in cases}) == 4 * 9
    for series in segments.SERIES:
        mine = [case for case in cases if case.series == series]
        assert [case.x for case in mine] == [case.config.segment_lengths[0] for case in mine]
        assert (mine[0].x, mine[-1].x) == (256, segments.SEQ)


def test_three_branches_reach_over_the_whole_sequence():
    three = [case.config for case in segments.cases() if "three" in case.series]
    assert all(config.segment_lengths[-1] == segments.SEQ for config in three)
    assert all(config.dilation_rates == (1, 4, 16) for config in three)


def test_the_picture_is_over_the_first_segment(rows):
    figure = Figure(layout="constrained")
    segments.draw(figure, rows)
    assert {axes.get_xlabel() for axes in figure.axes[:5]} == {"first segment, tokens"}
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["256", "1K", "64K"]
    assert [text.get_text() for text in figure.axes[5].get_legend().get_texts()] == list(segments.SERIES)


def test_what_is_said_is_computed(rows):
    findings = segments.findings(rows)
    first, last = rows[0]["planned"]["seconds"], rows[2]["planned"]["seconds"]
    assert f"takes {last / first:.0f} times the time" in findings.answer
    assert "100% instead of 43% of the mass" in findings.answer
    assert "takes up to 0% longer (predicted)" in findings.answer
