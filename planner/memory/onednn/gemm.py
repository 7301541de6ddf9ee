"""Scratch of one product of 16-bit matrices on a CPU where torch leaves it to oneDNN, by the unit it runs on.

oneDNN works on blocks of rows that it finds by weighing how evenly threads share them, and takes its scratch
from torch: for each thread a copy of a block of the second matrix in the order of its instructions, sums of a
block of the result in single precision, and, where the first matrix is transposed, a copy of a block of that.
Without instructions for it (float16 on AVX512_FP16), both copies are in single precision, and the first
matrix is always copied. A matrix unit's blocks are another matter: `amx.py`.

Follows compute_blocking_heuristic_avx512 and matmul_avx512_blocking_params_t in oneDNN's
src/cpu/x64/matmul/brgemm_matmul_utils.cpp, for two dimensions. Checked to the byte against torch 2.13.0
(oneDNN 3.12), with 1 to 8 threads and on the Intel Xeon up to 64: AVX512_BF16 on an AMD EPYC; AMX with
bfloat16, and AVX512_FP16, on an Intel Xeon without AMX_FP16. float16 on AMX_FP16 is from the source only.
Imports no torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from planner.memory.onednn.amx import ENTRY_BYTES, THREAD_BYTES, Product, buffer_bytes, chunked, small, up
from planner.memory.onednn.amx_threads import shared
from planner.memory.onednn.units import Unit

COLUMNS: Final = 64
"""Columns of a block of the result."""
LEAST_WORK: Final = 16**3
"""Products of at most so many multiplications stay with torch (mkldnn_gemm_min_size)."""

Singles = NDArray[np.float32]


@lru_cache(maxsize=4096)
def scratch_bytes(
    unit: Unit,
    rows: int,
    inner: int,
    columns: int,
    threads: int,
    transposed: bool,
    second_transposed: bool = False,
) -> int:
    """Scratch of [rows, inner] @ [inner, columns]. `transposed`: the first is a transposed view;
    `second_transposed`: the second is, as weights are in a projection."""
    if rows * inner * columns <= LEAST_WORK:
        return 0
    half = unit in ("avx512_fp16", "amx_fp16")
    if half and second_transposed and 1 in (rows, columns):
        return 0  # torch multiplies a vector of float16 itself
    if columns == 1:  # torch asks for the transposed product
        rows, columns, transposed, second_transposed = 1, rows, False, not transposed
    transposed = transposed and rows > 1
    if unit in ("amx_bf16", "amx_fp16"):
        product = Product(rows, inner, columns, threads, second_transposed)
        way = (None if transposed or rows == 1 else shared(product)) or chunked(product, transposed)
        if half or not small(way):
            return buffer_bytes(product, way)
    return _vector_bytes(rows, inner, columns, threads, transposed, single=half)


def _vector_bytes(rows: int, inner: int, columns: int, threads: int, transposed: bool, single: bool) -> int:
    """Scratch of a product on a vector unit. `single`: copies are in single precision."""
    size, step = (4, 16) if single else (2, 32)
    depth = min(inner, 1024 if inner > 1024 and not transposed and rows > 1 else 512)
    # A copy also keeps apart long rows that would meet in the cache.
    copies = transposed or single or (rows >= 1024 and inner >= 4096 and _power_of_two(inner))
    together, chunk, split = _blocks(rows, inner, columns, threads, transposed, depth, copies, single)
    packed = size * COLUMNS * up(depth, step)
    if split > 1:  # threads share the inner dimension, and each has sums for all of the result
        sums = 4 * rows * columns
    else:
        sums = 4 * together * min(columns, COLUMNS) * (chunk if inner > depth else 1)
    copied = 0
    if copies:
        line = 64 // size
        width = up(depth, line)
        copied = size * together * (width + line * (width >= 512 and _power_of_two(width)))
    return (3 + copies) * ENTRY_BYTES + threads * (THREAD_BYTES + packed + sums + copied)


def _blocks(
    rows: int,
    inner: int,
    columns: int,
    threads: int,
    transposed: bool,
    depth: int,
    copies: bool,
    single: bool,
) -> tuple[int, int, int]:
    """(rows of a block, blocks of columns that are worked on together, threads for the inner dimension):
    those that threads share most evenly, the first of equals, larger blocks first."""
    across = -(-columns // COLUMNS)
    minimum, splits = min(32, rows), 1
    if threads > across:
        minimum = min(16, rows)
        if (transposed or rows == 1) and inner >= 2048 and (single or _power_of_two(inner)):
            splits = min(threads, 4)
    candidates = np.arange(min(256, rows), minimum - 1, -1)
    blocks, best = (1, 1, 1), np.float32(1)
    for split in range(splits, 0, -1):
        improved = False
        for chunk in range(min(16 if copies else 1, across), 0, -1):
            work = -(-rows // candidates) * -(-columns // (min(columns, COLUMNS) * chunk))
            share = threads // split
            uneven = _imbalance(rows, inner, columns, threads, depth, candidates, work, chunk, split)
            if splits == 1:  # too little work for all threads is not considered
                uneven = np.where((work < 3 * share) & (work % share != 0), np.float32(np.inf), uneven)
            at = int(np.argmin(uneven))
            if uneven[at] < best:
                best, blocks, improved = uneven[at], (int(candidates[at]), chunk, split), True
        if not improved:
            few = candidates[-1:]
            work = -(-rows // few) * across
            uneven = _imbalance(rows, inner, columns, threads, depth, few, work, 1, split)
            if uneven[0] < best:
                best, blocks = uneven[0], (minimum, 1, split)
    return blocks


def _imbalance(
    rows: int,
    inner: int,
    columns: int,
    threads: int,
    depth: int,
    candidates: NDArray[np.int64],
    work: NDArray[np.int64],
    chunk: int,
    split: int,
) -> Singles:
    """How unevenly threads would share, the mean of five shares: oneDNN's get_imbalance, in its precision."""
    single, share = np.float32, threads // split
    across = -(-columns // min(columns, COLUMNS))
    chunks = -(-across // chunk)
    beyond = ((candidates * -(-rows // candidates)) % rows).astype(single) / single(rows)
    left_over = (single(chunks) * single(chunk) - single(across)) / single(across)
    idle = single((threads - share * split) / threads)
    depths = _distance(np.array(inner), split * depth)
    mean: Singles = (_distance(work, share) + beyond + left_over + idle + depths) / single(5)
    return mean


def _distance(work: NDArray[np.int64], unit: int) -> Singles:
    """How far `work` is from a multiple of `unit`, as a share of it (calculate_spatial_disbalance)."""
    rest = work % unit
    away = np.where(work < unit, unit - rest, np.minimum(unit - rest, rest))
    distance: Singles = (away / unit).astype(np.float32)
    return distance


def _power_of_two(count: int) -> bool:
    return count & (count - 1) == 0
