"""The memory plan of an attention of a few kernel calls over the whole sequence; see
`attention/ops/whole_calls.py`. Imports no torch.

Letters as in `planner/memory/plans/tiles.py`; N views of T queries and K keys, of H query and G key heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from attention.sizes.arrays import Count, any_of, maximum, minimum, where
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import CallPart, WholeCall, backward_cut, by_cudnn, forward_cut
from planner.memory.allocator_settings import MIN_BLOCK
from planner.memory.cuda_kernels import cudnn_workspace, largest
from planner.memory.cuda_process import FLOAT32
from planner.memory.machines import KernelCall
from planner.memory.plans import tiles
from planner.memory.plans.tiles import Case
from planner.memory.table import PlanTable

CutOf = Callable[[WholeCall, Shape], CallPart]


def whole_calls(table: PlanTable, case: Case, calls: Sequence[WholeCall]) -> None:
    """Forward and, in training, backward of these calls."""
    forward(table, case, calls)
    tiles.join_sinks(table, case)
    if not case.trains:
        table.free("log-sum-exp")  # where weights are wanted it is theirs from here on
    if case.goes_back(table):
        tiles.sinks_gradient(table, case)
        backward(table, case, calls)


def forward(table: PlanTable, case: Case, calls: Sequence[WholeCall]) -> None:
    """Up to out and its log-sum-exp."""
    shape, e = case.shape, case.shape.itemsize
    calls = [call for call in calls if any_of(call.exists)]
    out, lse_bytes = case.machine.forward(_all_tokens(case)).result
    covered = sum((call.covers(shape) * call.exists for call in calls), 0)
    as_returned = sum((call.covers(shape) * call.exists * (call.views == 1) for call in calls), 0)
    table.phase("forward")
    table.add("out", "output", where(covered, out, case.channels * e), "B S H D e")
    for call in calls:
        table.add(f"{call.name}: log-sum-exp", "temp_buffers", _reordered(call, case), "float32 B S H")
    lse = "saved_for_backward" if case.trains else "temp_buffers"
    table.add("log-sum-exp", lse, where(as_returned, lse_bytes, case.lse_bytes), "float32 B S H")
    for call in calls:
        cut = forward_cut(call, shape)
        _forward_calls(table, case, call, cut)
        table.free(f"{call.name}: log-sum-exp")
        _forward_others(table, case, call, cut)


def forward_parts(table: PlanTable, case: Case, call: WholeCall) -> None:
    """A call whose results are merged into an output that is there."""
    cut = forward_cut(call, case.shape)
    _forward_calls(table, case, call, cut)
    _forward_others(table, case, call, cut)


def _forward_others(table: PlanTable, case: Case, call: WholeCall, cut: CallPart) -> None:
    """The kernel calls after the first one of a call that are cut so."""
    alone = call.exists * (1 - call.covers(case.shape))
    if any_of(_repeats(call, case, cut) * alone):
        table.again(f"forward, {call.name}")
    for rest in _rests(call, case, cut, alone):
        _forward_calls(table, case, call, rest, rest=True)


def _forward_calls(
    table: PlanTable, case: Case, call: WholeCall, cut: CallPart, *, rest: bool = False
) -> None:
    """The kernel calls of a call that are cut so, and how their results are merged; `rest`: those over what
    the larger ones left over."""
    name = call.name + ", the rest" * rest
    covers = call.covers(case.shape)
    alone = call.exists * (1 - covers)
    table.phase(f"forward, {name}")
    largest_call = _kernel_call(call, case, cut, covers, rest=rest)
    out, lse_bytes, scratch, rows = _forward_bytes(call, case, cut, covers, largest_call)
    merging = (FLOAT32 * rows * (not call.first) * alone,)
    # The kernel's is gone when the log-sum-exp is written in another order.
    exists = call.exists * (1 - (sum(scratch) <= _reordered(call, case)) * 1)
    table.add(f"{name}: part", "temp_buffers", (out * alone, lse_bytes * alone), "N T H (D e + 4)")
    most = largest((tuple(x * exists for x in scratch), merging), MIN_BLOCK)
    table.add(f"{name}: scratch", "workspace", most, "of the kernel, or of the merge")
    allowance = _cudnn_workspace(table, call, case, largest_call, name)
    table.free(f"{name}: part", f"{name}: scratch", *allowance)


def backward(table: PlanTable, case: Case, calls: Sequence[WholeCall], cut_of: CutOf = backward_cut) -> None:
    """From the gradient of out to dq, dk and dv. `cut_of`: how calls are cut."""
    shape, e = case.shape, case.shape.itemsize
    calls = [call for call in calls if any_of(call.exists)]
    padded = case.machine.backward(_all_tokens(case)).result
    own = (case.channels * e, case.kv_channels * e, case.kv_channels * e)
    one = sum((is_one(call, cut_of(call, shape), case) * call.exists for call in calls), 0)
    table.phase("backward")
    for name, nbytes, returned in zip(("dq", "dk", "dv"), own, padded, strict=True):
        table.add(name, "gradients", where(one, returned, nbytes), "B S H D e, or B S G D e")
    for call in calls:
        backward_parts(table, case, call, cut_of)


def backward_parts(table: PlanTable, case: Case, call: WholeCall, cut_of: CutOf = backward_cut) -> None:
    """A call whose gradients are added to those that are there, unless they are all of them."""
    cut = cut_of(call, case.shape)
    alone = call.exists * (1 - is_one(call, cut, case))
    _backward_calls(table, case, call, cut, alone)
    if any_of(_repeats(call, case, cut) * alone):
        table.again(f"backward, {call.name}")
    for rest in _rests(call, case, cut, alone):
        _backward_calls(table, case, call, rest, alone, rest=True)


def _backward_calls(
    table: PlanTable, case: Case, call: WholeCall, cut: CallPart, alone: Count, *, rest: bool = False
) -> None:
    """The kernel calls of a call that are cut so; `alone`: 1 if dq, dk and dv are not what they return, else
    0; `rest` as in `_forward_calls`."""
    name = call.name + ", the rest" * rest
    table.phase(f"backward, {name}")
    kernel_call = _kernel_call(call, case, cut, 1 - alone, rest=rest)
    kernel = case.machine.backward(kernel_call)
    results = [x * alone for x in kernel.result]
    copies = [x * call.exists for x in kernel.copies]
    table.add(f"{name}: copies of operands", "workspace", copies, "as the kernel wants them")
    table.add(f"{name}: dq, dk, dv", "temp_buffers", results, "N (T H + 2 K G) D e")
    tiles.first_scratch(table, kernel, f"{name}: ", f"backward, {name}", call.exists)
    scratch = [x * call.exists for x in kernel.scratch]
    table.add(f"{name}: backward scratch", "workspace", scratch, "of the kernel")
    allowance = _cudnn_workspace(table, call, case, kernel_call, name)
    table.free(f"{name}: copies of operands", f"{name}: dq, dk, dv", f"{name}: backward scratch", *allowance)


def _cudnn_workspace(
    table: PlanTable, call: WholeCall, case: Case, kernel: KernelCall, name: str
) -> tuple[str, ...]:
    """Adds what cuDNN's attention may take of itself, where it runs the call, and names it."""
    taken = by_cudnn(call, case.shape) * call.exists
    if not any_of(taken):
        return ()
    rows = kernel.heads * kernel.queries + kernel.kv_heads * kernel.keys
    line = cudnn_workspace(2 * kernel.views * rows * kernel.head_dim * kernel.itemsize)
    table.add(f"{name}: {line.name}", "workspace", line.bytes * taken, line.source)
    return (f"{name}: {line.name}",)


