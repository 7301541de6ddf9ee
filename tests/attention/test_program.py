"""Programs, without tensors: the calls of every tile together meet exactly the pairs that the oracle
counts, tiles say truly whether they merge, and what they hold fits the workspace."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from conformance import IMPLEMENTATIONS, LEAST_WORKSPACE, configs, dilated, patterned
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from needs import extent_of

from attention import block_sparse, token_window
from attention import dilated as dilated_module
from attention.layout import build_layout
from attention.ops.maskless import maskless
from attention.ops.program import Call, Gather, Tile
from attention.reference import multiplicity
from attention.sizes import shape as shape_module
from attention.sizes.row_bounds import chosen_rows, rows_of
from attention.sizes.shape import Shape, Span, chunk_tokens
from attention.sizes.tiles import cut
from attention.sizes.token_tiles import token_window_of

FIXED = {name: config for name, config in IMPLEMENTATIONS.items() if config.variant != "adaptive"}


def shape_of(seq, workspace=LEAST_WORKSPACE, **sizes):
    usual = {"heads": 4, "kv_heads": 2, "head_dim": 16, "itemsize": 8, "causal": False, "packs": False}
    fields = {"seq": seq, "workspace": workspace, **usual, "widens": False, **sizes}
    if "chunk" not in fields:
        given = {name: fields[name] for name in ("seq", "heads", "kv_heads", "head_dim", "itemsize")}
        fields["chunk"] = chunk_tokens(cpu=fields.pop("cpu", True), workspace=workspace, **given)
    return Shape(**fields)


def tiles_of(config, shape):
    if config.token_edges:
        return list(token_window.tiles(token_window_of(config, shape.causal), shape))
    if config.variant == "block_sparse":
        rows = rows_of(config, shape.seq, shape.causal)
        return list(block_sparse.tiles(build_layout(config, shape.seq, shape.causal), rows, shape))
    return list(dilated_module.tiles(config.branches or ((shape.seq, 1),), shape))


def places(span):
    """(tokens [N, 1, T], heads [H, 1]) of a span."""
    n, t, h = (np.arange(x) for x in (span.batch, span.length, span.heads))
    tokens = span.start + n[:, None, None] * span.batch_step + t * span.step
    return tokens, (span.head + h * span.head_step)[:, None]


def pairs(call, span, shape):
    """(heads, queries, keys) of all pairs that one kernel call meets, flat."""
    queries, heads = places(span)
    repeat = shape.heads // shape.kv_heads
    if isinstance(call.keys, Span):
        keys, kv_heads = places(call.keys)
        block = None
    else:
        assert isinstance(call.keys, Gather)
        shared, block = call.keys.blocks.ndim == 2, call.keys.size
        lists = call.keys.blocks[:, None] if shared else call.keys.blocks
        assert (np.diff(lists, axis=-1) > 0).all()
        keys = (lists[..., None] * block + np.arange(block)).reshape(*lists.shape[:2], -1)
        kv_heads = np.arange(shape.kv_heads)[:, None] if shared else np.arange(shape.heads)[:, None] // repeat
    assert len(heads) % len(kv_heads) == 0  # a kernel that takes groups gives each as many heads
    np.testing.assert_array_equal(heads // repeat, kv_heads.repeat(len(heads) // len(kv_heads), axis=0))
    t, k = np.arange(span.length)[:, None], np.arange(keys.shape[-1])
    seen = np.ones((span.length, keys.shape[-1]), bool)
    if call.mask == "causal":
        assert span.length == keys.shape[-1]
        seen = k <= t
    elif call.mask == "diagonal":
        seen = k <= t + keys.shape[-1] - (block or span.length)
    elif call.mask == "band":
        seen = (t <= k + call.column) & (k + call.column <= t + call.band)
    full = np.broadcast_arrays(heads[None, :, :, None], queries[..., None], keys[:, :, None, :], seen)
    keep = full[3]
    if call.mask == "tail":
        keep = keep & (full[2] < shape.seq)
    h, q, c = (x[keep] for x in full[:3])
    assert c.max(initial=0) < shape.seq
    assert q.max(initial=0) < shape.seq
    return h, q, c


def met(tiles, shape):
    """How often each (head, query, key) is met, [H, S, S]."""
    counts = np.zeros((shape.heads, shape.seq, shape.seq), np.int64)
    for tile in tiles:
        for call in tile.calls:
            for span in call.queries:
                np.add.at(counts, pairs(call, span, shape), 1)
    return counts


def assert_right(config, shape):
    tiles = tiles_of(config, shape)
    expected = multiplicity(config, shape.seq, shape.heads, shape.causal).numpy()
    np.testing.assert_array_equal(met(tiles, shape), expected)
    assert_tiles_are_honest(tiles, shape)


def assert_tiles_are_honest(tiles, shape):
    """Tiles follow each other; in each, a call is `first` where nothing came before, and only a tile
    without `merge` may leave that unsaid, because its calls never meet."""
    assert [tile.start for tile in tiles] == [0, *(tile.stop for tile in tiles[:-1])]
    assert tiles[-1].stop == shape.seq
    for tile in tiles:
        assert_calls_meet_as_said(tile, shape)


def assert_calls_meet_as_said(tile, shape):
    """A call is in each query of a head once at most, in none beyond the tile, and where nothing came before
    if it is `first` or the tile does not merge."""
    touched = np.zeros((shape.seq, shape.heads), np.int64)
    for call in tile.calls:
        here = np.zeros_like(touched)
        for span in call.queries:
            queries, heads = np.broadcast_arrays(*[x[..., None] for x in places(span)])
            np.add.at(here, (queries.ravel(), heads.ravel()), 1)
        assert here.max() == 1
        if call.first or not tile.merge:
            assert not (touched & here).any()
        touched += here
    assert not touched[: tile.start].any()
    assert not touched[tile.stop :].any()


causal_or_not = pytest.mark.parametrize("causal", [False, True])
packing_or_not = pytest.mark.parametrize("packs", [False, True])


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("workspace", [LEAST_WORKSPACE, 1 << 22])
@pytest.mark.parametrize("config", FIXED.values(), ids=FIXED.keys())
def test_tiles_without_masks_meet_the_same_pairs(config, workspace, kv_heads):
    shape = shape_of(77, workspace, causal=True, kv_heads=kv_heads)
    tiles = tiles_of(config, shape)
    without = [maskless(tile, shape) for tile in tiles]
    assert not any(tile.masks for tile in without)
    np.testing.assert_array_equal(met(without, shape), met(tiles, shape))
    assert_tiles_are_honest(without, shape)


@pytest.mark.pairwise
@packing_or_not
@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 8, 9, 61, 150])
@pytest.mark.parametrize("config", FIXED.values(), ids=FIXED.keys())
def test_calls_meet_the_oracles_pairs(config, seq, kv_heads, causal, packs):
    assert_right(config, shape_of(seq, kv_heads=kv_heads, causal=causal, packs=packs))


@st.composite
def programs(draw, longest=120):
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 4))
    workspace = draw(st.sampled_from([LEAST_WORKSPACE, 1 << 17, 1 << 22]))
    shape = shape_of(
        draw(st.integers(1, longest)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 8, 64, 256])),
        itemsize=draw(st.sampled_from([2, 4, 8])),
        causal=draw(st.booleans()),
        workspace=workspace,
        cpu=draw(st.booleans()),
        packs=draw(st.booleans()),
        widens=draw(st.booleans()),
    )
    return draw(configs()), shape


@settings(max_examples=60)
@given(program=programs())
def test_random_programs_meet_the_oracles_pairs(program):
    assert_right(*program)


@pytest.mark.slow
@settings(max_examples=2000)
@given(program=programs(longest=300))
def test_many_random_programs_meet_the_oracles_pairs(program):
    assert_right(*program)


@causal_or_not
@pytest.mark.parametrize("config", FIXED.values(), ids=FIXED.keys())
def test_the_limit_of_views_cuts_no_pair_and_doubles_none(config, causal, monkeypatch):
    monkeypatch.setattr(shape_module, "MOST_VIEWS", 3)
    shape = shape_of(150, causal=causal, workspace=1 << 24, chunk=1024)
    assert_right(config, shape)
    for tile in tiles_of(config, shape) if config.variant == "block_sparse" else []:
        for call in tile.calls:
            assert all(span.batch <= 3 for span in call.queries)


def chosen_lists(rng, rows, heads, kept, causal):
    """[H, rows, kept] ascending lists with each row's own block, -1 after them where there are fewer."""
    lists = np.full((heads, rows, kept), -1)
    for h in range(heads):
        for i in range(rows):
            others = [c for c in range(i if causal else rows) if c != i]
            count = min(kept - 1, len(others))
            drawn = rng.choice(others, count, replace=False).tolist() if count else []
            lists[h, i, : count + 1] = sorted([i, *drawn])
    return lists


