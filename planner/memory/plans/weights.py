"""The memory plan of attention weights on request; see `attention/ops/weights.py`. Imports no torch.

Letters as in `planner/memory/plans/tiles.py`, and n active blocks a head, of b x b weights each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from attention.sizes.arena import arena_bytes
from attention.sizes.arrays import Count
from attention.sizes.weights import weights_sizes
from planner.memory.plans.tiles import Case, products
from planner.memory.table import PlanTable


class ReturnedWeights(NamedTuple):
    """The attention weights that a call returns."""

    size: Count
    """Tokens a block."""
    active: Count
    """Blocks a head: `attention.layout.count_active`, or `active_of_choice` of an adaptive attention."""
    branches: int
    """Branches of a dilated attention; else 0."""
    own: bool
    """Whether every head of every batch item has blocks of its own."""


def weighted(
    table: PlanTable, case: Case, attend: Callable[[PlanTable, Case], None], returned: ReturnedWeights
) -> None:
    """Adds what `attend` does, and after its forward pass the weights, which live to the end."""

    def turn(table: PlanTable) -> bool:
        _weights(table, case, returned)
        return case.turn is None or case.turn(table)

    attend(table, case._replace(turn=turn, keeps_lse=True))
    if not case.trains:
        _weights(table, case, returned)


def _weights(table: PlanTable, case: Case, returned: ReturnedWeights) -> None:
    shape, lanes = case.shape, case.batch * case.shape.heads
    table.phase("weights")
    if not case.trains:
        table.add("log-sum-exp of the weights", "temp_buffers", case.lse_bytes, "B S H w")
    indices = returned.active * 16 * (lanes if returned.own else 1)
    table.add("indices of the weights", "sparse_indices", indices, "16 n, or 16 B H n")
    values = lanes * returned.active * returned.size * returned.size * shape.itemsize
    table.add("weights", "weights", values, "B H n b b e")
    table.add(
        "scratch of the weights",
        "workspace",
        arena_bytes(weights_sizes(shape, returned.size, returned.active, returned.branches)),
        "attention/sizes/weights.py",
    )
    products(table, case)
    table.free("scratch of the weights")
    if not case.trains:
        table.free("log-sum-exp of the weights")
