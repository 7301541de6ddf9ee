"""Candidates as columns: to a config and back."""

from __future__ import annotations

from itertools import islice
from unittest import mock

import numpy as np
import pytest

import planner.configs
from attention.errors import ConfigError
from planner.configs import Columns, columns_of
from planner.fitting.samples import samples
from planner.workload import Workload

CASES = [case for case in islice(samples(3), 64) if case.config.uncovered == "refuse"]


@pytest.mark.parametrize("config, workload", CASES)
def test_a_config_is_the_same_after_columns(config, workload):
    assert columns_of(config, workload.seq).config(0, workload) == config


def test_one_of_many():
    columns = Columns(
        "block_sparse", "local_window", seq=64, block_size=np.array([8, 16]), window=np.array([9, 7])
    )
    pattern = columns.config(1, Workload(seq=64)).pattern
    assert (pattern.block_size, pattern.local_window_size) == (16, 7)
    assert len(columns) == 2
    assert columns.take(np.array([1])).config(0, Workload(seq=64)).pattern == pattern


def test_rows_are_found_once_and_are_those_of_the_candidates_taken():
    columns = Columns(
        "block_sparse",
        "dilated_sparse",
        seq=np.array([4096, 5000, 900]),
        block_size=64,
        sparsity_ratio=np.array([0.1, 0.5, 1.0]),
        lengths=(512, 4096),
        rates=(1, np.array([1, 2, 3])),
    )
    some = np.array([2, 0])
    fresh = columns.take(some)
    assert columns.rows(True) is columns.rows(True)
    taken = columns.take(some)
    with mock.patch.object(planner.configs, "pattern_rows", side_effect=AssertionError):
        known = taken.rows(True)
        with pytest.raises(AssertionError):
            taken.rows(False)
    for mine, theirs in zip(known, fresh.rows(True), strict=True):
        assert np.array_equal(mine, theirs)


def test_columns_are_equally_long():
    one, two = np.ones(1, np.int64), np.ones(2, np.int64)
    with pytest.raises(ConfigError, match="equally long"):
        Columns("dense", seq=one, workspace=two)
    with pytest.raises(ConfigError, match="1 columns of lengths and 0 of rates"):
        Columns("dilated", seq=one, lengths=(one,))
