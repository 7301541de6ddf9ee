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
    forward_cut_of,
    own_backward_cut,
    parts,
)
from attention.sizes.shape import Shape

BlocksOf = Callable[[int, range, range], Ints]
"""The blocks of all lists of a batch item, some lanes and some rows, lane by lane, ascending in each list."""


class BlockLists(NamedTuple):
    """An attention over lists: its sizes, and the lists."""

    calls: ListCalls
    counts: Ints
    """[B, lanes, rows]: blocks of each list; B and lanes may be 1 for all of them."""
    blocks: BlocksOf

    def listed(self, item: int) -> Ints:
        """[lanes, rows]: blocks of each list."""
        counts = self.counts[item if len(self.counts) > 1 else 0]
        return np.broadcast_to(counts, (self.calls.lanes, counts.shape[1]))

    def gathered(self, item: int) -> Ints:
        """[lanes, rows]: blocks of each list that are gathered: where there are none, one all the same."""
        counts = self.listed(item)
        return np.maximum(counts - 1, 1) if self.calls.own else counts

    def most(self, items: int, parts: Sequence[ListPart]) -> int:
        """Blocks that the largest of these parts gathers of some batch item."""
        largest = 0
        for item in range(items if len(self.counts) > 1 else 1):
            ends = np.pad(self.gathered(item).cumsum(axis=1), ((0, 0), (1, 0)))
            for part in parts:
                lanes = slice(part.lanes.start, part.lanes.stop)
                blocks = int((ends[lanes, part.rows.stop] - ends[lanes, part.rows.start]).sum())
                if len(part.lanes) * len(part.rows) == 1:
                    blocks = min(blocks, part.blocks.stop - part.blocks.start)
                largest = max(largest, blocks)
        return largest


def shared_lists(layout: Layout, calls: ListCalls) -> BlockLists:
    """The lists of a layout, the same for all batch items and lanes."""

    def blocks(item: int, lanes: range, rows: range) -> Ints:
        begin, end = layout.row_ptr[rows.start], layout.row_ptr[rows.stop]
        return np.tile(layout.cols[begin:end].astype(np.int64), len(lanes))

    return BlockLists(calls, layout.counts[None, None], blocks)


def chosen_lists(lists: Ints, calls: ListCalls) -> BlockLists:
    """Lists [B, H, blocks, kept], each followed by -1 where it has fewer."""

    def blocks(item: int, lanes: range, rows: range) -> Ints:
        chosen = lists[item, lanes.start : lanes.stop, rows.start : rows.stop]
        return chosen[chosen >= 0]

    return BlockLists(calls, (lists >= 0).sum(axis=-1), blocks)


class _Table(NamedTuple):
    """What a part gathers, on the device."""

    firsts: Tensor
    """Of each block the row of k and v, numbered token by token, at which it begins. All parts of a pass have
    as many, lest each asks for more memory than the last; those that are too many are of no list."""
    beyond: bool
    """Whether some go on beyond the end."""
    sequences: kernels.Sequences
    idle: Tensor | None
    """Pairs that gather nothing: what the kernel computes for them, over a block that they do not list,
    counts for nothing."""
    order: Tensor
    """The part's blocks by where their gradients go; as what follows, empty in forward."""
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

    def table(self, item: int, part: ListPart, most: int, kv_head: int | None = None) -> _Table | None:
        """A part's; None where no list is so long. `most`: blocks of the largest. `kv_head`: the first whose
        sums are held; None where nothing is summed."""
        calls, shape = self.lists.calls, self.shape
        size, there = calls.size, calls.blocks(shape)
        pairs = np.s_[part.lanes.start : part.lanes.stop, part.rows.start : part.rows.stop]
        counts = self.lists.gathered(item)[pairs].ravel()
        blocks = self.lists.blocks(item, part.lanes, part.rows)
        idle = np.zeros(0, np.int64)
        if calls.own:  # the last of each list, which may be the only one
            listed = self.lists.listed(item)[pairs].ravel()
            ends = listed.cumsum() - 1
            blocks[ends[listed == 1]] = 0  # which is never short
            blocks = np.delete(blocks, ends[listed > 1])
            idle = np.flatnonzero(listed == 1)
        if len(counts) == 1:
            blocks = blocks[part.blocks]
            counts = np.array([len(blocks)])
            if not len(blocks):
                return None
        kv_heads = np.arange(part.lanes.start, part.lanes.stop) // calls.lanes_of_kv
        kv_heads = kv_heads.repeat(len(part.rows)).repeat(counts)
        firsts = np.zeros(most, np.int64)
        firsts[: len(blocks)] = blocks * (size * shape.kv_heads) + kv_heads
        # What is copied of a short last block beyond the end is a sequence without queries.
        beyond = -shape.seq % size
        ends = blocks[counts.cumsum() - 1] == there - 1
        cut = np.flatnonzero(ends & (beyond > 0))
        queries, keys = np.full(len(counts), part.tokens * calls.repeat), counts * size
        keys[cut] -= beyond
        queries, keys = np.insert(queries, cut + 1, 0), np.insert(keys, cut + 1, beyond)
        places = [
            _begins(x, calls.sequences(len(part.lanes), len(part.rows), shape)) for x in (queries, keys)
        ]
        order = starts = targets = np.zeros(0, np.int64)
        if kv_head is not None:
            wanted = (kv_heads - kv_head) * there + blocks
            order = wanted.argsort(kind="stable")
            starts = np.flatnonzero(np.diff(wanted[order], prepend=-1))
            targets = wanted[order][starts]
        pieces = (firsts, order, starts, targets, idle, *places)
        packed = torch.from_numpy(np.concatenate(pieces)).to(self.steps.device, non_blocking=True)
        first, by_target, start, target, without, *both = packed.split([len(piece) for piece in pieces])
        count = calls.sequences(len(part.lanes), len(part.rows), shape) + 1
        of_queries, of_keys = (x.view(torch.int32)[:count] for x in both)
        sequences = kernels.Sequences(of_queries, of_keys, int(queries.max()), int(keys.max()))
        unlisted = without if len(idle) else None
        return _Table(first, len(cut) > 0, sequences, unlisted, by_target, start, target)

    def copies(self, k: Tensor, v: Tensor, table: _Table) -> tuple[Tensor, Tensor]:
        """A part's keys and values, each [keys, 1, D], of k and v [S, G, D]."""
        index = (table.firsts[:, None] + self.steps).flatten()
        if table.beyond:
            index.clamp_max_(k.shape[0] * k.shape[1] - 1)
        return _copied(k, index), _copied(v, index)


