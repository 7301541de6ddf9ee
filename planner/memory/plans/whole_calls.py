"""The memory plan of an attention of a few kernel calls over the whole sequence; see
`attention/ops/whole_calls.py`. Imports no torch.

Letters as in `planner/memory/plans/tiles.py`; N views of T queries and K keys, of H query and G key heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from attention.sizes.arrays import Count, any_of, maximum, minimum, where
from attention.sizes.whole_calls import CallPart, WholeCall, backward_cut, forward_cut
from planner.memory.cuda_kernels import largest
from planner.memory.cuda_process import FLOAT32
from planner.memory.machines import KernelCall
from planner.memory.plans import tiles
from planner.memory.plans.tiles import Case
from planner.memory.table import PlanTable


def whole_calls(table: PlanTable, case: Case, calls: Sequence[WholeCall]) -> None:
    """Forward and, in training, backward of these calls."""
    shape, e = case.shape, case.shape.itemsize
    calls = [call for call in calls if any_of(call.exists)]
    out, lse_bytes = case.machine.forward(_all_tokens(case)).result
    covered = sum((call.covers(shape) * call.exists for call in calls), 0)
    as_returned = sum((call.covers(shape) * call.exists * (call.views == 1) for call in calls), 0)
    table.phase("forward")
    table.add("out", "output", where(covered, out, case.channels * e), "B S H D e")
    lse = "saved_for_backward" if case.trains else "temp_buffers"
    table.add("log-sum-exp", lse, where(as_returned, lse_bytes, case.lse_bytes), "float32 B S H")
    for call in calls:
        table.phase(f"forward, {call.name}")
        covers = call.covers(shape)
        alone = call.exists * (1 - covers)
        out, lse_bytes, scratch, rows = _forward_bytes(call, case, forward_cut(call, shape), covers)
        # A call over views of all tokens has its log-sum-exp in another order than is kept.
        reordered = case.lse_bytes * (call.views > 1) * covers
        merging = (FLOAT32 * rows * (not call.first) * alone, reordered * call.exists)
        table.add(f"{call.name}: part", "temp_buffers", (out * alone, lse_bytes * alone), "N T H (D e + 4)")
        most = largest((tuple(x * call.exists for x in scratch), merging))
        table.add(f"{call.name}: scratch", "workspace", most, "of the kernel, or of the merge")
        table.free(f"{call.name}: part", f"{call.name}: scratch")
    if not case.trains:
        table.free("log-sum-exp")  # where weights are wanted it is theirs from here on
    if case.goes_back(table):
        _backward(table, case, calls)


def _backward(table: PlanTable, case: Case, calls: Sequence[WholeCall]) -> None:
    shape, e = case.shape, case.shape.itemsize
    padded = case.machine.backward(_all_tokens(case)).result
    own = (case.channels * e, case.kv_channels * e, case.kv_channels * e)
    one = sum((_is_one(call, backward_cut(call, shape), case) * call.exists for call in calls), 0)
    table.phase("backward")
    for name, nbytes, returned in zip(("dq", "dk", "dv"), own, padded, strict=True):
        table.add(name, "gradients", where(one, returned, nbytes), "B S H D e, or B S G D e")
    for call in calls:
        table.phase(f"backward, {call.name}")
        cut = backward_cut(call, shape)
        alone = call.exists * (1 - _is_one(call, cut, case))
        kernel = case.machine.backward(_kernel_call(call, case, cut, 1 - alone))
        results = [x * alone for x in kernel.result]
        copies = [x * call.exists for x in kernel.copies]
        table.add(f"{call.name}: copies of operands", "workspace", copies, "where D is padded")
        table.add(f"{call.name}: dq, dk, dv", "temp_buffers", results, "N (T H + 2 K G) D e")
        tiles.first_scratch(table, kernel, f"{call.name}: ", f"backward, {call.name}", call.exists)
        scratch = [x * call.exists for x in kernel.scratch]
        table.add(f"{call.name}: backward scratch", "workspace", scratch, "of the kernel")
        table.free(
            f"{call.name}: copies of operands", f"{call.name}: dq, dk, dv", f"{call.name}: backward scratch"
        )


def _forward_bytes(
    call: WholeCall, case: Case, cut: CallPart, covers: Count
) -> tuple[Count, Count, tuple[Count, ...], Count]:
    """Out, log-sum-exp, scratch and rows of the kernel call that takes most: the largest, or one with fewer
    views or heads, for whom the kernel cuts the keys further."""
    largest_call = _kernel_call(call, case, cut, covers)
    shape, kv_heads = case.shape, call.kv_heads(case.shape)
    last = shape.heads // call.period  # heads of the last offset
    sizes = [
        largest_call,
        largest_call._replace(views=where(covers, largest_call.views, (call.views - 1) % cut.views + 1)),
        largest_call._replace(
            heads=where(kv_heads <= cut.kv_heads, maximum(last, 1), largest_call.heads),
            queries=maximum(call.length // call.step, 1),
            keys=maximum(call.key_length // call.step, 1),
            groups=minimum(largest_call.kv_heads, maximum(last, 1)),
        ),
        _with_heads(largest_call, (kv_heads - 1) % cut.kv_heads + 1, covers),
    ]
    kernels = [case.machine.forward(size) for size in sizes]
    most = largest(tuple((*kernel.result, *kernel.copies, *kernel.scratch) for kernel in kernels))
    return most[0], most[1], most[2:], largest_call.views * largest_call.heads * largest_call.queries


def _with_heads(call: KernelCall, kv_heads: Count, covers: Count) -> KernelCall:
    """The call for fewer kv heads and the query heads that read them."""
    kv_heads = where(covers, call.kv_heads, kv_heads)
    return call._replace(heads=call.heads // call.kv_heads * kv_heads, groups=kv_heads)


def _is_one(call: WholeCall, cut: CallPart, case: Case) -> Count:
    """1 if the kernel is given all tokens at once and returns dq, dk and dv, else 0."""
    fits = (call.views <= cut.views) * (call.kv_heads(case.shape) <= cut.kv_heads)
    return call.covers(case.shape) * fits * 1


def _heads(call: WholeCall, cut: CallPart, case: Case) -> Count:
    """Query heads that the kernel is given at once."""
    return cut.kv_heads * (call.heads(case.shape) // call.kv_heads(case.shape))


def _kernel_call(call: WholeCall, case: Case, cut: CallPart, batched: Count) -> KernelCall:
    """The largest kernel call; `batched`: 1 if it takes all batch items and all of the call, else 0."""
    shape = case.shape
    views, queries = where(batched, case.batch * call.views, cut.views), maximum(call.queries, 1)
    heads = where(batched, call.heads(shape), _heads(call, cut, case))
    # Operands are views [N, T, H, D] of [S, H, D], and the log-sum-exp is one [N, H, T] of [H, S].
    operands = ((heads == 1) | (call.period == 1)) * ((queries == 1) | (call.step * shape.heads == heads))
    operands = operands * ((views == 1) | (call.view_step * shape.heads == queries * heads))
    rows = ((queries == 1) | (call.step == 1)) * ((heads == 1) | (call.period * shape.seq == queries))
    rows = rows * ((views == 1) | (call.view_step == heads * queries))
    return KernelCall(
        views,
        heads,
        queries,
        maximum(call.keys, 1),
        shape.head_dim,
        shape.itemsize,
        dense=where(batched, 1, operands * 1),
        whole=where(batched, ((call.views == 1) | (shape.heads == 1)) * 1, rows * 1),
        groups=where(batched, call.kv_heads(shape), cut.kv_heads),
        tokens_first=True,
    )


def _all_tokens(case: Case) -> KernelCall:
    shape = case.shape
    return KernelCall(
        case.batch, shape.heads, shape.seq, shape.seq, shape.head_dim, shape.itemsize, groups=shape.kv_heads
    )
