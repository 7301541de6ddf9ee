"""Samples that are spread evenly."""

from __future__ import annotations

import numpy as np
import pytest

from planner.sampling import golden, stratified


@pytest.mark.parametrize("count", [16, 100, 4096])
def test_golden_points_leave_no_wide_gap(count):
    points = np.sort(golden(np.arange(count)))
    assert points[0] >= 0
    assert points[-1] < 1
    assert np.diff(points, append=points[0] + 1).max() < 2.7 / count
    assert [golden(n, 0.5) for n in range(4)] == (golden(np.arange(4), 0.5)).tolist()


def test_every_stratum_has_one_point():
    assert np.floor(stratified(golden(np.arange(100)))).tolist() == list(range(100))
