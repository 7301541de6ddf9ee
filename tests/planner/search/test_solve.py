"""The grid's table: what is told of many candidates at once without asking each."""

from __future__ import annotations

import numpy as np
import pytest

from planner.question.asked import Gates
from planner.question.space import Space
from planner.search import evaluate
from planner.search.candidates import grid
from planner.search.evaluate import CLEARLY
from planner.search.recommend import scenario_of
from planner.search.solve import enumerate_grid, order, passing, tabulate

QUESTIONS = [
    {},
    {"causal": True, "profile": "local"},
    {"profile": "retrieval", "heads": 4, "kv_heads": 2, "mode": "training"},
    {"causal": True, "gpu": "gtx1080", "min_mass": 0.95, "profile": "streaming"},
]


EVERYTHING = Space()


def table_of(question, seq=5000, space=EVERYTHING):
    scenario, _ = scenario_of("8GB", seq, question)
    return scenario, tabulate(
        scenario, grid(space, scenario.workload, flex=scenario.flex, windows=scenario.windows)
    )


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_mass_is_exact_or_stands_for_one_below_the_gate(question):
    scenario, table = table_of(question)
    gate = scenario.gates.min_mass
    exact = np.concatenate([evaluate.masses(scenario, part, exactly=True) for part in table.parts])
    told = table.figures.mass
    assert ((told >= gate) == (exact >= gate)).all()
    bounds = told != exact
    assert bounds.any()
    assert (told[bounds] < gate - CLEARLY).all()
    assert (told[bounds] >= exact[bounds]).all()


def test_settled_masses_are_exact_where_asked_for_and_as_they_were_elsewhere():
    scenario, table = table_of({})
    exact = np.concatenate([evaluate.masses(scenario, part, exactly=True) for part in table.parts])
    bounds = np.flatnonzero(table.figures.mass != exact)
    some, rest = bounds[::2], bounds[1::2]
    settled = table.settled(scenario, some)
    assert (settled.figures.mass[some] == exact[some]).all()
    assert (settled.figures.mass[rest] == table.figures.mass[rest]).all()


def test_without_a_gate_of_mass_every_mass_is_exact():
    scenario, table = table_of({"min_mass": None})
    exact = np.concatenate([evaluate.masses(scenario, part, exactly=True) for part in table.parts])
    assert (table.figures.mass == exact).all()


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_is_said_not_to_reach_does_not(question):
    scenario, table = table_of(question, space=Space(patterns=("dilated_sparse",)))
    everything = np.arange(len(table))
    left = table.may_reach(scenario, everything)
    assert left.size < everything.size
    assert not table.reaching(scenario, np.setdiff1d(everything, left)).any()


def test_candidates_of_the_same_shape_are_those_with_equal_fields():
    space = Space(variants=("dense", "dilated", "block_sparse", "adaptive"), block_sizes=(64, 256))
    scenario, table = table_of({}, space=space)
    rng = np.random.default_rng(0)
    which = rng.permutation(len(table))[:300]

    def shape(config):
        pattern = config.pattern
        if config.token_edges:  # whatever the blocks
            pattern = pattern.model_copy(update={"block_size": 1})
        return config.variant, config.segment_lengths, config.dilation_rates, pattern

    configs = [table.config(int(at), scenario) for at in which]
    for config in configs[:40]:
        assert table.shaped(config, which).tolist() == [shape(one) == shape(config) for one in configs]


def test_a_loosened_question_knows_what_the_first_one_did():
    scenario, table = table_of({})
    found = evaluate.point(scenario, table.config(0, scenario), 5000)
    other = scenario.but(budget=1 << 60, gates=Gates(min_mass=None))
    assert (other.budget, other.gates.min_mass) == (1 << 60, None)
    assert evaluate.point(other, table.config(0, scenario), 5000) is found


def test_the_optimum_is_the_first_in_order_that_passes_everything():
    scenario, table = table_of({"causal": True}, seq=3000)
    found = enumerate_grid(
        scenario, grid(EVERYTHING, scenario.workload, flex=scenario.flex, windows=scenario.windows)
    )
    points = (
        evaluate.point(scenario, table.config(int(at), scenario), 3000)
        for at in order(scenario, table, np.flatnonzero(passing(scenario, table)[1]))
    )
    assert next(one for one in points if not evaluate.failed(scenario, one)) == found.best
