"""Memory peaks of many candidates at once, by the very plans that one config has. Imports no torch.

columns = Columns("block_sparse", "local_window", seq=131072, block_size=sizes, window=windows)
peaks(columns, workload, machine)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np

from attention.errors import ConfigError
from attention.sizes.arrays import Count, ceil_div, maximum, minimum, row_blocks
from planner.configs import Columns, Ints
from planner.memory.machines import Machine
from planner.memory.plan import UNBOUNDED, goes_flex, has_flex, sized
from planner.memory.plans import adaptive as plans_adaptive
from planner.memory.plans import multihead as plans_multihead
from planner.memory.plans import tiles as plans
from planner.memory.table import Table
from planner.workload import Workload

AT_ONCE: Final = 8192
"""Candidates that are evaluated together: few enough that a plan's arrays stay in the cache."""


def peaks(columns: Columns, workload: Workload, machine: Machine) -> Ints:
    """Bytes at the peak of each candidate: what `plan_of` has for its config. `workload.seq` is not read.

    Refused are workloads that ask for the weights: how many there are is counted for one config at a time.
    """
    if workload.weights:
        raise ConfigError("weights=True is for one config at a time; use planner.estimate")
    found = np.empty(len(columns), np.int64)
    for start in range(0, len(found), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        found[part] = _alike(columns.take(part), workload, machine)
    return found


def _alike(columns: Columns, workload: Workload, machine: Machine) -> Ints:
    """The same, apart by which plan a candidate has."""
    if columns.variant == "adaptive":
        return _planned(columns, workload, machine, _adaptive)
    if columns.variant == "block_sparse":
        seq: Any = columns.seq
        apart = has_flex(workload, machine) and goes_flex(
            columns.backend, columns.rows(workload.causal), seq, workload
        )
        return _split(columns, apart, workload, machine, _flex, _block_sparse)
    if columns.variant == "dense":
        columns = replace(columns, lengths=(columns.seq,), rates=(1,))
    everything: Any = False
    if len(columns.lengths) == 1 and workload.heads == workload.groups:
        everything = (columns.lengths[0] >= columns.seq) & (columns.rates[0] == 1)
    return _split(columns, everything, workload, machine, _whole, _dilated)


Layer = Callable[[Table, plans.Case, Columns], None]


def _split(
    columns: Columns, apart: Count, workload: Workload, machine: Machine, those: Layer, others: Layer
) -> Ints:
    """Peaks by the plan of `those` where `apart` holds, and of the `others` elsewhere."""
    chosen = np.broadcast_to(np.asarray(apart, bool), len(columns))
    found = np.empty(len(columns), np.int64)
    for layer, mask in ((those, chosen), (others, ~chosen)):
        if mask.all():
            return _planned(columns, workload, machine, layer)
        if mask.any():
            which = np.flatnonzero(mask)
            found[which] = _planned(columns.take(which), workload, machine, layer)
    return found


def _planned(columns: Columns, workload: Workload, machine: Machine, layer: Layer) -> Ints:
    pool = plans.pooled(columns.pool, columns.pool_bytes, columns.seq)  # type: ignore[arg-type]
    bound = UNBOUNDED if columns.pool_bytes is None else columns.pool_bytes
    case = sized(workload, machine, columns.seq, columns.workspace, pool, bound)  # type: ignore[arg-type]
    case = case._replace(cache_entries=columns.cache_entries, cache_bytes=columns.cache_bytes)
    table = Table()
    outer = columns.multihead
    if outer is not None:
        plans_multihead.multihead(
            table, case, lambda table, case: layer(table, case, columns), bias=outer.bias,
            checkpoint=outer.checkpoint,
        )  # fmt: skip
    else:
        plans.inputs(table, case)
        layer(table, case, columns)
    return table.done().peaks()


def _whole(table: Table, case: plans.Case, _: Columns) -> None:
    plans.whole(table, case)


def _dilated(table: Table, case: plans.Case, columns: Columns) -> None:
    plans.dilated(table, case, _within(case, columns))


def _adaptive(table: Table, case: plans.Case, columns: Columns) -> None:
    size: Any = columns.block_size
    ratio: Any = columns.sparsity_ratio
    kept = row_blocks(ratio, ceil_div(case.shape.seq, size))
    plans_adaptive.adaptive(table, case, plans_adaptive.scorer_of(case, size, kept, columns.score_dim))


def _block_sparse(table: Table, case: plans.Case, columns: Columns) -> None:
    plans.block_sparse(table, case, columns.rows(case.shape.causal))


def _flex(table: Table, case: plans.Case, columns: Columns) -> None:
    plans.flex(table, case, columns.rows(case.shape.causal))


def _within(case: plans.Case, columns: Columns) -> list[tuple[Count, Count]]:
    """As `Shape.within` has it."""
    seq = case.shape.seq
    limit = maximum(seq, case.shape.heads)
    pairs: Any = zip(columns.lengths, columns.rates, strict=True)
    return [(minimum(length, seq), minimum(rate, limit)) for length, rate in pairs]
