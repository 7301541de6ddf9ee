"""The memory plan of columns of candidates, or of one config, on a workload. Imports no torch, and NumPy only
for weights and where it is given NumPy's arrays.

A config is columns of one: which implementation runs, and which plan is its, is decided here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from attention.config import AttentionConfig, Backend
from attention.sizes.adaptive import active_of_choice
from attention.sizes.arrays import Count, any_of, maximum
from attention.sizes.flex import auto_leaves_flex, flex_is_lean, flex_takes_blocks
from attention.sizes.flex_tiles import unfit_sizes
from attention.sizes.kernel_choice import KernelChoice, kernel_choice
from attention.sizes.list_calls import ListCalls, calls_of_rows
from attention.sizes.row_bounds import Rows
from attention.sizes.shape import Shape, Windows, chunk_tokens
from attention.sizes.tiles import dilated_extent, sparse_extent
from attention.sizes.token_tiles import TokenWindow, token_extent, token_window
from attention.sizes.whole_calls import WholeCall, branch_calls, document_call, pattern_calls, windows_of_cut
from planner.configs import Columns, columns_of
from planner.memory.cut_programs import ExtentOf, bounded, cut_program
from planner.memory.machines import Cpu, Cuda, Machine
from planner.memory.plans import adaptive, document_calls, list_calls, multihead, tiles, weights, whole_calls
from planner.memory.table import Plan, PlanTable
from planner.workload import Workload

UNBOUNDED = 1 << 62
MOST_LISTED = 1 << 23
"""Blocks that the layout of a program that is cut may list to be looked at: tenths of a second."""


def plan_of(config: AttentionConfig, workload: Workload, machine: Machine, *, warm: bool = False) -> Plan:
    """The plan of one call, and in training of its backward. `warm`: of a second equal call, with what the
    first left in pool and caches. Where fewer tokens ask, or of documents, its sizes are those of the
    program's own calls; a bound in closed form where these are too many to look at (`is_vast`)."""
    columns = columns_of(config, workload.seq)
    apart = bool(goes_apart(columns, workload, machine))
    returned = returned_weights(config, workload) if workload.weights else None
    cut = _cut_of(config, columns, workload, machine)
    return planned(columns, workload, machine, apart=apart, returned=returned, warm=warm, cut=cut)


def attention_of(
    config: AttentionConfig, workload: Workload, machine: Machine
) -> tuple[tiles.Case, Callable[[PlanTable, tiles.Case], None]]:
    """The case of one device's call, and what adds the attention alone over q, k and v that are there."""
    columns = columns_of(config, workload.seq)
    apart = bool(goes_apart(columns, workload, machine))
    cut = _cut_of(config, columns, workload, machine)
    return attention_of_columns(columns, workload, machine, apart=apart, cut=cut)


def attention_of_columns(
    columns: Columns, workload: Workload, machine: Machine, *, apart: bool, cut: ExtentOf | None = None
) -> tuple[tiles.Case, Callable[[PlanTable, tiles.Case], None]]:
    """`attention_of` of candidates of which `goes_apart` holds for all or for none; `cut` as of `planned`."""
    case = case_of(columns, workload, machine)
    if cut is None and is_cut(columns, workload):
        cut = bounded_cut(columns, case.shape)
    return case, lambda table, case: _attention(table, case, columns, apart, cut)


def _cut_of(
    config: AttentionConfig, columns: Columns, workload: Workload, machine: Machine
) -> ExtentOf | None:
    """The sizes of one config's program, where that is cut."""
    if not is_cut(columns, workload):
        return None
    shape = shape_of(columns, workload, machine)
    if shape.windows != "none":
        return None
    vast = is_vast(columns, shape.causal)
    return bounded_cut(columns, shape) if vast else cut_program(config, workload, shape).extent


