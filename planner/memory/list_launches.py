"""How many kernels an attention over the lists of dilated_sparse launches on a GPU. No torch.

Of one candidate: what is copied, merged and added up follows from which blocks are listed, of which the
reach of every row tells enough. See `attention/ops/list_calls.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from attention.config import AttentionConfig
from attention.layout import BranchRows, grid_of, row_budget
from attention.sizes.arrays import ceil_div
from attention.sizes.list_calls import (
    ListCalls,
    ListCut,
    ListRows,
    ListSums,
    backward_cut_of,
    backward_sums,
    forward_cut_of,
    own_backward_cut,
)
from attention.sizes.shape import Shape
from planner.memory.call_launches import Pass, is_padded, pads_channels, pieces, summed, whole_calls
from planner.memory.machines import Cuda

INDEX = 1
"""The tokens of a block are numbered once a pass."""
COPIES = 3
"""Of a part's keys and values: their places, and both."""
FLASH_BACKWARD = 3
"""Kernels of flash attention's."""
MOST_PARTS, MOST_MERGED = 1 << 18, 1 << 10
"""Parts of one kv head that are counted, in backward where parts have several rows: more take seconds."""


class ListedRows:
    """What the rows of a layout list, without its lists."""

    def __init__(self, branches: BranchRows, budget: int, short: bool) -> None:
        """`short`: whether the last block is."""
        rows = np.arange(branches.blocks, dtype=np.int64)
        self.own = branches.causal  # by themselves
        self.rates = branches.rates.ravel().tolist()
        self.left, self.right = branches.select(rows, budget)
        listed = branches.kept(rows, budget)
        self.idle = (listed == 1) & self.own
        self.gathered = np.maximum(listed - 1, 1) if self.own else listed
        last = rows + self.right.max(axis=0) == branches.blocks - 1
        self.beyond = last & short & (not self.own)

    @classmethod
    def of(cls, config: AttentionConfig, shape: Shape) -> ListedRows:
        """Of a dilated_sparse config."""
        size, blocks = grid_of(config, shape.seq, None)
        branches = BranchRows.of(config, blocks, shape.causal)
        return cls(branches, row_budget(config, shape.seq), shape.seq % min(size, shape.seq) > 0)

    def different(self, begin: int, end: int) -> int:
        """Different blocks that some rows gather: the progressions of all branches, each marked where it
        begins and behind its end."""
        some = ~self.idle[begin:end]
        row = np.arange(begin, end)[some]
        idle = int(not some.all())  # what gathers nothing is given the first block
        if not len(row):
            return idle
        left, right = (side[:, begin:end][:, some] for side in (self.left, self.right))
        first = int((row - left.max(axis=0)).min())
        there = np.zeros(int((row + right.max(axis=0)).max()) + 1 - first, np.bool_)
        for t, rate in enumerate(self.rates):
            marks = np.zeros(ceil_div(len(there) + rate, rate) * rate, np.int64)
            np.add.at(marks, row - left[t] - first, 1)
            np.add.at(marks, row + right[t] + rate * (not self.own) - first, -1)
            there |= marks.reshape(-1, rate).cumsum(axis=0).ravel()[: len(there)] > 0
        return int(there.sum()) + idle * (first > 0 or not there[0])


class _Part(NamedTuple):
    """What a part is in figures; flags are 0 or 1."""

    lanes: int
    rows: int
    first: int
    """Whether nothing came before in these queries."""
    idle: int
    """Whether some row gathers nothing."""
    beyond: int
    """Whether some row gathers a short last block."""
    slabs: int
    """In which the gradients of its blocks are added to the sums; 0 where nothing is added."""


class _Parts(NamedTuple):
    """The parts of a group."""

    most: int
    """Blocks that the largest gathers."""
    number: Counter[_Part]
    """How many there are of each."""


