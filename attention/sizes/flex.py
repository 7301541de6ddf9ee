"""FlexAttention's lists of blocks: their bytes, and where they are few enough. Imports no torch."""

from __future__ import annotations

from attention.sizes.arrays import Count, ceil_div, maximum
from attention.sizes.row_bounds import Rows

FLEX_CAPABILITY = (8, 0)
"""Compute capability from which compiled FlexAttention runs."""

FLEX_SHARE = 16
"""`backend="auto"` takes FlexAttention where its lists are at most one such part of q, k, v and out."""


def flex_takes_blocks(size: Count) -> Count:
    """1 if FlexAttention takes blocks of so many tokens, a power of two from 16; else 0."""
    return (size >= 16) * (size & (size - 1) == 0) * 1


def flex_list_bytes(rows: Rows, seq: Count) -> Count:
    """Bytes of FlexAttention's lists of blocks, at most: int32, by query rows and by key rows, of partial and
    of full blocks, each a count and a row as wide as the widest; see `attention.ops.flex.block_lists`. All
    batch items share them. With a global block, which all rows see, they grow with the square of `seq`."""
    # The counts are four, and of a row's blocks one at most is partial, by queries and by keys.
    return 4 * ceil_div(seq, rows.size) * (6 + maximum(rows.span, rows.lists) + rows.seen)


def flex_is_lean(rows: Rows, seq: Count, floor: Count) -> Count:
    """1 if FlexAttention's lists are at most their share of `floor`, the bytes of q, k, v and out of the
    whole batch, else 0."""
    return (FLEX_SHARE * flex_list_bytes(rows, seq) <= floor) * 1
