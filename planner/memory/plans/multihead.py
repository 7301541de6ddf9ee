"""The memory plan of an attention between projections; see `attention/multihead.py`. Imports no torch.

The three streams are one tensor, as in self-attention. Letters as in `planner/memory/plans/tiles.py`, and
E = H D channels of the model, R = E + 2 G D rows of the input projections. Products are made one after
another, each with scratch of its own where a library takes that from torch.
"""

from __future__ import annotations

from collections.abc import Callable

from attention.sizes.arrays import Count, maximum
from planner.memory.cuda_kernels import largest
from planner.memory.plans.tiles import Case, given, products
from planner.memory.table import PlanTable, PrefixedTable

Attend = Callable[[PlanTable, Case], None]
"""Adds an attention over q, k and v that are there."""
PROJECTED = ("projected q", "projected k", "projected v")
GRADIENT = "gradient of the attention"
COMPACT = "output without padding"


def multihead(table: PlanTable, case: Case, attend: Attend, *, bias: bool, checkpoint: bool) -> None:
    """Input projections, attention, output projection, and in training their gradients. `attend` adds the
    attention itself. `checkpoint`: backward repeats the forward pass, of which nothing was saved."""
    _inputs(table, case, bias)
    repeats = checkpoint and case.trains
    case = case._replace(runs=1 + repeats)
    e = case.shape.itemsize
    if repeats:
        first = PrefixedTable(table, "unsaved ")
        _project(first, case)
        attend(first, case._replace(turn=lambda _: False))
        first.end("out")
        _result(table, case, "unsaved out")
        first.end()
        case = case._replace(run=1)
    _project(table, case)

    def turn(table: PlanTable) -> bool:
        """The output projection, forward unless that was done before, and its gradients."""
        if not repeats:
            _result(table, case, "out")
        width = _width(case)
        if not bias:  # autograd's order: of a product, the second matrix is first
            _gradients(table, case, "output projection", (width,), bias)
        table.phase("backward, output projection")
        if repeats:
            _compact(table, case, "out")
        table.add(GRADIENT, "gradients", case.channels * e, "B S E e")
        _product(table, case, _tokens(case), width, width)
        if bias:
            _gradients(table, case, "output projection", (width,), bias)
        table.free(COMPACT)
        return True

    attend(table, case._replace(turn=turn))
    if not case.trains:
        table.free(*PROJECTED)
        _result(table, case, "out")
        return
    table.free_held(*PROJECTED, GRADIENT, "out", "log-sum-exp")
    table.phase("backward, input projections")
    table.add("gradient of the input", "gradients", case.channels * e, "B S E e")
    _product(table, case, _tokens(case), _width(case), _width(case))
    table.phase("backward, input projections, keys")
    _product(table, case, _tokens(case), _kv_width(case), _width(case))
    _gradients(table, case, "input projections", (_width(case), _kv_width(case), _kv_width(case)), bias)


def parameter_bytes(case: Case, bias: bool) -> Count:
    """Bytes of all weights and biases."""
    return sum(_parameter_tensors(case, bias))


def _parameter_tensors(case: Case, bias: bool) -> tuple[Count, ...]:
    """Bytes of the weight and bias of the output projection and of those of the input projections."""
    width, e = _width(case), case.shape.itemsize
    rows = width + 2 * _kv_width(case)
    return (width * width * e, width * bias * e, rows * width * e, rows * bias * e)


def _width(case: Case) -> Count:
    """E: channels of the model, and rows of the projection to q."""
    return case.shape.heads * case.shape.head_dim


def _kv_width(case: Case) -> Count:
    """G D: rows of the projection to k, or to v."""
    return case.shape.kv_heads * case.shape.head_dim


def _tokens(case: Case) -> Count:
    return case.batch * case.shape.seq


def _inputs(table: PlanTable, case: Case, bias: bool) -> None:
    e = case.shape.itemsize
    table.add("parameters", "parameters", _parameter_tensors(case, bias), "(R + E) (E + 1 if biased) e")
    given(table, case)
    table.add("input", "qkv", case.channels * e, "B S E e")
    if case.trains:
        table.add("gradient of the result", "gradients", case.channels * e, "B S E e")


def _project(table: PlanTable, case: Case) -> None:
    for name, heads, width in (
        ("q", "H", _width(case)),
        ("k", "G", _kv_width(case)),
        ("v", "G", _kv_width(case)),
    ):
        table.phase(f"input projections, {name}")
        table.add(f"projected {name}", "qkv", _tokens(case) * width * case.shape.itemsize, f"B S {heads} D e")
        _product(table, case, _tokens(case), _width(case), width, forward=True)


def _compact(table: PlanTable, case: Case, out: str) -> None:
    """Where a kernel pads channels, the attention's output is copied for the projection."""
    nbytes = case.channels * case.shape.itemsize
    table.add(COMPACT, "temp_buffers", nbytes * (table.nbytes(out) > nbytes), "B S E e, where D is padded")


def _result(table: PlanTable, case: Case, out: str) -> None:
    """The output projection of the attention's output, of this name; its copy lives as long as the output
    where backward follows."""
    table.phase("output projection")
    _compact(table, case, out)
    table.add("result", "output", case.channels * case.shape.itemsize, "B S E e")
    _product(table, case, _tokens(case), _width(case), _width(case), forward=True)
    if out != "out" or not case.trains:
        table.free(COMPACT)


def _gradients(table: PlanTable, case: Case, name: str, widths: tuple[Count, ...], bias: bool) -> None:
    """Adds the gradients of the parameters of projections to `widths` channels."""
    width, e = _width(case), case.shape.itemsize
    rows: Count = sum(widths)
    table.phase(f"backward, weights of the {name}")
    table.add(f"weight gradient, {name}", "gradients", rows * width * e, "(E or R) E e")
    products(table, case, backward=True)
    scratch = [case.machine.product(each, _tokens(case), width, transposed=True) for each in widths]
    _scratch(table, maximum(*scratch))
    table.phase(f"backward, biases of the {name}")
    table.add(f"bias gradient, {name}", "gradients", rows * e * bias, "(E or R) e")
    if bias:
        sums = tuple(case.machine.column_sum(_tokens(case), each, e) for each in widths)
        table.add("partial sums", "workspace", largest(sums), "of the kernel")
        table.free("partial sums")


def _product(
    table: PlanTable, case: Case, rows: Count, inner: Count, columns: Count, forward: bool = False
) -> None:
    """A projection's scratch, in the phase of its result. Going `forward`, weights are a transposed view."""
    products(table, case, backward=not forward)
    _scratch(table, case.machine.product(rows, inner, columns, second_transposed=forward))


def _scratch(table: PlanTable, count: Count) -> None:
    table.add("product scratch", "workspace", count, "of the library; see planner/memory/onednn/gemm.py")
    table.free("product scratch")
