"""How oneDNN shares a product among threads on a CPU with a matrix unit (AMX) where the first matrix lies row
by row, and which blocks each thread multiplies.

A thread keeps a block of one matrix in its second cache and moves along it with strips of the other, two
tiles high or wide. All ways to share rows, columns and the inner dimension are tried, and the one that would
take least time is taken; products with few rows, columns or inner numbers are shared in one dimension only.

Follows the macro heuristics of oneDNN's src/cpu/x64/matmul/amx_blocking_heuristics.cpp for products of 16-bit
matrices, the second of which is packed first. Imports no torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np

from planner.memory.onednn.amx import L1, L2, STEP, TILE, Product, Way, parts, single, up

L1_FILLED: Final = L1 * 5 // 6
SETS_BYTES: Final = 2048 * 64
"""Bytes of one line of each set of the second cache."""
WAYS: Final = 12
"""Ways of a set's 16 that oneDNN fills."""
BUSY: Final = 0.75
"""Share of the threads that have to have work where one dimension is shared."""
# Bytes a cycle that a core moves: to and from the first cache where it hits and where it misses, and from
# memory that so many cores share.
HIT: Final = single(106.41)
LOAD_MISS: Final = single(106.41 / 2.28)
STORE_MISS: Final = single(106.41 / 2.85)
LAST_LEVEL: Final = single(6)
SHARED: Final = {1: 2.28, 2: 0.9, 4: 2.39, 8: 2.98, 16: 3.31, 32: 4.06}


def shared(product: Product) -> Way | None:
    """The division that oneDNN chooses, None if it leaves the choice to its other heuristics."""
    return _in_one_dimension(product) or _in_all(product)


