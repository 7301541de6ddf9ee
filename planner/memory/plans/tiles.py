"""The memory plans: one function per implementation. Imports no torch.

What the executor reserves and how large its calls get comes from `attention/sizes/tiles.py`, which the
executor itself uses; what the kernels allocate from `planner/memory/machines.py`. Here is when which of
these are alive. Sizes are ints, or NumPy arrays for many candidates at once.

Letters: B batch, S tokens, H query heads, G key and value heads, D channels, e bytes a number, w bytes of
a number in sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from attention.sizes.arena import POOL_FROM_TOKENS, arena_bytes, bucket_bytes
from attention.sizes.arrays import Count, any_of, maximum, up, where
from attention.sizes.flex import flex_list_bytes
from attention.sizes.learned_sinks import slab_tokens
from attention.sizes.row_bounds import Rows
from attention.sizes.shape import Shape
from attention.sizes.tiles import Extent, Kind, backward_sizes, dilated_extent, forward_sizes, pieces
from planner.memory.allocator_settings import MIN_BLOCK
from planner.memory.cuda_kernels import PLAIN_BACKWARD_LEFT, PLAIN_FORWARD_LEFT, KernelStep, largest
from planner.memory.machines import Bytes, KernelCall, Machine
from planner.memory.table import PlanTable

POOLED = "arena kept by the pool"
MOST_KINDS = 64
"""Kinds of calls of a pass that a plan shows, those that take most: a program cut to many documents has
hundreds."""
NUMBER = 4
"""Bytes of the number of a token's document."""


class Case(NamedTuple):
    """Sizes, mode and settings of one call."""

    batch: Count
    shape: Shape
    trains: bool
    machine: Machine
    keeps_lse: bool
    """Whether the log-sum-exp outlives the forward pass without training."""
    pool: Count
    """1 if arenas come from a pool that keeps them, else 0."""
    pool_bytes: Count
    """Bound of the pool."""
    cache_entries: Count = 100
    """Masks that may be kept between calls."""
    cache_bytes: Count = 64 << 20
    """Bound of all that are kept."""
    warm: bool = False
    """Whether an equal call came before, whose arenas and masks are there."""
    runs: int = 1
    """Forward passes of one call: 2 where backward repeats the forward pass."""
    run: int = 0
    """Number of this forward pass among them, from 0."""
    turn: Callable[[PlanTable], bool] | None = None
    """Adds what happens between forward and backward, and says whether backward follows; None for nothing in
    between."""
    sinks: bool = False
    """Whether learned sinks join the softmax."""
    documents: bool = False
    """Whether the caller gives the tokens' documents."""
    ranks: int = 1
    """Those that share the heads, each of which has the parameters of all."""
    sequences: int = 0
    """Documents of all batch items where flash attention takes them in one call, else 0."""
    lse_row: Count | None = None
    """Numbers of the log-sum-exp from one head to the next, where those are not the queries'."""

    @property
    def needs_lse(self) -> bool:
        """Whether the forward pass gives the log-sum-exp of all queries."""
        return self.trains or self.keeps_lse or self.sinks

    @property
    def channels(self) -> Count:
        """Numbers in q or out."""
        return self.batch * self.shape.queries * self.shape.heads * self.shape.head_dim

    @property
    def kv_channels(self) -> Count:
        """Numbers in k or v."""
        return self.batch * self.shape.seq * self.shape.kv_heads * self.shape.head_dim

    @property
    def lse_bytes(self) -> Count:
        """Bytes of the log-sum-exp."""
        return self.batch * self.shape.queries * self.shape.heads * self.shape.wide

    def goes_back(self, table: PlanTable) -> bool:
        """Whether a backward pass follows, now that the forward pass is done."""
        return self.trains and (self.turn is None or self.turn(table))


def pooled(switch: str, pool_bytes: int | None, seq: Count) -> Count:
    """1 if a call's arena comes from a pool that keeps it, else 0; see `attention.pool.Buffers`."""
    if switch == "off" or pool_bytes == 0:
        return 0
    return (seq >= (POOL_FROM_TOKENS if switch == "auto" else 0)) * 1


