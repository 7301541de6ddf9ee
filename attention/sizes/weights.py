"""Bytes that computing attention weights reserves: closed forms that the module and the planner share. No
torch.

Letters: n active blocks a head, b tokens a block, D channels, w bytes of a number in sums. Weights are
computed for some active blocks of all heads at a time. Sizes are ints, or NumPy arrays for many at once.
"""

from __future__ import annotations

from attention.sizes.arrays import Count, maximum, minimum
from attention.sizes.shape import Shape


def weights_step(shape: Shape, size: Count, active: Count, branches: int) -> Count:
    """Active blocks of all heads whose weights are computed at a time: their scratch fits the workspace."""
    of_one = 0 * size
    for nbytes in _sizes(shape, size, 1 + 0 * size, branches).values():
        of_one = of_one + nbytes
    return minimum(active, maximum(shape.workspace // of_one, 1))


def weights_sizes(shape: Shape, size: Count, active: Count, branches: int) -> dict[str, Count]:
    """Bytes of each buffer; `branches`: of a dilated config, else 0."""
    return _sizes(shape, size, weights_step(shape, size, active, branches), branches)


def _sizes(shape: Shape, size: Count, step: Count, branches: int) -> dict[str, Count]:
    tokens = shape.heads * step * size
    pairs = tokens * size
    rows = tokens * shape.head_dim
    counted = branches > 1
    return {
        "q": rows * shape.wide,
        "k": rows * shape.wide,
        "row": rows * shape.itemsize * (shape.itemsize < shape.wide),
        "place": size * 8,
        "index": tokens * 8,
        "query": tokens * 8,
        "key": tokens * 8,
        "lse": tokens * shape.wide,
        "past": tokens,
        "scores": pairs * shape.wide,
        "hidden": pairs,
        "query segment": tokens * 8 * (branches > 0),
        "key segment": tokens * 8 * (branches > 0),
        "offset": tokens * 8 * (branches > 0),
        "apart": tokens * (branches > 0),
        "meets": pairs * (branches > 0),
        "times": pairs * counted,
        "factor": pairs * shape.wide * counted,
    }