@pytest.mark.pairwise
@packing_or_not
@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq, size, kept", [(1, 8, 1), (61, 8, 3), (150, 8, 12), (64, 1, 20), (100, 33, 2)])
def test_lists_of_each_head_meet_their_pairs(seq, size, kept, kv_heads, causal, packs):
    from attention.block_sparse import chosen_tiles

    rows = -(-seq // size)
    lists = chosen_lists(np.random.default_rng(0), rows, 4, min(kept, rows), causal)
    shape = shape_of(seq, kv_heads=kv_heads, causal=causal, packs=packs)
    blocks = np.zeros((4, rows, rows + 1), np.int64)
    np.put_along_axis(blocks, np.where(lists < 0, rows, lists), 1, axis=-1)
    expected = blocks[..., :rows].repeat(size, 1).repeat(size, 2)[:, :seq, :seq]
    tiles = list(chosen_tiles(lists, chosen_rows(size, lists.shape[-1]), shape))
    np.testing.assert_array_equal(met(tiles, shape), np.tril(expected) if causal else expected)
    assert_tiles_are_honest(tiles, shape)


# Scratch


def copied_bytes(call, shape):
    """Bytes of keys and values that a call copies: gathers do, and where the kernel packs, spans too."""
    if isinstance(call.keys, Gather):
        heads = shape.kv_heads if call.keys.blocks.ndim == 2 else shape.heads
        return 2 * call.keys.blocks.shape[0] * call.keys.length * heads * shape.head_dim * shape.itemsize
    span = call.keys
    packed = 2 * span.batch * span.heads * span.length * shape.head_dim * shape.itemsize
    return packed if shape.packs else 0


def scratch_bytes(tile, shape):
    """Most that a tile holds at a time in the forward pass: the keys and values of a call, its part of
    the output, and the accumulator of a tile that merges in a precision wider than the output's."""
    accumulator = 0
    if tile.merge and shape.itemsize < 4:
        accumulator = (tile.stop - tile.start) * shape.heads * shape.head_dim * 4
    calls = [
        copied_bytes(call, shape) + span.batch * span.heads * span.length * shape.head_dim * shape.itemsize
        for call in tile.calls
        for span in call.queries
    ]
    return accumulator + max(calls, default=0)


def smallest_piece(config, shape):
    """Bytes below which a tile cannot go: one block of queries against one block of keys, or, where
    there are no blocks, one token against one."""
    size = config.pattern.block_size if config.pattern else 1
    return size * (3 * shape.token_bytes + 4 * shape.heads * shape.head_dim)


def assert_tiles_fit(program):
    config, shape = program
    assume(config.variant != "dilated" or min(config.segment_lengths) > 20)  # many calls, all alike
    room = max(shape.workspace, smallest_piece(config, shape))
    for tile in tiles_of(config, shape):
        assert scratch_bytes(tile, shape) <= room


@settings(max_examples=60)
@given(program=programs(longest=1500))
def test_tiles_fit_the_workspace(program):
    assert_tiles_fit(program)


@pytest.mark.slow
@settings(max_examples=1000)
@given(program=programs(longest=1500))
def test_tiles_of_many_programs_fit_the_workspace(program):
    assert_tiles_fit(program)


@packing_or_not
@causal_or_not
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "config",
    [
        dilated([(2048, 1), (8192, 4), (65536, 16)]),
        patterned("dilated_sparse", [(256, 1), (4096, 8)], sparsity_ratio=0.02),
        patterned("global_local", local_window_size=512, global_tokens=64),
    ],
    ids=["dilated", "dilated_sparse", "global_local"],
)
def test_tiles_of_long_sequences_fit_and_use_the_workspace(config, itemsize, causal, packs):
    shape = shape_of(
        40_000,
        heads=8,
        kv_heads=8,
        head_dim=64,
        itemsize=itemsize,
        causal=causal,
        packs=packs,
        workspace=1 << 24,
        chunk=1024,
    )
    held = [scratch_bytes(tile, shape) for tile in tiles_of(config, shape)]
    assert max(held) <= shape.workspace
    assert max(held) >= shape.chunk * shape.token_bytes


