"""Scratch of 16-bit products: by hand for each unit, and as torch's profiler counts it on this CPU."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from planner.measuring.footprint import footprints
from planner.memory.machines import Cpu, this_cpu
from planner.memory.onednn.gemm import scratch_bytes
from planner.memory.onednn.units import UNITS

CPU = torch.device("cpu")
ALL = [unit for units in UNITS.values() for unit in units]
CASES = 30
"""Of each dtype, kind of product and number of threads."""
TILE = 1024


@pytest.mark.parametrize("unit", ALL)
def test_little_work_takes_nothing(unit):
    assert scratch_bytes(unit, 16, 16, 16, 2, False) == 0
    assert scratch_bytes(unit, 16, 16, 17, 2, False) > 0


def test_a_block_of_rows_is_shared_by_two_threads():
    # 64 rows are two blocks of 32; a thread packs 64 x 64 numbers and sums 32 x 64.
    expected = 3 * 128 + 2 * (640 + 2 * 64 * 64 + 4 * 32 * 64)
    assert scratch_bytes("avx512_bf16", 64, 64, 64, 2, False) == expected


def test_a_transposed_matrix_is_copied_with_rows_apart():
    # One thread, a block of 17 rows; rows of 512 numbers are 32 further apart, not to share a cache set.
    packed, sums, copied = 2 * 64 * 512, 4 * 17 * 64, 2 * 17 * (512 + 32)
    expected = 4 * 128 + 640 + packed + sums + copied
    assert scratch_bytes("avx512_bf16", 17, 512, 64, 1, True) == expected


def test_what_is_deeper_than_a_block_is_summed_for_all_columns_that_go_together():
    shallow, deep = (scratch_bytes("avx512_bf16", 17, inner, 562, 1, True) for inner in (512, 1024))
    assert deep - shallow == 8 * 4 * 17 * 64  # nine blocks of columns


@pytest.mark.parametrize("transposed", [False, True])
def test_float16_without_a_matrix_unit_is_copied_in_single_precision(transposed):
    packed, sums, copied = 4 * 64 * 512, 4 * 17 * 64, 4 * 17 * (512 + 16)
    expected = 4 * 128 + 640 + packed + sums + copied
    assert scratch_bytes("avx512_fp16", 17, 512, 64, 1, transposed) == expected


def test_a_matrix_unit_keeps_few_rows_and_takes_columns_for_each_thread():
    # 64 columns are 32 for each of two threads, in two tiles; 64 numbers of each are packed.
    expected = 3 * 128 + 2 * (640 + 2 * 32 * 64 + 2 * TILE)
    assert scratch_bytes("amx_bf16", 16, 64, 64, 2, False, second_transposed=True) == expected


def test_a_matrix_unit_shares_rows_where_the_inner_dimension_is_short():
    # 50 rows for each thread are two blocks of 26, four tiles of 13 x 16; columns and inner rounded up to 32.
    expected = 3 * 128 + 2 * (640 + 2 * 64 * 32 + 4 * TILE)
    assert scratch_bytes("amx_bf16", 100, 16, 40, 2, False) == expected


def test_a_matrix_unit_packs_all_columns_once_unless_their_matrix_is_transposed():
    strip, all_columns = 2 * 32 * 128, 2 * 96 * 128
    plain, transposed = (scratch_bytes("amx_bf16", 64, 128, 96, 1, False, second) for second in (False, True))
    assert (plain, transposed) == tuple(3 * 128 + 640 + packed + 4 * TILE for packed in (all_columns, strip))


def test_a_matrix_unit_sums_blocks_of_the_inner_dimension_in_single_precision():
    # 1000 are 352 three times, one after another for each 32 columns; the last tile is filled up in one more.
    packed, sums = 3 * 2 * 32 * 352, 4 * 64 * 32
    expected = 4 * 128 + 640 + packed + sums + 5 * TILE
    assert scratch_bytes("amx_bf16", 64, 1000, 96, 1, False, second_transposed=True) == expected


def test_a_matrix_unit_copies_a_transposed_matrix():
    # 100 are four blocks of 32 in one call; there are lists, packed, copied, sums and tiles.
    lists, packed, copied, sums = 4 * 640, 4 * 2 * 64 * 32, 4 * 2 * 64 * 32, 4 * 64 * 64
    expected = 5 * 128 + lists + packed + copied + sums + 3 * TILE
    assert scratch_bytes("amx_bf16", 64, 100, 48, 1, True) == expected


def test_a_matrix_unit_leaves_small_blocks_of_bfloat16_to_the_vector_unit():
    small, large = (2, 31, 128, 2, False), (2, 32, 128, 2, False)
    assert scratch_bytes("amx_bf16", *small) == scratch_bytes("avx512_bf16", *small)
    assert scratch_bytes("amx_bf16", *large) != scratch_bytes("avx512_bf16", *large)
    assert scratch_bytes("amx_fp16", *small) != scratch_bytes("avx512_fp16", *small)


@pytest.mark.parametrize("unit", ["avx512_fp16", "amx_fp16"])
def test_torch_multiplies_a_vector_of_float16_by_transposed_weights_itself(unit):
    assert scratch_bytes(unit, 1, 128, 64, 1, False, second_transposed=True) == 0
    assert scratch_bytes(unit, 1, 128, 64, 1, False, second_transposed=False) > 0


def test_a_unit_multiplies_the_cpus_type_only():
    assert Cpu(2, dtype="float32").product(64, 64, 64) == 0
    assert this_cpu("float32").products is this_cpu("float64").products is None


@pytest.mark.parametrize(
    "flags, bfloat16, float16, packing",
    [
        ("avx2 f16c", None, None, set()),
        ("avx512f avx512_bf16", "avx512_bf16", None, set()),
        ("avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile", "amx_bf16", "avx512_fp16", {"bfloat16"}),
        ("avx512_bf16 avx512_fp16 amx_bf16 amx_fp16", "amx_bf16", "amx_fp16", {"bfloat16", "float16"}),
    ],
)
def test_the_unit_is_what_linux_names(monkeypatch, flags, bfloat16, float16, packing):
    monkeypatch.setattr(Path, "read_text", lambda self: f"model name: any\nflags\t\t: fpu {flags}\n")
    assert (this_cpu("bfloat16").products, this_cpu("float16").products) == (bfloat16, float16)
    assert this_cpu("float32").products is None
    assert this_cpu("float16").units == packing


@pytest.mark.parametrize("unit", ALL)
def test_arrays_give_what_ints_give(unit):
    machine = Cpu(2, products=unit)
    rows = np.array([1, 5, 64, 300])
    for transposed, second in ((False, False), (False, True), (True, False)):
        found = machine.product(rows, 48, 96, transposed, second)
        assert found.tolist() == [
            machine.product(count, 48, 96, transposed, second) for count in rows.tolist()
        ]


@pytest.mark.parametrize("unit", ["amx_bf16", "amx_fp16"])
def test_any_number_of_threads_finds_a_way(unit):
    rng = random.Random(unit)
    for _ in range(30):
        rows, inner, columns = (int(2 ** rng.uniform(0, 13)) for _ in range(3))
        threads, transposed = rng.choice((1, 5, 16, 64, 224)), rng.random() < 0.3
        taken = scratch_bytes(unit, rows, inner, columns, threads, transposed, rng.random() < 0.5)
        assert taken >= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "transposed", "second transposed", "biased"])
@pytest.mark.parametrize("threads", [1, 2, 3, 8], indirect=True)
def test_the_profiler_counts_the_same(kind, dtype, threads):
    machine = replace(this_cpu(str(dtype).removeprefix("torch.")), threads=threads)
    if machine.products is None:
        pytest.skip(f"this CPU leaves no products of {dtype} to oneDNN")
    rng = random.Random(f"{kind} {dtype} {threads}")
    runs, said = [], []
    for _ in range(CASES):
        rows = rng.choice((1, 5, 17, 32, 64, rng.randint(2, 100), rng.randint(2, 1500)))
        columns = rng.choice((8, 32, 64, 256, rng.randint(2, 100), rng.randint(2, 1100)))
        inner = rng.choice((8, 32, 33, 64, rng.randint(2, 100), rng.randint(2, 1100), 1024, 2048))
        first, second = torch.zeros(rows, inner, dtype=dtype), torch.zeros(inner, columns, dtype=dtype)
        weights, bias = torch.zeros(columns, inner, dtype=dtype), torch.zeros(columns, dtype=dtype)
        if kind == "transposed":
            first = torch.zeros(inner, rows, dtype=dtype).t()
        if kind in ("plain", "transposed"):
            runs.append(lambda a=first, b=second: torch.mm(a, b))
        else:
            added = bias if kind == "biased" else None
            runs.append(lambda a=first, w=weights, b=added: torch.nn.functional.linear(a, w, b))
        transposed, second_transposed = kind == "transposed", kind in ("second transposed", "biased")
        said.append(
            ((rows, inner, columns), machine.product(rows, inner, columns, transposed, second_transposed))
        )
        runs[-1]()  # what oneDNN keeps of a first call
    for found, (sizes, expected) in zip(footprints(runs, CPU), said, strict=True):
        assert found.peak - found.kept == expected, sizes
