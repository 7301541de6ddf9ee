"""What a pool and a cache of masks keep between the parts of a rank. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from attention.sizes.arena import bucket_bytes
from planner.memory.plans import tiles
from planner.memory.table import PlanTable

MaskSize = tuple[int, int, bool, int]
"""(queries, keys, whether it is a band, bytes of a number)."""
End = Callable[[], None]
"""Ends the use of a buffer."""


class Kept:
    """What a pool and a cache of masks hold: of the parts of a rank before this one, and of calls before."""

    def __init__(self, pool: str, pool_bytes: int | None, cache_entries: int, cache_bytes: int) -> None:
        self._pool, self._pool_bytes = pool, pool_bytes
        self._cache_entries, self._cache_bytes = cache_entries, cache_bytes
        self.arenas: list[int] = []
        """Bytes of each buffer, the one used last at the end."""
        self.masks: dict[MaskSize, int] = {}
        """Bytes of each that is kept, the one used last at the end."""
        self._seen: set[MaskSize] = set()

    def before(self, table: PlanTable) -> None:
        """Adds what calls before have left."""
        for nbytes in self.arenas:
            table.add(_arena_name(nbytes), "memory_pool", nbytes, "a pool's buffer, of the call before")
        for mask, nbytes in self.masks.items():
            table.add(_mask_name(mask), "pattern_cache", nbytes, "attention/sizes/tiles.py Extent.mask")

    def begin(self, table: PlanTable, own: int, other: int, seq: int, formula: str) -> End:
        """Adds a pass's arena over so many keys, `other` being that of the training step's other pass;
        returns what ends its use."""
        pooled = bool(tiles.pooled(self._pool, self._pool_bytes, seq))
        nbytes = int(bucket_bytes(max(own, other))) if pooled else own
        if not own:
            return lambda: None
        if pooled and nbytes in self.arenas:
            self.arenas.remove(nbytes)  # to be the last
            self.arenas.append(nbytes)
            return lambda: None
        table.add("arena", "workspace", nbytes, formula)

        def end() -> None:
            table.free("arena")
            if not pooled or (self._pool_bytes is not None and nbytes > self._pool_bytes):
                return
            table.phase("arena kept")
            self.arenas.append(nbytes)
            table.add(_arena_name(nbytes), "memory_pool", nbytes, "a pool's buffer, for what follows")
            while self._pool_bytes is not None and sum(self.arenas) > self._pool_bytes:
                table.free(_arena_name(self.arenas.pop(0)))

        return end

    def mask(self, table: PlanTable, mask: MaskSize) -> End:
        """Adds a pass's mask; returns what ends its use."""
        queries, keys, _, number = mask
        nbytes = queries * keys * number
        if not nbytes or mask in self.masks:
            return lambda: None
        formula = "attention/sizes/tiles.py Extent.mask"
        if self._cache_entries and mask in self._seen and nbytes <= self._cache_bytes:
            self.masks[mask] = nbytes
            table.add(_mask_name(mask), "pattern_cache", nbytes, formula)
            return lambda: None
        self._seen.add(mask)
        table.add("mask", "masks", nbytes, formula)
        return lambda: table.free("mask")


def _arena_name(nbytes: int) -> str:
    return f"arena of {nbytes:,} bytes kept by the pool"


def _mask_name(mask: MaskSize) -> str:
    return f"mask of {mask[0]:,} by {mask[1]:,}, kept"
