"""What an answer has to keep to: each gate says what exceeds it, and what the question is without it."""

from __future__ import annotations

import numpy as np
import pytest

from attention import AttentionConfig
from planner.question.asked import Gates
from planner.search import evaluate
from planner.search.gates import GATES, MASS, MEMORY, REACH, SECONDS
from planner.search.recommend import scenario_of

ALL = {"min_mass": 0.9, "layers": 4, "max_seconds": 0.5}


def scenario(**asked):
    return scenario_of("8GB", 4096, asked)[0]


def test_what_is_above_a_limit_exceeds_it_and_what_is_at_it_does_not():
    question = scenario(**ALL)
    assert MEMORY.excess(question, 12 * 10**9) == 0.5
    assert MEMORY.excess(question, 8 * 10**9) == 0
    assert SECONDS.excess(question, np.array([0.25, 0.5, 1.0])).tolist() == [-0.5, 0, 1]
    assert MASS.excess(question, 0.9) == 0 < MASS.excess(question, 0.8)
    assert [REACH.excess(question, layers) for layers in (1, 4, 5, None)] == [0, 0, 1, 1]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_the_loosened_question_is_the_same_but_for_that_gate(gate):
    question = scenario(**ALL)
    loose = gate.loosened(question)
    for other in GATES:
        limits = other.limit(question), other.limit(loose)
        assert (limits[0] == limits[1]) == (other is not gate)
    if gate is not MEMORY:
        assert gate.limit(loose) is None
        assert gate.excess(loose, 7) is None
        assert gate.loosened(loose) == loose
    assert loose.known is question.known


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_a_config_fails_a_gate_and_not_the_question_without_it(gate):
    tight = {
        MEMORY: {"reserve": "7.999GB"},
        MASS: {"min_mass": 1.0},
        REACH: {"layers": 1},
        SECONDS: {"max_seconds": 1e-9},
    }[gate]
    question = scenario(**{"min_mass": None, "layers": None, **tight})
    config = AttentionConfig(variant="dilated", segment_lengths=(256,), dilation_rates=(1,))
    point = evaluate.point(question, config, 4096)
    assert evaluate.failed(question, point) == (gate.name,)
    assert evaluate.failed(gate.loosened(question), point) == ()


def test_the_limits_print_as_stored_studies_have_them():
    assert repr(Gates(layers=12, min_mass=0.8)) == "Gates(layers=12, min_mass=0.8, max_seconds=None)"
