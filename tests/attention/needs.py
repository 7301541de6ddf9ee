"""What the executor asks of its scratch for the calls of a program, by name and in bytes, beside what is
reserved: `attention/ops/execute.py`, `views.py` and `sinks.py` told once more without tensors, so that it can
be asked of programs that no machine here could run. `sizes/test_tiles.py` holds it against the executor
itself. Imports no torch."""

from __future__ import annotations

import numpy as np

from attention.ops.extent import cut_of
from attention.ops.program import Gather
from attention.sizes.row_bounds import rows_of
from attention.sizes.tiles import (
    backward_sizes,
    cut,
    dilated_extent,
    forward_sizes,
    slab_rows,
    sparse_extent,
    sums_in_full,
)
from attention.sizes.token_tiles import token_extent, token_window_of


def extent_of(config, shape):
    """Of all but adaptive."""
    if config.token_edges:
        return token_extent(token_window_of(config, shape.causal), shape)
    if config.variant == "block_sparse":
        return sparse_extent(rows_of(config, shape.seq, shape.causal), shape)
    branches = shape.within(config.branches or ((shape.seq, 1),))
    return dilated_extent(sorted(branches, key=lambda branch: branch[1]), shape)


class Needs(dict):
    """The most bytes asked for under each name."""

    def need(self, name, nbytes):
        self[name] = max(self.get(name, 0), nbytes)


def forward_needs(tiles, shape, keeps_lse):
    """Of a forward pass."""
    dim, narrow = shape.head_dim, shape.itemsize < 4
    needs = Needs()
    for tile in tiles:
        tokens = tile.stop - tile.start
        if tile.merge:
            needs.need("total", tokens * shape.heads * dim * 4 * narrow)
            needs.need("lse", tokens * shape.heads * shape.wide * (not keeps_lse))
        for call in tile.calls:
            if isinstance(call.keys, Gather):
                heads = shape.kv_heads if call.keys.blocks.ndim == 2 else shape.heads
                for name in "kv":
                    rows = len(call.keys.blocks) * call.keys.length * heads
                    needs.need(name, rows * dim * shape.itemsize)
            if tile.merge and not call.first:
                for span in call.queries:
                    needs.need("part", span.batch * span.heads * span.length * dim * 4 * narrow)
    return needs


def backward_needs(tiles, extent, shape, kinds=True):
    """Of a backward pass; `shape` is `Shape.backward()`, and tiles and extent are its. `kinds`: whether a
    call is cut as the largest of its kind, or by its own sizes."""
    cuts = {kind.name: cut(kind, shape) for kind in extent.kinds} if kinds else None
    dim, wide = shape.head_dim, shape.wide
    full = sums_in_full(shape)
    target = wide if full else shape.itemsize
    needs = Needs()
    if full:
        needs.need("dk", shape.seq * shape.kv_heads * dim * wide)
        needs.need("dv", shape.seq * shape.kv_heads * dim * wide)
    for tile in tiles:
        tokens = tile.stop - tile.start
        needs.need("dq", tokens * shape.heads * dim * wide * (shape.itemsize < wide))
        for call in tile.calls:
            by = cut_of(call, shape, cuts)
            for _, part in call.columns(by.width):
                gathers = isinstance(part, Gather)
                overlaps = not gathers and part.overlaps
                if gathers:
                    _gathered(needs, part, shape, target)
                elif overlaps:
                    spread = (part.stop - part.start) * shape.kv_heads * dim
                    for name in "kv":
                        needs.need(f"wide {name}", spread * 4 * shape.widens)
                        needs.need(f"d{name} of a call", spread * wide * (target < wide))
                    slab = min(slab_rows(shape) * dim, spread)
                    needs.need("wide slab", slab * wide * (target < wide))
                for span in call.queries:
                    views = min(by.views, span.batch)
                    width = part.length if call.mask == "causal" else min(by.keys, part.length)
                    for name in ("do", "q", "out"):
                        needs.need(name, views * span.heads * span.length * dim * 4 * shape.widens)
                    apart = isinstance(part, Gather) and part.blocks.ndim > 2
                    rows = views * (span.heads if apart else min(span.heads, shape.kv_heads)) * width * dim
                    if not overlaps:
                        for name in "kv":
                            needs.need(f"wide {name}", rows * 4 * shape.widens)
                    if not overlaps and not gathers:
                        needs.need("share", rows * 4 * (shape.widens and target < wide))
    return needs


