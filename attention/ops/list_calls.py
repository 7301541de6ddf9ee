"""Runs an attention over lists of blocks as few kernel calls, forward and backward; see
`attention/sizes/list_calls.py`.

The keys and values of a part's lists are copied one list behind the other. What the kernel returns for a
part's queries goes to their places in the output; dk and dv of a part are of the copies. Those of a block are
added up in the order of the lists, in single precision within the operator, and these are added to sums in
single precision: no two additions race, and the result is the same each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attention.layout import Layout
from attention.ops import kernels, whole_calls
from attention.sizes.arrays import Ints
from attention.sizes.list_calls import (
    ListCalls,
    ListPart,
    backward_cut_of,
    backward_sums,
    forward_cut,
    own_backward_cut,
    parts,
)
from attention.sizes.shape import Shape

RowsOf = Callable[[int, range, range], tuple[Ints, Ints]]
"""(blocks of each list, all of them) of a batch item, some lanes, and some rows: lane by lane, ascending in
each list."""


class BlockLists(NamedTuple):
    """An attention over lists: its sizes, and the lists."""

    calls: ListCalls
    rows: RowsOf


def shared_lists(layout: Layout) -> RowsOf:
    """The lists of a layout, the same for all batch items and lanes."""
    counts = layout.counts

    def rows(item: int, lanes: range, some: range) -> tuple[Ints, Ints]:
        begin, end = layout.row_ptr[some.start], layout.row_ptr[some.stop]
        blocks = layout.cols[begin:end].astype(np.int64)
        return np.tile(counts[some.start : some.stop], len(lanes)), np.tile(blocks, len(lanes))

    return rows


def chosen_lists(lists: Ints) -> RowsOf:
    """BlockLists [B, H, blocks, kept], each followed by -1 where it has fewer."""

    def rows(item: int, lanes: range, some: range) -> tuple[Ints, Ints]:
        chosen = lists[item, lanes.start : lanes.stop, some.start : some.stop]
        there = chosen >= 0
        return there.sum(axis=-1).ravel(), chosen[there]

    return rows


class _Table(NamedTuple):
    """What a part gathers, on the device."""

    firsts: Tensor
    """Of each block the row of k and v, numbered token by token, at which it begins."""
    beyond: bool
    """Whether some go on beyond the end."""
    sequences: kernels.Sequences
    idle: Tensor | None
    """Pairs that gather nothing: what the kernel computes for them, over a block that they do not list,
    counts for nothing."""
    order: Tensor
    """The part's blocks by where their gradients go."""
    begins: Tensor
    """Where in `order` those of each target begin."""
    targets: Tensor
    """Blocks of the sums, each once."""


