"""What dry runs take in place of a scorer's choice."""

import pytest

from planner.measuring.choices import spread


@pytest.mark.parametrize("blocks, kept", [(1, 1), (5, 1), (5, 3), (7, 7), (64, 13)])
@pytest.mark.parametrize("causal", [False, True])
def test_each_row_has_itself_and_distinct_blocks_in_order(blocks, kept, causal):
    for row, chosen in enumerate(spread(blocks, kept, causal).tolist()):
        there = [block for block in chosen if block >= 0]
        assert len(there) == (min(kept, row + 1) if causal else kept)
        assert chosen == there + [-1] * (kept - len(there))
        assert there == sorted(set(there))
        assert row in there
        assert max(there) <= (row if causal else blocks - 1)