def inputs(table: PlanTable, case: Case) -> None:
    """q, k, v, and in training the incoming gradient; documents and sinks, where they are given."""
    e = case.shape.itemsize
    given(table, case)
    table.add("q", "qkv", case.channels * e, "B S H D e")
    table.add("k", "qkv", case.kv_channels * e, "B S G D e")
    table.add("v", "qkv", case.kv_channels * e, "B S G D e")
    if case.trains:
        table.add("gradient of out", "gradients", case.channels * e, "B S H D e")


def given(table: PlanTable, case: Case) -> None:
    """What a call is given beside its streams: documents and sinks."""
    if case.documents:
        table.add("documents", "qkv", case.batch * case.shape.seq * NUMBER, "4 B S, in int32")
    if case.sinks:
        table.add("sinks", "parameters", case.shape.heads * case.shape.itemsize, "H e")


def products(table: PlanTable, case: Case, *, backward: bool = False) -> None:
    """What a product's library keeps from now on: a thread's. Autograd runs backward in a thread of its own,
    and in that a forward pass that is repeated."""
    name = "cuBLAS workspace of backward" if backward or case.run else "cuBLAS workspace"
    table.lasting(name, "workspace", case.machine.workspace(), "planner/memory/cuda_process.py")


def join_sinks(table: PlanTable, case: Case) -> None:
    """Learned sinks join the softmax, slab by slab, in out and its log-sum-exp themselves; see
    `attention/ops/learned_sinks.py`."""
    if not case.sinks:
        return
    shape, w, narrow = case.shape, case.shape.wide, case.shape.itemsize < case.shape.wide
    rows = slab_tokens(shape) * shape.heads
    table.phase("forward, sinks")
    table.add("sinks in single precision", "temp_buffers", shape.heads * w * narrow, "H w")
    table.add("share of a slab", "workspace", rows * w, "T H w")
    most = largest(((rows * w,), (rows * shape.head_dim * w * narrow,)))
    table.add("scratch of the sinks", "workspace", most, "T H w, or T H D w")
    table.free("sinks in single precision", "share of a slab", "scratch of the sinks")


