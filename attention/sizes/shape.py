"""The shape of a call, and how it is cut into views and tiles. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from attention.sizes.arrays import Count, floor_power_of_two, maximum, minimum, where
from attention.sizes.row_bounds import Rows

Windows = Literal["none", "causal", "any"]
"""Of a kernel. `any`: so many tokens before and behind a query, for fewer kv heads than heads too (flash
attention on CUDA). `causal`: so many before it under a causal mask, for as many kv heads as heads (efficient
attention there)."""
MOST_VIEWS = 65_535
"""CUDA grids end here: views of one call."""


WIDE = 4
"""Rows share what they see if it is at least this many times as many blocks as there are rows."""


class Span(NamedTuple):
    """An affine set of (token, head) pairs: view n, head h, position t is
    token `start + n * batch_step + t * step` of head `head + n * batch_head + h * head_step`."""

    start: int
    length: int
    step: int = 1
    batch: int = 1
    batch_step: int = 0
    head: int = 0
    heads: int = 1
    head_step: int = 1
    batch_head: int = 0

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
            start=self.start + begin * self.batch_step,
            batch=count,
            batch_step=self.batch_step * stride,
            head=self.head + begin * self.batch_head,
            batch_head=self.batch_head * stride,
        )

    def disjoint(self) -> Iterator[tuple[slice, Span]]:
        """The views in groups that do not overlap, with each group's place in the batch."""
        reach = (self.length - 1) * self.step + 1
        groups = self.batch if self.batch_step == 0 else min(self.batch, -(-reach // self.batch_step))
        for first in range(groups):
            yield slice(first, None, groups), self.pick(first, self.batch, groups)


class Shape(NamedTuple):
    """The sizes that a program depends on besides its config: those of one call, and limits of a chunk. Every
    field but the flags may be a NumPy array, for the planner's sake."""

    seq: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    itemsize: int
    causal: bool
    workspace: Count
    """Bytes of scratch that a pass may hold."""
    chunk: Count
    """Query tokens of all heads that a block-sparse call works on; see `chunk_tokens`."""
    packs: bool
    """Whether the kernel copies the keys and values it is given (a CPU's matrix unit): they count as
    scratch."""
    widens: bool
    """Whether backward gives the kernel single-precision copies (16 bit on a CPU)."""
    windows: Windows = "none"
    """The windows that the kernel takes, if any: then an attention is whole calls where it can be."""
    groups: bool = False
    """Whether the kernel takes fewer kv heads than heads: then a tile's calls have all heads at once, not
    one query head of each group after the other."""
    cudnn_from: int = 0
    """Queries, and keys, from which whole calls go to cuDNN's attention; 0 for none."""
    origin: Count = 0
    """Token of the sequence at which its queries begin; they go to its end."""
    first_head: Count = 0
    """Which of the attention's query heads its first one is, where it has some of them alone."""

    @property
    def queries(self) -> Count:
        """Tokens that are queries."""
        return self.seq - self.origin

    @property
    def call_heads(self) -> Count:
        """Query heads of a tile's call."""
        return self.heads if self.groups else self.kv_heads

    @property
    def wide(self) -> int:
        """Bytes of a number that sums are kept in: single precision, or double for float64."""
        return max(self.itemsize, 4)

    @property
    def token_bytes(self) -> Count:
        """Bytes of one token of q or o."""
        return self.heads * self.head_dim * self.itemsize

    @property
    def kv_token_bytes(self) -> Count:
        return self.kv_heads * self.head_dim * self.itemsize

    @property
    def tile_tokens(self) -> Count:
        """Tokens of a dilated attention's tile, a power of two: its part, what the kernel copies, the
        accumulator and a copy of the part in single precision fit in the workspace; where backward
        widens, q, out and its gradient too."""
        per_token = self.token_bytes + (2 + 3 * self.widens) * self.heads * self.head_dim * self.wide
        per_token += 2 * self.kv_token_bytes * self.packs
        return floor_power_of_two(maximum(self.workspace // per_token, 1))

    @property
    def list_bytes(self) -> Count:
        """Bytes of keys and values that one call may gather; backward holds their gradients beside
        them, in up to twice as many bytes."""
        return self.workspace * 3 // 8

    @property
    def pack_bytes(self) -> Count:
        """Bytes of keys and values that a kernel may copy in one call."""
        return self.workspace // 2

    @property
    def column_tokens(self) -> Count:
        """Key tokens that backward works on at a time: their dk and dv in single precision take three
        eighths of the workspace, and so do k and v where those are widened too."""
        return maximum(self.list_bytes // (2 * self.kv_heads * self.head_dim * self.wide), 1)

    @property
    def column_rows(self) -> Count:
        """`column_tokens` in rows of one kv head."""
        return self.column_tokens * self.kv_heads

    @property
    def piece_rows(self) -> Count:
        """Keys of all heads together whose dk and dv the backward kernel returns at once: what stays in
        a CPU's cache."""
        return maximum(self.workspace // 4 // (2 * self.head_dim * self.wide), 1)

    def backward(self) -> Shape:
        """This shape for the backward pass: its calls have fewer queries, where several views' keys would be
        too many for a column."""
        return self._replace(chunk=minimum(self.chunk, maximum(self.column_tokens // 2, 1)), packs=False)

    def chunk_views(self, queries: Count) -> Count:
        """Views of so many queries that a call takes together."""
        return minimum(maximum(self.chunk // queries, 1), MOST_VIEWS)

    def chunk_rows(self, rows: Rows) -> Count:
        """Rows of blocks that a call takes together; where lists are gathered, as many as those allow."""
        chunk = self.chunk_views(minimum(rows.size, self.seq))
        block_bytes = 2 * rows.size * (self.token_bytes if rows.own else self.kv_token_bytes)
        listed = maximum(self.list_bytes // (maximum(rows.lists, 1) * block_bytes), 1)
        return where(rows.lists > 0, minimum(chunk, listed), chunk)

    def span_rows(self, rows: Rows) -> Count:
        """Rows that a call over overlapping views takes together: what the kernel copies of them fits.
        Where no rows slide, or those that do are cut by what they share, others go one by one."""
        keys = maximum(minimum(rows.span * rows.size, self.seq), 1)
        views = minimum(self.chunk_rows(rows), maximum(self.pack_tokens(1) // keys, 1))
        return where((rows.slides > 0) * (1 - self.goes_wide(rows)), views, 1)

    def list_blocks(self, rows: Rows) -> Count:
        """Blocks of a list that a call gathers; a longer one is cut."""
        block_bytes = 2 * rows.size * (self.token_bytes if rows.own else self.kv_token_bytes)
        return minimum(maximum(rows.lists, 1), maximum(self.list_bytes // block_bytes, 1))

    def full_blocks(self, size: Count) -> Count:
        """Blocks that a row of `size` queries may see at most: under a causal mask only the last, short row
        sees the last, short block."""
        blocks = maximum(self.seq // size, 1)
        return blocks if self.causal else blocks + 1

    def pack_tokens(self, views: Count) -> Count:
        """Keys a view that a call may have, so that what the kernel copies of them fits."""
        if not self.packs:
            return 0 * views + self.seq * MOST_VIEWS
        return maximum(self.pack_bytes // (2 * self.kv_token_bytes * views), 1)

    def goes_wide(self, rows: Rows) -> Count:
        """1 if sliding rows are worth cutting by what they share, else 0."""
        together = self.chunk_rows(rows)
        return 1 * (rows.slides > 0) * (together > 1) * (rows.span >= WIDE * together)

    def mask_blocks(self, rows: Rows) -> Count:
        """Blocks of keys, the queries' own the last, that a causal call has under an additive mask, whose
        bytes are bounded; 0 if one block is the most: then the own block is a call under the kernel's
        own causal mask."""
        blocks = minimum(
            maximum(rows.span, rows.lists), self.workspace // 16 // (rows.size * rows.size * self.wide)
        )
        return blocks * ((blocks > 1) | ((blocks == 1) & (rows.lists == 1)))

    def gather_width(self, lanes: Count, unit: Count) -> Count:
        """Keys of a list that backward gathers at a time; `lanes`: rows of one kv head a position."""
        return maximum(self.column_rows // lanes // unit, 1) * unit

    @property
    def overlap_width(self) -> Count:
        """Keys of overlapping views that backward works on at a time: views begin within half a column."""
        return maximum(self.column_tokens // 2, 1)

    def piece(
        self,
        heads: tuple[Count, Count],
        views: Count,
        queries: Count,
        keys: Count,
        unit: Count = 1,
        whole: bool = False,
    ) -> tuple[Count, Count]:
        """(views, keys) of a call, of so many query and kv heads, that the backward kernel is given at once.
        Keys are cut if their dk and dv are more than `piece_rows`, unless they must stay `whole`; views are
        taken together as far as what the kernel returns is no more than two chunks."""
        lanes, kv_lanes = heads
        limit = self.piece_rows // kv_lanes
        width = keys if whole else minimum(keys, maximum(limit // unit, 1) * unit)
        few = maximum(
            minimum(2 * self.chunk * self.heads // (2 * keys * kv_lanes + queries * lanes), limit // keys), 1
        )
        return where(width < keys, 1, minimum(few, views)), width

    def key_ranges(self, keys: Span) -> tuple[Span, ...]:
        """The span's keys, cut so that what a kernel copies of each part fits `pack_bytes`."""
        limit = self.pack_tokens(keys.batch)
        starts = range(0, keys.length, limit)
        return tuple(keys.cut(begin, min(begin + limit, keys.length)) for begin in starts)

    def within(self, branches: tuple[tuple[Count, Count], ...]) -> tuple[tuple[Count, Count], ...]:
        """The branches with lengths and rates that this sequence can tell apart: a segment longer than
        it, or a rate beyond all its positions and heads, means the same as one just as large."""
        limit = maximum(self.seq, self.first_head + self.heads)
        return tuple((minimum(length, self.seq), minimum(rate, limit)) for length, rate in branches)

    def is_whole(self, branches: tuple[tuple[Count, Count], ...]) -> Count:
        """1 if branches, as `within` gives them, are one kernel call over all of q, k and v: a single one
        that covers the sequence at rate 1, with as many kv heads as the kernel takes; else 0."""
        if len(branches) != 1 or self.windows != "none":
            return 0
        length, rate = branches[0]
        return (length >= self.seq) * (rate == 1) * (self.heads == self.call_heads) * 1

    def head_groups(self) -> tuple[tuple[int, int], ...]:
        """(first query head, step) of the query heads of each of a tile's calls over the same keys."""
        if self.groups:
            return ((0, 1),)
        repeat = self.heads // self.kv_heads
        return tuple((first, repeat) for first in range(repeat))


def chunk_tokens(
    *,
    cpu: bool,
    seq: Count,
    heads: Count,
    kv_heads: Count,
    head_dim: Count,
    itemsize: int,
    workspace: Count,
    origin: Count = 0,
) -> Count:
    """Query tokens of a block-sparse call: as many as make the kernel fast, within a share of the
    workspace, and never more than a small share of the floor, so that short sequences stay lean too.

    CPU: 1,024 tokens (docs/explanation/speed.md), 1/128 of the floor. CUDA: a quarter of the workspace,
    1/256 of the floor.
    """
    floor = (seq - origin) * heads + seq * kv_heads
    if cpu:
        tokens = minimum(1024, workspace // (32 * heads * head_dim), floor // (64 * heads))
    else:
        tokens = minimum(workspace // (4 * heads * head_dim * itemsize), floor // (128 * heads))
    return maximum(tokens, 1)
