"""FlexAttention's lists of blocks: their bytes, and where they are few enough. Imports no torch."""

from __future__ import annotations

from attention.config import AttentionConfig, PatternType
from attention.sizes.arrays import Count, ceil_div, maximum, up
from attention.sizes.flex_tiles import SMALLEST
from attention.sizes.row_bounds import Rows
from attention.sizes.shape import Windows

FLEX_SHARE = 16
"""`backend="auto"` takes FlexAttention where its lists are at most one such part of q, k, v and out."""


def flex_takes_blocks(size: Count) -> Count:
    """1 if FlexAttention takes blocks of so many tokens, with the options of `attention.sizes.flex_tiles`: a
    power of two from 16; else 0."""
    return (size >= SMALLEST) * (size & (size - 1) == 0) * 1


def unfit_config(config: AttentionConfig) -> str | None:
    """Why FlexAttention computes no such attention, on any card; None if it does."""
    if config.variant != "block_sparse":
        return f"variant {config.variant!r} is computed by views or lists of its own"
    assert config.pattern is not None
    if config.token_edges:
        return "edges='token' is computed by kernels' own windows, or by views"
    block = config.pattern.block_size
    if not flex_takes_blocks(block):
        return f"block_size must be a power of two from {SMALLEST}, got {block}"
    return None


def auto_leaves_flex(kind: PatternType | None, windows: Windows) -> bool:
    """Whether `backend="auto"` makes a pattern of whole calls, by the kernel's own windows, not of lists."""
    return windows == "any" and kind != "dilated_sparse"


def flex_list_bytes(rows: Rows, seq: Count, unit: int = 1) -> Count:
    """Bytes of FlexAttention's lists of blocks, at most: int32, by query rows and by key rows, of partial and
    of full blocks, each a count and a row as wide as the widest; see `attention.ops.flex.block_lists`. All
    batch items share them. With a global block, which all rows see, they grow with the square of `seq`.
    Each is rounded up to `unit`."""
    blocks = ceil_div(seq, rows.size)
    # The counts are four, and of a row's blocks one at most is partial, by queries and by keys.
    narrow, wide = 4 * blocks, (maximum(rows.span, rows.lists), rows.seen)
    return 6 * up(narrow, unit) + sum(up(narrow * width, unit) for width in wide)


def flex_is_lean(rows: Rows, seq: Count, floor: Count) -> Count:
    """1 if FlexAttention's lists are at most their share of `floor`, the bytes of q, k, v and out of the
    whole batch, else 0."""
    return (FLEX_SHARE * flex_list_bytes(rows, seq) <= floor) * 1
