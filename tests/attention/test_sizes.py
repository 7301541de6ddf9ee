"""What is reserved is enough at the sizes that people run: random programs up to a million tokens, expanded
call by call. Imports no torch, so that no size is too large."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
from needs import beyond, extent_of

from attention import block_sparse, dilated, token_window
from attention.config import AttentionConfig, SparsePatternConfig
from attention.layout import build_layout
from attention.sizes.arrays import row_blocks
from attention.sizes.row_bounds import chosen_rows, rows_of
from attention.sizes.shape import Shape, chunk_tokens
from attention.sizes.tiles import sparse_extent
from attention.sizes.token_tiles import token_window_of

MOST_CALLS = 1500
"""Of a pass: longer programs repeat themselves, so their sequence is cut."""
MOST_LISTED = 1 << 22
"""Blocks in the lists of an adaptive attention, which are arrays of this test."""
USUAL = (1, 7, 17, 512, 1000, 4096, 6144, 16_384, 30_714, 32_768, 65_537, 131_072, 1 << 20)


def random_shape(rng: random.Random) -> Shape:
    """Sizes of a call: usual ones and others, on a CPU with and without a matrix unit and on a GPU."""
    repeat = rng.choice((1, 1, 2, 3, 4, 8))
    kv_heads = max(rng.choice((1, 2, 3, 4, 5, 8, 12, 16, 32)) // repeat, 1)
    itemsize = rng.choice((2, 2, 2, 4, 8))
    cpu = rng.random() < 0.8
    seq = rng.choice(USUAL) if rng.random() < 0.5 else round(2 ** rng.uniform(0, 20))
    sizes = {
        "seq": max(seq + rng.choice((0, 0, 0, 1, -1)), 1),
        "heads": kv_heads * repeat,
        "kv_heads": kv_heads,
        "head_dim": rng.choice((64, 128, 128, 80, 96, 160, rng.randint(1, 160))),
        "itemsize": itemsize,
        "workspace": rng.choice((16 << 20, 64 << 20, round(2 ** rng.uniform(16, 26)))),
    }
    shape = Shape(
        **sizes,
        causal=rng.random() < 0.5,
        chunk=chunk_tokens(cpu=cpu, **sizes),
        packs=cpu and itemsize == 2 and rng.random() < 0.5,
        widens=cpu and itemsize == 2,
    )
    return shape._replace(groups=cpu and not shape.packs and rng.random() < 0.8)


def random_branches(rng: random.Random, most: int, unit: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Segment lengths up to `most` units, often powers of two or nested, and rates."""
    count = rng.choice((1, 1, 2, 3, 4))
    ones = rng.random() < 0.3
    lengths, rates = [], []
    for _ in range(count):
        length = round(2 ** rng.uniform(0, math.log2(most + 1)))
        if rng.random() < 0.5:
            length = 1 << (length.bit_length() - 1)
        lengths.append(length * unit)
        rate = 1 if ones else rng.choice((1, 2, 3, 4, 5, 8, 16, rng.randint(1, 64)))
        rates.append(min(rate, length))
    return tuple(lengths), tuple(rates)


