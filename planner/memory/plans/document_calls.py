"""The memory plan of documents that flash attention takes as sequences of one call; see
`attention/ops/document_calls.py`. Imports no torch.

Letters as in `planner/memory/plans/tiles.py`; N documents of all batch items, Q queries of an item.
"""

from __future__ import annotations

from attention.sizes.arrays import Count, up, where
from attention.sizes.whole_calls import CHANNELS, WholeCall, backward_cut
from planner.memory.cuda_kernels import ragged_backward, ragged_forward
from planner.memory.plans import tiles
from planner.memory.plans.tiles import Case
from planner.memory.table import PlanTable

PLACE = 4
"""Bytes of the place of a document's first token."""


def document_calls(table: PlanTable, case: Case, call: WholeCall) -> None:
    """Forward and, in training, backward; `call`: what each document is."""
    places = PLACE * (case.sequences + 1)
    begins = (
        "where documents begin",
        "sparse_indices",
        (places, places),
        "4 (N + 1), of queries and of keys",
    )
    if case.warm:
        table.kept(*begins)
    _forward(table, case, begins)
    tiles.join_sinks(table, case)
    if not case.trains:
        table.free("log-sum-exp")
    if case.goes_back(table):
        tiles.sinks_gradient(table, case)
        _backward(table, case, call)


def _forward(table: PlanTable, case: Case, begins: tuple[str, str, tuple[int, int], str]) -> None:
    sizes = _Sizes(case, case.shape.heads, case.shape.kv_heads)
    table.phase("forward")
    if not (case.warm or case.run):
        table.add(*begins)
    table.add("copies of operands", "workspace", sizes.copies("qkk"), "where D is padded")
    table.add("out", "output", sizes.queries, "B Q H D e")
    lse, *rest = (line.bytes for line in ragged_forward(sizes.rows))
    table.add("log-sum-exp", "saved_for_backward" if case.trains else "temp_buffers", lse, "float32 H B Q")
    table.add("kernel scratch", "workspace", rest, "of the kernel")
    table.free("copies of operands", "kernel scratch")


def _backward(table: PlanTable, case: Case, call: WholeCall) -> None:
    shape, e = case.shape, case.shape.itemsize
    some = backward_cut(call, shape).kv_heads
    one = (some >= shape.kv_heads) * 1
    repeat = shape.heads // shape.kv_heads
    sizes = _Sizes(case, some * repeat, some)
    table.phase("backward")
    own = (case.channels * e, case.kv_channels * e, case.kv_channels * e)
    table.add("copies of operands", "workspace", sizes.copies("qqkkq"), "where D is padded")
    table.add("random state", "workspace", 16, "what dropout would read")
    # Of some heads the gradient of out and out are views, which the kernel copies unless that was done.
    apart = sizes.queries * (1 - one) * (not sizes.pads) * (case.batch * shape.queries > 1)
    table.add("gradient of out and out in one piece", "workspace", (apart, apart), "B Q H D e")
    results = (sizes.queries, sizes.keys, sizes.keys)
    for name, nbytes, returned in zip(("dq", "dk", "dv"), own, results, strict=True):
        table.add(name, "gradients", where(one, returned, nbytes), "B S H D e, or B S G D e")
    table.add("dq, dk, dv of some heads", "temp_buffers", [x * (1 - one) for x in results], "the same")
    _, *scratch = (
        line.bytes for line in ragged_backward(sizes.rows, case.sequences * some * repeat, sizes.dim)
    )
    each_head = sizes.keys * repeat * (repeat > 1)
    table.add("backward scratch", "workspace", (*scratch, each_head, each_head), "of the kernel")
    table.free("copies of operands", "random state", "gradient of out and out in one piece")
    table.free("dq, dk, dv of some heads", "backward scratch")


class _Sizes:
    """Bytes of operands of so many heads, of all batch items, as the kernel has them."""

    def __init__(self, case: Case, heads: Count, kv_heads: Count) -> None:
        shape = case.shape
        self.dim = up(shape.head_dim, CHANNELS)
        self.pads = self.dim > shape.head_dim
        self.rows = case.batch * shape.queries * heads
        self.queries = self.rows * self.dim * shape.itemsize
        self.keys = case.batch * shape.seq * kv_heads * self.dim * shape.itemsize

    def copies(self, operands: str) -> tuple[Count, ...]:
        """Of operands, `q` or `k` each."""
        return tuple((self.queries if name == "q" else self.keys) * self.pads for name in operands)
