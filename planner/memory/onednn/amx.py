"""Scratch of one product of 16-bit matrices on a CPU with a matrix unit (AMX), where torch leaves it to
oneDNN: `scratch_bytes` of `gemm.py` for that unit.

oneDNN divides a product among threads and into blocks, and takes from torch, for each thread: a copy of a
block of the second matrix in the order of the unit's instructions, tiles of the result, sums of blocks of
the result in single precision where the inner dimension is divided, and a copy of a block of the first matrix
where that is transposed or its rows do not fill the unit. A first matrix that lies row by row is divided as
`amx_threads.py` says; here is how all others are, and what a division takes.

Follows oneDNN's src/cpu/x64/matmul (brgemm_matmul_utils.cpp, amx_blocking_heuristics.cpp: the micro
heuristics) and src/cpu/x64/brgemm/brgemm_utils.cpp, for two dimensions. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np

L1: Final = 48 << 10
L2: Final = (2 << 20) // 4 * 3
"""Bytes of a core's caches, and of the second what oneDNN fills: of every CPU with this unit so far."""
STEP: Final = 32
"""Numbers of the inner dimension that one instruction takes."""
TILE: Final = 16
"""Rows of a tile, and its columns."""
TILE_BYTES: Final = 1024
THREAD_BYTES: Final = 640
"""Bytes of a thread besides blocks: its list of pairs of blocks, for each that one call of a kernel takes."""
ENTRY_BYTES: Final = 128
"""Bytes for each kind of buffer, whose beginning is rounded up."""
SMALL_BLOCK: Final = 126
"""Bytes of a block of the first matrix up to which the vector unit multiplies bfloat16."""

single = np.float32


class Product(NamedTuple):
    """[rows, inner] @ [inner, columns]. `second_transposed`: the second is a transposed view."""

    rows: int
    inner: int
    columns: int
    threads: int
    second_transposed: bool = False


class Way(NamedTuple):
    """A way to multiply: the blocks of one call of a kernel, and how many of them are worked on together."""

    threads: int
    rows: int
    columns: int
    depth: int
    """A block's part of the inner dimension."""
    apart: int
    """Numbers from a row of the first matrix, or of its copy, to the next."""
    row_blocks: int = 1
    column_blocks: int = 1
    depth_blocks: int = 1
    batch: int = 1
    """Blocks of depth that one call takes."""
    depth_threads: int = 1
    """Threads that share the inner dimension."""
    packed: int = STEP
    """Columns of the second matrix that are packed together."""
    sums: bool = False
    copies: bool = False
    """Blocks of the first matrix are copied before the kernel is called."""
    fills: bool = False
    """The kernel fills up the last instruction of a row itself, tile by tile."""
    gathers: bool = False
    """The kernel fills up the rows of a block in a copy of its own."""

    def together(self) -> int:
        """Depth of the blocks that are worked on together."""
        return self.depth * self.depth_blocks * self.batch


def buffer_bytes(product: Product, way: Way) -> int:
    """Bytes of all buffers."""
    depth, together = up(way.depth, STEP), way.depth_blocks * way.batch
    packed = 2 * up(way.columns, way.packed) * depth * together
    bytes_ = [THREAD_BYTES * way.batch, packed, _workspace(product, way)]
    if way.copies:
        bytes_.append(2 * way.rows * way.apart * together * way.row_blocks)
    if way.sums and way.depth_threads > 1:  # each has sums for all of the result
        bytes_.append(4 * product.rows * product.columns)
    elif way.sums:
        sums = 4 * way.rows * up(way.columns, min(32, way.columns))
        apart = way.together() < product.inner  # all blocks of the result are begun before one is done
        bytes_.append(sums * (way.row_blocks * way.column_blocks if apart else 1))
    return sum(ENTRY_BYTES + way.threads * count for count in bytes_)


def small(way: Way) -> bool:
    """Whether bfloat16 is left to the vector unit."""
    return 2 * way.rows * way.apart <= SMALL_BLOCK


