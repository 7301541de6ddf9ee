"""What a call has to do, in figures that seconds are made of: closed forms of the programs that
`attention/block_sparse.py`, `attention/dilated.py` and `attention/adaptive.py` write. Imports no torch.

Totals are of one pass (forward or backward); numbers for one candidate, arrays for many. A program of
thousands of calls is a few kinds of call here, each with how often it occurs and its mean sizes, so totals
agree with the real program's to within a few percent (`tests/planner/speed/test_work.py`).

Letters: N views, H heads, T queries and K keys of a call, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from attention.sizes.adaptive import gate_part
from attention.sizes.arrays import Amount, any_of, ceil_div, maximum, minimum, where
from attention.sizes.learned_sinks import slab_tokens
from attention.sizes.list_calls import ListCalls
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import CallPart, WholeCall, backward_cut, forward_cut
from planner.configs import Columns
from planner.documents import parts
from planner.memory.dispatch import calls_of, lists_of, shape_of, window_of
from planner.memory.machines import Cuda, Machine
from planner.speed import calls
from planner.speed.calls import Calls, Program
from planner.speed.last_queries import pairs_share
from planner.speed.row_runs import Run, rounded_down, rounded_up, runs_of
from planner.workload import Workload

FLEX_TILE: Final = 64
"""Tokens a block with which FlexAttention reaches half of its rate. Assumption: tiles of fewer tokens fill
matrix units less. Compiled for a CPU in bfloat16 it is steeper: 204, 311, 468 GFLOP/s at 64, 128, 256."""

CUDNN_FASTER: Final = {9: 1.5, 10: 3.0}
"""Times as fast as flash attention cuDNN's is, by the major of the card's capability: medians of published
measurements, forward and backward, are 1.3 with 64 channels and 1.7 with 128 on Hopper, 3.1 with 128 on a
GB200 (benchmark/sdpa_benchmark_training of NVIDIA/cudnn-frontend, over those of FlashAttention-2). Not
measured here."""

NAMES: Final = (
    "work", "pairs", "keys", "queries", "merged", "summed", "gathered", "widened", "launches", "gathers",
    "tiles", "tokens", "matmul", "scored", "ranked", "gated", "gates", "flex", "passes",
)  # 19 names, in the rows in which the docstring explains them  # fmt: skip
"""Names of the totals. Numbers are of the tensors' type unless it says otherwise.

`work`: N H T K D, a multiply-add forward for q k^T and one for the weighted sum, what idle workers could
have done included, and of cuDNN's calls as much as flash attention does in their time. `pairs`: N H T K,
likewise. `keys`: N H K D for each block of queries that reads them.
`queries`: N H T D for each block of keys that updates them. `merged`: numbers of out that are merged into
earlier parts. `summed`: numbers of dk, and as many of dv, added to what is there. `gathered`: numbers of k,
and as many of v, copied by list. `widened`: numbers converted to single precision. `launches`: kernel calls.
`gathers`: calls over lists. `tiles`. `tokens`: numbers of q, k, v and out. `matmul`: multiply-adds of the
projections around it. Of adaptive: `scored`, multiply-adds beside the attention, in single precision;
`ranked`, pairs of blocks; `gated`, pairs of tokens in the gate's backward; `gates`, its steps. `flex`: `work`
of compiled FlexAttention, which is not in `work`, and as much again at FLEX_TILE tokens a block.
`passes`: 1."""

Totals = dict[str, Amount]


class Kernel(NamedTuple):
    """How a device cuts a call."""

    workers: int
    """Threads, or multiprocessors, that share a call's blocks; 1 if not known."""
    query_blocks: tuple[tuple[int, int], ...]
    """(from so many queries, queries a block), descending."""
    key_block: int
    """Keys that are computed at a time."""
    shares_keys: bool = False
    """Whether the workers share the blocks of keys of a backward call too, beside its views and heads."""

    def query_block(self, queries: Amount) -> Amount:
        """Queries a block in a call of `queries`."""
        size: Amount = self.query_blocks[-1][1]
        for least_queries, block in reversed(self.query_blocks[:-1]):
            size = where(queries >= least_queries, block, size)
        return size


def cpu_kernel(threads: int) -> Kernel:
    """ATen/native/cpu/FlashAttentionKernel.cpp, `flash_attention_kernel_impl` and its backward."""
    return Kernel(threads, ((768, 256), (192, 64), (0, 32)), 512)


