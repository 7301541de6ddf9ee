"""Which blocks the rows of local_window and global_local keep.

A row keeps the first `shared` blocks, and those up to `side` blocks away from its own. The first `shared`
rows keep everything. Under a causal mask nothing behind the row's own block is left.
"""

from __future__ import annotations

from attention.sizes.arrays import Amount, ceil_div, maximum, minimum, where


def window_blocks(
    window: Amount, global_tokens: Amount, size: Amount, blocks: Amount, causal: bool
) -> tuple[Amount, Amount]:
    """(side, shared) in blocks of `size` tokens. A causal window looks back by all its tokens, another one
    by half of them to either side; what is left of a block does not count. Of the `global_tokens` that begin
    a sequence the last one's block counts whole; local_window has none."""
    side = minimum(window // (size if causal else 2 * size), blocks)
    return side, minimum(ceil_div(global_tokens, size), blocks)


def window_spans(
    row: Amount, side: Amount, shared: Amount, blocks: Amount, causal: bool
) -> tuple[tuple[Amount, Amount], tuple[Amount, Amount]]:
    """Row `row` of `blocks` keeps the blocks start <= c < stop of both, which are ascending and disjoint:
    the second holds the row's own block; the first, often empty, holds the shared blocks apart from it.

    Without a causal mask these are also the rows that keep block `row`.
    """
    start = where(row < shared, 0, maximum(row - side, 0))
    stop = row + 1 if causal else where(row < shared, blocks, minimum(row + side + 1, blocks))
    return (0, minimum(shared, start)), (start, stop)
