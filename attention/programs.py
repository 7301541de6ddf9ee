"""Which tiles are an attention's. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from attention import block_sparse, dilated, token_window
from attention.config import AttentionConfig
from attention.layout import Layout
from attention.ops.program import Tile
from attention.sizes.row_bounds import Rows, rows_of
from attention.sizes.shape import Shape
from attention.sizes.token_tiles import token_window_of


def tiles_of(
    config: AttentionConfig, shape: Shape, layout: Callable[[], Layout]
) -> Callable[[Shape], Iterable[Tile]]:
    """What makes the tiles of a config's attention for this shape, or for its backward pass. `layout` gives
    its layout, where it has one, and is asked anew each time that tiles are made. Not of adaptive attention,
    which depends on values."""
    if config.token_edges:
        return partial(token_window.tiles, token_window_of(config, shape.causal))
    if config.variant == "block_sparse":
        return partial(_of_layout, layout, rows_of(config, shape.seq, shape.causal))
    branches = ((shape.seq, 1),) if config.variant == "dense" else shape.within(config.branches)
    return partial(dilated.tiles, branches)


def _of_layout(layout: Callable[[], Layout], rows: Rows, shape: Shape) -> Iterator[Tile]:
    return block_sparse.tiles(layout(), rows, shape)