def gpu_kernel(multiprocessors: int) -> Kernel:
    """flash and efficient kernels: 64 or 128 queries a thread block, as many keys at a time."""
    return Kernel(multiprocessors, ((0, 128),), 128, shares_keys=True)


def forward(kinds: Iterable[Calls], tiles: Amount, shape: Shape, kernel: Kernel) -> Totals:
    """Totals of a forward pass over one batch item."""
    total = _empty(shape, tiles)
    dim = shape.head_dim
    for call in _present(kinds):
        lanes = call.views * call.heads
        blocks = rounded_up(call.queries, kernel.query_block(call.queries))
        launches = call.number * call.spans
        _add_kernel(
            total,
            call,
            launches,
            lanes,
            maximum(call.views // 1, 1) * call.heads * blocks,
            call.keys,
            kernel,
            dim,
        )
        total["merged"] = total["merged"] + launches * call.later * lanes * call.queries * dim
        if any_of(call.unit > 0):
            total["gathers"] = total["gathers"] + call.number
            total["gathered"] = total["gathered"] + call.number * call.views * call.kv_heads * call.keys * dim
    return total


def backward(
    kinds: Iterable[Calls], tiles: Amount, shape: Shape, kernel: Kernel, whole: bool = False
) -> Totals:
    """Totals of a backward pass over one batch item; `shape` is `Shape.backward()`, and `kinds` are of it.
    `whole`: the kernel gets each call as it is, and its dk and dv are the result."""
    total = _empty(shape, tiles)
    dim = shape.head_dim
    for call in _present(kinds):
        if whole:
            lanes = call.views * call.heads
            items = lanes * (rounded_up(call.keys, kernel.key_block) if kernel.shares_keys else 1)
            _add_kernel(total, call, call.number, lanes, items, call.keys, kernel, dim)
            total["summed"] = total["summed"] + call.number * call.summed * dim
            if any_of(call.unit > 0):
                total["gathers"] = total["gathers"] + call.number
                total["gathered"] = total["gathered"] + call.number * lanes * call.keys * dim
            continue
        overlaps = (call.views > 1) * (call.step > 0) * (call.keys > call.step)
        gathers = any_of(call.unit > 0)
        heads = (call.heads, call.kv_heads)
        if gathers:
            held, listed = call.largest
            width = shape.gather_width(call.kv_heads * held, call.unit)
            column = minimum(call.keys, width)
            views, keys = shape.piece(heads, held, call.unit, minimum(listed, width), call.unit)
        else:
            column = where(overlaps, minimum(call.keys, shape.overlap_width), call.keys)
            views, keys = shape.piece(heads, call.views, call.queries, column)
            keys = where(call.causal, column, keys)  # what the kernel masks is not cut
        columns = rounded_up(call.keys, column)
        cuts = rounded_up(column, keys) * columns
        keys = call.keys / cuts
        groups = maximum(rounded_up(call.views, views), 1)
        together = call.views / groups
        lanes = call.heads * together
        launches = call.number * call.spans * groups * cuts
        items = maximum(together // 1, 1) * call.heads
        if kernel.shares_keys:
            items = items * rounded_up(keys, kernel.key_block)
        _add_kernel(total, call, launches, lanes, items, keys, kernel, dim)
        every = call.number * call.heads * call.views
        every_key = call.number * call.kv_heads * call.views
        total["summed"] = total["summed"] + every_key * call.spans * call.keys * dim
        if gathers:
            total["gathers"] = total["gathers"] + call.number * columns
            total["gathered"] = total["gathered"] + every_key * call.keys * dim
        if shape.widens:
            own = every_key * call.keys
            shared = call.number * call.kv_heads * ((call.views - 1) * call.step + call.keys)
            total["widened"] = total["widened"] + dim * (
                call.spans * 3 * every * call.queries * columns
                + 2 * where(overlaps, shared, call.spans * own)
            )
    return total


def _present(kinds: Iterable[Calls]) -> Iterator[Calls]:
    """The kinds of call that occur for some candidate, with sizes that can be divided by."""
    for call in kinds:
        if any_of(call.number > 0):
            yield call._replace(
                views=maximum(call.views, 1), queries=maximum(call.queries, 1), keys=maximum(call.keys, 1)
            )


def _add_kernel(
    total: Totals,
    call: Calls,
    launches: Amount,
    lanes: Amount,
    items: Amount,
    keys: Amount,
    kernel: Kernel,
    dim: Amount,
) -> None:
    """Adds what the kernel does in `launches` calls of `lanes` views and heads over `keys` keys, of which
    the workers share `items`."""
    block = kernel.query_block(call.queries)
    blocks = rounded_up(call.queries, block)
    visible = keys
    if any_of(call.causal):
        # Under its own causal mask it computes whole blocks of keys, those that lie ahead left out.
        full = rounded_down(keys / kernel.key_block)
        halves = full * (full + 1) / 2 * kernel.key_block**2 + (keys - full * kernel.key_block) * keys
        visible = where(call.causal, halves / keys, keys)
    idle = rounded_up(items, kernel.workers) * kernel.workers / items
    pairs = launches * lanes * call.queries * visible * idle / call.faster
    total["work"] = total["work"] + pairs * dim
    total["pairs"] = total["pairs"] + pairs
    total["keys"] = total["keys"] + launches * lanes * blocks * visible * dim
    total["queries"] = (
        total["queries"] + launches * lanes * call.queries * rounded_up(keys, kernel.key_block) * dim
    )
    total["launches"] = total["launches"] + launches


def _empty(shape: Shape, tiles: Amount) -> Totals:
    total: Totals = dict.fromkeys(NAMES, 0)
    total["tiles"] = tiles
    # Of fewer queries, about as many keys are read.
    total["tokens"] = 2 * shape.queries * (shape.heads + shape.kv_heads) * shape.head_dim
    return total


class Work(NamedTuple):
    """Totals of a call of each candidate, all batch items together."""

    forward: Totals
    backward: Totals | None
    """Totals of the backward pass; None in inference."""


def work_of(
    columns: Columns,
    workload: Workload,
    machine: Machine,
    kernel: Kernel,
    *,
    apart: bool,
    like: Shape | None = None,
) -> Work:
    """The work of candidates of which `goes_apart` holds for all or for none; `workload.seq` is not read.
    `like`: a shape whose limits are taken in place of the machine's.

    Closed forms for one config too: where fewer tokens ask, a share of what all would do by their pairs
    (`planner/speed/last_queries.py`), and of documents the sum of what each would do by itself.
    """
    shape = shape_of(columns, workload, machine)
    if like is not None:
        shape = shape._replace(windows=like.windows, cudnn_from=like.cudnn_from, chunk=like.chunk)
    if len(workload.documents or ()) < 2:
        return _with_sinks(_work(columns, workload, machine, kernel, apart, shape), workload, shape)
    total: Work | None = None
    for part in parts(columns, workload):
        own = shape_of(part.columns, part.workload, machine)._replace(windows=shape.windows, cudnn_from=0)
        work = _work(part.columns, part.workload, machine, kernel, False, own)
        total = _summed(total, work, part.copies)
    assert total is not None
    return _with_sinks(total, workload, shape)


def cudnn_faster(machine: Machine) -> float:
    """Times as fast as flash attention cuDNN's is on a machine that has it."""
    return CUDNN_FASTER.get(machine.capability[0], 1.0) if isinstance(machine, Cuda) else 1.0


def work_of_calls(
    parts: Sequence[WholeCall], shape: Shape, batch: int, kernel: Kernel, *, trains: bool, faster: float
) -> Work:
    """The work of whole calls over `batch` tensors of one shape; see `attention.ops.whole_calls`. `faster`:
    times as fast as flash attention cuDNN's is."""

    def program(shape: Shape, cut_of: Callable[[WholeCall, Shape], CallPart]) -> Program:
        return calls.whole_calls(parts, shape, batch, kernel.key_block, cut_of, faster)

    behind = program(shape.backward(), backward_cut) if trains else None
    return _of_programs(program(shape, forward_cut), behind, shape, batch, kernel)


def work_of_lists(
    lists: ListCalls, width: Amount, shape: Shape, batch: int, kernel: Kernel, *, trains: bool
) -> Work:
    """The work of calls over lists of `width` blocks on average; see `attention.ops.list_calls`."""
    runs = [Run("list", ceil_div(shape.queries, lists.size), width)]

    def program(shape: Shape, backward: bool) -> Program:
        return calls.over_lists(runs, lists, shape, batch, kernel.key_block, backward=backward)

    behind = program(shape.backward(), True) if trains else None
    return _of_programs(program(shape, False), behind, shape, batch, kernel)


def _of_programs(ahead: Program, behind: Program | None, shape: Shape, batch: int, kernel: Kernel) -> Work:
    """The work of few calls, forward and backward."""
    forth = _all_items(forward(ahead.calls, 0, shape, kernel), batch, False, 1)
    if behind is None:
        return Work(forth, None)
    total = backward(behind.calls, 0, shape.backward(), kernel, whole=True)
    return Work(forth, _all_items(total, batch, False, 1))


def shared(total: Totals, pairs: Amount, rows: Amount) -> Totals:
    """What of totals so large a share of the pairs and of the queries has, of its calls those of one tile at
    least."""
    one_tile: Amount = 1 / maximum(total["tiles"], 1)
    calls = maximum(rows, one_tile)
    shares = dict.fromkeys(("work", "pairs", "keys", "queries", "summed", "gathered", "widened"), pairs)
    shares |= dict.fromkeys(("launches", "gathers", "tiles"), calls) | {"merged": rows}
    return {name: count * shares.get(name, 1) for name, count in total.items()}


def _summed(total: Work | None, work: Work, times: int) -> Work:
    """A sum with what so many documents do; they are one pass together."""

    def added(one: Totals | None, other: Totals) -> Totals:
        every = {name: (one[name] if one else 0) + count * times for name, count in other.items()}
        return every | {"passes": other["passes"]}

    if total is None:
        return Work(added(None, work.forward), work.backward and added(None, work.backward))
    return Work(added(total.forward, work.forward), work.backward and added(total.backward, work.backward))


def _with_sinks(work: Work, workload: Workload, shape: Shape) -> Work:
    """The work and what learned sinks take: out is read and written once more, and in backward with its
    gradient read, in slabs."""
    if not workload.sinks:
        return work
    numbers = 2 * workload.batch * shape.queries * shape.heads * shape.head_dim
    slabs = workload.batch * rounded_up(shape.queries, slab_tokens(shape))
    for total in filter(None, work):
        total["tokens"] = total["tokens"] + numbers
        total["tiles"] = total["tiles"] + slabs
    return work


def _work(
    columns: Columns, workload: Workload, machine: Machine, kernel: Kernel, apart: bool, shape: Shape
) -> Work:
    """The work of one document, whose sizes are `shape`."""
    untyped: Any = columns
    asks = workload.queries is not None and any_of(shape.origin > 0)
    outer, trains = columns.multihead, workload.mode == "training"
    faster = cudnn_faster(machine)
    program, once = _program(columns, shape, apart, workload.batch, kernel, faster)
    total = forward(program.calls, program.tiles, shape, kernel)
    few = calls_of(columns, shape) is not None
    if asks and not (once or few):  # whole calls are those of the last queries
        _share(total, columns, shape, kernel)
    _beside(total, columns, shape, 1, apart)
    again = trains and outer is not None and outer.checkpoint  # the forward runs once more
    ahead = _all_items(total, workload.batch, once, 2 if again else 1)
    if not trains:
        return Work(ahead, None)
    back = shape.backward()
    program, once = _program(
        columns, back, apart and not shape.widens, workload.batch, kernel, faster, backward=True
    )
    few = calls_of(columns, shape) is not None or lists_of(columns, shape) is not None
    total = backward(program.calls, program.tiles, back, kernel, whole=once or few)
    if asks and not (once or few):
        _share(total, columns, back, kernel)
    if asks:  # dk and dv are of all tokens
        total["tokens"] = total["tokens"] + 2 * shape.origin * shape.kv_heads * shape.head_dim
    _beside(total, columns, shape, 2, apart)
    if columns.variant == "adaptive":
        kept, size = columns.rows(workload.causal).lists, untyped.block_size
        total["gated"] = shape.heads * shape.seq * kept * size
        part = gate_part(shape, size)
        rows = rounded_up(ceil_div(shape.seq, size), part.rows)
        total["gates"] = rounded_up(shape.heads, part.heads) * kept * rows
        total["scored"] = total["scored"] + 2 * total["gated"] * shape.head_dim
    return Work(ahead, _all_items(total, workload.batch, once, 1))


def _share(total: Totals, columns: Columns, shape: Shape, kernel: Kernel) -> None:
    """Leaves of totals of a whole sequence what its last queries have."""
    pairs: Amount = pairs_share(columns, shape)
    total.update(shared(total, pairs, shape.queries / shape.seq))
    # A call of fewer queries than a block of the kernel's reads as many keys.
    untyped: Any = columns
    usual = untyped.block_size if columns.variant == "block_sparse" else minimum(shape.tile_tokens, shape.seq)
    block = minimum(kernel.query_block(usual), usual)
    total["keys"] = total["keys"] * maximum(block / minimum(shape.queries, usual), 1)  # type: ignore[arg-type]


def _program(
    columns: Columns,
    shape: Shape,
    apart: bool,
    batch: int,
    kernel: Kernel,
    cudnn_faster: float,
    *,
    backward: bool = False,
) -> tuple[Program, bool]:
    """The program of a pass, of all queries of the sequence unless it is one call, and whether it takes the
    whole batch at once."""
    untyped: Any = columns
    parts = None if apart else calls_of(columns, shape)
    if parts is not None:
        cut_of = backward_cut if backward else forward_cut
        return calls.whole_calls(parts, shape, batch, kernel.key_block, cut_of, cudnn_faster), False
    lists = None if apart else lists_of(columns, shape)
    if columns.variant == "adaptive":
        rows = columns.rows(shape.causal)
        runs = _chosen(rows.lists, shape, untyped.block_size)
        if lists is not None:
            program = calls.over_lists(runs, lists, shape, batch, kernel.key_block, backward=backward)
            return program, False
        return calls.block_sparse(runs, rows, shape), False
    whole = shape._replace(origin=0)
    if columns.token_edges:
        return calls.token_window(window_of(columns, shape.causal), whole), False
    if columns.variant == "block_sparse":
        fields: dict[str, Any] = {
            "window": untyped.window,
            "global_tokens": untyped.global_tokens,
            "ratio": untyped.sparsity_ratio,
            "lengths": untyped.lengths,
            "rates": untyped.rates,
        }
        rows = columns.rows(shape.causal)
        runs = runs_of(columns.pattern_type, rows, shape.seq, shape.causal, **fields)
        if apart:
            return calls.flex(runs, rows, shape, batch), True
        if lists is not None:
            program = calls.over_lists(runs, lists, shape, batch, kernel.key_block, backward=backward)
            return program, False
        return calls.block_sparse(runs, rows, shape), False
    if apart:
        return calls.whole(shape, batch), True
    return calls.dilated(shape.within(columns.branches), shape), False


def _chosen(kept: Amount, shape: Shape, size: Amount) -> list[Run]:
    """The rows of an adaptive attention; see `attention.block_sparse.chosen_tiles`."""
    blocks = ceil_div(shape.seq, size)
    growing = minimum(kept - 1, blocks) * int(shape.causal)
    return [Run("list", growing, (growing + 1) / 2, growing), Run("list", blocks - growing, kept)]


def _beside(total: Totals, columns: Columns, shape: Shape, times: int, apart: bool) -> None:
    """Adds the matrix products beside an attention, which backward has twice: a scorer's, and those of
    the projections around it. Work of FlexAttention gets a name of its own."""
    untyped: Any = columns
    if apart and columns.variant == "block_sparse":
        total["flex"], total["work"] = total["work"] * (1 + FLEX_TILE / untyped.block_size), 0
    if columns.variant == "adaptive":
        rows = columns.rows(shape.causal)
        products, ranked = calls.scoring(rows, shape, columns.score_dim or shape.head_dim)
        total["scored"], total["ranked"] = products * times, ranked
    if columns.multihead is not None:
        wide = shape.heads * shape.head_dim
        products = 2 * shape.seq * wide * (wide + shape.kv_heads * shape.head_dim)
        total["matmul"] = total["matmul"] + products * times


def _all_items(total: Totals, batch: int, once: bool, times: int) -> Totals:
    """Totals of all batch items, where the kernel's figures are of one (`once`: of all), and of `times`
    passes."""
    kernels = ("tokens", "matmul", "scored", "ranked", "gated", "gates") if once else NAMES[:-1]
    every = {name: count * (batch if name in kernels else 1) for name, count in total.items()}
    every["passes"] = 1
    return {name: count * times for name, count in every.items()}
