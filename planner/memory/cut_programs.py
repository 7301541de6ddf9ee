"""Programs of tiles that are cut: to the last queries of a sequence, and to documents. Imports no torch.

Of one config the sizes come from the program's own calls, as the library has them. Of columns of candidates
they are bounded in closed form, by the calls of the program that nothing is cut from: of short sequences far
too much, of long ones by a hundredth. Backward cuts a smaller call otherwise, by which 4 of 361 random cases
were above it, by up to 24 KB.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from attention.config import AttentionConfig
from attention.sizes.arrays import Count, maximum, minimum
from attention.sizes.shape import Shape
from attention.sizes.tiles import Extent, Kind
from planner.workload import Workload

if TYPE_CHECKING:
    from attention.sections import CutProgram

ExtentOf = Callable[[Shape], Extent]
"""The largest sizes of a program's calls, cut for a shape: that of the forward pass or of backward."""


def cut_program(config: AttentionConfig, workload: Workload, shape: Shape) -> CutProgram:
    """One config's program, as `attention.module.Attention` cuts it; `shape` of the forward pass."""
    # NumPy, which plans of whole programs do not need.
    from attention.layout import build_layout
    from attention.programs import tiles_of
    from attention.sections import CutProgram

    layout = cache(lambda: build_layout(config, shape.seq, shape.causal))
    lengths = (workload.documents or (workload.seq,),)
    return CutProgram(tiles_of(config, shape, layout), lengths, int(shape.origin))


def bounded(extent_of: ExtentOf) -> ExtentOf:
    """The sizes of columns of candidates, from the closed form of programs that nothing is cut from: no call
    has more queries than there are, and any may be merged into what came before it."""

    def bound(shape: Shape) -> Extent:
        extent = extent_of(shape)
        kinds = tuple(_at_most(kind, shape.queries) for kind in extent.kinds)
        return extent._replace(tokens=minimum(extent.tokens, shape.queries), kinds=kinds, merges=1)

    return bound


def _at_most(kind: Kind, queries: Count) -> Kind:
    """A kind of calls of so many queries in all, or fewer."""
    few = minimum(kind.queries, queries)
    views = minimum(kind.views, maximum(queries // maximum(few, 1), 1))
    sizes = tuple((minimum(some, views), minimum(tokens, few), keys) for some, tokens, keys in kind.sizes)
    return kind._replace(queries=few, views=views, later=views * few, sizes=sizes, moves=False)
