"""How large the parts are in which learned sinks join the softmax. Imports no torch."""

from __future__ import annotations

from attention.sizes.arrays import Count, maximum, minimum
from attention.sizes.shape import Shape

SHARE = 16
"""A copy of a slab's output in single precision takes at most one part in so many of the workspace."""


def slab_tokens(shape: Shape) -> Count:
    """Queries of a batch item that are worked on at a time."""
    token = shape.heads * shape.head_dim * shape.wide
    return minimum(maximum(shape.workspace // (SHARE * token), 1), shape.queries)