def _in_one_dimension(product: Product) -> Way | None:
    """The division where one dimension is small: maybe_small_dims_heuristics."""
    rows, inner, columns, threads, second_transposed = product
    way = Way(threads, rows, columns, inner, inner, fills=inner % STEP > 0 and not _even(inner))
    if rows <= 32 and second_transposed:
        wide = min(columns, 32)
        share = up(parts(columns, threads), wide)
        busy = parts(columns, share) >= BUSY * threads and rows * inner <= L2
        return way._replace(columns=wide, column_blocks=share // wide) if busy else None
    share = parts(rows, threads)
    if inner <= STEP:
        workers = parts(rows, share)
        high = min(rows, 2 * _evenly(parts(rows, workers), TILE))
        blocks = parts(columns * (inner + STEP + high), L2)
        wide = up(parts(columns, blocks), 32)
    elif columns <= 32:
        high, wide, blocks = _evenly(share, 2 * TILE), columns, 1
        workers = parts(rows, up(share, high))
    else:
        return None
    if workers < BUSY * threads:
        return None
    return way._replace(rows=high, columns=wide, row_blocks=parts(share, high), column_blocks=blocks)


def _in_all(product: Product) -> Way | None:
    """The best of all divisions: find_best_blocking."""
    best: _Choice | None = None
    for threads, by_rows, by_inner in _thread_counts(product.threads):
        by_columns = threads // by_rows // by_inner
        high = _evenly(parts(product.rows, by_rows), TILE)
        division = _Division.of(product, threads, by_rows, by_inner, by_columns, high)
        if division.worth_it():
            best = _better(best, division.choice())
    if best and not product.second_transposed and not best.keeps_second:
        # Each thread would pack the second matrix again for each strip; tiles are of all rows now.
        rows, columns = best.division.rows.threads, best.division.columns.threads
        inner = best.division.inner_threads
        division = _Division.of(
            product, rows * columns * inner, rows, inner, columns, _evenly(product.rows, TILE)
        )
        for packs_in_cache in (False, True):
            best = _better(best, division.choice(keeps_second=True, packs_in_cache=packs_in_cache))
    return best.way if best else None


@lru_cache(maxsize=64)
def _thread_counts(threads: int) -> tuple[tuple[int, int, int], ...]:
    """(threads, of these by rows, by the inner dimension), in the order in which they are tried."""
    return tuple(
        (count, by_rows, by_inner)
        for count in range(threads, 0, -1)
        for by_rows in range(1, count + 1)
        if count % by_rows == 0
        for by_inner in range(1, count // by_rows + 1)
        if count // by_rows % by_inner == 0
    )


class _Side(NamedTuple):
    """Rows or columns of the result."""

    total: int
    threads: int
    share: int
    """A thread's rows or columns."""
    strip: int
    """Rows or columns of two tiles."""

    def too_few(self, unit: int) -> bool:
        """Whether a thread would have none if shares are multiples of `unit`."""
        return up(self.share, unit) * (self.threads - 1) >= self.total


class _Block(NamedTuple):
    """A block of the matrix that is kept: rows or columns, depth, and how many depths are kept together."""

    length: int
    depth: int
    depths: int

    @property
    def together(self) -> int:
        return self.depth * self.depths


class _Choice(NamedTuple):
    """A division with its blocks. Score: the share of the unit's speed that it would reach."""

    score: np.float32
    keeps_second: bool
    passes_cache: bool
    """The first matrix is read past the first cache."""
    division: _Division
    way: Way


def _better(old: _Choice | None, new: _Choice | None) -> _Choice | None:
    """The choice of the higher score; of equals the first, unless only the other keeps the second matrix."""
    if new is None or new.score <= 0:
        return old
    if old is None or new.score > old.score:
        return new
    rows = old.division.rows.share
    fits = rows * (old.division.inner + old.division.columns.total) < L2
    to_second = new.keeps_second and not old.keeps_second and not (fits and new.passes_cache)
    return new if new.score == old.score and to_second else old


class _Division(NamedTuple):
    """A product shared among threads: some by rows, some by columns, some by the inner dimension."""

    threads: int
    all_threads: int
    """Threads that there are, of which some may have no work."""
    rows: _Side
    columns: _Side
    inner: int
    inner_threads: int
    inner_share: int
    high: int
    """Rows of a tile."""

    @classmethod
    def of(
        cls, product: Product, threads: int, by_rows: int, by_inner: int, by_columns: int, high: int
    ) -> _Division:
        rows, inner, columns, all_threads, _ = product
        return cls(
            threads,
            all_threads,
            _Side(rows, by_rows, parts(rows, by_rows), min(rows, 2 * high)),
            _Side(columns, by_columns, parts(columns, by_columns), min(columns, 2 * TILE)),
            inner,
            by_inner,
            parts(inner, by_inner),
            high,
        )

    def worth_it(self) -> bool:
        """Whether each thread's share is large enough to be one."""
        writes = self.inner_threads == 1 and self.inner_share < 128
        return (
            (self.rows.threads == 1 or up(self.rows.share, self.high) >= 32)
            and (self.inner_threads == 1 or self.inner_share >= 128)
            and (self.columns.threads == 1 or up(self.columns.share, TILE) >= (128 if writes else 32))
        )

    def choice(self, keeps_second: bool = False, packs_in_cache: bool = False) -> _Choice | None:
        """The best blocks and their score. `keeps_second`: the second matrix has to be kept; then
        `packs_in_cache` has room for what it is packed from, too."""
        by_second = self._block(True, self._depth(self.rows.strip), packs_in_cache=packs_in_cache)
        by_first = None if keeps_second else self._block(False, self._depth(self.columns.strip))
        if by_second and self._too_few(True, by_second):
            by_second = None
        if by_first and (self._too_few(False, by_first) or self._conflicts(by_first)):
            by_first = None
        if by_second and (not by_first or self._prefers_second()):
            return self._by_second(by_second, packs_in_cache)
        return self._by_first(by_first) if by_first else None

    def _prefers_second(self) -> bool:
        if self.rows.share < 2 * self.high:
            return True
        return self.columns.share >= 2 * TILE and self.rows.share >= self.columns.share

    def _by_second(self, block: _Block, packs_in_cache: bool) -> _Choice:
        rows, columns, inner = self.rows.strip, self.columns.strip, self.inner
        tiles = 8 * rows * columns + rows * up(2 * columns, 64)
        strips = parts(inner, block.depth) * block.depth * rows * 2
        passes = block.depth < inner and strips + tiles > L1_FILLED
        if passes:  # the first cache is given up, and blocks are as deep as the second has room for
            block = self._block(True, STEP, block.depth // STEP, packs_in_cache) or block
            block = _Block(block.length, min(STEP * block.depths, inner), 1)
        wide = min(block.length, self.columns.total)
        gathers = inner % STEP > 0 and wide >= 3 * columns and block.depth >= 128
        way = self._way(block, rows, wide)._replace(row_blocks=parts(self.rows.share, rows), gathers=gathers)
        return self._scored(True, passes, block, way._replace(fills=way.fills and not gathers))

    def _by_first(self, block: _Block) -> _Choice:
        high, columns = min(block.length, self.rows.total), self.columns.strip
        way = self._way(block, high, columns)._replace(column_blocks=parts(self.columns.share, columns))
        return self._scored(False, True, block, way)

    def _way(self, block: _Block, rows: int, columns: int) -> Way:
        fills = self.inner % STEP > 0 and not (_even(block.depth) and _even(self.inner % block.depth))
        return Way(
            self.threads,
            rows,
            columns,
            block.depth,
            self.inner,
            depth_blocks=block.depths,
            depth_threads=self.inner_threads,
            sums=self.inner_threads > 1 or block.depth != self.inner,
            fills=fills,
        )

    def _sides(self, keeps_second: bool) -> tuple[_Side, _Side]:
        """(the side that moves, the one that is kept)."""
        return (self.rows, self.columns) if keeps_second else (self.columns, self.rows)

    def _depth(self, strip: int) -> int:
        """The deepest that strips of both matrices fit the first cache with, in equal parts."""
        rows, columns, step = self.rows.strip, self.columns.strip, min(STEP, self.inner)
        room = L1_FILLED - (8 * rows * columns + rows * up(2 * columns, 64))
        share = parts(parts(self.inner, step), self.inner_threads)
        blocks = parts(share, room // (2 * strip) // step)
        return min(parts(share, blocks) * step, self.inner)

    def _block(
        self, keeps_second: bool, depth: int, minimum: int = 0, packs_in_cache: bool = False
    ) -> _Block | None:
        """The block that a thread best keeps: most multiplications for a byte that moves, larger blocks
        first."""
        moving, kept = self._sides(keeps_second)
        if moving.too_few(moving.strip) or self._inner_too_few(depth):
            return None
        room = L2 // (2 * kept.strip * min(depth, self.inner_share))
        best_block, best = None, single(0)
        for strips in _groups(parts(kept.share, kept.strip)):
            if strips > room:
                continue
            for depths in _groups(parts(self.inner_share, depth)):
                block = _Block(strips * kept.strip, depth, depths)
                if depths >= minimum and self._used(keeps_second, block, packs_in_cache) <= L2:
                    score = self._worth(keeps_second, block)
                    if score > best:
                        best_block, best = block, score
        return best_block

    def _inner_too_few(self, unit: int) -> bool:
        return up(self.inner_share, unit) * (self.inner_threads - 1) >= self.inner

    def _too_few(self, keeps_second: bool, block: _Block) -> bool:
        _, kept = self._sides(keeps_second)
        return kept.too_few(block.length) or self._inner_too_few(block.together)

    def _conflicts(self, block: _Block) -> bool:
        """Whether to keep the first matrix would have the second cache throw out what is needed again."""
        repeats = parts(self.inner, block.together)
        used = self._used_with_result(False, block)
        if used > L2:
            used = self._used(False, block)
        if repeats > 1 and (repeats != self.inner_threads or used * self.inner_threads >= L2):
            return True
        apart = 2 * self.columns.total % 4096 or 4096  # rows of the result that share sets
        return SETS_BYTES % apart == 0 and parts(apart * self.rows.share, SETS_BYTES) >= WAYS

    def _used(self, keeps_second: bool, block: _Block, packs_in_cache: bool = False) -> int:
        """Bytes of the second cache that a block takes with two strips and their results."""
        moving, kept = self._sides(keeps_second)
        strip, count, depth = moving.strip, block.length, min(block.together, self.inner_share)
        rows, columns = (strip, count) if keeps_second else (count, strip)
        used = 4 * strip * depth + 2 * count * depth + 2 * rows * up(2 * columns, 64)
        if packs_in_cache:
            used += 2 * count * block.together
        return used + 8 * strip * (kept.strip if block.depth == self.inner else count)

    def _used_with_result(self, keeps_second: bool, block: _Block) -> int:
        """Bytes of the second cache with all of a thread's result for the block."""
        moving, _ = self._sides(keeps_second)
        count, depth = block.length, min(block.together, self.inner_share)
        return 4 * ((moving.share + count) * depth + moving.share * count)

    def _worth(self, keeps_second: bool, block: _Block) -> np.float32:
        """Multiplications for each byte that moves."""
        strip, count = self._sides(keeps_second)[0].strip, block.length
        depth = min(block.together, self.inner_share)
        stays = depth == self.inner or self._used_with_result(keeps_second, block) < L2
        moved = 2 * depth * (strip + count) + (0 if stays and self.inner_threads == 1 else 4 * strip * count)
        ratio: np.float32 = single(strip * count * depth) / single(moved)
        return ratio

    def _scored(self, keeps_second: bool, passes_cache: bool, block: _Block, way: Way) -> _Choice:
        score = single(self.rows.total * self.inner * self.columns.total) / single(512 * self.all_threads)
        cycles = self._cycles(keeps_second, block, way)
        return _Choice(single(0) if cycles is None else score / cycles, keeps_second, passes_cache, self, way)

    def _cycles(self, keeps_second: bool, block: _Block, way: Way) -> np.float32 | None:
        """Cycles that the division would take, None if sums of several threads do not fit: in oneDNN's order
        and precision, on which choices between near equals depend."""
        moving, kept = self._sides(keeps_second)
        step, result = min(STEP, self.inner), 2 if self.inner_threads == 1 else 4
        kept_size = single(2 * kept.share * self.inner_share)
        strip_size = single(2 * moving.strip * self.inner_share)
        written = moving.strip * kept.share * result
        products = moving.strip * self.inner_share * kept.share // (self.high * step * TILE)
        strips = single(parts(moving.share, moving.strip))
        kept_strips = parts(way.columns if keeps_second else way.rows, kept.strip)
        first_cache = (
            strip_size * single(2) / LOAD_MISS
            + strip_size * (single(kept_strips) - single(1)) / HIT
            + kept_size / LOAD_MISS
            + self._result_cycles(way)
        )
        strip_load, kept_load = strip_size / _shared(kept.threads), kept_size / _shared(moving.threads)
        memory = single(written) / _shared(1)
        unit = single(products) * single(self.high)
        if keeps_second:  # packed once
            strip = max(strip_load + memory, first_cache, unit)
            fits = self._used(True, block._replace(length=way.columns), packs_in_cache=True) < L2
            begin = kept_load + (strip if fits else kept_size / LAST_LEVEL)
        else:  # packed for each strip
            strip = strip_load + max(memory, first_cache, unit)
            private = single(2 * moving.strip * self.inner_share + written)
            begin = kept_load + private / _shared(1)
        cycles: np.float32 = begin + (strips - single(1)) * strip
        if self.inner_threads == 1:
            return cycles
        reduced = self._reduction_cycles()
        return None if reduced is None else cycles + reduced

    def _result_cycles(self, way: Way) -> np.float32:
        """Cycles to move blocks of the result to and from the first cache."""
        columns, strips = self.columns.strip, parts(way.columns, self.columns.strip)
        missed = single(way.rows * strips * up(2 * columns, 64))
        written = single(way.rows * strips * parts(columns, TILE) * 64)
        numbers = single(way.rows * way.columns)
        sums = single(4) * numbers * single(way.depth_blocks)
        cycles: np.float32 = (
            missed / STORE_MISS
            + (written - missed) / HIT
            + numbers * single(4) / HIT
            + sums / (HIT if way.depth == self.inner else STORE_MISS)
        )
        return cycles

    def _reduction_cycles(self) -> np.float32 | None:
        """Cycles to add the sums of the threads that share the inner dimension."""
        rows, columns, threads = self.rows, self.columns, self.inner_threads
        if 8 * rows.share * columns.share >= L2:
            return None
        workers = rows.threads * columns.threads
        read = single(4 * rows.total * up(columns.total, 16) * (threads - 1) // workers)
        sizes = 2 * (rows.share + columns.share) * self.inner_share + 2 * rows.share * columns.share
        read = read / (_shared(2) if sizes < L2 else LAST_LEVEL)
        written = single(2 * rows.total * columns.total // workers) / _shared(1)
        cycles: np.float32 = read + written + single(25000)
        return cycles


@lru_cache(maxsize=4096)
def _groups(count: int) -> tuple[int, ...]:
    """Sizes of groups that `count` can be put in, largest first."""
    sizes, groups = [count], 1
    while sizes[-1] > 1:
        groups = (count - 1) // (sizes[-1] - 1) + 1  # the fewest that make them smaller
        sizes.append(parts(count, groups))
    return tuple(sizes)


def _evenly(count: int, maximum: int) -> int:
    """The size of equal parts of up to `maximum`."""
    return parts(count, parts(count, maximum))


def _even(depth: int) -> bool:
    """Whether instructions can be given equal parts of a block's depth, in pairs of numbers."""
    if not depth:
        return True
    count = parts(depth, STEP)
    return depth % (2 * count) == 0


@lru_cache(maxsize=512)
def _shared(cores: int) -> np.float32:
    """Bytes a cycle from memory that so many cores share: between those measured, on a line."""
    counts = sorted(SHARED)
    if cores >= counts[-1]:
        return single(SHARED[counts[-1]])
    after = next(number for number, count in enumerate(counts) if count >= cores)
    high = single(SHARED[counts[after]])
    if after == 0:
        return high
    x, low = counts[after - 1], single(SHARED[counts[after - 1]])
    rate: np.float32 = low + (high - low) * single(cores - x) / single(counts[after] - x)
    return rate
