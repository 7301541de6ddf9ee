"""Layouts: which query block attends to which key blocks, as compressed rows. Imports no torch.

Letters: `b` tokens a block, `n` blocks a segment, `r` a dilation rate, `i` a query block (row),
`c` a key block (column), `d = c - i` an offset, `t` a branch, `T` their number.

Two shapes of row are enough for every pattern. Dense, dilated, local_window and global_local rows
are a few *spans* of consecutive blocks. A dilated_sparse row is a union of *progressions* through
its own block: branch t contributes the offsets d with r | d and -left_t <= d <= right_t. Both are
found by arithmetic on arrays of one entry a row, and written out a slab of rows at a time, so
nothing is ever larger than the result and one slab.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention.config import AttentionConfig, SparsePatternConfig
from attention.errors import ConfigError, InputError
from attention.sizes.arrays import Ints, row_blocks
from attention.sizes.window import window_blocks, window_spans

BlockIds = NDArray[np.unsignedinteger[Any]]

DEFAULT_BLOCK_SIZE = 64
EDGES = 16
"""Segments of a branch, and rows beside, that stand for all of a rank's."""
_SLAB = 1 << 18  # elements of scratch: small enough for the L2 cache, large enough to amortise NumPy


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Row i of `blocks` query blocks attends to key blocks `cols[row_ptr[i] : row_ptr[i + 1]]`.

    The columns of a row are unique and ascending. A layout owns its arrays and makes them read-only.
    Layouts compare by identity.
    """

    seq: int
    """Tokens; the last block may be shorter than the others."""
    block_size: int
    """Tokens a block."""
    row_ptr: Ints
    """[blocks + 1], from 0 to `active`."""
    cols: BlockIds
    """[active], of the smallest unsigned type that holds a block index (see `column_dtype`)."""

    def __post_init__(self) -> None:
        self.row_ptr.setflags(write=False)
        self.cols.setflags(write=False)

    @property
    def blocks(self) -> int:
        """Rows, and columns that a row can have: ceil(seq / block_size)."""
        return -(-self.seq // self.block_size)

    @property
    def active(self) -> int:
        """Blocks kept, over all rows."""
        return self.cols.size

    @property
    def counts(self) -> Ints:
        """[blocks], the blocks kept in each row."""
        return np.diff(self.row_ptr)

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.row_ptr.nbytes + self.cols.nbytes

    @property
    def density(self) -> float:
        """Fraction of all blocks x blocks that is kept."""
        return self.active / self.blocks**2

    def row(self, i: int) -> BlockIds:
        """The key blocks of query block i (0 <= i < blocks), ascending; a view."""
        return self.cols[self.row_ptr[i] : self.row_ptr[i + 1]]


def column_dtype(blocks: int) -> type[np.uint16] | type[np.uint32]:
    """The type of a column index: uint16 up to 65,536 blocks, else uint32."""
    return np.uint16 if blocks <= 1 << 16 else np.uint32


def build_layout(config: AttentionConfig, seq: int, causal: bool, *, block_size: int | None = None) -> Layout:
    """The blocks that hold a (query, key) pair of `config`, over `seq` tokens.

    Causal keeps key blocks up to the query block; masking inside that one is left to the attention.
    `block_size` is for dense and dilated, which have none of their own (default 64); for block_sparse
    it may only repeat the pattern's. Raises `InputError` for seq < 1, and `ConfigError` for adaptive,
    whose blocks are chosen at run time.
    """
    size, blocks = grid_of(config, seq, block_size)
    if is_dilated_sparse(config):
        counts, cols = _dilated_sparse(config, seq, blocks, causal)
    else:
        start, stop = spans(config, seq, size, np.arange(blocks, dtype=np.int64), blocks, causal)
        counts, cols = (stop - start).sum(axis=1), _ranges(start.ravel(), stop.ravel(), blocks)
    return Layout(seq=seq, block_size=size, row_ptr=_pointers(counts), cols=cols)


def count_active(config: AttentionConfig, seq: int, causal: bool, *, block_size: int | None = None) -> int:
    """`build_layout(config, seq, causal, block_size=block_size).active`, in O(blocks) memory."""
    size, blocks = grid_of(config, seq, block_size)
    if not is_dilated_sparse(config):
        start, stop = spans(config, seq, size, np.arange(blocks, dtype=np.int64), blocks, causal)
        return int((stop - start).sum())
    branches, budget = BranchRows.of(config, blocks, causal), row_budget(config, seq)
    return sum(repeats * int(branches.kept(rows, budget).sum()) for rows, repeats in branches.distinct_rows())


def kept_columns(config: AttentionConfig, seq: int, causal: bool, rows: Ints) -> Ints:
    """The blocks that some of `rows` keep, ascending, of a dilated_sparse config; in memory that grows with
    what they reach."""
    branches = BranchRows.of(config, _blocks(seq, _pattern(config).block_size), causal)
    left, right = branches.select(rows, row_budget(config, seq))
    low, high = int((rows - left).min()), int((rows + right).max()) + 1
    kept = np.zeros(high - low, np.bool_)
    for t, rate in enumerate(branches.rates.ravel().tolist()):
        # Each row opens a progression at its first column and closes it behind its last one.
        change = np.zeros(-(-(high - low) // rate) * rate + rate, np.int64)
        np.add.at(change, rows - left[t] - low, 1)
        np.add.at(change, rows + right[t] + rate - low, -1)
        kept |= change.reshape(-1, rate).cumsum(axis=0).ravel()[: high - low] > 0
    return np.flatnonzero(kept) + low


def columns_by_row(config: AttentionConfig, seq: int, causal: bool, rows: Ints) -> BlockIds:
    """The blocks that each of `rows` keeps, one row's after the other's, of a dilated_sparse config."""
    blocks, budget = _blocks(seq, _pattern(config).block_size), row_budget(config, seq)
    branches = BranchRows.of(config, blocks, causal)
    kept = branches.kept(rows, budget)
    columns: BlockIds = np.empty(int(kept.sum()), column_dtype(blocks))
    _write_rows(columns, rows, kept, branches, branches.select(rows, budget))
    return columns


def kept_hull(config: AttentionConfig, seq: int, causal: bool, rows: tuple[int, int]) -> tuple[int, int]:
    """(first, one past the last) of the blocks that rows (first, one past the last) keep, of a dilated_sparse
    config, nearly: those are looked at where segments begin and end, of many segments only some."""
    branches = BranchRows.of(config, _blocks(seq, _pattern(config).block_size), causal)
    first, stop = rows
    edges = [np.array([first, stop - 1]), np.linspace(first, stop - 1, EDGES).astype(np.int64)]
    for length in branches.lengths.ravel().tolist():
        ends = np.arange(-(-first // length), -(-stop // length)) * length
        some = ends[np.linspace(0, max(len(ends) - 1, 0), min(len(ends), EDGES)).astype(np.int64)]
        edges += [some, some - 1]
    looked = np.unique(np.concatenate(edges))
    looked = looked[(looked >= first) & (looked < stop)]
    left, right = branches.select(looked, row_budget(config, seq))
    return int((looked - left).min()), int((looked + right).max()) + 1


def row_budget(config: AttentionConfig, seq: int) -> int:
    """Blocks that a row may keep: max(1, floor(sparsity_ratio * blocks + 0.5))."""
    pattern = _pattern(config)
    return row_blocks(pattern.sparsity_ratio, _blocks(seq, pattern.block_size))


@lru_cache(maxsize=4096)
def widest_rows(branches: tuple[tuple[int, int], ...], blocks: int, causal: bool) -> tuple[int, int]:
    """(blocks of the widest row of a dilated_sparse layout without a budget, of the widest but the last).
    `branches`: (length, rate) in blocks."""
    offered = BranchRows.over(branches, blocks, causal)
    rows = offered.telling_rows()
    kept = offered.kept(rows, blocks)
    return int(kept.max()), int(kept[rows < blocks - 1].max(initial=0))


# What is asked for


def _pattern(config: AttentionConfig) -> SparsePatternConfig:
    if config.pattern is None:
        raise ConfigError(
            f"variant {config.variant!r} has no pattern and so no block budget; use variant "
            "'block_sparse' or 'adaptive'"
        )
    return config.pattern


def is_dilated_sparse(config: AttentionConfig) -> bool:
    return config.variant == "block_sparse" and _pattern(config).pattern_type == "dilated_sparse"


def _blocks(seq: int, block_size: int) -> int:
    if seq < 1:
        raise InputError(f"a layout needs at least 1 token, got seq={seq}")
    return -(-seq // block_size)


def grid_of(config: AttentionConfig, seq: int, block_size: int | None) -> tuple[int, int]:
    """(tokens a block, blocks) of the layout asked for."""
    if config.variant == "adaptive":
        raise ConfigError(
            "variant 'adaptive' has no layout before it runs: its blocks are chosen from q and k; "
            "call module.select(q, k) for them"
        )
    if block_size is not None and block_size < 1:
        raise ConfigError(f"block_size must be at least 1, got {block_size}")
    if config.variant == "block_sparse":
        size = _pattern(config).block_size
        if block_size not in (None, size):
            raise ConfigError(
                f"block_size={block_size} contradicts the pattern's block_size={size}; leave it out"
            )
    else:
        size = block_size or DEFAULT_BLOCK_SIZE
    return size, _blocks(seq, size)


def _pointers(counts: Ints) -> Ints:
    pointers = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=pointers[1:])
    return pointers


# Rows that are spans of consecutive blocks


def spans(
    config: AttentionConfig, seq: int, size: int, i: Ints, blocks: int, causal: bool
) -> tuple[Ints, Ints]:
    """(start, stop), each [rows, 2]: row i[n] keeps start <= c < stop of both, ascending and disjoint.

    The second span holds the row's own block; the first, often empty, what lies apart from it.
    """
    zero = np.zeros_like(i)
    if config.variant == "dense":
        apart, start, stop = zero, zero, np.full_like(i, blocks)
    elif config.variant == "dilated":
        # Every branch's span holds i, so their union is one span.
        ends = [_segment_span(i, min(length, seq), size, seq) for length in config.segment_lengths]
        apart, start = zero, np.minimum.reduce([first for first, _ in ends])
        stop = np.maximum.reduce([last for _, last in ends])
    else:
        pattern = _pattern(config)
        tokens = pattern.global_tokens if pattern.pattern_type == "global_local" else 0
        side, shared = window_blocks(pattern.local_window_size, tokens, size, blocks, causal, pattern.edges)
        (_, apart), (start, stop) = window_spans(i, side, shared, blocks, causal)
    if causal:
        stop = i + 1
    return np.stack([zero, start], axis=1), np.stack([apart, stop], axis=1)


def _segment_span(i: Ints, length: int, size: int, seq: int) -> tuple[Ints, Ints]:
    """(start, stop) of the blocks that hold tokens of a segment that block i holds tokens of."""
    first, last = i * size, np.minimum((i + 1) * size, seq) - 1
    end = np.minimum((last // length + 1) * length, seq)
    return first // length * length // size, -(-end // size)


def _ranges(start: Ints, stop: Ints, blocks: int) -> BlockIds:
    """arange(start[0], stop[0]), arange(start[1], stop[1]), ... in one array."""
    lengths = stop - start
    pointers = _pointers(lengths)
    cols = np.empty(int(pointers[-1]), column_dtype(blocks))
    shift = start - pointers[:-1]
    a = 0
    while a < lengths.size:
        z = max(a + 1, int(np.searchsorted(pointers, pointers[a] + _SLAB, side="right")) - 1)
        low, high = int(pointers[a]), int(pointers[z])
        cols[low:high] = np.arange(low, high) + np.repeat(shift[a:z], lengths[a:z])
        a = z
    return cols


# Rows that are unions of progressions


@dataclass(frozen=True, slots=True, eq=False)
class BranchRows:
    """The branches of a dilated_sparse pattern over `blocks` blocks, as arrays [T, 1].

    Branch t offers row i the offsets d != 0 that keep its segment and are multiples of its rate,
    nearest first and left before right: its *candidates*. Candidate m of branch t has *priority*
    m * T + t, an offset has that of its first candidate, and a row keeps its own block and the best
    budget - 1 offsets. The first candidates of a branch reach a number of steps left and right that
    follows from the room on both sides, so a row is known from how many priorities it has used.
    """

    lengths: Ints
    rates: Ints
    blocks: int
    causal: bool

    @classmethod
    def of(cls, config: AttentionConfig, blocks: int, causal: bool) -> BranchRows:
        size = _pattern(config).block_size
        return cls.over([(length // size, rate) for length, rate in config.branches], blocks, causal)

    @classmethod
    def over(cls, branches: Iterable[tuple[int, int]], blocks: int, causal: bool) -> BranchRows:
        """The branches from their (length, rate) in blocks."""
        # A repeated branch offers nothing that its first copy has not offered just before.
        unique = dict.fromkeys((min(length, blocks), min(rate, blocks)) for length, rate in branches)
        pairs = np.array(list(unique), np.int64)
        return cls(lengths=pairs[:, :1], rates=pairs[:, 1:], blocks=blocks, causal=causal)

    def distinct_rows(self) -> list[tuple[Ints, int]]:
        """(rows, repeats): the rows of one period, how often it fits, and what is left at the end.

        Within a period no segment is cut, so the rows of its copies differ by a shift alone.
        """
        period = math.lcm(*self.lengths.ravel().tolist())
        repeats = self.blocks // period
        body = [(np.arange(period, dtype=np.int64), repeats)] if repeats else []
        return [*body, (np.arange(repeats * period, self.blocks, dtype=np.int64), 1)]

    def telling_rows(self) -> Ints:
        """Rows among which is a widest one, without a budget, and a widest but for the last row.

        Where a segment of some branch begins or ends, rows change; from there to the next such place a row
        sees, if causal, what the one before sees and more, so that the last tells, and otherwise as many
        blocks as the row that is the rates' common multiple before.
        """
        lengths = self.lengths.ravel().tolist()
        begins = np.zeros(self.blocks, np.bool_)
        for length in lengths:
            begins[::length] = True
        starts = np.flatnonzero(begins)
        if self.causal:
            last = np.append(begins[1:], True)
            last[max(self.blocks - 2, 0) :] = True
            return np.flatnonzero(last)
        ends = np.append(starts[1:], self.blocks)
        inside = np.arange(min(math.lcm(*self.rates.ravel().tolist()), int((ends - starts).max())))
        rows = starts[:, None] + inside
        return rows[rows < ends[:, None]]

    def rooms(self, rows: Ints) -> tuple[Ints, Ints]:
        """Candidates on the left and on the right, each [T, rows]."""
        place = rows % self.lengths
        segment = np.minimum(self.lengths, self.blocks - rows + place)
        right = np.zeros_like(place) if self.causal else (segment - 1 - place) // self.rates
        return place // self.rates, right

    def reach(self, rooms: tuple[Ints, Ints], used: Ints | int) -> tuple[Ints, Ints]:
        """Distance in blocks, left and right [T, rows], after the first `used` [rows] priorities."""
        left, right = rooms
        t = len(self.rates)
        rounds = (used + np.arange(t - 1, -1, -1)[:, None]) // t
        count = np.minimum(rounds, left + right)
        # Sides take turns, left first, until one of them is used up.
        after = np.minimum(right, np.maximum(count // 2, count - left))
        return (count - after) * self.rates, after * self.rates

    def kept(self, rows: Ints, budget: int) -> Ints:
        """[rows], blocks kept, the own one included.

        budget - 1 rounds suffice: then each branch is exhausted or has filled the row by itself.
        """
        offsets = self._offsets(self.reach(self.rooms(rows), len(self.rates) * (budget - 1)))
        return np.minimum(offsets + 1, budget)

    def select(self, rows: Ints, budget: int) -> tuple[Ints, Ints]:
        """The reach [T, rows] at which each row has exactly `kept` blocks, found by bisection."""
        rooms, wanted = self.rooms(rows), self.kept(rows, budget) - 1
        low, high = wanted, np.full_like(wanted, len(self.rates) * (budget - 1))
        while (low < high).any():
            middle = (low + high) // 2
            enough = self._offsets(self.reach(rooms, middle)) >= wanted
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        return self.reach(rooms, high)

    def _offsets(self, reach: tuple[Ints, Ints]) -> Ints:
        rates = self.rates.ravel().tolist()
        return union_size(zip(rates, reach[0], reach[1], strict=True), reach[0].shape[1])


def union_size(sets: Iterable[tuple[int, Ints, Ints]], rows: int) -> Ints:
    """[rows], offsets in the union of the sets {d != 0 : step | d, -left <= d <= right}.

    Each set (step, left [rows], right [rows]) counts what no earlier one holds. Its meets with those
    are sets of the same kind. Sets of equal step are nested and merge into one, and with ascending
    steps most meets do, which keeps the recursion from growing with 2^T.
    """
    merged: dict[int, tuple[Ints, Ints]] = {}
    for step, left, right in sets:
        if step <= max(left.max(initial=0), right.max(initial=0)):
            other = merged.get(step, (left, right))
            merged[step] = np.maximum(left, other[0]), np.maximum(right, other[1])
    total = np.zeros(rows, np.int64)
    ascending = sorted((step, *sides) for step, sides in merged.items())
    for t, (step, left, right) in enumerate(ascending):
        meets = (
            (math.lcm(step, s), np.minimum(left, le), np.minimum(right, ri)) for s, le, ri in ascending[:t]
        )
        total += left // step + right // step - union_size(meets, rows)
    return total


def _dilated_sparse(config: AttentionConfig, seq: int, blocks: int, causal: bool) -> tuple[Ints, BlockIds]:
    """(counts [blocks], cols) of the dilated_sparse pattern."""
    branches, budget = BranchRows.of(config, blocks, causal), row_budget(config, seq)
    parts = [(rows, repeats, branches.kept(rows, budget)) for rows, repeats in branches.distinct_rows()]
    counts = np.concatenate([np.tile(kept, repeats) for _, repeats, kept in parts])
    cols: BlockIds = np.empty(int(counts.sum()), column_dtype(blocks))
    begin = 0
    for rows, repeats, kept in parts:
        size = int(kept.sum())
        copies = cols[begin : begin + repeats * size].reshape(repeats, size)
        _write_rows(copies[0], rows, kept, branches, branches.select(rows, budget))
        shifts = np.arange(1, repeats)[:, None] * len(rows)
        np.add(copies[:1], shifts.astype(cols.dtype), out=copies[1:])
        begin += repeats * size
    return counts, cols


def _write_rows(
    out: BlockIds, rows: Ints, kept: Ints, branches: BranchRows, reach: tuple[Ints, Ints]
) -> None:
    """Fill `out` [sum of kept] with the columns of `rows`, ascending in each, from their reach [T, rows]."""
    rates, pointers = branches.rates, _pointers(kept)
    widest = sum((side.max(axis=1, initial=0, keepdims=True) // rates).sum() for side in reach) + 1
    slab = max(1, _SLAB // int(widest))
    for a in range(0, len(rows), slab):
        z = min(a + slab, len(rows))
        left, right = (side[:, a:z, None].astype(np.int32) for side in reach)
        # Few rows differ much from their neighbours, so the slab's offsets are hardly more than a row's.
        steps = zip(left.max(axis=(1, 2)), right.max(axis=(1, 2)), rates.ravel(), strict=True)
        offsets = np.unique(np.concatenate([np.arange(-le, ri + 1, r) for le, ri, r in steps]))
        d = offsets.astype(np.int32)
        keep = np.zeros((z - a, d.size), np.bool_)
        for t, rate in enumerate(rates.ravel()):
            keep |= (d % rate == 0) & (d >= -left[t]) & (d <= right[t])
        # Unsigned sums wrap around: i + d is right wherever it is kept.
        columns = rows[a:z, None].astype(out.dtype) + offsets.astype(out.dtype)
        out[pointers[a] : pointers[z]] = columns[keep]