def _forward_bytes(
    call: WholeCall, case: Case, cut: CallPart, covers: Count, largest_call: KernelCall
) -> tuple[Count, Count, tuple[Count, ...], Count]:
    """Out, log-sum-exp, scratch and rows of the kernel call that takes most: the largest, or one with fewer
    views or heads, for whom the kernel cuts the keys further."""
    shape, kv_heads = case.shape, call.kv_heads(case.shape)
    last = shape.heads // call.period  # heads of the last offset
    sizes = [
        largest_call,
        largest_call._replace(views=where(covers, largest_call.views, (call.views - 1) % cut.views + 1)),
        largest_call._replace(
            heads=where(kv_heads <= cut.kv_heads, maximum(last, 1), largest_call.heads),
            queries=minimum(largest_call.queries, maximum(call.length // call.step, 1)),
            keys=minimum(largest_call.keys, maximum(call.key_length // call.step, 1)),
            groups=minimum(largest_call.kv_heads, maximum(last, 1)),
        ),
        _with_heads(largest_call, (kv_heads - 1) % cut.kv_heads + 1, covers),
    ]
    kernels = [case.machine.forward(size) for size in sizes]
    most = largest(tuple((*kernel.result, *kernel.copies, *kernel.scratch) for kernel in kernels), MIN_BLOCK)
    return most[0], most[1], most[2:], largest_call.views * largest_call.heads * largest_call.queries


def _with_heads(call: KernelCall, kv_heads: Count, covers: Count) -> KernelCall:
    """The call for fewer kv heads and the query heads that read them."""
    kv_heads = where(covers, call.kv_heads, kv_heads)
    return call._replace(heads=call.heads // call.kv_heads * kv_heads, groups=kv_heads)


def _reordered(call: WholeCall, case: Case) -> Count:
    """Bytes of the log-sum-exp of a call over views of all tokens: it has another order than what is kept."""
    return case.lse_bytes * (call.views > 1) * call.covers(case.shape) * call.exists


def is_one(call: WholeCall, cut: CallPart, case: Case) -> Count:
    """1 if the kernel is given all tokens at once and returns dq, dk and dv, else 0."""
    fits = (call.views <= cut.views) * (call.kv_heads(case.shape) <= cut.kv_heads)
    return call.covers_keys(case.shape) * fits * 1


def _repeats(call: WholeCall, case: Case, cut: CallPart) -> Count:
    """1 if there are several kernel calls of the largest size, but for slices of the queries, else 0."""
    views, kv_heads = call.views >= 2 * cut.views, call.kv_heads(case.shape) >= 2 * cut.kv_heads
    return ((case.batch > 1) | (call.offsets > 1) | views | kv_heads) * 1


def _rests(call: WholeCall, case: Case, cut: CallPart, alone: Count) -> Iterator[CallPart]:
    """How the last kernel calls are cut, if they have less than the others: what is left over of views, of kv
    heads or of queries. Of one config: it takes less at once, but what is below a MiB comes from segments of
    its own."""
    kv_heads = call.kv_heads(case.shape)
    sizes = (call.views, cut.views, kv_heads, cut.kv_heads, call.queries, cut.queries, alone)
    if any(type(size) is not int for size in sizes) or not alone:
        return
    if call.views % cut.views:
        yield cut._replace(views=call.views % cut.views)
    if kv_heads % cut.kv_heads:
        yield cut._replace(kv_heads=kv_heads % cut.kv_heads)
    if cut.queries < call.queries and call.queries % cut.queries:
        yield cut._replace(queries=call.queries % cut.queries)


def _heads(call: WholeCall, cut: CallPart, case: Case) -> Count:
    """Query heads that the kernel is given at once."""
    return cut.kv_heads * (call.heads(case.shape) // call.kv_heads(case.shape))


def _kernel_call(
    call: WholeCall, case: Case, cut: CallPart, batched: Count, *, rest: bool = False
) -> KernelCall:
    """The largest kernel call; `batched`: 1 if it takes all batch items and all of the call, else 0. `rest`:
    whether it is over what the larger ones left over."""
    shape = case.shape
    views, queries = where(batched, case.batch * call.views, cut.views), maximum(call.queries, 1)
    heads = where(batched, call.heads(shape), _heads(call, cut, case))
    keys = maximum(call.keys, 1)
    sliced = (cut.queries < queries) * (1 - batched)
    # The last slice, which is the first that comes, or what is left over, the first tokens'.
    begin = (queries - cut.queries) * (1 - rest)
    first, stop = call.seen(begin, begin + cut.queries, queries, keys)
    keys, queries = where(sliced, stop - first, keys), where(sliced, cut.queries, queries)
    # Operands are views [N, T, H, D] of [S, H, D], and the log-sum-exp is one [N, H, T] of [H, S].
    operands = ((heads == 1) | (call.period == 1)) * ((queries == 1) | (call.step * shape.heads == heads))
    operands = operands * ((views == 1) | (call.view_step * shape.heads == queries * heads))
    row = shape.queries if case.lse_row is None else case.lse_row
    rows = ((queries == 1) | (call.step == 1)) * ((heads == 1) | (call.period * row == queries))
    rows = rows * ((views == 1) | (call.view_step == heads * queries))
    return KernelCall(
        views,
        heads,
        queries,
        keys,
        shape.head_dim,
        shape.itemsize,
        dense=where(batched, 1, operands * 1),
        whole=where(batched, ((call.views == 1) | (shape.heads == 1)) * 1, rows * 1),
        groups=where(batched, call.kv_heads(shape), cut.kv_heads),
        reversed=call.reverses(shape),
        tokens_first=True,
        gathers_heads=call.left is None and call.right is None,
    )


def _all_tokens(case: Case) -> KernelCall:
    shape = case.shape
    return KernelCall(
        case.batch,
        shape.heads,
        shape.queries,
        shape.seq,
        shape.head_dim,
        shape.itemsize,
        groups=shape.kv_heads,
    )
