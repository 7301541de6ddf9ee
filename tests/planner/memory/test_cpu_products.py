"""Scratch of bfloat16 products: by hand, and as torch's profiler counts it where this CPU makes them so."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from planner.footprint import footprint
from planner.memory.cpu_products import scratch_bytes
from planner.memory.kernels import Cpu, this_cpu

CPU = torch.device("cpu")
HERE = "bfloat16" in this_cpu("bfloat16").products
CASES = 40


def test_little_work_takes_nothing():
    assert scratch_bytes(16, 16, 16, 2, False) == 0
    assert scratch_bytes(16, 16, 17, 2, False) > 0


def test_a_block_of_rows_is_shared_by_two_threads():
    # 64 rows are two blocks of 32; a thread packs 64 x 64 numbers and sums 32 x 64.
    assert scratch_bytes(64, 64, 64, 2, False) == 3 * 128 + 2 * (640 + 2 * 64 * 64 + 4 * 32 * 64)


def test_a_transposed_matrix_is_copied_with_rows_apart():
    # One thread, a block of 17 rows; rows of 512 numbers are 32 further apart, not to share a cache set.
    packed, sums, copied = 2 * 64 * 512, 4 * 17 * 64, 2 * 17 * (512 + 32)
    assert scratch_bytes(17, 512, 64, 1, True) == 4 * 128 + 640 + packed + sums + copied


def test_what_is_deeper_than_a_block_is_summed_for_all_columns_that_go_together():
    shallow, deep = scratch_bytes(17, 512, 562, 1, True), scratch_bytes(17, 1024, 562, 1, True)
    assert deep - shallow == 8 * 4 * 17 * 64  # nine blocks of columns


def test_only_types_that_the_library_multiplies_take_scratch():
    machine = Cpu(2, dtype="float32", products=frozenset({"bfloat16"}))
    assert machine.product(64, 64, 64) == 0
    assert Cpu(2, dtype="bfloat16").product(64, 64, 64) == 0


def test_arrays_give_what_ints_give():
    machine = Cpu(2, dtype="bfloat16", products=frozenset({"bfloat16"}))
    rows = np.array([1, 5, 64, 300])
    found = machine.product(rows, 48, 96)
    assert found.tolist() == [machine.product(count, 48, 96) for count in rows.tolist()]


@pytest.mark.skipif(not HERE, reason="this CPU makes no bfloat16 products by AVX512_BF16")
@pytest.mark.parametrize("turned", [False, True])
def test_the_profiler_counts_the_same(turned, threads):
    rng = random.Random(f"{turned} {threads}")
    for _ in range(CASES):
        rows, columns = rng.choice((5, 17, rng.randint(2, 700))), rng.choice((8, rng.randint(2, 400)))
        inner = rng.choice((8, rng.randint(2, 700), 1024, 1500))
        a = torch.randn(inner, rows).bfloat16().t() if turned else torch.randn(rows, inner).bfloat16()
        b, out = torch.randn(inner, columns).bfloat16(), torch.empty(rows, columns).bfloat16()
        torch.mm(a, b, out=out)
        found = footprint(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), CPU)
        assert found.peak == scratch_bytes(rows, inner, columns, threads, turned), (rows, inner, columns)