def _parts(rows: ListedRows, group: ListRows, cut: ListCut, lanes: Counter[int], widening: int = 0) -> _Parts:
    """Over so many ranges of so many lanes. `widening`: by how much larger than a block its sum is, 0 where
    nothing is added up."""
    number: Counter[_Part] = Counter()
    if not group.exists:
        return _Parts(0, number)
    stop = group.first + group.rows
    begins = np.arange(group.first, stop, cut.rows)
    lengths = np.diff(begins, append=stop)
    gathered = np.add.reduceat(rows.gathered[:stop], begins)
    idle, beyond = (np.logical_or.reduceat(some[:stop], begins) for some in (rows.idle, rows.beyond))
    # One list by itself may be too long, and is cut.
    most = max(
        int(np.where(count * lengths == 1, np.minimum(gathered, cut.blocks), count * gathered).max())
        for count in lanes
    )
    for count, times in lanes.items():
        alone = count * lengths == 1
        for at in range(0, group.width, cut.blocks):
            blocks = np.where(alone, np.clip(gathered - at, 0, cut.blocks), count * gathered * (at == 0))
            slabs = np.zeros_like(blocks)
            if widening:
                slab = max(most // widening, 1)
                different = np.minimum(blocks, count * len(rows.gathered))
                for n in np.flatnonzero((different > slab) & (lengths > 1)):
                    different[n] = count * rows.different(begins[n], begins[n] + lengths[n])
                slabs = -(-different // slab)
            first = np.full_like(blocks, at == 0 and not rows.own)
            ends = beyond & (~alone | (at + cut.blocks >= gathered))
            kinds = np.stack([np.full_like(blocks, count), lengths, first, idle, ends, slabs], axis=1)
            for kind, same in Counter(map(tuple, kinds[blocks > 0].tolist())).items():
                number[_Part(*kind)] += times * same
    return _Parts(most, number)


def list_calls(
    calls: ListCalls, rows: ListedRows, shape: Shape, batch: int, card: Cuda
) -> tuple[Pass, Pass] | None:
    """Forward and backward over the lists of a layout; None where there are too many parts to look at."""
    held = backward_sums(calls, shape)
    for group in calls.groups:
        if group.exists and not (
            _number(group, forward_cut_of(calls, group, shape)) <= MOST_PARTS
            and _number(group, cut := backward_cut_of(calls, group, held, shape))
            <= (MOST_PARTS if cut.rows == 1 else MOST_MERGED)
        ):
            return None
    ahead, behind = Pass(0, 0), Pass(0, 0)
    if calls.own:
        ahead, behind = whole_calls(calls.own, shape, batch, card, own_backward_cut)
    ahead = summed(ahead, _forward(calls, rows, shape), batch)
    behind = summed(behind, _backward(calls, rows, shape), batch)
    return summed(ahead, Pass(INDEX, 0), 1), summed(behind, Pass(INDEX, 0), 1)


def _number(group: ListRows, cut: ListCut) -> int:
    """Parts of the rows of a group."""
    return ceil_div(group.rows, cut.rows) * ceil_div(group.width, cut.blocks)


def _forward(calls: ListCalls, rows: ListedRows, shape: Shape) -> Pass:
    """Of one batch item."""
    total = Pass(0, 0)
    for group in calls.groups:
        cut = forward_cut_of(calls, group, shape)
        parts = _parts(rows, group, cut, _cuts([calls.lanes], cut.lanes))
        for part, number in parts.number.items():
            view = _view(part, group, calls, shape)
            kernels = COPIES + part.beyond + 1
            kernels += _padding(view.queries, parts.most * calls.size, shape, queries=1)
            kernels += view.reaching * (1 - view.merges)  # q
            if part.first:
                kernels += view.reaching * (1 - view.is_dense * (1 - is_padded(view.queries, shape)))
                kernels += 1 - view.rows_are_one
            else:
                kernels += 3 + 2 * view.reaching + part.idle
            total = summed(total, Pass(kernels, 1), number)
    return total


def _backward(calls: ListCalls, rows: ListedRows, shape: Shape) -> Pass:
    """Of one batch item."""
    held = backward_sums(calls, shape)
    total = Pass(0, 0)
    heads = _cuts([shape.kv_heads], held.kv_heads)
    for group in calls.groups:
        total = summed(total, _group_backward(calls, group, held, list(heads.elements()), rows, shape), 1)
    for count, number in heads.items():
        a_sum = held._replace(kv_heads=count).bytes_of_each(calls, shape)
        as_it_is = not calls.own and held.itemsize == shape.itemsize and shape.kv_heads == 1
        handed = pieces(max(shape.seq * shape.kv_token_bytes, a_sum)) * (1 - as_it_is)
        total = summed(total, Pass(2 * pieces(a_sum) + 2 * handed, 0), number)
    return total


def _group_backward(
    calls: ListCalls, group: ListRows, held: ListSums, heads: list[int], rows: ListedRows, shape: Shape
) -> Pass:
    cut = backward_cut_of(calls, group, held, shape)
    widening = held.itemsize // shape.itemsize
    lanes = _cuts([count * calls.lanes_of_kv for count in heads], cut.lanes)
    parts = _parts(rows, group, cut, lanes, widening)
    total = Pass(0, 0)
    for part, number in parts.number.items():
        view = _view(part, group, calls, shape)
        kernels = COPIES + part.beyond + FLASH_BACKWARD
        kernels += _padding(view.queries, parts.most * calls.size, shape, queries=3)
        # q, out and its gradient, of which the kernel itself copies what lies apart, but for q.
        apart = view.merges * (1 - view.is_dense) * (1 - pads_channels(shape))
        kernels += view.reaching * (3 * (1 - view.merges) + 2 * apart)
        kernels += view.idle_rows if part.idle else 1 - view.rows_are_one
        as_it_is = part.first * view.is_dense * (1 - is_padded(view.queries, shape))
        kernels += view.reaching * (1 - as_it_is)
        # Of dk and dv: rows of a block in one piece, the sum of those alike, which is widened and added.
        in_rows = is_padded(parts.most * calls.size, shape) * (calls.size > 1)
        kernels += 2 * (in_rows + 1 + part.slabs * (1 + (widening > 1)))
        total = summed(total, Pass(kernels, 1), number)
    return total


def _cuts(totals: Iterable[int], size: int) -> Counter[int]:
    """How many there are of each size where each total is cut into parts of at most `size`."""
    number: Counter[int] = Counter()
    for total in totals:
        number[size] += total // size
        number[total % size] += 1
    return Counter({count: times for count, times in number.items() if count * times})


def _padding(query_rows: int, key_rows: int, shape: Shape, *, queries: int) -> int:
    """Kernels that pad the channels of so many operands of queries, and of keys and values."""
    pads = pads_channels(shape)
    return queries * (pads + is_padded(query_rows, shape)) + 2 * (pads + is_padded(key_rows, shape))


class _View(NamedTuple):
    """How a part's queries [lanes, rows, heads of a lane, tokens] lie in memory; flags are 0 or 1."""

    queries: int
    reaching: int
    """Kernels of an operator over them and their channels."""
    merges: int
    """Whether they are as many rows of memory in equal steps."""
    is_dense: int
    """Whether these lie one behind the other."""
    rows_are_one: int
    """Whether those of the log-sum-exp are one piece."""
    idle_rows: int
    """Kernels that make one piece of the log-sum-exp, with some rows filled."""


def _view(part: _Part, group: ListRows, calls: ListCalls, shape: Shape) -> _View:
    lanes, rows, repeat, tokens = sizes = (part.lanes, part.rows, calls.repeat, group.tokens)
    dim, heads, seq = shape.head_dim, shape.heads, shape.seq
    step = _merged(sizes, (repeat * dim, tokens * heads * dim, dim, heads * dim))
    lse = (repeat * seq, tokens, seq, 1)
    return _View(
        queries=lanes * rows * repeat * tokens,
        reaching=pieces(rows * tokens * shape.token_bytes),
        merges=(step is not None) * 1,
        is_dense=(step in (0, dim)) * 1,
        rows_are_one=(_merged(sizes, lse) in (0, 1)) * 1,
        idle_rows=_idle_rows(sizes, lse),
    )


def _merged(sizes: Sequence[int], steps: Sequence[int]) -> int | None:
    """The step from one number to the next where all dimensions are one, 0 for a single number; None where
    they are not."""
    there = [(size, step) for size, step in zip(sizes, steps, strict=True) if size > 1]
    for (_, outer), (size, inner) in pairwise(there):
        if outer != size * inner:
            return None
    return there[-1][1] if there else 0


def _idle_rows(sizes: tuple[int, int, int, int], steps: tuple[int, int, int, int]) -> int:
    """Kernels that copy the log-sum-exp by pairs, fill those of idle pairs, and make it one piece."""
    lanes, rows, repeat, tokens = sizes
    pair = _merged(sizes[:2], steps[:2])
    if pair is None:  # the pairs are copied to be one dimension, and the copy is in one piece
        return 2
    there = [(lanes * rows, pair), (repeat, steps[2]), (tokens, steps[3])]
    there = [(size, step) for size, step in there if size > 1]
    ordered = sorted(there, key=lambda one: -one[1])
    dense = _merged([size for size, _ in ordered], [step for _, step in ordered]) in (0, 1)
    return 1 + (not dense) + (there != ordered)
