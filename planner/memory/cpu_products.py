"""What one product of bfloat16 matrices takes on a CPU with AVX512_BF16, where torch leaves it to oneDNN.

oneDNN works on blocks of rows that it finds by weighing how evenly threads share them, and takes its scratch
from torch: for each thread a copy of a block of the second matrix in the order of its instructions, sums of a
block of the result in single precision, and, where the first matrix is transposed, a copy of a block of that.

Follows compute_blocking_heuristic_avx512 and matmul_avx512_blocking_params_t in oneDNN's
src/cpu/x64/matmul/brgemm_matmul_utils.cpp, for two dimensions and bfloat16; sizes were checked to the byte
against torch 2.13.0 (oneDNN 3.12) on an AMD EPYC with 1 to 8 threads. CPUs with a matrix unit (AMX) block
otherwise and are not covered. Imports no torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

COLUMNS: Final = 64
"""Of a block of the result."""
LEAST_WORK: Final = 16**3
"""Products of at most so many multiplications stay with torch (mkldnn_gemm_min_size)."""
THREAD_BYTES: Final = 640
"""Of a thread, besides blocks: its list of pairs of blocks."""
ENTRY_BYTES: Final = 128
"""Of each kind of buffer: where it begins is rounded up."""

Floats = NDArray[np.float32]


@lru_cache(maxsize=4096)
def scratch_bytes(rows: int, inner: int, columns: int, threads: int, turned: bool) -> int:
    """Scratch of [rows, inner] @ [inner, columns]. `turned`: the first is a transposed view."""
    if rows * inner * columns <= LEAST_WORK:
        return 0
    depth = min(inner, 1024 if inner > 1024 and not turned and rows > 1 else 512)
    together, chunk, split = _blocks(rows, inner, columns, threads, turned, depth)
    packed = 2 * COLUMNS * _up(depth, 32)
    if split > 1:  # threads share the inner dimension, and each has sums for all of the result
        sums = 4 * rows * columns
    else:
        sums = 4 * together * min(columns, COLUMNS) * (chunk if inner > depth else 1)
    copied = 0
    if turned:
        width = _up(depth, 32)
        far_apart = width >= 512 and width & (width - 1) == 0  # rows would meet in the cache
        copied = 2 * together * (width + 32 * far_apart)
    return (3 + turned) * ENTRY_BYTES + threads * (THREAD_BYTES + packed + sums + copied)


def _blocks(
    rows: int, inner: int, columns: int, threads: int, turned: bool, depth: int
) -> tuple[int, int, int]:
    """(rows of a block, blocks of columns that are worked on together, threads for the inner dimension):
    those that threads share most evenly, the first of equals, larger blocks first."""
    across = -(-columns // COLUMNS)
    least, splits = min(32, rows), 1
    if threads > across:
        least = min(16, rows)
        if turned and inner >= 2048 and inner & (inner - 1) == 0:
            splits = min(threads, 4)
    candidates = np.arange(min(256, rows), least - 1, -1)
    found, best = (1, 1, 1), np.float32(1)
    for split in range(splits, 0, -1):
        any_found = False
        for chunk in range(min(16 if turned else 1, across), 0, -1):
            work = -(-rows // candidates) * -(-columns // (min(columns, COLUMNS) * chunk))
            share = threads // split
            uneven = _imbalance(rows, inner, columns, threads, depth, candidates, work, chunk, split)
            if splits == 1:  # too little work for all threads is not considered
                uneven = np.where((work < 3 * share) & (work % share != 0), np.float32(np.inf), uneven)
            at = int(np.argmin(uneven))
            if uneven[at] < best:
                best, found, any_found = uneven[at], (int(candidates[at]), chunk, split), True
        if not any_found:
            few = candidates[-1:]
            work = -(-rows // few) * across
            uneven = _imbalance(rows, inner, columns, threads, depth, few, work, 1, split)
            if uneven[0] < best:
                best, found = uneven[0], (least, 1, split)
    return found


def _imbalance(
    rows: int, inner: int, columns: int, threads: int, depth: int, candidates: NDArray[np.int64],
    work: NDArray[np.int64], chunk: int, split: int,
) -> Floats:  # fmt: skip
    """How unevenly threads would share, the mean of five shares: oneDNN's get_imbalance, in its precision."""
    single, share = np.float32, threads // split
    across = -(-columns // min(columns, COLUMNS))
    chunks = -(-across // chunk)
    beyond = ((candidates * -(-rows // candidates)) % rows).astype(single) / single(rows)
    left_over = (single(chunks) * single(chunk) - single(across)) / single(across)
    idle = single((threads - share * split) / threads)
    depths = _distance(np.array(inner), split * depth)
    found: Floats = (_distance(work, share) + beyond + left_over + idle + depths) / single(5)
    return found


def _distance(work: NDArray[np.int64], unit: int) -> Floats:
    """How far `work` is from a multiple of `unit`, as a share of it (calculate_spatial_disbalance)."""
    rest = work % unit
    away = np.where(work < unit, unit - rest, np.minimum(unit - rest, rest))
    found: Floats = (away / unit).astype(np.float32)
    return found


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
