"""The combinations that the fast suite keeps: every two values meet, and there are few."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from pairwise import pairwise

SIZES = [(16, 8, 2, 2), (14, 5, 3, 2, 2), (2, 3), (4,), (1, 1, 1)]


def rows_of(sizes):
    return [dict(zip("abcdef", values, strict=False)) for values in product(*map(range, sizes))]


def pairs(rows):
    return {pair for row in rows for pair in combinations(row.items(), 2)}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_two_values_that_meet_in_a_row_meet_in_one_that_is_kept(sizes):
    rows = rows_of(sizes)
    some = [row for number, row in enumerate(rows) if number % 7]  # not every combination need be there
    for given in (rows, some):
        assert pairs(given[number] for number in pairwise(given)) == pairs(given)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_few_are_kept_and_the_same_each_time(sizes):
    """At least the product of the two longest is needed."""
    least = sorted(sizes)[-1] * (sorted(sizes)[-2] if len(sizes) > 1 else 1)
    kept = pairwise(rows_of(sizes))
    assert least <= len(kept) <= 1.2 * least
    assert kept == pairwise(rows_of(sizes))
