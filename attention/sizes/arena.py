"""Buffers of a pass in one arena, and the size classes of a pool."""

from __future__ import annotations

from collections.abc import Mapping

from attention.sizes.arrays import Count, floor_power_of_two, maximum, up

ALIGNMENT = 256
"""Buffers of an arena begin at multiples of this many bytes."""


POOL_FROM_TOKENS = 4096
"""Sequence length from which `pool="auto"` keeps buffers; below it, allocating is as fast."""


SMALLEST_BUCKET = 4096


def bucket_bytes(nbytes: Count) -> Count:
    """The size class of a pool's buffer: at least 4,096, 16 steps per power of two, waste under 7%."""
    return maximum(
        up(nbytes, floor_power_of_two(maximum(nbytes - 1, SMALLEST_BUCKET)) // 16), SMALLEST_BUCKET
    )


def arena_bytes(sizes: Mapping[str, Count]) -> Count:
    """Bytes of all buffers together, each at its place."""
    total: Count = 0
    for nbytes in sizes.values():
        total = total + up(nbytes, ALIGNMENT)
    return total