def sinks_gradient(table: PlanTable, case: Case) -> None:
    """The gradient of learned sinks, slab by slab, before the backward pass of the attention itself."""
    if not case.sinks:
        return
    shape, w, narrow = case.shape, case.shape.wide, case.shape.itemsize < case.shape.wide
    rows = slab_tokens(shape) * shape.heads
    table.phase("backward, sinks")
    table.add("gradient of the sinks", "gradients", shape.heads * shape.itemsize, "H e")
    table.add("sum of the sinks' gradient", "temp_buffers", shape.heads * w * narrow, "H w")
    products = rows * shape.head_dim * w
    reduced = case.machine.column_sum(rows // shape.heads, shape.heads, w)
    most = largest(((products, products * narrow), (products, rows * w), (rows * w, rows * w, *reduced)))
    table.add("scratch of the sinks' gradient", "workspace", most, "2 T H D w, or T H (D + 1) w")
    table.free("sum of the sinks' gradient", "scratch of the sinks' gradient")


def whole(table: PlanTable, case: Case, extent_of: Callable[[Shape], Extent] | None = None) -> None:
    """Dense attention with as many kv heads as the kernel takes: one kernel call over everything.
    `extent_of`: of the tiles by which backward widens, where they are not those of the whole sequence."""
    shape, e = case.shape, case.shape.itemsize
    call = KernelCall(
        case.batch,
        shape.heads,
        shape.queries,
        shape.seq,
        shape.head_dim,
        e,
        causal=shape.causal,
        whole=1,
        groups=shape.kv_heads,
    )
    kernel = case.machine.forward(call)
    out = kernel.result[0] if len(kernel.result) > 1 else case.channels * e
    table.phase("forward")
    lse = "saved_for_backward" if case.trains else "temp_buffers"
    if kernel.steps:
        _stepped(table, case, kernel.steps, "forward", "", {"out": "output", "log-sum-exp": lse})
        table.free(*PLAIN_FORWARD_LEFT)
    else:
        table.add("copies of operands", "workspace", kernel.copies, "of the kernel")
        table.add("out", "output", out, "B S H D e")
        table.add("log-sum-exp", lse, sum(kernel.result) - out, "of the kernel")
        table.add("kernel scratch", "workspace", kernel.scratch, "of the kernel")
        table.free("copies of operands", "kernel scratch")
    join_sinks(table, case)
    if not (case.trains or case.keeps_lse):
        table.free("log-sum-exp")
    if not case.goes_back(table):
        return
    sinks_gradient(table, case)
    if shape.widens:
        of_all = extent_of or (lambda back: dilated_extent(((shape.seq, 1),), back))
        program_backward(table, case, of_all, 0)
    else:
        kernel = case.machine.backward(call._replace(dense=1))
        dq = kernel.result[0] if len(kernel.result) > 1 else case.channels * e
        table.phase("backward")
        if kernel.steps:
            results = dict.fromkeys(("dq", "dk", "dv"), "gradients")
            _stepped(table, case, kernel.steps, "backward", "", results, backward=True)
            table.free(*PLAIN_BACKWARD_LEFT)
            return
        table.add("copies of operands", "workspace", kernel.copies, "of the kernel")
        table.add("dq", "gradients", dq, "B S H D e")
        table.add("dk and dv", "gradients", _rest(kernel.result, dq), "2 B S G D e")
        first_scratch(table, kernel, "", "backward")
        table.add("backward scratch", "workspace", kernel.scratch, "of the kernel")
        table.free("copies of operands", "backward scratch")


def first_scratch(table: PlanTable, kernel: Bytes, prefix: str, phase: str, exists: Count = 1) -> None:
    """Adds what a kernel takes and frees before the rest of its scratch."""
    if kernel.before:
        name = f"{prefix}first scratch"
        table.add(name, "workspace", [count * exists for count in kernel.before], "of the kernel")
        table.free(name)
        table.phase(f"{phase}, summed")


def _rest(parts: tuple[Count, ...], first: Count) -> tuple[Count, ...]:
    """The parts after the first, which takes `first` bytes, or what is left of them all."""
    return parts[1:] if len(parts) > 1 else (parts[0] - first,)


def _stepped(
    table: PlanTable,
    case: Case,
    steps: Sequence[KernelStep],
    phase: str,
    prefix: str,
    results: Mapping[str, str],
    *,
    exists: Count = 1,
    backward: bool = False,
) -> None:
    """Adds the steps of a kernel that is made of products, under names with a prefix; a phase begins where
    something is freed. `results`: components of those that are not scratch."""
    for step in steps:
        line = step.line
        if step.frees:
            table.free(*(prefix + name for name in step.frees))
            table.phase(f"{phase}, {line.name}")
        component = results.get(line.name, line.component)
        table.add(prefix + line.name, component, line.bytes * exists, line.source)
        if step.multiplies:
            products(table, case, backward=backward)


def program(table: PlanTable, case: Case, extent_of: Callable[[Shape], Extent]) -> None:
    """An attention of tiles: forward, and in training backward."""
    shape, e = case.shape, case.shape.itemsize
    extent = extent_of(shape)
    keeps = case.needs_lse
    arena = arena_bytes(forward_sizes(extent, shape, keeps))
    other: Count = 0
    if case.trains:
        back = shape.backward()
        other = arena_bytes(backward_sizes(extent_of(back), back))
    size, pool_size = _arena(case, arena, other)
    there = pool_size if case.warm or case.run else 0
    mask, _ = _masks(case, extent_of)
    if case.warm and not case.run:
        table.kept(POOLED, "memory_pool", pool_size, "a pool's buffer, of the call before")
        table.kept(
            "causal mask of the call before",
            "pattern_cache",
            mask.there,
            "attention/sizes/tiles.py Extent.mask",
        )

    def begin() -> None:
        table.add("out", "output", case.channels * e, "B S H D e")
        table.add(
            "log-sum-exp",
            "saved_for_backward" if case.trains else "temp_buffers",
            case.lse_bytes * keeps,
            "B S H w",
        )
        table.add("forward arena", "workspace", size - there, "attention/sizes/tiles.py forward_sizes")
        _make(table, "causal mask", mask)

    forward_calls(table, case, extent, begin)
    table.free("causal mask")
    _leave(table, "forward arena", POOLED, pool_size - there)
    join_sinks(table, case)
    if keeps and not case.trains:
        table.free("log-sum-exp")
    if case.goes_back(table):
        sinks_gradient(table, case)
        program_backward(table, case, extent_of, arena, other)


def forward_calls(table: PlanTable, case: Case, extent: Extent, begin: Callable[[], None]) -> None:
    """The calls of a forward pass over tiles, whose largest sizes are given; `begin` adds what all share, in
    the first of their phases."""
    shape, e = case.shape, case.shape.itemsize
    for number, kind in enumerate(_in_order(case, _most(case, extent, shape))):
        table.phase(f"forward, {kind.name}")
        if number == 0:
            begin()
        call = _call(extent, kind, kind.views, kind.keys, shape)._replace(
            unmasked=_unmasked(kind, kind.keys, shape), sizes=kind.sizes
        )
        kernel = _bytes_of(case.machine.forward, call, kind)
        rows = kind.heads * kind.views * kind.queries
        merging = rows * shape.wide * (kind.later > 0)
        _hidden(table, kind, kind.views * kind.keys * e, shape)
        if kernel.steps:
            _stepped_forward(table, case, kind, kernel.steps, merging)
            continue
        left = [count * kind.exists for count in kernel.result]
        result = f"{kind.name}: part"
        table.add(result, "temp_buffers", left, "N T H (D e + w)")
        # The list of what is gathered is gone when the kernel is called.
        listing = maximum(_list(case, kind, kind.views * kind.keys) - sum(kernel.result), 0)
        most = largest(((*kernel.copies, *kernel.scratch), (merging,), (listing,)))
        scratch = [count * kind.exists for count in most]
        table.add(f"{kind.name}: scratch", "workspace", scratch, "of the kernel, or of the merge")
        table.free(result, f"{kind.name}: scratch", f"{kind.name}: hidden positions")


def _most(case: Case, extent: Extent, shape: Shape) -> tuple[Kind, ...]:
    """The kinds of a pass, of very many those whose calls take most beside what all share."""
    kinds = extent.kinds
    if len(kinds) <= MOST_KINDS:
        return kinds

    def nbytes(number: int) -> int:
        kind = kinds[number]
        kernel = case.machine.forward(_call(extent, kind, kind.views, kind.keys, shape))
        steps = (step.line.bytes for step in kernel.steps)
        return sum((*kernel.result, *kernel.scratch, *kernel.copies, *steps))

    largest_first = sorted(range(len(kinds)), key=nbytes, reverse=True)
    return tuple(kinds[number] for number in sorted(largest_first[:MOST_KINDS]))


def _in_order(case: Case, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """The kinds as their calls come, where whole scores are held: rows that see the same are the first."""
    if not case.machine.multiplies(case.shape.itemsize):
        return kinds
    return tuple(sorted(kinds, key=lambda kind: kind.name != "long view"))


def _stepped_forward(
    table: PlanTable, case: Case, kind: Kind, steps: Sequence[KernelStep], merging: Count
) -> None:
    """The calls of a kind that are made of products, from what they list to the merge."""
    prefix, phase = f"{kind.name}: ", f"forward, {kind.name}"
    if kind.gathers:
        _listing(table, case, kind, kind.views * kind.keys, phase)
    results = dict.fromkeys(("out", "log-sum-exp"), "temp_buffers")
    _stepped(table, case, steps, phase, prefix, results, exists=kind.exists)
    table.free(*(prefix + name for name in PLAIN_FORWARD_LEFT))
    table.phase(f"{phase}, merged")
    table.add(f"{prefix}merged log-sum-exp", "temp_buffers", merging * kind.exists, "N T H w")
    table.free(*(prefix + name for name in (*results, "merged log-sum-exp", "hidden positions")))


def _listing(table: PlanTable, case: Case, kind: Kind, positions: Count, phase: str) -> None:
    """What a call gathers; the list is gone when the kernel is called."""
    name = f"{kind.name}: positions"
    table.add(name, "sparse_indices", _list(case, kind, positions) * kind.exists, "8 N K, or 8 N H K")
    table.free(name)
    table.phase(f"{phase}, gathered")


def program_backward(
    table: PlanTable,
    case: Case,
    extent_of: Callable[[Shape], Extent],
    forward_arena: Count,
    arena: Count | None = None,
) -> None:
    """The backward pass of an attention of tiles. `arena`: its own, where that is known."""
    shape, e = case.shape.backward(), case.shape.itemsize
    extent = extent_of(shape)
    if arena is None:
        arena = arena_bytes(backward_sizes(extent, shape))
    size, pool_size = _arena(case, arena, forward_arena)
    # The forward pass's arena, kept, is taken again.
    there = _arena(case, forward_arena, arena)[1]
    if case.warm:
        table.kept(
            f"backward {POOLED}",
            "memory_pool",
            maximum(pool_size - there, 0),
            "a pool's buffer, of the call before",
        )
        there = maximum(there, pool_size)
    _, mask = _masks(case, extent_of)

    def begin() -> None:
        table.add("dq", "gradients", case.channels * e, "B S H D e")
        table.add("dk", "gradients", case.kv_channels * e, "B S G D e")
        table.add("dv", "gradients", case.kv_channels * e, "B S G D e")
        table.add(
            "backward arena",
            "workspace",
            size - there * (size > 0),
            "attention/sizes/tiles.py backward_sizes",
        )
        _make(table, "causal mask of backward", mask)

    backward_calls(table, case, extent, begin)
    table.free("causal mask of backward")
    _leave(table, "backward arena", f"backward {POOLED}", maximum(pool_size - there, 0))


def backward_calls(table: PlanTable, case: Case, extent: Extent, begin: Callable[[], None]) -> None:
    """The calls of a backward pass over tiles, as `forward_calls`; `extent`: cut for that pass."""
    shape, e = case.shape.backward(), case.shape.itemsize
    number = shape.wide if shape.widens else e
    ordered = _in_order(case, _most(case, extent, shape))
    by_name = dict(zip((kind.name for kind in extent.kinds), pieces(extent, shape), strict=True))
    for n, kind in enumerate(ordered):
        piece = by_name[kind.name]
        table.phase(f"backward, {kind.name}")
        if n == 0:
            begin()
        call = _call(extent, kind, piece.views, piece.keys, shape, number)
        call = call._replace(unmasked=_unmasked(kind, piece.keys, shape))
        if shape.widens:
            call = call._replace(dense=1)
        kernel = _bytes_of(case.machine.backward, call, kind)
        if kernel.steps and kind.gathers:
            _listing(table, case, kind, piece.column, f"backward, {kind.name}")
        _hidden(table, kind, piece.column * number, shape)
        places = case.machine.listed(piece.column // kind.unit * (kind.heads if kind.own else 1))
        if kind.gathers:
            table.add(
                f"{kind.name}: places", "sparse_indices", places * kind.exists, "8 N K / b, or 8 N H K / b"
            )
        if kernel.steps:
            prefix, results = f"{kind.name}: ", dict.fromkeys(("dq", "dk", "dv"), "temp_buffers")
            phase = f"backward, {kind.name}"
            _stepped(table, case, kernel.steps, phase, prefix, results, exists=kind.exists, backward=True)
            left_over = (*results, *PLAIN_BACKWARD_LEFT, "hidden positions", *["places"] * kind.gathers)
            table.free(*(prefix + name for name in left_over))
            continue
        copies = f"{kind.name}: copies of operands"
        taken = [count * kind.exists for count in kernel.copies]
        table.add(copies, "workspace", taken, "of the kernel")
        left = [count * kind.exists for count in kernel.result]
        table.add(f"{kind.name}: dq, dk, dv", "temp_buffers", left, "N (H T + 2 G K) D w")
        ahead = sum(up(count, MIN_BLOCK) for count in kernel.copies)
        listing = maximum(_list(case, kind, piece.column) - sum(kernel.result) - ahead, 0)
        # Sums of dk and of dv over lists are in single precision, into which a view's are copied.
        copied = kind.kv_heads * piece.keys * shape.head_dim * shape.wide
        copied = copied * (kind.gathers and number < shape.wide)
        copied = maximum(copied - ahead, 0)
        first_scratch(table, kernel, f"{kind.name}: ", f"backward, {kind.name}", kind.exists)
        most = largest((kernel.scratch, (listing,), (copied,)))
        taken = [count * kind.exists for count in most]
        table.add(f"{kind.name}: backward scratch", "workspace", taken, "of the kernel")
        table.free(
            *(f"{kind.name}: {left}" for left in ("dq, dk, dv", "backward scratch", "hidden positions"))
        )
        table.free(copies)
        if kind.gathers:
            table.free(f"{kind.name}: places")


def _hidden(table: PlanTable, kind: Kind, count: Count, shape: Shape) -> None:
    """The mask of shared lists that hold the last block, if that is short. Under a causal mask only the
    last row sees that block, and its causal mask hides what is past the end."""
    applies = kind.gathers and not kind.own and not shape.causal
    nbytes = count * (kind.masked > 0) * (shape.seq % kind.unit > 0) * kind.exists if applies else 0
    table.add(f"{kind.name}: hidden positions", "masks", nbytes, "N K e")


def _arena(case: Case, own: Count, other: Count) -> tuple[Count, Count]:
    """(bytes that a pass takes, bytes that the pool keeps of them): see `attention.ops.scratch.Scratch`."""
    size = where(case.pool, bucket_bytes(maximum(own, other)), own) * (own > 0)
    return size, size * case.pool * (size <= case.pool_bytes)


def _leave(table: PlanTable, name: str, pool_name: str, pool_size: Count) -> None:
    """Ends a buffer's use; what the pool keeps of it stays."""
    table.free(name)
    table.phase(f"after {name}")
    table.add(pool_name, "memory_pool", pool_size, "a pool's buffer, for the next call")


class MaskBytes(NamedTuple):
    """A pass's causal mask, by what becomes of it in `attention.cache.BoundedCache`, which keeps a mask from
    its second use on."""

    passing: Count
    """Bytes if it is made and dropped."""
    staying: Count
    """Bytes if it is made and kept."""
    there: Count
    """Bytes if it was kept before."""


def _masks(case: Case, extent_of: Callable[[Shape], Extent]) -> tuple[MaskBytes, MaskBytes]:
    """Masks of the forward and of the backward pass. They are one in the cache if sizes and dtype are
    equal."""
    shape = case.shape
    queries, keys = extent_of(shape).mask
    if not case.trains:
        back_queries, back_keys = 0 * queries, 0 * keys
    else:
        back_queries, back_keys = extent_of(shape.backward()).mask
    nbytes = queries * keys * shape.itemsize
    back_bytes = back_queries * back_keys * (shape.wide if shape.widens else shape.itemsize)
    same = (queries == back_queries) * (keys == back_keys) * (back_bytes == nbytes)
    together = nbytes + back_bytes * (1 - same)
    differ = 1 + (back_bytes > 0) * (1 - same)
    keeps = (case.cache_entries >= differ) * (case.cache_bytes >= together)
    uses = case.warm * (case.runs + same) + case.run
    back_uses = same * case.runs + case.warm * (1 + same * case.runs)
    return _mask(nbytes, uses, keeps), _mask(back_bytes, back_uses, keeps)


def _mask(nbytes: Count, uses: Count, keeps: Count) -> MaskBytes:
    """Bytes of a mask that was asked for `uses` times before."""
    staying, there = nbytes * keeps * (uses == 1), nbytes * keeps * (uses >= 2)
    return MaskBytes(nbytes - staying - there, staying, there)


def _make(table: PlanTable, name: str, mask: MaskBytes) -> None:
    """Adds a mask; its bytes that do not stay are to be freed under its name."""
    formula = "attention/sizes/tiles.py Extent.mask"
    table.add(name, "masks", mask.passing, formula)
    table.add(f"{name}, kept", "pattern_cache", mask.staying, f"{formula}, for the next call")


def _call(
    extent: Extent, kind: Kind, views: Count, keys: Count, shape: Shape, itemsize: int | None = None
) -> KernelCall:
    # A kind that does not exist may have no queries; a kernel has some.
    return KernelCall(
        views,
        kind.heads,
        maximum(kind.queries, 1),
        keys,
        shape.head_dim,
        itemsize or shape.itemsize,
        causal=kind.whole,
        dense=kind.dense,
        masked=kind.masked,
        mask_keys=extent.mask[1] if shape.causal or extent.band else keys,
        packed=kind.own,
        fewer=kind.fewer,
        groups=kind.groups,
    )


def _unmasked(kind: Kind, keys: Count, shape: Shape) -> Count:
    """0 if all calls of a kind, given so many keys at once, have an additive mask, else 1. Under a causal
    mask those have none that are before the diagonal; else those that do not see the end."""
    if shape.causal:
        return maximum((kind.later > 0) * 1, (keys < kind.keys) * 1, (kind.masked == 0) * 1)
    return maximum((shape.seq > kind.unit) * 1, (kind.masked == 0) * 1)


def _bytes_of(kernel: Callable[[KernelCall], Bytes], call: KernelCall, kind: Kind) -> Bytes:
    """What a kernel takes for a call of this kind; not computed where no candidate has such calls."""
    return kernel(call) if any_of(kind.exists) else Bytes((0,), (0,))


def _list(case: Case, kind: Kind, positions: Count) -> Count:
    """The list of what a call of this kind gathers, of so many positions of all views."""
    return case.machine.listed(positions * (kind.heads if kind.own else 1)) if kind.gathers else 0


def flex(table: PlanTable, case: Case, rows: Rows) -> None:
    """Block-sparse attention by compiled FlexAttention; see `attention/ops/flex.py`."""
    shape, e = case.shape, case.shape.itemsize
    call = KernelCall(case.batch, shape.heads, shape.seq, shape.seq, shape.head_dim, e)
    takes = case.machine.flex(call)
    table.phase("forward")
    table.add(
        "block lists",
        "sparse_indices",
        flex_list_bytes(rows, shape.seq, unit=MIN_BLOCK),
        "attention/sizes/flex.py flex_list_bytes, each list rounded up to 512",
    )
    saved = "saved_for_backward" if case.trains else "temp_buffers"
    table.add("log-sum-exp", saved, takes.saved, "float32 B H S")
    table.add("row maxima", "temp_buffers", takes.forward, "float32 B H S")
    table.add("out", "output", case.channels * e, "B S H D e")
    table.free("row maxima")
    if not case.trains:
        table.free("log-sum-exp")
    if not case.goes_back(table):
        return
    table.phase("backward")
    table.add("backward scratch", "workspace", takes.backward, "float32 B H S")
    if case.turn is not None:  # nobody else holds out, which is only wanted for that scratch
        table.free("out")
        table.phase("backward, gradients")
    table.add("dq", "gradients", case.channels * e, "B S H D e")
    table.add("dk", "gradients", case.kv_channels * e, "B S G D e")
    table.add("dv", "gradients", case.kv_channels * e, "B S G D e")
    table.free("backward scratch")


def once(shape: Shape, extent_of: Callable[[Shape], Extent]) -> Callable[[Shape], Extent]:
    """`extent_of` for a shape and for its backward, each computed once: most of an evaluation's time."""
    extents: dict[bool, Extent] = {}

    def of_either(wanted: Shape) -> Extent:
        forward = wanted is shape
        if forward not in extents:
            extents[forward] = extent_of(wanted)
        return extents[forward]

    return of_either
