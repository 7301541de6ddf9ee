"""The table of dimensions agrees with what it names: Space, options, candidates, configs, trials."""

from __future__ import annotations

import dataclasses
import inspect

import optuna
import pytest

from attention import AttentionConfig, SparsePatternConfig
from planner.cli.options_choose import build_space
from planner.configs import Columns
from planner.question.dimensions import DIMENSIONS, KINDS, attention_kind, dimensions_of, variant_of
from planner.question.space import Space
from planner.search.suggest import chosen
from planner.workload import Workload

WORKLOAD = Workload(seq=5000)


def test_fields_of_a_space_are_the_dimensions_in_their_order():
    assert list(Space.model_fields) == list(DIMENSIONS)
    assert [each.field for each in DIMENSIONS.values()] == list(DIMENSIONS)


def test_options_are_the_dimensions_in_their_order():
    options = inspect.signature(build_space).parameters
    assert list(options) == [each.argument for each in DIMENSIONS.values()]
    for each, option in zip(DIMENSIONS.values(), options.values(), strict=True):
        assert option.default == Space.model_fields[each.field].default


def test_attributes_are_of_a_config_or_its_pattern():
    names = {*AttentionConfig.model_fields, *SparsePatternConfig.model_fields}
    assert {each.attribute for each in DIMENSIONS.values()} - {""} <= names


def test_parameters_are_columns_but_how_many_branches():
    names = {each.parameter for each in DIMENSIONS.values()} - {""}
    assert names - {field.name for field in dataclasses.fields(Columns)} == {"branches"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_is_asked_for_what_its_attention_has(kind):
    """With two values of each dimension allowed, all that it may be asked for."""
    allowed = {
        "block_sizes": (64, 128),
        "windows": (512, 1024),
        "global_tokens": (64, 128),
        "ratios": (0.1, 0.2),
        "branches": (1, 2),
        "workspaces": (1 << 20, 1 << 22),
    }
    theirs = [each for each in dimensions_of(kind) if each.field in allowed]
    sparse = {"patterns": (kind,)} if variant_of(kind) == "block_sparse" else {}
    values = {each.field: allowed[each.field] for each in theirs}
    space = Space(variants=(variant_of(kind),), **sparse, **values)
    trial = optuna.create_study().ask()
    config = chosen(trial, space, WORKLOAD).config(0, WORKLOAD)
    assert attention_kind(config) == kind
    lengths = {name for name in trial.params if name.startswith(("first_segment", "growth", "rate_growth"))}
    assert trial.params.keys() - lengths == {each.parameter for each in theirs}


def test_a_changed_config_has_the_other_value_and_no_other_change():
    config = AttentionConfig(
        variant="block_sparse", pattern=SparsePatternConfig(pattern_type="global_local", block_size=64)
    )
    for each, value in ((DIMENSIONS["windows"], 1024), (DIMENSIONS["workspaces"], 1 << 20)):
        other = each.changed(config, value)
        assert each.of(other) == value
        assert each.changed(other, each.of(config)) == config
