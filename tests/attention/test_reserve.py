"""What a pass reserves is enough for every call of its program, and no more than the largest takes."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from conformance import LEAST_WORKSPACE, dilated, patterned
from hypothesis import given, settings
from hypothesis import strategies as st
from test_program import chosen_lists, programs, shape_of, tiles_of

from attention import AttentionConfig, build
from attention.adaptive import _tiles
from attention.ops import reserve
from attention.ops.execute import _piece
from attention.ops.program import Gather
from attention.ops.reserve import (
    arena_bytes,
    backward_sizes,
    dilated_extent,
    forward_sizes,
    slab_rows,
    sparse_extent,
    sums_in_full,
)
from attention.rows import chosen_rows, rows_of


def extent_of(config, shape):
    if config.variant == "block_sparse":
        return sparse_extent(rows_of(config, shape.seq, shape.causal), shape)
    branches = shape.within(config.branches or ((shape.seq, 1),))
    return dilated_extent(sorted(branches, key=lambda branch: branch[1]), shape)


def forward_needs(tiles, shape, keeps_lse):
    """Most bytes that the executor asks for by name in a forward pass."""
    dim, narrow = shape.head_dim, shape.itemsize < 4
    needs = dict.fromkeys(("total", "part", "lse", "k", "v"), 0)

    def need(name, nbytes):
        needs[name] = max(needs[name], nbytes)

    for tile in tiles:
        tokens = tile.stop - tile.start
        if tile.merge:
            need("total", tokens * shape.heads * dim * 4 * narrow)
            need("lse", tokens * shape.heads * shape.wide * (not keeps_lse))
        for call in tile.calls:
            if isinstance(call.keys, Gather):
                heads = shape.kv_heads if call.keys.blocks.ndim == 2 else shape.heads
                for name in "kv":
                    need(name, len(call.keys.blocks) * call.keys.length * heads * dim * shape.itemsize)
            if tile.merge and not call.first:
                for span in call.queries:
                    need("part", span.batch * span.heads * span.length * dim * 4 * narrow)
    return needs


def backward_needs(tiles, shape):
    """Most bytes that the executor asks for by name in a backward pass."""
    dim, wide = shape.head_dim, shape.wide
    full = sums_in_full(shape)
    target = wide if full else shape.itemsize
    needs = {}

    def need(name, nbytes):
        needs[name] = max(needs.get(name, 0), nbytes)

    if full:
        need("dk", shape.seq * shape.kv_heads * dim * wide)
        need("dv", shape.seq * shape.kv_heads * dim * wide)
    for tile in tiles:
        need("dq", (tile.stop - tile.start) * shape.heads * dim * wide * (shape.itemsize < wide))
        for call in tile.calls:
            for _, part in call.columns(shape):
                overlaps = not isinstance(part, Gather) and part.overlaps
                if isinstance(part, Gather):
                    shared = part.blocks.ndim == 2
                    heads = shape.kv_heads if shared else shape.heads
                    rows = len(part.blocks) * part.length * heads
                    lists = part.blocks
                    if not shared:
                        lists = lists * shape.kv_heads
                        lists = lists + (np.arange(shape.heads) * shape.kv_heads // shape.heads)[:, None]
                    sums = np.unique(lists).size * part.size * (shape.kv_heads if shared else 1)
                    for name in "kv":
                        need(name, rows * dim * shape.itemsize)
                        need(f"d{name} of a call", sums * dim * wide)
                    lane = shape.kv_heads if shared else 1
                    need("slab", min(slab_rows(shape) // lane, sums // lane) * lane * dim * target)
                elif overlaps:
                    spread = (part.stop - part.start) * shape.kv_heads * dim
                    for name in "kv":
                        need(f"wide {name}", spread * 4 * shape.widens)
                        need(f"d{name} of a call", spread * wide * (target < wide))
                for span in call.queries:
                    views, width = _piece(span, part, call.mask == "causal", shape)
                    views, width = min(views, span.batch), min(width, part.length)
                    for name in ("do", "q", "out"):
                        need(name, views * span.heads * span.length * dim * 4 * shape.widens)
                    if not overlaps:
                        for name in "kv":
                            need(f"wide {name}", views * span.heads * width * dim * 4 * shape.widens)
                    if not overlaps and not isinstance(part, Gather):
                        apart = shape.widens and target < wide
                        need("share", views * span.heads * width * dim * 4 * apart)
    return needs


def assert_enough(tiles, extent, shape, back_tiles, back_extent):
    back = shape.backward()
    for needs, sizes in [
        (forward_needs(tiles, shape, False), forward_sizes(extent, shape, False)),
        (forward_needs(tiles, shape, True), forward_sizes(extent, shape, True)),
        (backward_needs(back_tiles, back), backward_sizes(back_extent, back)),
    ]:
        for name, nbytes in needs.items():
            assert nbytes <= sizes[name], (name, nbytes, sizes[name])
    for tile in tiles:
        assert tile.stop - tile.start <= extent.tokens
    for call in (call for tile in tiles for call in tile.calls if call.mask == "diagonal"):
        assert max(call.queries[0].length, call.keys.unit) <= extent.mask[0]
        assert call.keys.length <= extent.mask[1]


def sized(program):
    config, shape = program
    return config, shape._replace(widens=shape.widens and shape.itemsize == 2)


def assert_enough_for(program, sum_bytes):
    config, shape = sized(program)
    back = shape.backward()
    tiles, back_tiles = tiles_of(config, shape), tiles_of(config, back)
    with mock.patch.object(reserve, "SUM_BYTES", sum_bytes):
        assert_enough(tiles, extent_of(config, shape), shape, back_tiles, extent_of(config, back))


either = st.sampled_from([0, reserve.SUM_BYTES])


@settings(max_examples=100)
@given(program=programs(longest=400), sum_bytes=either)
def test_what_is_reserved_is_enough(program, sum_bytes):
    assert_enough_for(program, sum_bytes)


@pytest.mark.slow
@settings(max_examples=5000)
@given(program=programs(longest=600), sum_bytes=either)
def test_what_is_reserved_is_enough_for_many(program, sum_bytes):
    assert_enough_for(program, sum_bytes)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("itemsize, widens", [(2, True), (2, False), (4, False)])
@pytest.mark.parametrize("seq, size, kept", [(1, 8, 1), (61, 8, 3), (150, 8, 12), (64, 1, 20), (100, 33, 2)])
def test_what_is_reserved_is_enough_for_lists_of_each_head(seq, size, kept, itemsize, widens, causal):
    blocks = -(-seq // size)
    lists = chosen_lists(np.random.default_rng(0), blocks, 4, min(kept, blocks), causal)
    shape = shape_of(seq, itemsize=itemsize, widens=widens, causal=causal)
    rows, back = chosen_rows(size, lists.shape[-1]), shape.backward()
    tiles, back_tiles = list(_tiles(lists, rows, shape)), list(_tiles(lists, rows, back))
    assert_enough(tiles, sparse_extent(rows, shape), shape, back_tiles, sparse_extent(rows, back))


@pytest.mark.pairwise
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "config",
    [
        dilated([(2048, 1)]),
        dilated([(2048, 1), (8192, 4), (65536, 16)]),
        patterned("local_window", local_window_size=512),
        patterned("local_window", local_window_size=16_384),
        patterned("global_local", local_window_size=512, global_tokens=64),
        patterned("dilated_sparse", [(256, 1)], sparsity_ratio=0.02),
        patterned("dilated_sparse", [(256, 2)], sparsity_ratio=0.02),
        patterned("dilated_sparse", [(256, 1), (1024, 2), (4096, 8)], sparsity_ratio=0.02),
    ],
    ids=lambda config: config.pattern.pattern_type if config.pattern else "dilated",
)
def test_nothing_is_reserved_in_vain(config, itemsize, causal):
    shape = shape_of(40_000, heads=8, kv_heads=8, head_dim=64, itemsize=itemsize, widens=itemsize == 2,
                     causal=causal, workspace=1 << 24)  # fmt: skip
    back = shape.backward()
    pairs = [
        (forward_needs(tiles_of(config, shape), shape, False),
         forward_sizes(extent_of(config, shape), shape, False)),
        (backward_needs(tiles_of(config, back), back), backward_sizes(extent_of(config, back), back)),
    ]  # fmt: skip
    for needs, sizes in pairs:
        needed = {name: needs.get(name, 0) for name in sizes}
        needed["wide slab"] = sizes.get("wide slab", 0)
        # How many blocks the lists of several rows share, no closed form tells.
        told = config.pattern is None or config.pattern.pattern_type != "dilated_sparse"
        assert arena_bytes(needed) >= (0.98 if told else 0.8) * arena_bytes(sizes), (needed, sizes)
        assert arena_bytes(sizes) <= shape.workspace * 2


def test_arrays_give_what_ints_give():
    windows = np.array([64, 512, 4096, 20_000])
    from attention.rows import window_rows

    for causal in (False, True):
        shape = shape_of(10_000, workspace=LEAST_WORKSPACE, itemsize=2, widens=True, causal=causal)
        sizes = [
            (forward_sizes(sparse_extent(rows, shape), shape, True),
             backward_sizes(sparse_extent(rows, shape.backward()), shape.backward()))
            for rows in (window_rows(64, 157, windows, 0, causal),
                         *(window_rows(64, 157, int(w), 0, causal) for w in windows))
        ]  # fmt: skip
        for n, single in enumerate(sizes[1:]):
            for many, one in zip(sizes[0], single, strict=True):
                assert {name: int(np.broadcast_to(x, 4)[n]) for name, x in many.items()} == one


def test_segments_whose_residues_differ_in_size_have_room_in_backward():
    """Where a segment is no multiple of the rate, heads take a token more or less of it, and of the shorter
    views a piece holds more."""
    config = AttentionConfig(
        variant="dilated",
        segment_lengths=(4,),
        dilation_rates=(3,),
        uncovered="zero",
        workspace_bytes=1 << 16,
    )
    q = torch.randn(1, 20, 8, 1, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, 20, 2, 1, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    build(config)(q, k, v).sum().backward()
    assert q.grad is not None