def _gathered(needs, part, shape, target):
    """The lists of a gather in backward: copies, and a place for each distinct block."""
    dim, wide = shape.head_dim, shape.wide
    shared = part.blocks.ndim == 2
    heads = shape.kv_heads if shared else shape.heads
    rows = len(part.blocks) * part.length * heads
    lists = part.blocks
    if not shared:
        lists = lists * shape.kv_heads + (np.arange(shape.heads) * shape.kv_heads // shape.heads)[:, None]
    sums = np.unique(lists).size * part.size * (shape.kv_heads if shared else 1)
    for name in "kv":
        needs.need(name, rows * dim * shape.itemsize)
        needs.need(f"d{name} of a call", sums * dim * wide)
    lane = shape.kv_heads if shared else 1
    slab = min(max(slab_rows(shape) // lane, 1), _inside(part, shape)) * lane * dim
    needs.need("slab", slab * target)
    needs.need("wide slab", slab * wide * (target < wide))


def _inside(part, shape):
    """Places of a gather's distinct blocks that lie before the end of the sequence."""
    lists = (
        part.blocks
        if part.blocks.ndim == 2
        else part.blocks * shape.kv_heads + (np.arange(shape.heads) * shape.kv_heads // shape.heads)[:, None]
    )
    found = np.unique(lists) // (1 if part.blocks.ndim == 2 else shape.kv_heads)
    return int(np.minimum(shape.seq - found * part.size, part.size).sum())


def beyond(tiles, extent, shape, back_tiles, back_extent, kinds=True):
    """What is asked for beyond what is reserved: (pass, name, needed, reserved) of each such buffer. `kinds`:
    see `backward_needs`."""
    back = shape.backward()
    asked = [
        ("forward", forward_needs(tiles, shape, False), forward_sizes(extent, shape, False)),
        ("forward, keeping lse", forward_needs(tiles, shape, True), forward_sizes(extent, shape, True)),
        ("backward", backward_needs(back_tiles, back_extent, back, kinds), backward_sizes(back_extent, back)),
    ]
    found = [
        (which, name, nbytes, sizes.get(name, 0))
        for which, needs, sizes in asked
        for name, nbytes in needs.items()
        if nbytes > sizes.get(name, 0)
    ]
    longest = max((tile.stop - tile.start for tile in tiles), default=0)
    if longest > extent.tokens:
        found.append(("tile", "tokens", longest, extent.tokens))
    for some, mask in ((tiles, extent.mask), (back_tiles, back_extent.mask)):
        for call in (call for tile in some for call in tile.calls):
            if not _within_mask(call, mask, kinds):
                found.append(("mask", call.kind, (call.queries[0].length, call.keys.length), mask))
    for tile in back_tiles if kinds else ():
        for call in tile.calls:
            kind = next(kind for kind in back_extent.kinds if kind.name == call.kind)
            if call.mask == "causal" and call.keys.length > kind.keys:
                found.append(("causal", call.kind, call.keys.length, kind.keys))
    return found


def _within_mask(call, mask, kinds):
    """Whether what a call takes of the program's mask lies in it."""
    queries, keys = call.queries[0].length, call.keys.length
    if call.mask not in ("diagonal", "band"):
        return True
    if kinds:
        return max(queries, call.keys.unit) <= mask[0] and keys <= mask[1]
    if call.mask == "band":
        return queries <= mask[0] and call.column >= 0 and call.column + keys <= mask[1]
    if call.edge >= keys - 1:
        return True
    first = mask[1] - mask[0] - call.edge
    return queries <= mask[0] and first >= 0 and first + keys <= mask[1]