def random_config(rng: random.Random, shape: Shape) -> AttentionConfig | tuple[int, int]:
    """A config, or (block size, blocks a row) of an adaptive attention."""
    kind = rng.choice(
        (
            "dense",
            "dilated",
            "dilated",
            "local_window",
            "global_local",
            "dilated_sparse",
            "dilated_sparse",
            "adaptive",
        )
    )
    size = rng.choice((16, 32, 64, 64, 128, 128, 256, 512, rng.randint(1, 300)))
    blocks = -(-shape.seq // size)
    if kind == "dense":
        return AttentionConfig(variant="dense")
    if kind == "dilated":
        lengths, rates = random_branches(rng, 2 * shape.seq)
        return AttentionConfig(
            variant="dilated", segment_lengths=lengths, dilation_rates=rates, uncovered="zero"
        )
    ratio = min(1.0, 2 ** rng.uniform(-8, 0))
    if kind == "adaptive":
        return size, min(row_blocks(ratio, blocks), blocks)
    fields = {}
    if kind == "dilated_sparse":
        lengths, rates = random_branches(rng, blocks + 3, size)
        return AttentionConfig(
            variant="block_sparse",
            segment_lengths=lengths,
            dilation_rates=rates,
            pattern=SparsePatternConfig(pattern_type=kind, block_size=size, sparsity_ratio=ratio),
        )
    if kind == "global_local":
        fields["global_tokens"] = round(2 ** rng.uniform(0, math.log2(shape.seq + 1)))
    window = rng.choice((256, 512, 1024, 4096, round(2 ** rng.uniform(0, math.log2(shape.seq + 1)))))
    fields["edges"] = rng.choice(("token", "block"))
    pattern = SparsePatternConfig(pattern_type=kind, block_size=size, local_window_size=window, **fields)
    return AttentionConfig(variant="block_sparse", pattern=pattern)


def chosen_lists(rng: random.Random, blocks: int, heads: int, kept: int, causal: bool) -> np.ndarray:
    """[heads, blocks, kept] ascending key blocks, -1 at the end of rows that have fewer; a window that wraps
    around somewhere else in every row, and under `causal` the row's own block."""
    row = np.arange(blocks)
    room = np.maximum(row if causal else np.full(blocks, blocks), 1)
    shift = np.random.default_rng(rng.randrange(1 << 30)).integers(0, blocks, (heads, blocks))
    wanted = kept - causal
    found = (shift[..., None] + np.arange(wanted)) % room[:, None]
    if causal:
        found = np.where(np.arange(wanted) < row[:, None], found, blocks + 1)
        found = np.concatenate([found, np.broadcast_to(row[:, None], (heads, blocks, 1))], axis=-1)
    found = np.sort(found, axis=-1)
    return np.where(found > blocks, -1, found)


def program_of(config, shape: Shape, rng: random.Random):
    """(tiles of a shape, extent of a shape)."""
    if not isinstance(config, AttentionConfig):
        size, blocks = config[0], -(-shape.seq // config[0])
        kept = min(config[1], blocks)
        lists = chosen_lists(rng, blocks, shape.heads, kept, shape.causal)
        rows = chosen_rows(size, kept)
        return lambda s: block_sparse.chosen_tiles(lists, rows, s), lambda s: sparse_extent(rows, s)
    if config.token_edges:
        window = token_window_of(config, shape.causal)
        return lambda s: token_window.tiles(window, s), lambda s: extent_of(config, s)
    if config.variant == "block_sparse":
        layout = build_layout(config, shape.seq, shape.causal)
        rows = rows_of(config, shape.seq, shape.causal)
        return lambda s: block_sparse.tiles(layout, rows, s), lambda s: extent_of(config, s)
    branches = shape.within(config.branches or ((shape.seq, 1),))
    return lambda s: dilated.tiles(branches, s), lambda s: extent_of(config, s)


def expanded(tiles) -> list | None:
    """The tiles as a list; None if they have more than `MOST_CALLS` calls."""
    found, calls = [], 0
    for tile in tiles:
        found.append(tile)
        calls += len(tile.calls)
        if calls > MOST_CALLS:
            return None
    return found


def beyond_in(seed: int):
    """(config, shape, what the program of this seed asks for beyond what is reserved)."""
    rng = random.Random(seed)
    shape = random_shape(rng)
    config = random_config(rng, shape)
    while True:
        listed = 1
        if not isinstance(config, AttentionConfig):
            listed = -(-shape.seq // config[0]) * config[1] * shape.heads
        if listed <= MOST_LISTED:
            tiles, extent = program_of(config, shape, random.Random(seed))
            back = shape.backward()
            forward = expanded(tiles(shape))
            backward = None if forward is None else expanded(tiles(back))
            if backward is not None:
                return config, shape, beyond(forward, extent(shape), shape, backward, extent(back))
        shape = shape._replace(seq=shape.seq // 3 + 1)


def failures(seed: int, count: int) -> list:
    """(seed, config, shape, what is beyond) of the first programs that ask for more than is reserved."""
    found = []
    for number in range(seed, seed + count):
        config, shape, over = beyond_in(number)
        if over:
            found.append((number, config, shape, over))
        if len(found) == 5:
            break
    return found


def test_what_is_reserved_is_enough_at_the_sizes_that_people_run():
    assert not failures(0, 60)


FOUND = (101571, 35919617041351, 35920073626039)
"""Seeds of programs that asked for more: windows of several segments, rows on either side of an end, windows
that end where the global blocks begin."""


@pytest.mark.parametrize("seed", FOUND)
def test_what_is_reserved_is_enough_where_it_once_was_not(seed):
    assert not failures(seed, 1)


@pytest.mark.slow
def test_what_is_reserved_is_enough_for_20000_programs(seed):
    assert not failures(seed * 20_000, 20_000)


def test_sizes_are_known_without_torch():
    code = "import sys, test_sizes; test_sizes.failures(0, 3); assert 'torch' not in sys.modules"
    paths = [path for path in sys.path if path]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {paths}; {code}"], check=True)
