"""What is to be computed, as index arithmetic: spans, gathers, calls and tiles. Holds no tensors.

An attention over one batch item is a sequence of *tiles*. A tile finishes the queries of a token
range by *calls*; a call is one fused SDPA over queries and keys that are *spans* (affine views) or
*gathers* (lists of blocks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Mask = Literal["none", "causal", "diagonal", "tail"]
"""`none`: every query sees every key. `causal`: query t sees keys 0..t of an equally long span.
`diagonal`: the last block of keys is the queries' own, and causal. `tail`: of a gather, positions
past the end of the sequence are hidden."""


class Span(NamedTuple):
    """An affine set of (token, head) pairs: view n, head h, position t is
    token `start + n * batch_step + t * step` of head `head + h * head_step`."""

    start: int
    length: int
    step: int = 1
    batch: int = 1
    batch_step: int = 0
    head: int = 0
    heads: int = 1
    head_step: int = 1

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + (self.batch - 1) * self.batch_step + (self.length - 1) * self.step + 1

    @property
    def unit(self) -> int:
        """Keys are cut at multiples of this."""
        return 1

    @property
    def overlaps(self) -> bool:
        """Whether views share tokens."""
        return self.batch > 1 and self.batch_step <= (self.length - 1) * self.step

    def cut(self, begin: int, end: int) -> Span:
        """Positions begin..end of every view."""
        return self._replace(start=self.start + begin * self.step, length=end - begin)

    def pick(self, begin: int, end: int, stride: int = 1) -> Span:
        """Views begin, begin + stride, ... below end."""
        count = len(range(begin, end, stride))
        return self._replace(
            start=self.start + begin * self.batch_step, batch=count, batch_step=self.batch_step * stride
        )

    def disjoint(self) -> Iterator[tuple[slice, Span]]:
        """The views in groups that do not overlap, with each group's place in the batch."""
        reach = (self.length - 1) * self.step + 1
        groups = self.batch if self.batch_step == 0 else min(self.batch, -(-reach // self.batch_step))
        for first in range(groups):
            yield slice(first, None, groups), self.pick(first, self.batch, groups)


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
        return Gather(self.blocks[..., begin // self.size : end // self.size], self.size, self.heads)


@dataclass(frozen=True, slots=True)
class Call:
    """Fused attention of each of `queries` (equal in everything but heads) over the same keys."""

    queries: tuple[Span, ...]
    keys: Span | Gather
    mask: Mask = "none"
    first: bool = False
    """In a merging tile: nothing came before in these queries, so the part is taken as it is."""

    @property
    def edge(self) -> int:
        """Under a `causal` or `diagonal` mask query t sees keys 0..t + edge."""
        if self.mask == "causal":
            return 0
        own = self.keys.size if isinstance(self.keys, Gather) else self.queries[0].length
        return self.keys.length - own

    def columns(self, shape: Shape) -> Iterator[tuple[int, Span | Gather]]:
        """The keys in parts whose dk and dv fit `shape.column_tokens` if their unit allows, those that
        views share counted once, each part with the position at which it begins. A `causal` mask ties
        keys to queries: those stay whole."""
        keys, unit, most = self.keys, self.keys.unit, shape.column_tokens
        if isinstance(keys, Gather):
            lists = keys.blocks.size // keys.blocks.shape[-1]
            if keys.blocks.ndim == 3:  # lists of one head each
                width = most * shape.kv_heads // lists
            elif len(np.unique(keys.blocks)) * unit <= most:
                width = keys.length
            else:
                width = most // lists
        elif keys.overlaps:
            width = most - (keys.batch - 1) * keys.batch_step
        else:
            width = most // keys.batch
        width = max(width // unit, 1) * unit
        if self.mask == "causal" or width >= keys.length:
            yield 0, keys
            return
        even = -(-keys.length // (-(-keys.length // width) * unit)) * unit
        for begin in range(0, keys.length, even):
            yield begin, keys.cut(begin, min(begin + even, keys.length))


@dataclass(frozen=True, slots=True)
class Tile:
    """Calls that finish tokens start..stop. `merge`: several calls meet in the same queries, so
    their parts are merged by log-sum-exp; otherwise each (token, head) is in exactly one call."""

    start: int
    stop: int
    calls: tuple[Call, ...]
    merge: bool


class Shape(NamedTuple):
    """What a program depends on besides its config: sizes of one call and the limits of a chunk."""

    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    causal: bool
    workspace: int
    """Bytes of scratch that a tile may hold."""
    fast: int
    """Bytes a chunk should stay within to be fast (the CPU's cache); at most `workspace`."""
    packs: bool
    """Whether the kernel copies the keys and values it is given (a CPU's matrix unit): they count as
    scratch."""
    widens: bool
    """Whether backward gives the kernel single-precision copies (16 bit on other CPUs)."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of q or o."""
        return self.heads * self.head_dim * self.itemsize

    @property
    def kv_token_bytes(self) -> int:
        return self.kv_heads * self.head_dim * self.itemsize

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile, a power of two: its part, what the kernel copies, the accumulator and a
        temporary in single precision fit in the workspace; where backward widens, q, out and its
        gradient too."""
        per_token = self.token_bytes + (2 + 3 * self.widens) * self.heads * self.head_dim * max(
            self.itemsize, 4
        )
        per_token += 2 * self.kv_token_bytes * self.packs
        return 1 << (max(self.workspace // per_token, 1).bit_length() - 1)

    @property
    def list_bytes(self) -> int:
        """Bytes of keys and values that one call may gather; backward holds their gradients beside
        them, in up to twice as many bytes."""
        return self.workspace * 3 // 8

    @property
    def pack_bytes(self) -> int:
        """Bytes of keys and values that a kernel may copy in one call."""
        return self.workspace // 2

    @property
    def column_tokens(self) -> int:
        """Key tokens that backward works on at a time: their dk and dv in single precision take three
        eighths of the workspace, and so do k and v where those are widened too."""
        return max(self.list_bytes // (2 * self.kv_heads * self.head_dim * max(self.itemsize, 4)), 1)

    def key_ranges(self, keys: Span, tail: int = 1) -> tuple[Span, ...]:
        """The span's keys, cut so that what a kernel copies of each part fits `pack_bytes`. The last part
        has at least `tail` keys."""
        if not self.packs:
            return (keys,) if keys.length else ()
        limit = max(self.pack_bytes // (2 * self.kv_token_bytes * keys.batch), 1)
        last = max(keys.length - max(limit, tail), 0)
        edges = [*range(0, last, limit), last, keys.length]
        return tuple(keys.cut(begin, end) for begin, end in pairwise(edges) if end > begin)

    def within(self, branches: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """The branches with lengths and rates that this sequence can tell apart: a segment longer than
        it, or a rate beyond all its positions and heads, means the same as one just as large."""
        most = max(self.seq, self.heads)
        return tuple((min(length, self.seq), min(rate, most)) for length, rate in branches)

    def head_groups(self) -> tuple[tuple[int, int], ...]:
        """(first query head, step) of the groups whose g-th member reads kv head g."""
        repeat = self.heads // self.kv_heads
        return tuple((first, repeat) for first in range(repeat))