def planned(
    columns: Columns,
    workload: Workload,
    machine: Machine,
    *,
    apart: bool,
    returned: weights.ReturnedWeights | None = None,
    warm: bool = False,
    cut: ExtentOf | None = None,
) -> Plan:
    """The plan of candidates of which `goes_apart` holds for all or for none. `returned`: the weights that
    the call returns beside out. `cut`: the sizes of one config's cut program, in place of a bound in closed
    form. `workload.seq` is not read."""
    case = case_of(columns, workload, machine)._replace(warm=warm)
    table = PlanTable()

    if cut is None and is_cut(columns, workload):
        cut = bounded_cut(columns, case.shape)

    def attention(table: PlanTable, case: tiles.Case) -> None:
        _attention(table, case, columns, apart, cut)

    def attend(table: PlanTable, case: tiles.Case) -> None:
        if returned is None:
            attention(table, case)
        else:
            weights.weighted(table, case, attention, returned)

    outer = columns.multihead
    if outer is None:
        tiles.inputs(table, case)
        attend(table, case)
    else:
        checkpoint = outer.checkpoint and returned is None
        multihead.multihead(table, case, attend, bias=outer.bias, checkpoint=checkpoint)
    return table.done()


def _attention(
    table: PlanTable, case: tiles.Case, columns: Columns, apart: bool, cut: ExtentOf | None
) -> None:
    """The attention alone, over q, k and v."""
    calls, lists = calls_of(columns, case.shape), lists_of(columns, case.shape)
    if case.sequences:
        document_calls.document_calls(table, case, document_call_of(columns, case.shape))
    elif calls is not None and not apart:
        whole_calls.whole_calls(table, case, calls)
    elif columns.variant == "adaptive":
        rows = columns.rows(case.shape.causal)
        scorer = adaptive.scorer_of(case, rows.size, rows.lists, columns.score_dim)
        adaptive.adaptive(table, case, scorer, lists)
    elif lists is not None and not apart:
        list_calls.list_calls(table, case, lists)
    elif not apart:
        tiles.program(table, case, tiles.once(case.shape, cut or _extent_of(columns, case.shape)))
    elif columns.variant == "block_sparse":
        tiles.flex(table, case, columns.rows(case.shape.causal))
    else:
        tiles.whole(table, case, cut)


def _extent_of(columns: Columns, shape: Shape) -> ExtentOf:
    """The largest sizes of the calls of the candidates' tiles, of which nothing is cut."""
    if columns.token_edges:
        return partial(token_extent, window_of(columns, shape.causal))
    if columns.variant == "block_sparse":
        return partial(sparse_extent, columns.rows(shape.causal))
    return partial(dilated_extent, _by_rate(shape.within(columns.branches)))


def bounded_cut(columns: Columns, shape: Shape) -> ExtentOf:
    """A bound of the sizes of the calls of the candidates' tiles, of which something is cut."""
    if columns.variant == "block_sparse":
        return bounded(_extent_of(columns, shape))
    # What is left of a triangle is a rectangle and a smaller triangle: no larger than without a mask.
    every = _extent_of(columns, shape)
    return bounded(lambda shape: every(shape._replace(causal=False)))


