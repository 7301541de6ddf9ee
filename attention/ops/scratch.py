"""The buffers of one pass over a program: taken from the pool when first needed, used by every
tile, and handed back together."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import TracebackType

import torch
from torch import Tensor

from attention.pool import BufferPool


class Scratch:
    """Buffers by name. `get` with a name ends the use of what it gave for that name before."""

    def __init__(self, pool: BufferPool, device: torch.device) -> None:
        self._pool, self._device = pool, device
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor."""
        size, key = prod(shape), (name, dtype)
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            if flat is not None:
                flat = None  # frees the smaller buffer before the larger one is made
                self._pool.give(self._flat.pop(key), keep=False)
            flat = self._flat[key] = self._pool.take((size,), dtype, self._device)
        return flat[:size].view(shape)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._flat:
            self._pool.give(self._flat.popitem()[1])
