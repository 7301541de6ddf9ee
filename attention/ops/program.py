"""What is to be computed, as index arithmetic: spans, gathers, calls and tiles. Holds no tensors.

An attention over one batch item is a sequence of *tiles*. A tile finishes the queries of a token
range by *calls*; a call is one fused SDPA over queries and keys that are *spans* (affine views) or
*gathers* (lists of blocks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal

from attention.sizes.shape import Shape, Span

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


FEW_CALLS, FEW_BLOCKS = 64, 4096
"""Calls of a program that is kept, and blocks that they list: some tens of kilobytes."""
Mask = Literal["none", "causal", "diagonal", "tail", "band"]
"""`none`: every query sees every key. `causal`: query t sees keys 0..t of an equally long span.
`diagonal`: the last block of keys is the queries' own, and causal. `tail`: of a gather, positions
past the end of the sequence are hidden. `band`: query t sees the keys that are at columns t..t + `band` of
the program's mask."""


@dataclass(frozen=True, slots=True)
class Gather:
    """Key blocks by list. `blocks` is [N, A], the same for all heads, or [N, H, A], one list a query
    head; ascending. Position t of view n is token `blocks[n, t // size] * size + t % size`."""

    blocks: npt.NDArray[np.int64]
    size: int
    heads: int

    @property
    def unit(self) -> int:
        """Keys are cut at multiples of this."""
        return self.size

    @property
    def length(self) -> int:
        """Keys of a view."""
        return int(self.blocks.shape[-1]) * self.size

    def cut(self, begin: int, end: int) -> Gather:
        """Positions begin..end of every view, both multiples of `size`."""
        blocks = self.blocks[..., begin // self.size : end // self.size]
        return Gather(blocks, self.size, self.heads)


@dataclass(frozen=True, slots=True)
class Call:
    """Fused attention of each of `queries` (equal in everything but heads) over the same keys."""

    queries: tuple[Span, ...]
    keys: Span | Gather
    kind: str
    """Name of the `attention.sizes.tiles.Kind` of calls by whose largest backward cuts this one, so that a
    smaller one never asks for more."""
    mask: Mask = "none"
    first: bool = False
    """Whether nothing came before in these queries of a merging tile: the part is then taken as it is."""
    column: int = 0
    """Of the first key, in the program's mask, under a `band` mask."""
    band: int = 0
    """Columns of that mask from the first to the last that a query sees."""

    def seen(self, t: int) -> tuple[int, int]:
        """(first, one past the last) key that query t sees under a `band` mask."""
        first = t - self.column
        return max(first, 0), min(first + self.band + 1, self.keys.length)

    @property
    def edge(self) -> int:
        """Under a `causal` or `diagonal` mask query t sees keys 0..t + edge."""
        if self.mask == "causal":
            return 0
        own = self.keys.size if isinstance(self.keys, Gather) else self.queries[0].length
        return self.keys.length - own

    def columns(self, width: int) -> Iterator[tuple[int, Span | Gather]]:
        """The keys in parts of `width`, whose sums of dk and dv fit the workspace, each with the position at
        which it begins. Views that share no keys need no sums and are not cut."""
        keys = self.keys
        if isinstance(keys, Span) and not keys.overlaps:
            width = keys.length
        for begin in range(0, keys.length, width):
            yield begin, keys.cut(begin, min(begin + width, keys.length))


@dataclass(frozen=True, slots=True)
class Tile:
    """Calls that finish tokens start..stop. `merge`: several calls meet in the same queries, so
    their parts are merged by log-sum-exp; otherwise each (token, head) is in exactly one call."""

    start: int
    stop: int
    calls: tuple[Call, ...]
    merge: bool

    @property
    def masks(self) -> bool:
        """Whether a kernel computes pairs that do not see each other, to hide them afterwards."""
        return any(call.mask in ("causal", "diagonal", "band") for call in self.calls)


class Tiles:
    """The tiles of every batch item, cut for a shape; those of a program of few calls are made once, with
    those of its backward pass."""

    def __init__(
        self, make: Callable[[Shape], Iterable[Tile]] | None = None, *, with_backward: bool = True
    ) -> None:
        """`make` makes them; None: see `made_by`. Without `with_backward` those of the backward pass are made
        when they are asked for."""
        self._make, self._with_backward = make, with_backward
        self._kept: dict[Shape, tuple[Tile, ...]] = {}

    def made_by(self, make: Callable[[Shape], Iterable[Tile]]) -> Tiles:
        """The same program, where what its tiles are made from is to hand. They share what they keep."""
        program = Tiles(make)
        program._kept = self._kept
        return program

    def __contains__(self, shape: Shape) -> bool:
        """Whether it has tiles for the shape, and for its backward pass, without making them."""
        return shape in self._kept

    def __call__(self, _: int, shape: Shape) -> Iterable[Tile]:
        tiles = self._kept.get(shape)
        if tiles is not None:
            return tiles
        assert self._make is not None
        tiles, rest = _begun(self._make(shape))
        if _are_few(tiles) and not self._with_backward:
            self._kept[shape] = tiles
        elif _are_few(tiles):
            backward = _begun(self._make(shape.backward()))[0]
            if _are_few(backward):
                self._kept[shape.backward()] = backward
                self._kept[shape] = tiles
        return chain(tiles, rest)


def _begun(tiles: Iterable[Tile]) -> tuple[tuple[Tile, ...], Iterator[Tile]]:
    """(one more tile than few programs have, the rest)."""
    rest = iter(tiles)
    return tuple(islice(rest, FEW_CALLS + 1)), rest


def _are_few(tiles: tuple[Tile, ...]) -> bool:
    calls = [call for tile in tiles for call in tile.calls]
    blocks = sum(call.keys.blocks.size for call in calls if isinstance(call.keys, Gather))
    return max(len(calls), len(tiles)) <= FEW_CALLS and blocks <= FEW_BLOCKS
