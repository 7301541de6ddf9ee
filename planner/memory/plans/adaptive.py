"""The memory plan of an adaptive attention: choosing blocks, attending over them, and in training what the
scorer learns; see `attention/adaptive.py`. Imports no torch.

Letters as in `planner/memory/plans/tiles.py`, and n blocks, of which a row keeps k; E channels of a score.
"""

from __future__ import annotations

from functools import partial

from attention.sizes.adaptive import Scorer, choosing_sizes, gate_sizes, learning_sizes
from attention.sizes.arena import arena_bytes
from attention.sizes.arrays import Count, maximum
from attention.sizes.list_calls import ListCalls
from attention.sizes.row_bounds import chosen_rows
from attention.sizes.tiles import pieces, sparse_extent
from planner.memory.machines import Cuda
from planner.memory.plans import tiles
from planner.memory.plans.list_calls import list_calls
from planner.memory.plans.tiles import Case
from planner.memory.table import PlanTable

SIZES = "attention/sizes/adaptive.py"


def scorer_of(case: Case, size: Count, kept: Count, channels: Count | None) -> Scorer:
    """The scorer of a module whose parameters are of the type of q; `channels`: None for as many as q's."""
    shape = case.shape
    return Scorer(
        size,
        kept,
        shape.head_dim if channels is None else channels,
        shape.wide,
        casts=shape.itemsize < shape.wide,
    )


def adaptive(table: PlanTable, case: Case, scorer: Scorer, lists: ListCalls | None = None) -> None:
    """Choice and attention, and in training the backward pass. `lists`: where calls over lists do it."""
    numbers = _parameters(case, scorer)
    if not case.run:
        half = numbers // 2 * case.shape.itemsize * case.ranks
        table.kept("projections of the scorer", "parameters", (half, half), "2 H D E e")
    table.phase("choosing blocks")
    table.add("chosen blocks", "sparse_indices", _chosen(case, scorer) * 8, "8 B H n k")
    table.add(
        "scratch of the choice",
        "workspace",
        arena_bytes(choosing_sizes(case.shape, scorer)),
        f"{SIZES} choosing_sizes",
    )
    tiles.products(table, case)
    rows = case.shape.heads * scorer.choosing_rows(case.shape)
    best = case.machine.best_of(rows, scorer.blocks(case.shape), scorer.kept, scorer.wide)
    table.add("scratch of the best", "workspace", best, "of the kernel")
    table.free("scratch of the choice", "scratch of the best")

    def turn(table: PlanTable) -> bool:
        """The scorer learns before the attention does."""
        if lists is None:
            table.free("hidden positions")
        goes = case.turn is None or case.turn(table)
        if goes:
            _learn(table, case, scorer)
            if lists is None:
                _hide(table, case, scorer, backward=True)
        return goes

    if lists is not None:
        list_calls(table, case._replace(turn=turn), lists)
        return
    _hide(table, case, scorer, backward=False)
    extent_of = partial(sparse_extent, chosen_rows(scorer.size, scorer.kept))
    tiles.program(table, case._replace(turn=turn), tiles.once(case.shape, extent_of))
    if not case.trains:
        table.free("hidden positions")


def _hide(table: PlanTable, case: Case, scorer: Scorer, *, backward: bool) -> None:
    """The mask of lists that hold the last block, if that is short; under `causal` only its own rows do."""
    shape = case.shape.backward() if backward else case.shape
    extent = sparse_extent(chosen_rows(scorer.size, scorer.kept), shape)
    itemsize = shape.wide if backward and shape.widens else shape.itemsize
    largest: Count = 0
    for kind, piece in zip(extent.kinds, pieces(extent, shape), strict=True):
        column = piece.column if backward else kind.views * kind.keys
        views = kind.views if shape.causal else 1
        largest = maximum(largest, kind.heads * column // views * kind.gathers * kind.exists)
    short = shape.seq % scorer.size > 0
    name = "hidden positions"
    table.phase(f"backward, {name}" if backward else name)
    table.add(f"{name} of backward" if backward else name, "masks", largest * itemsize * short, "N H K e")


def _learn(table: PlanTable, case: Case, scorer: Scorer) -> None:
    """Backward from the gradient of out to that of the chosen scores, and on to those of the projections."""
    shape, numbers = case.shape, _parameters(case, scorer)
    table.phase("backward, gate")
    table.add("gradient of the scores", "temp_buffers", _chosen(case, scorer) * scorer.wide, "B H n k w")
    table.add(
        "scratch of the gate", "workspace", arena_bytes(gate_sizes(shape, scorer.size)), f"{SIZES} gate_sizes"
    )
    tiles.products(table, case, backward=True)
    table.free("scratch of the gate")
    table.phase("backward, scorer")
    half = numbers // 2
    sums = (half * scorer.wide, half * scorer.wide)
    table.add("sums of the projections' gradients", "temp_buffers", sums, "2 H D E w")
    table.add(
        "scratch of the scorer",
        "workspace",
        arena_bytes(learning_sizes(shape, scorer)),
        f"{SIZES} learning_sizes",
    )
    table.free("scratch of the scorer")
    if not scorer.casts:  # then the sums are the gradients
        table.free("sums of the projections' gradients")
    table.phase("backward, projections")
    gradients = (half * shape.itemsize, half * shape.itemsize)
    table.add("gradients of the projections", "gradients", gradients, "2 H D E e")
    table.free("gradient of the scores")
    if isinstance(case.machine, Cuda):  # a CPU's attention reads the lists from there
        table.free("chosen blocks")
    if scorer.casts:
        table.free("sums of the projections' gradients")


def _parameters(case: Case, scorer: Scorer) -> Count:
    """Numbers in both projections."""
    return 2 * case.shape.heads * case.shape.head_dim * scorer.channels


def _chosen(case: Case, scorer: Scorer) -> Count:
    """Places in all lists."""
    return case.batch * case.shape.heads * scorer.blocks(case.shape) * scorer.kept
