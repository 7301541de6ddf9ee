"""How a recommendation's figures are written."""

import pytest

from planner.report.text.times import seconds


@pytest.mark.parametrize(
    "value, text",
    [(1751.2, "1,751 s"), (1.234, "1.23 s"), (0.0456, "45.6 ms"), (789e-6, "789 us"), (1e-9, "0.001 us")],
)
def test_seconds_are_written_in_their_unit_and_without_exponents(value, text):
    assert seconds(value) == text