def _begins(lengths: Ints, sequences: int) -> Ints:
    """Where so many sequences of these lengths begin, and the last ends, as int32 in pairs; those beyond the
    lengths are empty."""
    begins = np.full((sequences + 2) // 2 * 2, lengths.sum(), np.int32)
    begins[0] = 0
    begins[1 : len(lengths) + 1] = lengths.cumsum()
    return begins.view(np.int64)


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
            some = list(parts(calls, group, forward_cut_of(calls, group, shape), range(calls.lanes)))
            most = lists.most(q.shape[0], some)
            for part in some:
                table = making.table(b, part, most)
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
    cuts = [(group, backward_cut_of(calls, group, held, shape)) for group in calls.groups]
    starts = range(0, shape.kv_heads, held.kv_heads)
    all_heads = [range(first, min(first + held.kv_heads, shape.kv_heads)) for first in starts]
    size = (calls.blocks(shape), calls.size * shape.head_dim)
    dtype = kernels.lse_dtype(q.dtype) if held.itemsize == shape.wide else q.dtype
    some = {
        (group.name, heads): list(parts(calls, group, cut, _lanes(heads, calls)))
        for group, cut in cuts
        for heads in all_heads
    }
    most = {
        group.name: lists.most(q.shape[0], [part for heads in all_heads for part in some[group.name, heads]])
        for group in calls.groups
    }
    # Made once: between what parts take and give back, others of their size would find other places.
    room = [torch.empty(held.kv_heads * size[0], size[1], dtype=dtype, device=q.device) for _ in "kv"]
    for b in range(q.shape[0]):
        for heads in all_heads:
            sums = [total[: len(heads) * size[0]].zero_() for total in room]
            for group in calls.groups:
                for part in some[group.name, heads]:
                    item = _Item(grad[b], q[b], k[b], v[b], out[b], lse[b], dq[b])
                    table = making.table(b, part, most[group.name], heads.start)
                    if table is not None:
                        _add_gradients(item, part, table, making, scale, sums)
            for target, total in zip((dk[b], dv[b]), sums, strict=True):
                tokens = total.view(len(heads), -1, shape.head_dim)[:, : shape.seq].transpose(0, 1)
                of_heads = target[:, heads.start : heads.stop]
                if calls.own:
                    of_heads.add_(tokens)
                else:
                    of_heads.copy_(tokens)
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
        # In single precision no more at a time than there was of keys, whose memory it takes.
        slab = max(len(blocks) * blocks.itemsize // total.itemsize, 1)
        del blocks
        for targets, numbers in zip(table.targets.split(slab), added.split(slab), strict=True):
            total.index_add_(0, targets, numbers.to(total.dtype))


def _lanes(kv_heads: range, calls: ListCalls) -> range:
    """The lanes that read some kv heads."""
    return range(kv_heads.start * calls.lanes_of_kv, kv_heads.stop * calls.lanes_of_kv)


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
    some: Tensor = tokens[:, part.lanes.start : part.lanes.stop].unflatten(0, (len(part.rows), part.tokens))
    return some.permute(2, 0, 3, 1, 4)


def _rows(x: Tensor, part: ListPart, calls: ListCalls) -> Tensor:
    """`_queries` of x [S, H], without D."""
    return _queries(x[..., None], part, calls)[..., 0]


def _flat(x: Tensor) -> Tensor:
    """A part's queries as the kernel takes them, [queries, 1, D]."""
    return x.reshape(-1, 1, x.shape[-1])
