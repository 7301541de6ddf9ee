"""How large the parts are in which learned sinks join the softmax. Imports no torch."""

from __future__ import annotations

from attention.sizes.arrays import Count, maximum, minimum
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import floor_bytes

SHARE = 16
"""A copy of a slab's output in single precision takes at most one part in so many of the workspace, and where
an attention is whole calls, of q, k, v and out, if that is more: then slabs are few."""


def slab_tokens(shape: Shape) -> Count:
    """Queries of a batch item that are worked on at a time."""
    token = shape.heads * shape.head_dim * shape.wide
    room = shape.workspace
    if shape.windows != "none":
        room = maximum(room, floor_bytes(shape))
    return minimum(maximum(room // (SHARE * token), 1), shape.queries)
