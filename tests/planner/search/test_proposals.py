"""Whose turn it is, and steps from the best."""

from __future__ import annotations

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from planner.search.proposals import Turns

KINDS = ("dense", "dilated", "local_window")
RANGES = {
    "kind": CategoricalDistribution(KINDS),
    "window": IntDistribution(1, 100, log=True),
    "ratio": FloatDistribution(0.001, 1.0, log=True),
    "backend": CategoricalDistribution(("auto", "sdpa")),
}


def params(kind, window=40, ratio=0.8, backend="auto"):
    return {"kind": kind, "window": window, "ratio": ratio, "backend": backend}


def test_kinds_take_turns_at_first_and_dense_has_one():
    turns = Turns(KINDS, 20, explores=True)
    assert [turns.fixed(number)["kind"] for number in range(3)] == list(KINDS)
    turns.record((0.0, 1.0), {"kind": "dense"}, {"kind": RANGES["kind"]})
    assert {turns.fixed(number)["kind"] for number in range(3, 10)} == {"dilated", "local_window"}


def test_after_that_the_best_are_changed_by_steps_that_no_trial_had():
    turns = Turns(KINDS, 20, explores=True)
    for kind, value in (("dense", 3.0), ("dilated", 1.0), ("local_window", 2.0)):
        turns.record((0.0, value), params(kind), RANGES)
    found = [turns.fixed(number) for number in range(10, 200)]
    steps = [step for step in found if len(step) > 1]
    assert {step["kind"] for step in steps} == {"dilated", "local_window"}
    assert len({frozenset(step.items()) for step in steps}) == len(steps)
    assert all(1 <= step["window"] <= 100 and 0.001 <= step["ratio"] <= 1.0 for step in steps)
    assert any(step["backend"] == "sdpa" for step in steps)
    assert any(step["window"] == 20 and step["ratio"] == 0.4 for step in steps), "two dimensions at once"


def test_what_passes_leads_before_what_does_not():
    turns = Turns(KINDS[1:], 10, explores=False)
    turns.record((0.5, 0.1), params("dilated", window=1), RANGES)
    turns.record((0.0, 9.0), params("dilated", window=50), RANGES)
    turns.record((0.2, 0.1), params("dilated", window=2), RANGES)
    assert turns.leaders["dilated"].params["window"] == 50


def test_with_something_to_start_from_steps_come_at_once():
    turns = Turns(KINDS, 10, explores=False)
    turns.record((0.0, 1.0), params("dilated"), RANGES)
    assert turns.fixed(1) == params("dilated", window=20)


def test_nothing_known_is_nothing_fixed_where_there_is_one_kind():
    assert Turns(("dilated",), 10, explores=False).fixed(0) == {}
