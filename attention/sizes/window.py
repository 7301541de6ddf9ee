"""Which blocks the rows of local_window and global_local keep.

A row keeps the first `shared` blocks, and those up to `side` blocks away from its own. The first `shared`
rows keep everything. Under a causal mask nothing behind the row's own block is left.
"""

from __future__ import annotations

from attention.config import Edges
from attention.sizes.arrays import Amount, ceil_div, maximum, minimum, where


def token_side(window: Amount, causal: bool) -> Amount:
    """Tokens that a window goes to a side: a causal one looks back by all of them, another one by half of
    them to either side."""
    return window if causal else window // 2


def window_blocks(
    window: Amount, global_tokens: Amount, size: Amount, blocks: Amount, causal: bool, edges: Edges = "block"
) -> tuple[Amount, Amount]:
    """(side, shared) in blocks of `size` tokens. Of a window that ends at a block, what is left of a block
    does not count; of one that ends at a token, blocks that hold a pair count. Of the `global_tokens` that
    begin a sequence the last one's block counts whole; local_window has none."""
    tokens = token_side(window, causal)
    side = minimum(ceil_div(tokens, size) if edges == "token" else tokens // size, blocks)
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
