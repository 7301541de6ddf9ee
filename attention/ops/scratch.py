"""The buffers of one pass over a program: one arena from the pool, taken when the pass begins, used by
every tile, and handed back at its end. What lies in it is known before (`attention/sizes/tiles.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import TracebackType

import torch
from torch import Tensor

from attention.pool import BufferPool, Buffers
from attention.sizes.arena import ALIGNMENT, arena_bytes


class Scratch:
    """Buffers by name, of at most the bytes that `sizes` gives each. `get` with a name ends the use of
    what it gave for that name before. A training step's two passes ask for arenas of one size, so that a
    pool keeps one: `other` is what the other pass reserves."""

    def __init__(
        self, pool: BufferPool, device: torch.device, sizes: Mapping[str, int], other: int = 0
    ) -> None:
        self._pool = pool
        self._places: dict[str, tuple[int, int]] = {}
        self._last: dict[str, Tensor] = {}
        self._arena: Tensor | None = None
        if not any(sizes.values()):
            return
        end = 0
        for name, nbytes in sizes.items():
            self._places[name] = (end, nbytes)
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        assert end == arena_bytes(sizes)
        if pool.keeps:
            end = max(end, other)
        self._arena = pool.take((end,), torch.uint8, device)

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        last = self._last.get(name)
        if last is not None and last.dtype == dtype and last.shape == tuple(shape):
            return last
        begin, room = self._places.get(name, (0, 0))
        nbytes = prod(shape) * dtype.itemsize
        if nbytes > room or self._arena is None:
            raise AssertionError(f"{name} {list(shape)} takes {nbytes} bytes of the {room} reserved for it")
        self._last[name] = self._arena[begin : begin + nbytes].view(dtype).view(shape)
        return self._last[name]

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._last.clear()
        if self._arena is not None:
            self._pool.give(self._arena)
            self._arena = None


class FreshScratch(Scratch):
    """Every buffer is allocated when it is asked for: of passes that are too rare to be planned for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(Buffers.OFF, device, {})
        self._device = device

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)
