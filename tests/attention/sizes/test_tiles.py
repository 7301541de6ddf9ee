"""What a pass reserves is enough for every call of its program, and no more than the largest takes."""

from __future__ import annotations

import math
import random
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from conformance import LEAST_WORKSPACE, dilated, patterned
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import Needs, backward_needs, beyond, extent_of, forward_needs
from test_program import chosen_lists, programs, shape_of, tiles_of
from test_sizes import chosen_lists as many_lists
from test_sizes import random_config, random_shape

from attention import AdaptiveConfig, AttentionConfig, SparsePatternConfig, build, inputs
from attention.block_sparse import chosen_tiles
from attention.ops.execute import attend
from attention.ops.scratch import Scratch
from attention.sizes import tiles as reserve
from attention.sizes.arena import arena_bytes
from attention.sizes.row_bounds import chosen_rows
from attention.sizes.tiles import backward_sizes, forward_sizes, sparse_extent


def sized(program):
    config, shape = program
    return config, shape._replace(widens=shape.widens and shape.itemsize == 2)


def assert_enough_for(program, sum_bytes):
    config, shape = sized(program)
    back = shape.backward()
    tiles, back_tiles = tiles_of(config, shape), tiles_of(config, back)
    with mock.patch.object(reserve, "SUM_BYTES", sum_bytes):
        assert not beyond(tiles, extent_of(config, shape), shape, back_tiles, extent_of(config, back))


either = st.sampled_from([0, reserve.SUM_BYTES])


@settings(max_examples=40)
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
    tiles, back_tiles = list(chosen_tiles(lists, rows, shape)), list(chosen_tiles(lists, rows, back))
    assert not beyond(tiles, sparse_extent(rows, shape), shape, back_tiles, sparse_extent(rows, back))


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
        patterned("local_window", local_window_size=512, edges="token"),
        patterned("local_window", local_window_size=16_384, edges="token"),
        patterned("global_local", local_window_size=512, global_tokens=64, edges="token"),
        patterned("dilated_sparse", [(256, 1)], sparsity_ratio=0.02),
        patterned("dilated_sparse", [(256, 2)], sparsity_ratio=0.02),
        patterned("dilated_sparse", [(256, 1), (1024, 2), (4096, 8)], sparsity_ratio=0.02),
    ],
    ids=lambda config: config.pattern.pattern_type if config.pattern else "dilated",
)
def test_nothing_is_reserved_in_vain(config, itemsize, causal):
    shape = shape_of(
        40_000,
        heads=8,
        kv_heads=8,
        head_dim=64,
        itemsize=itemsize,
        widens=itemsize == 2,
        causal=causal,
        workspace=1 << 24,
    )
    back = shape.backward()
    pairs = [
        (
            forward_needs(tiles_of(config, shape), shape, False),
            forward_sizes(extent_of(config, shape), shape, False),
        ),
        (
            backward_needs(tiles_of(config, back), extent_of(config, back), back),
            backward_sizes(extent_of(config, back), back),
        ),
    ]
    for needs, sizes in pairs:
        needed = {name: needs.get(name, 0) for name in sizes}
        assert all(needed[name] <= nbytes for name, nbytes in sizes.items()), (needed, sizes)
        needed["wide slab"] = sizes.get("wide slab", 0)
        # How many blocks the lists of several rows share, no closed form tells.
        told = config.pattern is None or config.pattern.pattern_type != "dilated_sparse"
        assert arena_bytes(needed) >= (0.98 if told else 0.8) * arena_bytes(sizes), (needed, sizes)
        assert arena_bytes(sizes) <= shape.workspace * 2


def test_arrays_give_what_ints_give():
    windows = np.array([64, 512, 4096, 20_000])
    from attention.sizes.row_bounds import window_rows

    for causal in (False, True):
        shape = shape_of(10_000, workspace=LEAST_WORKSPACE, itemsize=2, widens=True, causal=causal)
        sizes = [
            (
                forward_sizes(sparse_extent(rows, shape), shape, True),
                backward_sizes(sparse_extent(rows, shape.backward()), shape.backward()),
            )
            for rows in (
                window_rows(64, 157, windows, 0, causal),
                *(window_rows(64, 157, int(w), 0, causal) for w in windows),
            )
        ]
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


def asked_for(run):
    """(what `run` gives, most bytes that it asks a scratch for, by name)."""
    asked, get = Needs(), Scratch.get

    def recorded(self, name, shape, dtype):
        asked.need(name, math.prod(shape) * dtype.itemsize)
        return get(self, name, shape, dtype)

    with mock.patch.object(Scratch, "get", recorded):
        return run(), asked


def small_program(seed, tokens):
    """(problem, q, k, v) of a random program of `test_sizes` over at most so many tokens; None where it is a
    kernel call without scratch."""
    rng = random.Random(seed)
    shape = random_shape(rng)
    kv_heads = min(shape.kv_heads, 3)
    repeat = shape.heads // shape.kv_heads
    seq, workspace = shape.seq % tokens + 1, 1 << rng.randint(16, 20)
    config = random_config(rng, shape._replace(seq=seq))
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[shape.itemsize]
    q = torch.randn(1, seq, kv_heads * repeat, shape.head_dim, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, seq, kv_heads, shape.head_dim, dtype=dtype) for _ in range(2))
    if isinstance(config, AttentionConfig):
        module = build(config.model_copy(update={"workspace_bytes": workspace}))
        real = inputs.shape_of(q, k, module.config, shape.causal)
        problem, rows = module._problem(real)
        if rows is not None:
            problem = module._of_layout(problem, rows)
    else:
        size, kept = config
        blocks = -(-seq // size)
        pattern = SparsePatternConfig(block_size=size, sparsity_ratio=kept / blocks)
        scorer = AdaptiveConfig(num_heads=kv_heads * repeat, head_dim=shape.head_dim)
        module = build(
            AttentionConfig(variant="adaptive", workspace_bytes=workspace, pattern=pattern, adaptive=scorer)
        )
        real = inputs.shape_of(q, k, module.config, shape.causal)
        lists = many_lists(rng, blocks, kv_heads * repeat, kept, shape.causal)
        problem = module._problem_over(real, torch.from_numpy(lists)[None])
    return None if problem.whole else (problem, q, k, v)


def assert_asks_for_what_is_told(seeds, tokens):
    programs = [found for seed in seeds if (found := small_program(seed, tokens))]
    assert len(programs) > len(seeds) // 2
    for problem, q, k, v in programs:
        (out, _), forward = asked_for(partial(attend, q, k, v, problem))
        _, backward = asked_for(out.sum().backward)
        shape, back = problem.shape, problem.shape.backward()
        told = (
            forward_needs(problem.tiles(0, shape), shape, keeps_lse=True),
            backward_needs(problem.tiles(0, back), problem.reserves.extent(back), back),
        )
        for have, want in zip((forward, backward), told, strict=True):
            assert have == {name: nbytes for name, nbytes in want.items() if nbytes}, shape


def test_the_executor_asks_for_what_is_told_without_tensors():
    """So that `needs`, which is asked at sizes that cannot be run, cannot drift from what runs."""
    assert_asks_for_what_is_told(range(40), 300)


@pytest.mark.slow
def test_the_executor_asks_for_what_is_told_of_many(seed):
    assert_asks_for_what_is_told(range(seed, seed + 200), 1500)
