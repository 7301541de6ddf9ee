"""The memory plan of a rank that shares a sequence by exchanging heads; see `attention/sharding/heads.py`.
Imports no torch.

Letters as in `planner/memory/plans/tiles.py`: T own tokens of H heads and G kv heads, S tokens of the whole
sequence, W ranks.
"""

from __future__ import annotations

from typing import NamedTuple

from attention.sizes.arrays import Count
from planner.memory.plans.multihead import GRADIENT, PROJECTED, AttentionAdder
from planner.memory.plans.tiles import Case
from planner.memory.table import PlanTable, PrefixedTable

OWN = "own heads: "


class _Stream(NamedTuple):
    """One of q, k, v, out or their gradients."""

    own: Count
    """Bytes of own tokens of all heads."""
    whole: Count
    """Bytes of own heads of all tokens."""


def head_exchange(table: PlanTable, case: Case, twin: Case, world: int, attend: AttentionAdder) -> None:
    """An attention of a rank over its heads of the whole sequence: forward, and in training backward. `case`:
    of its own tokens of all heads, `twin` of its heads of all tokens, which `attend` adds. q, k and v are
    there."""
    e = case.shape.itemsize
    queries = _Stream(case.channels * e, twin.channels * e)
    keys = _Stream(case.kv_channels * e, twin.kv_channels * e)
    inputs = {"q": queries, "k": keys, "v": keys}
    for name, stream in inputs.items():
        _to_heads(table, name, stream, world)
    saves = case.trains and (case.runs == 1 or case.run > 0)  # a checkpoint's first pass saves nothing
    went_back = False

    def turn(_: PlanTable) -> bool:
        nonlocal went_back
        if not saves:
            return False
        _to_tokens(table, "out", "output", queries, world)
        table.free_held(*PROJECTED)  # which nobody has saved
        went_back = case.goes_back(table)
        if went_back:
            if table.holds(GRADIENT):  # the projection has been through with its input
                table.free("out")
            _to_heads(table, "gradient of out", queries, world)
            table.free_held(GRADIENT)
        return went_back

    attend(PrefixedTable(table, OWN), twin._replace(turn=turn))
    if not saves:
        table.free(*(OWN + name for name in inputs))
        _to_tokens(table, "out", "output", queries, world)
        table.free_held(f"{OWN}out", f"{OWN}log-sum-exp")
    if not went_back:
        return
    table.free_held(*(OWN + name for name in (*inputs, "gradient of out", "out", "log-sum-exp")))
    for name, stream in inputs.items():
        _to_tokens(table, f"d{name}", "gradients", stream, world)
    table.phase("gradients of own tokens")
    table.free_held(*(f"{OWN}d{name}" for name in inputs))


def _to_heads(table: PlanTable, name: str, stream: _Stream, world: int) -> None:
    table.phase(f"exchange of heads, {name}")
    table.add(OWN + name, "ring", stream.whole, "B S H D e / W, or B S G D e / W")
    packed = [stream.own // world] * (world - 1)
    table.add(f"packed {name}", "comm_buffers", packed, "B T H D e / W for each peer")
    table.free(f"packed {name}")


def _to_tokens(table: PlanTable, name: str, component: str, stream: _Stream, world: int) -> None:
    table.phase(f"exchange of tokens, {name}")
    table.add(name, component, stream.own, "B T H D e, or B T G D e")
    arriving = [stream.own // world] * (world - 1)
    table.add(f"arriving {name}", "comm_buffers", arriving, "B T H D e / W of each peer")
    table.free(f"arriving {name}")