# Columns


def assert_columns_cover(program):
    config, shape = program
    assume(config.variant != "dilated" or min(config.segment_lengths) > 20)
    shape = shape.backward()
    widths = {kind.name: cut(kind, shape).width for kind in extent_of(config, shape).kinds}
    for call in (call for tile in tiles_of(config, shape) for call in tile.calls):
        parts = list(call.columns(widths[call.kind]))
        assert [begin for begin, _ in parts] == [0, *np.cumsum([p.length for _, p in parts])[:-1]]
        assert sum(part.length for _, part in parts) == call.keys.length
        for begin, part in parts:
            assert begin % part.unit == 0
            if isinstance(part, Gather):
                where = slice(begin // part.unit, (begin + part.length) // part.unit)
                np.testing.assert_array_equal(part.blocks, call.keys.blocks[..., where])
                tokens = np.unique(part.blocks).size * part.size
            else:
                np.testing.assert_array_equal(
                    places(part)[0], places(call.keys)[0][..., begin : begin + part.length]
                )
                tokens = np.unique(places(part)[0]).size
            # It fits, is as small as it can be, or has nothing to sum up.
            summed = isinstance(part, Gather) or part.overlaps
            assert tokens <= shape.column_tokens or part.length <= part.unit or not summed


@settings(max_examples=20)
@given(program=programs(longest=1500))
def test_columns_cover_a_calls_keys_in_order_and_stay_small(program):
    assert_columns_cover(program)


@pytest.mark.slow
@settings(max_examples=1000)
@given(program=programs(longest=1500))
def test_columns_cover_a_calls_keys_in_many_programs(program):
    assert_columns_cover(program)


def test_span_says_where_it_ends_and_is_cut_and_picked():
    span = Span(5, 4, step=3, batch=6, batch_step=7, head=1, heads=2, head_step=2)
    tokens, heads = places(span)
    assert heads.ravel().tolist() == [1, 3]
    assert span.stop == tokens.max() + 1
    np.testing.assert_array_equal(places(span.cut(1, 3))[0], tokens[..., 1:3])
    np.testing.assert_array_equal(places(span.pick(1, 6, 2))[0], tokens[1:6:2])


@given(
    start=st.integers(0, 9),
    length=st.integers(1, 9),
    step=st.integers(1, 4),
    batch=st.integers(1, 9),
    batch_step=st.integers(0, 40),
)
def test_disjoint_groups_hold_every_view_once_and_never_a_token_twice(start, length, step, batch, batch_step):
    span = Span(start, length, step=step, batch=batch, batch_step=batch_step)
    tokens = places(span)[0][:, 0]
    held = []
    for where, group in span.disjoint():
        here = places(group)[0][:, 0]
        np.testing.assert_array_equal(here, tokens[where])
        assert len(np.unique(here)) == here.size
        held += list(range(span.batch))[where]
    assert sorted(held) == list(range(span.batch))


def test_programs_hold_no_tensors():
    for module in (block_sparse, dilated_module, inspect.getmodule(Tile)):
        assert "torch" not in vars(module)
    assert not any("Tensor" in str(kind) for kind in Call.__annotations__.values())