class _Making(NamedTuple):
    """What the tables of a pass are made from."""

    lists: BlockLists
    shape: Shape
    steps: Tensor
    """[size]: from the first row of a block and kv head to each of its tokens."""

    def table(self, item: int, part: ListPart, kv_head: int) -> _Table | None:
        """A part's; None where no list is so long. `kv_head`: the first whose sums are held."""
        calls, shape = self.lists.calls, self.shape
        size, blocks_there = calls.size, calls.blocks(shape)
        counts, blocks = self.lists.rows(item, part.lanes, part.rows)
        idle = np.zeros(0, np.int64)
        if calls.own:
            alone = counts == 1
            idle = np.flatnonzero(alone)
            blocks = np.delete(blocks, (np.cumsum(counts) - 1)[~alone])
            counts = counts - ~alone
        if len(counts) == 1:
            blocks = blocks[part.blocks]
            counts = np.array([len(blocks)])
            if not len(blocks):
                return None
        kv_heads = np.arange(part.lanes.start, part.lanes.stop) // calls.lanes_of_kv
        kv_heads = kv_heads.repeat(len(part.rows)).repeat(counts)
        firsts = blocks * (size * shape.kv_heads) + kv_heads
        # What is copied of a short last block beyond the end is a sequence without queries.
        beyond = -shape.seq % size
        queries, keys = np.full(len(counts), part.tokens * calls.repeat), counts * size
        last = blocks[np.cumsum(counts) - 1] == blocks_there - 1
        cut = np.flatnonzero(last & (beyond > 0))
        keys[cut] -= beyond
        queries, keys = np.insert(queries, cut + 1, 0), np.insert(keys, cut + 1, beyond)
        begins = [np.concatenate([[0], x.cumsum(), [0] * (len(x) % 2 == 0)]) for x in (queries, keys)]
        wanted = (kv_heads - kv_head) * blocks_there + blocks
        order = wanted.argsort(kind="stable")
        wanted = wanted[order]
        starts = np.flatnonzero(np.diff(wanted, prepend=-1))
        pieces = (firsts, order, starts, wanted[starts], idle)
        packed = np.concatenate([*pieces, *(x.astype(np.int32).view(np.int64) for x in begins)])
        on_device = torch.from_numpy(packed).to(self.steps.device, non_blocking=True)
        lengths = [len(piece) for piece in pieces] + [len(x) // 2 for x in begins]
        first, by_target, start, target, without, *both = on_device.split(lengths)
        places = [x.view(torch.int32)[: len(queries) + 1] for x in both]
        sequences = kernels.Sequences(places[0], places[1], int(queries.max()), int(keys.max()))
        return _Table(
            first, len(cut) > 0, sequences, without if len(idle) else None, by_target, start, target
        )

    def copies(self, k: Tensor, v: Tensor, table: _Table) -> tuple[Tensor, Tensor]:
        """A part's keys and values, each [keys, 1, D], of k and v [S, G, D]."""
        index = (table.firsts[:, None] + self.steps).flatten()
        if table.beyond:
            index.clamp_max_(k.shape[0] * k.shape[1] - 1)
        return _copied(k, index), _copied(v, index)


def _making(lists: BlockLists, shape: Shape, device: torch.device) -> _Making:
    steps = torch.arange(0, lists.calls.size * shape.kv_heads, shape.kv_heads, device=device)
    return _Making(lists, shape, steps)


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, shape: Shape, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, D], lse [B, S, H])."""
    calls = lists.calls
    if calls.own:
        out, lse = whole_calls.forward(q, k, v, calls.own, shape, scale, covers=True)
    else:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        size = (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.empty(size, dtype=kernels.lse_dtype(q.dtype), device=q.device).transpose(1, 2)
    making = _making(lists, shape, q.device)
    for b in range(q.shape[0]):
        for group in calls.groups:
            for part in parts(calls, group, forward_cut(calls, group, shape), range(calls.lanes)):
                table = making.table(b, part, 0)
                if table is None:
                    continue
                keys, values = making.copies(k[b], v[b], table)
                queries = _flat(_queries(q[b], part, calls))
                result, result_lse = kernels.ragged(queries, keys, values, table.sequences, scale=scale)
                del keys, values, queries
                target, target_lse = _queries(out[b], part, calls), _rows(lse[b], part, calls)
                result, result_lse = result.view(target.shape), result_lse.view(target_lse.shape)
                if part.first:
                    target.copy_(result)
                    target_lse.copy_(result_lse)
                else:
                    if table.idle is not None:
                        result_lse.flatten(0, 1).index_fill_(0, table.idle, -torch.inf)
                    whole_calls.merge(target, target_lse, result, result_lse)
                del table, result, result_lse  # before the next ones are made
    return out, lse


def backward(
    grad: Tensor, saved: Sequence[Tensor], lists: BlockLists, shape: Shape, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient of out and what forward saved: q, k, v, out and lse."""
    q, k, v, out, lse = saved
    calls = lists.calls
    if calls.own:
        dq, dk, dv = whole_calls.backward(
            grad, saved, calls.own, shape, scale, covers=True, cut_of=own_backward_cut
        )
    else:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    making = _making(lists, shape, q.device)
    held = backward_sums(calls, shape)
    size = (calls.blocks(shape), calls.size * shape.head_dim)
    dtype = kernels.lse_dtype(q.dtype) if held.itemsize == shape.wide else q.dtype
    for b in range(q.shape[0]):
        for first in range(0, shape.kv_heads, held.kv_heads):
            heads = range(first, min(first + held.kv_heads, shape.kv_heads))
            sums = [torch.zeros(len(heads) * size[0], size[1], dtype=dtype, device=q.device) for _ in "kv"]
            lanes = range(heads.start * calls.lanes_of_kv, heads.stop * calls.lanes_of_kv)
            for group in calls.groups:
                for part in parts(calls, group, backward_cut_of(calls, group, held, shape), lanes):
                    item = _Item(grad[b], q[b], k[b], v[b], out[b], lse[b], dq[b])
                    table = making.table(b, part, first)
                    if table is not None:
                        _add_gradients(item, part, table, making, scale, sums)
            for target, total in zip((dk[b], dv[b]), sums, strict=True):
                tokens = total.view(len(heads), -1, shape.head_dim)[:, : shape.seq].transpose(0, 1)
                of_heads = target[:, heads.start : heads.stop]
                if calls.own:
                    of_heads.add_(tokens)
                else:
                    of_heads.copy_(tokens)
            del sums, tokens, total
    return dq, dk, dv


