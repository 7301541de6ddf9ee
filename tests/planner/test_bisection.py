"""The largest number that fits."""

from __future__ import annotations

import pytest

from planner.bisection import largest


@pytest.mark.parametrize("limit", range(1, 20))
def test_the_largest_that_fits_is_found_in_few_steps(limit):
    asked = []

    def fits(number):
        asked.append(number)
        return number <= limit

    assert largest(fits, 0, 20) == limit
    assert len(asked) <= 5
    assert not {0, 20} & set(asked)


def test_where_none_between_fits_it_is_the_low_end():
    assert largest(lambda number: False, 3, 100) == 3
    assert largest(lambda number: True, 3, 100) == 99
    assert largest(lambda number: True, 3, 4) == 3