def is_vast(columns: Columns, causal: bool) -> bool:
    """Whether one config lists more blocks than are looked at."""
    if columns.variant != "block_sparse" or columns.token_edges:
        return False
    untyped: Any = columns
    rows = columns.rows(causal)
    return bool(maximum(rows.span, rows.lists) * -(-untyped.seq // rows.size) > MOST_LISTED)


def is_cut(columns: Columns, workload: Workload) -> bool:
    """Whether the candidates' programs are cut, to the last queries or to documents; see
    `attention.inputs.shape_of`. `workload.seq` is not read."""
    untyped: Any = columns
    return _has_documents(workload) or (
        workload.queries is not None and any_of(untyped.seq > workload.queries)
    )


def _has_documents(workload: Workload) -> bool:
    return workload.documents is not None and len(workload.documents) > 1


def sequences_of(columns: Columns, workload: Workload, machine: Machine) -> int:
    """Documents of all batch items where flash attention takes them in one call, else 0."""
    if not _has_documents(workload) or _windows(columns, workload, machine) == "none":
        return 0
    return workload.batch * len(workload.documents or ())


def document_call_of(columns: Columns, shape: Shape) -> WholeCall:
    """The call that each document of the candidates is, where `sequences_of` has any."""
    calls = calls_of(columns, shape._replace(origin=0))
    assert calls is not None
    return document_call(calls, shape)


def _windows(columns: Columns, workload: Workload, machine: Machine) -> Windows:
    """The windows with which the candidates run; see `attention.inputs.shape_of`."""
    windows = machine.windows(workload.head_dim, workload.itemsize)
    if not is_cut(columns, workload):
        return windows
    kind, edges = columns.pattern_type, columns.edges
    return windows_of_cut(windows, columns.variant, kind, edges, documents=_has_documents(workload))


def calls_of(columns: Columns, shape: Shape) -> tuple[WholeCall, ...] | None:
    """The candidates' calls, where whole ones do it instead of tiles; see
    `attention.sizes.whole_calls.whole_calls`."""
    if shape.windows == "none" or columns.variant == "adaptive":
        return None
    if columns.variant == "block_sparse":
        return pattern_calls(columns.pattern_type, shape, **_window_fields(columns), edges=columns.edges)
    branches = columns.branches if columns.variant == "dilated" else ((shape.seq, 1),)
    return branch_calls(_by_rate(shape.within(branches)), shape)


def lists_of(columns: Columns, shape: Shape) -> ListCalls | None:
    """The sizes of the candidates' attention over lists, where calls over those do it instead of tiles; see
    `attention.sizes.list_calls.list_calls`."""
    over_lists = columns.variant == "adaptive" or columns.pattern_type == "dilated_sparse"
    if shape.windows != "any" or not over_lists:
        return None
    return calls_of_rows(columns.rows(shape.causal), shape)


def window_of(columns: Columns, causal: bool) -> TokenWindow:
    """The candidates' window, which ends at the token; see
    `attention.sizes.token_tiles.token_window_of`."""
    return token_window(columns.pattern_type, causal, **_window_fields(columns))


def _window_fields(columns: Columns) -> dict[str, Any]:
    return {"size": columns.block_size, "window": columns.window, "global_tokens": columns.global_tokens}


def _by_rate(branches: tuple[tuple[Count, Count], ...]) -> tuple[tuple[Count, Count], ...]:
    """Branches smallest rate first, as those of arrays are already."""
    if all(type(rate) is int for _, rate in branches):
        return tuple(sorted(branches, key=lambda branch: branch[1]))
    return branches


def goes_apart(columns: Columns, workload: Workload, machine: Machine) -> Any:
    """Whether a candidate is a single kernel call (dense attention, compiled FlexAttention) and no program
    of tiles; an array if it differs among candidates. `workload.seq` is not read."""
    if columns.variant == "adaptive":
        return False
    cut = is_cut(columns, workload)
    if columns.variant == "block_sparse":
        if cut or workload.sinks:
            return False
        seq: Any = columns.seq
        windows = machine.windows(workload.head_dim, workload.itemsize)
        leaves_flex = columns.backend == "auto" and auto_leaves_flex(columns.pattern_type, windows)
        if columns.token_edges or leaves_flex:
            return False
        return has_flex(workload, machine) and goes_flex(
            columns.backend, columns.rows(workload.causal), seq, workload
        )
    shape = shape_of(columns, workload, machine)
    # A triangle that is aligned to the end of the keys, or documents, are no one call.
    aligned = len(workload.documents or ()) < 2 and not shape.causal
    return shape.is_whole(shape.within(columns.branches)) * (1 if aligned or not cut else 0)


def has_flex(workload: Workload, machine: Machine) -> bool:
    """Whether compiled FlexAttention runs such workloads there; see `attention.ops.flex.unfit`."""
    return (
        isinstance(machine, Cuda)
        and unfit_sizes(workload.head_dim, workload.itemsize, machine.capability) is None
        and not workload.weights
        and workload.is_plain
    )


def goes_flex(backend: Backend, rows: Rows, seq: Count, workload: Workload) -> Count:
    """1 if compiled FlexAttention runs a block_sparse pattern where `has_flex` and `auto` does not leave it
    for whole calls (`auto_leaves_flex`), else 0; `workload.seq` is not read. See
    `attention.ops.flex.resolve`."""
    floor = workload.floor_at(seq)
    runs = (backend in ("auto", "flex")) * flex_takes_blocks(rows.size)
    return runs * flex_is_lean(rows, seq, floor) if backend == "auto" else runs


def kernel_of(config: AttentionConfig, workload: Workload, machine: Machine) -> KernelChoice:
    """The kernel that a config runs on, as `module.kernels` has it of tensors."""
    columns = columns_of(config, workload.seq)
    by_flex = columns.variant == "block_sparse" and bool(goes_apart(columns, workload, machine))
    capability = machine.capability if isinstance(machine, Cuda) else None
    shape = shape_of(columns, workload, machine)
    choice = kernel_choice(config, shape, capability, flex=by_flex)
    tiled = is_cut(columns, workload) and shape.windows == "none"
    if tiled and not goes_apart(columns, workload, machine):
        return choice._replace(calls=None)
    return choice


def returned_weights(config: AttentionConfig, workload: Workload) -> weights.ReturnedWeights:
    """The weights that a call returns; see `attention.ops.weights.weights_block`."""
    if config.adaptive:
        rows = columns_of(config, workload.seq).rows(workload.causal)
        active = active_of_choice(-(-workload.seq // rows.size), rows.lists, workload.causal)
        return weights.ReturnedWeights(rows.size, active, branches=0, own=True)
    from attention.layout import DEFAULT_BLOCK_SIZE, count_active  # NumPy, which nothing else here needs

    size = config.pattern.block_size if config.pattern else DEFAULT_BLOCK_SIZE
    active = count_active(config, workload.seq, workload.causal)
    branches = len(config.branches) if config.variant == "dilated" else 0
    return weights.ReturnedWeights(size, active, branches, own=False)


def case_of(columns: Columns, workload: Workload, machine: Machine) -> tiles.Case:
    """Sizes, mode and settings of the candidates' calls; `workload.seq` is not read."""
    seq: Any = columns.seq
    return tiles.Case(
        batch=workload.batch,
        shape=shape_of(columns, workload, machine),
        trains=workload.mode == "training",
        machine=machine,
        keeps_lse=workload.weights,
        pool=tiles.pooled(columns.pool, columns.pool_bytes, seq),
        pool_bytes=UNBOUNDED if columns.pool_bytes is None else columns.pool_bytes,
        cache_entries=columns.cache_entries,
        cache_bytes=columns.cache_bytes,
        sinks=workload.sinks,
        documents=workload.documents is not None,
        sequences=sequences_of(columns, workload, machine),
    )


def shape_of(columns: Columns, workload: Workload, machine: Machine) -> Shape:
    """Shape of the candidates' calls, as `attention.inputs.shape_of` has it of tensors; `workload.seq` is not
    read."""
    cpu = isinstance(machine, Cpu)
    sixteen = cpu and workload.itemsize == 2
    packs = sixteen and isinstance(machine, Cpu) and workload.dtype in machine.units
    cut = is_cut(columns, workload)
    seq: Any = columns.seq
    last = cut and workload.queries == 1 and columns.variant in ("dense", "dilated")  # it is past nothing
    sizes: dict[str, Any] = {
        "seq": columns.seq,
        "origin": 0 if workload.queries is None else maximum(seq - workload.queries, 0),
        "heads": workload.heads,
        "kv_heads": workload.groups,
        "head_dim": workload.head_dim,
        "itemsize": workload.itemsize,
        "workspace": columns.workspace,
    }
    return Shape(
        **sizes,
        causal=workload.causal and not last,
        chunk=chunk_tokens(cpu=cpu, **sizes),
        packs=packs,
        widens=sixteen,
        windows=_windows(columns, workload, machine),
        groups=isinstance(machine, Cpu) and machine.groups and not packs,
        cudnn_from=0 if cut else machine.cudnn_from(workload.head_dim, workload.itemsize, columns.backend),
    )