def up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def parts(count: int, unit: int) -> int:
    return -(-count // unit)


def _workspace(product: Product, way: Way) -> int:
    """The most that a kernel takes for a block or for what remains of it: tiles, and what it fills up."""
    rest = product.inner % way.depth if product.inner > way.depth else 0
    if not (way.fills or way.gathers):
        rest = up(rest, 2)
    largest = 0
    for rows in (way.rows, product.rows % way.rows):
        for columns in (way.columns, product.columns % way.columns):
            for depth in (way.depth, rest):
                if rows and columns and depth and depth <= way.apart:
                    filled = way.fills and (depth % 2 > 0 or (depth > STEP and depth % STEP > 0))
                    gathered = 2 * rows * up(depth, STEP) if way.gathers else 0
                    largest = max(largest, TILE_BYTES * (_tiles(rows, columns, depth) + filled) + gathered)
    return largest


def _tiles(rows: int, columns: int, depth: int) -> int:
    """Tiles of the result that a kernel holds at once: brgemm_blocking_tmm."""
    tall, high, wide = _held(rows, columns, depth)
    high_parts, wide_parts = parts(rows, tall), parts(columns, TILE)
    # One that is cut off has a tile of its own.
    high = high_parts if high_parts <= high else high + (rows % tall > 0)
    wide = wide_parts if wide_parts <= wide else wide + (columns % TILE > 0)
    return high * wide


def _held(rows: int, columns: int, depth: int) -> tuple[int, int, int]:
    """(rows of a tile, whole tiles one above the other, side by side)."""
    tall = next(count for count in range(TILE, 0, -1) if rows % count == 0)
    full, cut = tall > 12, columns % TILE > 0
    high, wide = up(rows, TILE), up(columns, TILE)
    if full and not cut:
        minimum, deep = (L1 - 4096) // 96, 2 * depth
        five, four = minimum <= deep < (L1 - 5120) // 80, minimum <= deep < (L1 - 4096) // 64
        if columns % 80 == 0 and five and rows > 32:
            return tall, 1, 5
        if columns % 64 == 0 and four and rows > 32:
            return tall, 1, 4
        if rows % 80 == 0 and five and columns > 32:
            return tall, 5, 1
        if rows % 64 == 0 and four and columns > 32:
            return TILE, 4, 1
    if full and cut and wide in (32, 48, 64):
        return tall, 1 + (wide == 32), 2 if wide == 32 else wide // TILE
    if rows <= TILE:
        maximum = 5 if not cut else 4 if wide <= 64 else 3
        return rows, 1, min(maximum, wide // TILE)
    basic = _two_by_two(rows, columns, tall)
    weak = basic[0] < 8 or rows % basic[0] > 0
    if not full and not cut and weak:
        if rows > 64:
            return TILE, 1, 2
        if high in (48, 64):
            return TILE, high // TILE, 1
        if high == 32 and columns % 32 == 0:
            return TILE, 2, 2
    if columns <= TILE:
        maximum = 5 if rows % TILE == 0 else 4 if high <= 64 else 3
        return TILE, min(maximum, high // TILE), 1
    if not full and cut and high == wide == 32:
        return TILE, 2, 2
    return basic


def _two_by_two(rows: int, columns: int, tall: int) -> tuple[int, int, int]:
    """(rows of a tile, tiles one above the other, side by side): two by two tiles where these come out even,
    else three or two by one."""
    high, wide, cut = rows // tall, columns // TILE, columns % TILE > 0
    over = min(2, high)
    even = wide > 0 and not cut
    if over == 1 and even:
        beside = 3 if wide % 3 == 0 else 2 - wide % 2
    else:
        beside = 2 if even and wide % 2 == 0 else 1
    if beside == 1 and not cut:
        over = min(3, high)
    if (beside == 1 or over == 1 or tall < 8) and not cut:
        if 32 < rows < 48:
            return TILE, 3, 1
        if 16 < rows < 32:
            return TILE, 2, 2 if even and wide % 2 == 0 else 1
    return tall, over, beside


def chunked(product: Product, transposed: bool) -> Way:
    """The division of a product whose first matrix is transposed, or has one row: the best of blocks of up to
    64 rows and 64 columns, some of which are worked on together."""
    rows, inner, columns, threads, _ = product
    tall, wide = _tall(rows), min(64, columns)
    most_shares = min(max(1, threads // 8), 7, parts(inner, 1024))
    division, best = None, single(0)
    for shares in range(1, most_shares + 1):
        workers = threads // shares
        high_parts, wide_parts = parts(rows, tall), parts(columns, wide)
        work = high_parts * wide_parts * shares
        minimum = parts(tall, 2) if work < 1.5 * threads and tall > 32 else tall
        beside = min(6 if work > 16 * threads else 4, wide_parts)
        improved = False
        for height in _heights(rows, tall, minimum):
            for column_blocks in range(beside, 0, -1):
                for row_blocks in range(min(4, high_parts), 0, -1):
                    pieces = parts(rows, height * row_blocks) * parts(columns, wide * column_blocks)
                    if most_shares == 1 and pieces < 3 * workers and pieces % workers:
                        continue
                    way = _stepped(product, transposed, shares, height, row_blocks, column_blocks)
                    score = _score(product, way)
                    if score > best:
                        division, best, improved = way, score, True
        if not improved:
            way = _stepped(product, transposed, shares, minimum, 1, 1)
            score = _score(product, way)
            if score > best:
                division, best = way, score
    assert division
    return division


def _tall(rows: int) -> int:
    """Rows of the largest block: two to four tiles of at least 13 rows where they come out even."""
    for tile in range(16, 12, -1):
        for count in (4, 3, 2):
            if rows % (tile * count) == 0:
                return tile * count
    return min(rows, 64)


def _heights(rows: int, tall: int, minimum: int) -> Iterator[int]:
    """Rows of blocks that are tried. oneDNN has them in a hash table: the last that it puts in come first."""
    heights = [tall]
    while heights[-1] > 1 and parts(heights[-1], 2) >= minimum:
        heights.append(parts(heights[-1], 2))
    if rows > TILE:
        heights += range(min(rows // TILE * TILE, 64), up(minimum, TILE) - 1, -TILE)
    return reversed(dict.fromkeys(heights))


def _stepped(
    product: Product, transposed: bool, shares: int, height: int, row_blocks: int, column_blocks: int
) -> Way:
    """The way with the inner dimension in as few calls as the second cache has room for."""
    inner, threads = product.inner, product.threads // shares * shares
    way = Way(
        threads,
        height,
        min(64, product.columns),
        up(inner, 2),
        inner,
        row_blocks,
        column_blocks,
        depth_threads=shares,
        copies=transposed,
        packed=64 if transposed or product.rows == 1 else STEP,
    )
    if inner < STEP:
        way = way._replace(copies=transposed or inner % 2 > 0)
    else:
        depth = min(up(parts(inner, shares), 2), STEP)
        steps = batch = parts(parts(inner, depth), shares)
        needed = _needed(product, _placed(product, way._replace(depth=depth, batch=batch)))
        # Rows that lie a power of two apart are better read on.
        patience = 2 if not transposed and inner >= 4096 and inner & (inner - 1) == 0 else 0
        if needed // L2 > patience and batch > 1:
            longer, shorter = max(batch // (needed // L2), 1), parts(batch, parts(needed, L2))
            left, less = steps % longer, steps % shorter
            batch = shorter if less == 0 or not (left == 0 or less < left) else longer
        together = depth * batch
        if not transposed and inner % STEP and together > STEP:
            way = way._replace(depth=min(inner, together), fills=True)
        elif inner % depth == 0 and inner % together == 0:
            way = way._replace(depth=together)
        elif shares == 1 and inner == together + inner % depth:
            way = way._replace(depth=together, batch=2)
        else:
            way = way._replace(depth=depth, batch=batch)
        way = way._replace(copies=transposed or (not way.fills and inner % 2 > 0))
    return _placed(product, way)


def _placed(product: Product, way: Way) -> Way:
    """The way with the fields that follow from the inner dimension's steps."""
    sums = product.inner > way.together() or product.inner % way.depth > 0
    apart = product.inner
    if way.copies:
        apart = up(way.depth, STEP)
        if apart >= 512 and apart & (apart - 1) == 0:  # rows would meet in the cache
            apart += STEP
    return way._replace(sums=sums, apart=apart)


def _needed(product: Product, way: Way) -> int:
    """Bytes of all that a thread works on together."""
    depth, rows, columns = way.together(), way.rows * way.row_blocks, way.columns * way.column_blocks
    first = 2 * rows * (depth + way.copies * way.apart * way.batch)
    return first + 2 * depth * (columns + way.columns) + (2 + 4 * way.sums) * rows * columns


def _score(product: Product, way: Way) -> np.float32:
    """How well blocks fill the second cache, are used again, and are shared; in oneDNN's precision."""
    rows, columns = way.rows * way.row_blocks, way.columns * way.column_blocks
    threads, workers = product.threads, way.threads // way.depth_threads
    crowd = single(min(threads, 100))
    for_balance, for_cache = (crowd - single(1)) / crowd, single(1) / crowd
    needed = _needed(product, way)
    cache = single(1) - abs(single(L2) - single(needed)) / single(max(L2, needed))
    wanted = min(product.columns, 256 if way.copies else 64)
    row_use = min(single(rows) / single(min(product.rows, 256)), single(1))
    column_use = min(single(columns) / single(wanted), single(1))
    score = for_cache * cache + single(0.5) * (row_use + column_use)
    if for_balance > 0:
        pieces = up(parts(product.rows, rows) * parts(product.columns, columns), workers)
        balance = single(product.rows) / single(rows) * (single(product.columns) / single(columns))
        balance = balance / single(pieces) * single(workers)
        if way.depth_threads > 1:
            depth, shares = way.together(), way.depth_threads
            steps = single(up(parts(product.inner, depth), shares))
            even = single(0.8) * (single(product.inner) / single(depth)) / steps * single(shares)
            balance = balance * even
        score = score + for_balance * (balance / single(threads))
    mean: np.float32 = score / (single(1) + for_balance + for_cache)
    return mean