class _Item(NamedTuple):
    """One batch item of a backward pass: [S, heads, D], and lse [S, H]."""

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dq: Tensor


def _add_gradients(
    item: _Item, part: ListPart, table: _Table, making: _Making, scale: float, sums: Sequence[Tensor]
) -> None:
    """A part's dq to its place, and its dk and dv to the sums [blocks, tokens D]."""
    calls = making.lists.calls
    of_part = partial(_queries, part=part, calls=calls)
    keys, values = making.copies(item.k, item.v, table)
    lse = _rows(item.lse, part, calls)
    if table.idle is not None:  # without a share in any key
        lse = lse.flatten(0, 1).index_fill(0, table.idle, torch.inf)
    dq, *others = kernels.ragged_backward(
        _flat(of_part(item.grad)),
        _flat(of_part(item.q)),
        keys,
        values,
        _flat(of_part(item.out)),
        lse.reshape(1, -1).contiguous(),
        table.sequences,
        scale=scale,
    )
    del keys, values, lse
    target = of_part(item.dq)
    if part.first:
        target.copy_(dq.view(target.shape))
    else:
        target.add_(dq.view(target.shape))
    del dq
    for total in sums:
        blocks = others.pop(0).reshape(-1, total.shape[1])
        added = _summed(blocks, table)
        del blocks
        total.index_add_(0, table.targets, added.to(total.dtype))


def _summed(blocks: Tensor, table: _Table) -> Tensor:
    """The sum of the blocks of each target, [targets, numbers]."""
    added: tuple[Tensor, ...] = torch.ops.aten._embedding_bag_forward_only(blocks, table.order, table.begins)
    return added[0]


def _copied(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [S, G, D], numbered token by token, as [keys, 1, D]."""
    heads, dim = x.shape[1:]
    if x.is_contiguous():
        return x.view(-1, dim).index_select(0, index)[:, None]
    return x[index // heads, index % heads][:, None]


def _queries(x: Tensor, part: ListPart, calls: ListCalls) -> Tensor:
    """A part's rows of x [S, H, D] as [lanes, rows, heads of a lane, tokens, D]."""
    begin = part.rows.start * calls.size
    tokens = x[begin : begin + len(part.rows) * part.tokens].unflatten(1, (calls.lanes, calls.repeat))
    some = tokens[:, part.lanes.start : part.lanes.stop].unflatten(0, (len(part.rows), part.tokens))
    return some.permute(2, 0, 3, 1, 4)


def _rows(x: Tensor, part: ListPart, calls: ListCalls) -> Tensor:
    """`_queries` of x [S, H], without D."""
    return _queries(x[..., None], part, calls)[..., 0]


def _flat(x: Tensor) -> Tensor:
    """A part's queries as the kernel takes them, [queries, 1, D]."""
    return x.reshape(-1, 1, x.shape[-1])
