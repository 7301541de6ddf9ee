"""The memory plan of an attention over lists of blocks as few kernel calls; see
`attention/ops/list_calls.py`. Imports no torch.

Letters as in `planner/memory/plans/tiles.py`; P pairs of a row and a lane in a part, of Q queries and K keys
in all. Bounds: no part takes more, and some do where rows list as many blocks as the widest.
"""

from __future__ import annotations

from typing import NamedTuple

from attention.sizes.arrays import Count, any_of, maximum, minimum, up
from attention.sizes.list_calls import (
    INDEX,
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
from attention.sizes.whole_calls import CHANNELS
from planner.memory.allocator_settings import MIN_BLOCK
from planner.memory.cuda_kernels import largest, ragged_backward, ragged_forward
from planner.memory.cuda_process import FLOAT32
from planner.memory.plans import whole_calls
from planner.memory.plans.tiles import Case, join_sinks, sinks_gradient
from planner.memory.table import PlanTable

SIZES = "attention/sizes/list_calls.py"
STEPS = "steps through a block"


def list_calls(table: PlanTable, case: Case, calls: ListCalls) -> None:
    """Forward and, in training, backward over these lists."""
    forward(table, case, calls)
    join_sinks(table, case)
    if not case.trains:
        table.free("log-sum-exp")  # where weights are wanted it is theirs from here on
    if case.goes_back(table):
        sinks_gradient(table, case)
        backward(table, case, calls)


def forward(table: PlanTable, case: Case, calls: ListCalls) -> None:
    """Up to out and its log-sum-exp."""
    e = case.shape.itemsize
    if calls.own:
        whole_calls.forward(table, case, calls.own)
    else:
        table.phase("forward")
        table.add("out", "output", case.channels * e, "B S H D e")
        lse = "saved_for_backward" if case.trains else "temp_buffers"
        table.add("log-sum-exp", lse, case.lse_bytes, "float32 B S H")
    table.phase("forward, before lists")
    table.add(STEPS, "sparse_indices", INDEX * calls.size, "8 a token of a block")
    for group in _there(calls):
        _forward(table, case, calls, group)
    table.free(STEPS)


def backward(table: PlanTable, case: Case, calls: ListCalls) -> None:
    """From the gradient of out to dq, dk and dv."""
    shape, e = case.shape, case.shape.itemsize
    if calls.own:
        whole_calls.backward(table, case, calls.own, own_backward_cut)
    else:
        table.phase("backward")
        table.add("dq", "gradients", case.channels * e, "B S H D e")
        table.add("dk", "gradients", case.kv_channels * e, "B S G D e")
        table.add("dv", "gradients", case.kv_channels * e, "B S G D e")
    table.phase("backward, sums over lists")
    sums = backward_sums(calls, shape)
    a_sum = sums.bytes_of_each(calls, shape)
    table.add(STEPS, "sparse_indices", INDEX * calls.size, "8 a token of a block")
    table.add("sums of dk and dv", "workspace", (a_sum, a_sum), f"{SIZES} backward_sums")
    for group in _there(calls):
        _backward(table, case, calls, group, sums)
    table.free(STEPS, "sums of dk and dv")


def _there(calls: ListCalls) -> list[ListRows]:
    return [group for group in calls.groups if any_of(group.exists)]


class _Part(NamedTuple):
    """The largest part of a group."""

    queries: Count
    blocks: Count
    keys: Count
    sequences: Count
    copied: Count
    """1 if its queries are copied; those of one head lie in steps of their own."""
    lists: Count
    """Bytes of what says which blocks are gathered, without where their gradients go."""


def _part(calls: ListCalls, group: ListRows, cut: ListCut, shape: Shape) -> _Part:
    pairs = cut.lanes * cut.rows
    blocks = pairs * minimum(cut.blocks, group.width)
    sequences = calls.sequences(cut.lanes, cut.rows, shape)
    if (
        calls.own
    ):  # a row gathers up to all blocks before its own; where it has none to gather, one all the same
        ahead = calls.before + group.first
        whole = (group.rows // cut.rows - 1) * cut.rows
        last = (group.rows - 1) // cut.rows * cut.rows
        most = maximum(
            *(
                _gathered(ahead + begin, ahead + minimum(begin + cut.rows, group.rows), group.width)
                for begin in (maximum(whole, 0), last)
            )
        )
        blocks = minimum(blocks, cut.lanes * most)
    idle = pairs if calls.own else 0
    lists = INDEX * (blocks + idle) + 2 * up(4 * (sequences + 1), INDEX)
    copied = 1 - (cut.lanes * calls.repeat == 1) * 1
    return _Part(pairs * calls.repeat * group.tokens, blocks, blocks * calls.size, sequences, copied, lists)


def _gathered(begin: Count, end: Count, width: Count) -> Count:
    """Blocks that rows begin..end gather at most, row i up to i and no more than `width`."""

    def before(row: Count) -> Count:
        few = minimum(row, width)
        return few * (few - 1) // 2 + (row - few) * width

    return before(end) - before(begin) + (begin == 0) * 1


def _forward(table: PlanTable, case: Case, calls: ListCalls, group: ListRows) -> None:
    shape, name = case.shape, group.name
    part = _part(calls, group, forward_cut_of(calls, group, shape), shape)
    dim, e, padded = shape.head_dim, shape.itemsize, up(shape.head_dim, CHANNELS)
    queries, keys = part.queries * group.exists, part.keys * group.exists
    table.phase(f"forward, {name}")
    table.add(f"{name}: blocks", "sparse_indices", part.lists * group.exists, "8 K / b, and 12 a pair")
    table.add(f"{name}: k and v", "temp_buffers", (keys * dim * e, keys * dim * e), "2 K D e")
    pads = [rows * padded * e * (padded > dim) for rows in (queries, keys, keys)]
    kernel = [line.bytes * group.exists for line in ragged_forward(part.queries)]
    work = (queries * dim * e * part.copied, *pads, queries * padded * e, *kernel)
    most = largest((work, (INDEX * keys,)), MIN_BLOCK)
    table.add(f"{name}: queries and results", "temp_buffers", most, "Q (2 D e + 4), or 8 K of places")
    table.free(*(f"{name}: {what}" for what in ("blocks", "k and v", "queries and results")))


def _backward(table: PlanTable, case: Case, calls: ListCalls, group: ListRows, sums: ListSums) -> None:
    shape, name = case.shape, group.name
    part = _part(calls, group, backward_cut_of(calls, group, sums, shape), shape)
    dim, e, padded = shape.head_dim, shape.itemsize, up(shape.head_dim, CHANNELS)
    queries, keys = part.queries * group.exists, part.keys * group.exists
    table.phase(f"backward, {name}")
    targets = minimum(part.blocks, sums.kv_heads * calls.blocks(shape))
    lists = (part.lists + INDEX * (part.blocks + 2 * targets)) * group.exists
    table.add(f"{name}: blocks and sums", "sparse_indices", lists, "32 K / b, and 12 a pair")
    table.add(f"{name}: k and v of backward", "temp_buffers", (keys * dim * e, keys * dim * e), "2 K D e")
    copies = [queries * dim * e * copied for copied in (part.copied, shape.heads > 1, shape.heads > 1)]
    pads = [rows * padded * e * (padded > dim) for rows in (queries, queries, keys, keys, queries)]
    results = [rows * padded * e for rows in (queries, keys, keys)]
    kernel = [line.bytes * group.exists for line in ragged_backward(part.queries, part.sequences, padded)]
    rows = queries * FLOAT32 * (1 if calls.own else part.copied)  # where pairs are idle, always
    padding = (*copies, rows, *pads)  # once operands are padded, their copies are gone
    work = (*(x * (padded == dim) for x in copies), rows, *pads, *results, *kernel)
    most = largest((work, padding, (INDEX * keys,)), MIN_BLOCK)
    table.add(f"{name}: gradients and sums of dq", "temp_buffers", most, "Q (4 D e + 4) + 2 K D e + ...")
    table.free(
        *(
            f"{name}: {what}"
            for what in ("blocks and sums", "k and v of backward", "gradients and sums of dq")
        )
    )
