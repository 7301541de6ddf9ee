"""Seconds and their ranges in words, and what is said of times that cannot be told apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from planner.report.text.recommend import not_told_apart
from planner.report.text.times import are_apart, predicted, span


@pytest.mark.parametrize(
    "low, high, text",
    [
        (0.04, 0.06, "40 to 60 ms"),
        (0.9e-3, 1.2e-3, "900 us to 1.2 ms"),
        (None, None, ""),
        (4000, 5000, "4,000 to 5,000 s"),
    ],
)
def test_a_range_has_its_unit_once(low, high, text):
    assert span(low, high) == text


def test_a_prediction_in_words():
    assert predicted(0.047, 0.04, 0.06) == "47 ms a call, probably 40 to 60 ms; predicted"
    assert predicted(0.047, None, None) == "47 ms a call, predicted"


def timed(seconds, low=None, high=None, role="", config=0):
    return SimpleNamespace(seconds=seconds, low=low, high=high, role=role, config=config)


def test_times_are_apart_where_neither_is_in_the_others_range():
    assert are_apart(timed(1, 0.9, 1.2), timed(1.5, 1.3, 1.8))
    assert not are_apart(timed(1, 0.9, 1.2), timed(1.15, 1.0, 1.4))
    assert not are_apart(timed(1, 0.5, 2.2), timed(2, 1.8, 2.4))
    assert are_apart(timed(1), timed(2))
    assert not are_apart(timed(1), timed(1))


def test_picks_that_cannot_be_told_apart_say_so_once():
    picks = [
        timed(1, 0.9, 1.2, "fastest", 1),
        timed(1.1, 1, 1.3, "balanced", 2),
        timed(9, 8, 11, "widest", 3),
    ]
    assert not_told_apart(picks) == "The times of fastest and balanced cannot be told apart."
    assert not_told_apart([picks[0], picks[2]]) == ""
    assert not_told_apart([picks[0], timed(1, 0.9, 1.2, "balanced", 1)]) == ""  # one config twice
