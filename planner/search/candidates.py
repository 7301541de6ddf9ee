"""The grid: configs that are enumerated and evaluated whole. Imports no torch.

It has a few values of each dimension, which the caller may fix or restrict (`Space`); the full space around
it, which a sampler walks, has all that make sense (`planner/search/suggest.py`). Combinations that no config
can have are not generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from attention.config import MIB, Backend, Edges
from attention.errors import ConfigError
from attention.sizes.arrays import Ints
from attention.sizes.flex import auto_leaves_flex
from attention.sizes.shape import Windows
from planner.configs import Columns
from planner.memory.dispatch import goes_flex
from planner.question.dimensions import DIMENSIONS, AttentionKind, is_sparse, pattern_of, variant_of
from planner.question.space import MAX_BRANCHES, Space
from planner.ranks.ring import exchanges_heads, ring_of, shardings, share_of
from planner.workload import Workload

UNIT: Final = 64
"""Tokens that segment lengths of dilated are multiples of; those of blocks are multiples of the block."""
TOKEN_UNIT: Final = 16
"""Tokens that windows and global tokens are multiples of where they end at the token."""

BLOCK_SIZES: Final = (32, 64, 128, 256, 512)
USUAL_BLOCK: Final = 128
GLOBAL_TOKENS: Final = (64, 256, 1024)
RATIOS: Final = (0.001, 0.003, 0.01, 0.03, 0.06, 0.12, 0.25, 0.5)
SEGMENTS: Final = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
"""First segment lengths of dilated."""
SPARSE_SEGMENTS: Final = (512, 4096, 32_768)
"""First segment lengths of dilated_sparse; the last covers everything, and there are at most three."""
GROWTHS: Final = (2, 4, 8)
"""Factors from one branch to the next, of lengths and of rates; the last length may cover everything."""
WORKSPACES: Final = (MIB, 4 * MIB, 16 * MIB)

FREE_BLOCK_SIZES: Final = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512)
MOST_GROWTH: Final = 1 << 16
MOST_RATE_GROWTH: Final = 16
MOST_GLOBAL: Final = 8192
"""Most global tokens."""
FREE_WORKSPACES: Final = (20, 26)
"""Least and most as powers of two."""
LEAST_RATIO: Final = 1e-4


# The grid.


def grid(
    space: Space,
    workload: Workload,
    *,
    flex: bool = False,
    windows: Windows = "none",
    free_length: bool = False,
) -> list[Columns]:
    """All candidates of the grid, kind by kind; ConfigError if the restrictions leave none. `flex`: whether
    FlexAttention runs there; `windows`: those that the kernel takes.

    `workload.seq` says how far segments and windows are worth trying; `free_length`: shorter sequences are of
    interest too. Of windows that end at the token and are whole calls one block size is enough.
    """
    parts = []
    whole = windows != "none"
    tables = [(kind, one) for kind in space.kinds for one in ends(space, kind, windows)]
    for kind, edges in tables:
        for rows in _tables(space, kind, workload, edges, whole=whole):
            lists: dict[str, Any] = {name: np.array(values) for name, values in rows.items()}
            branches: dict[str, Any] = {
                "lengths": tuple(lists.pop(name) for name in list(lists) if name.startswith("length")),
                "rates": tuple(lists.pop(name) for name in list(lists) if name.startswith("rate")),
            }
            by_flex = tries_flex(space, kind, edges, flex, windows)
            backends = space.backends(by_flex)
            for backend in backends:
                columns = Columns(
                    variant_of(kind),
                    pattern_of(kind),
                    seq=workload.seq,
                    edges=edges,
                    backend=backend,
                    pool=space.pool,
                    **branches,
                    **lists,
                )
                alone = len(backends) == 1
                for shared in shared_ways(columns, workload):
                    share = workload if workload.gpus == 1 else share_of(shared, workload)
                    which = _differing(
                        shared,
                        share,
                        flex=by_flex and not runs_parts(shared, workload),
                        free_length=free_length,
                        alone=alone,
                    )
                    parts.append(shared.take(which))
    parts = [columns for columns in parts if len(columns)]
    if not parts:
        raise ConfigError(
            "the restrictions leave no candidate: allow more variants, patterns, block sizes or branches "
            "(segment lengths must be multiples of the block size)"
        )
    return parts


def shared_ways(columns: Columns, workload: Workload) -> list[Columns]:
    """The candidates, shared by ranks in all ways that are worth trying."""
    if workload.gpus == 1:
        return [columns]
    return [replace(columns, sharding=sharding) for sharding in shardings(columns, workload)]


def runs_parts(columns: Columns, workload: Workload) -> bool:
    """Whether candidates exchange keys, so that their ranks run parts of a sequence, which FlexAttention does
    not."""
    return ring_of(columns, workload).world > 1 and not exchanges_heads(columns)


def ends(space: Space, kind: AttentionKind, windows: Windows) -> tuple[Edges, ...]:
    """Edges of windows to try, one for an attention without windows."""
    if kind not in DIMENSIONS["edges"].kinds:
        return ("block",)
    return space.ends(windows != "none")


def tries_flex(space: Space, kind: AttentionKind, edges: Edges, flex: bool, windows: Windows) -> bool:
    """Whether FlexAttention is tried for a kind, where it runs (`flex`): not where the kernel's own windows
    do the same, unless it is asked for, and not for what it does not compute."""
    lists = space.backend == "flex" or not auto_leaves_flex(pattern_of(kind), windows)
    return flex and is_sparse(kind) and edges == "block" and lists


def _differing(columns: Columns, workload: Workload, *, flex: bool, free_length: bool, alone: bool) -> Ints:
    """Which candidates are possible and not another's twin. FlexAttention takes no workspace: those that it
    runs and that differ in it alone are one. Where it does not run `auto`, that is `sdpa`, which is then left
    out unless it is the backend `alone`. With the length free it may run at another length what it does not
    at this, so that both stay."""
    backend: Backend = "flex" if columns.backend == "flex" or (free_length and not alone) else "auto"
    runs = np.zeros(len(columns), bool)
    if flex and columns.variant == "block_sparse" and not columns.token_edges:
        runs |= goes_flex(backend, columns.rows(workload.causal), workload.seq, workload) > 0
    if columns.backend not in ("auto", "flex"):
        return np.flatnonzero(runs | alone)
    workspace = np.broadcast_to(columns.workspace, len(columns))
    possible = runs | (columns.backend == "auto")
    return np.flatnonzero(possible & (~runs | (workspace == workspace.max())))


def _tables(
    space: Space, kind: AttentionKind, workload: Workload, edges: Edges, *, whole: bool
) -> Iterator[dict[str, list[Any]]]:
    """Columns of all combinations of a kind, one table for each number of branches. `whole`: windows are
    whole calls."""
    workspaces = space.workspaces or WORKSPACES
    if kind == "dense":
        yield {"workspace": list(workspaces)}
    elif kind == "dilated":
        yield from _branched(_dilated(space, workload.seq), workspaces)
    elif kind == "dilated_sparse":
        yield from _branched(_dilated_sparse(space, workload.seq), workspaces)
    else:
        sizes = space.block_sizes or ((USUAL_BLOCK,) if whole and edges == "token" else BLOCK_SIZES)
        rows = list(_blocks(space, kind, workload, sizes, edges))
        if rows:
            yield _transposed([row | {"workspace": w} for row in rows for w in workspaces])


Lists = tuple[tuple[int, ...], tuple[int, ...]]
"""Lengths and rates of all branches."""


def _branched(
    rows: Iterable[tuple[Lists, Mapping[str, Any]]], workspaces: Sequence[int]
) -> Iterator[dict[str, list[Any]]]:
    by_count: dict[int, list[dict[str, Any]]] = {}
    for (lengths, rates), fields in rows:
        named = {f"length{n}": length for n, length in enumerate(lengths)}
        named |= {f"rate{n}": rate for n, rate in enumerate(rates)}
        by_count.setdefault(len(lengths), []).extend(
            {**named, **fields, "workspace": workspace} for workspace in workspaces
        )
    for _, alike in sorted(by_count.items()):
        yield _transposed(alike)


def _transposed(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _dilated(space: Space, seq: int) -> Iterator[tuple[Lists, Mapping[str, Any]]]:
    for lists in branch_lists(space, seq, UNIT, SEGMENTS, GROWTHS):
        if all(rate <= length for length, rate in zip(*lists, strict=True)):
            yield lists, {}


def _dilated_sparse(space: Space, seq: int) -> Iterator[tuple[Lists, Mapping[str, Any]]]:
    for block in space.block_sizes or BLOCK_SIZES[:-1]:
        if not divides(block, space.segments):
            continue
        whole = -(-seq // block) * block
        for lists in branch_lists(space, seq, block, SPARSE_SEGMENTS, (8,)):
            if not (space.segments or space.branches) and (lists[0][-1] < whole or len(lists[0]) > 3):
                continue
            for ratio in space.ratios or RATIOS:
                yield lists, {"block_size": block, "sparsity_ratio": ratio}


def divides(block: int, segments: Sequence[int] | None) -> bool:
    """Whether all segments, where any are given, are whole blocks."""
    return all(length % block == 0 for length in segments or ())


def branch_lists(
    space: Space, seq: int, unit: int, firsts: Iterable[int], growths: Sequence[int]
) -> list[Lists]:
    """Lengths, multiples of `unit`, and rates of one to four branches, each once.

    Lengths grow by one factor; the last is as it comes, or else covers the whole sequence, without which no
    token hears of those in another segment. Rates grow by a factor of `GROWTHS`, from 1.
    """
    counts = space.branches or tuple(range(1, MAX_BRANCHES + 1))
    if space.segments is not None:
        counts = (len(space.segments),)
    elif space.rates is not None:
        counts = (len(space.rates),)
    lists: dict[Lists, None] = {}
    for count in counts:
        for lengths in _lengths(space, seq, unit, firsts, growths, count):
            for factor in GROWTHS if count > 1 else (1,):
                rates = space.rates or tuple(factor**n for n in range(count))
                lists[lengths, rates] = None
    return list(lists)


def _lengths(
    space: Space, seq: int, unit: int, firsts: Iterable[int], growths: Sequence[int], count: int
) -> Iterator[tuple[int, ...]]:
    if space.segments is not None:
        yield space.segments
        return
    whole = -(-seq // unit) * unit
    for first in firsts:
        start = -(-first // unit) * unit
        for growth in growths:
            lengths = tuple(start * growth**n for n in range(count))
            if lengths[-1] <= whole:
                yield lengths
            if count == 1:
                yield (whole,)
            elif lengths[-2] < whole:
                yield (*lengths[:-1], -(-whole // lengths[-2]) * lengths[-2])


def _blocks(
    space: Space, kind: AttentionKind, workload: Workload, sizes: Iterable[int], edges: Edges
) -> Iterator[dict[str, Any]]:
    """Fields of local_window, global_local and adaptive."""
    for block in sizes:
        if kind == "adaptive":
            yield from ({"block_size": block, "sparsity_ratio": r} for r in space.ratios or RATIOS)
            continue
        unit = unit_of(block, edges)
        for window in space.windows or window_sizes(unit, workload):
            if kind == "local_window":
                yield {"block_size": block, "window": window}
            else:
                rounded = dict.fromkeys(-(-tokens // unit) * unit for tokens in GLOBAL_TOKENS)
                for tokens in space.global_tokens or rounded:
                    yield {"block_size": block, "window": window, "global_tokens": tokens}


def unit_of(block_size: int | None, edges: Edges) -> int:
    """Tokens that lengths, windows and global tokens of a candidate are multiples of; None: no blocks."""
    return TOKEN_UNIT if edges == "token" else block_size or UNIT


def window_sizes(unit: int, workload: Workload) -> list[int]:
    """Tokens of the windows worth trying: 2^k and 3 x 2^(k-1) units (blocks, where windows end at those), up
    to those that see everything."""
    widest = most_window(unit, workload)
    powers = range(0 if workload.causal else 1, widest.bit_length() + 1)
    counts = {min(n, widest) for power in powers for n in (1 << power, 3 << power >> 1)}
    return sorted(n * unit for n in counts if n >= (1 if workload.causal else 2))


def most_window(block: int, workload: Workload) -> int:
    """Blocks of a window in which every query sees everything."""
    blocks = -(-workload.seq // block)
    return max(blocks - 1, 1) * (1 if workload.causal else 2)


def widest_window(workload: Workload) -> int:
    """Tokens of the widest window that blocks of any size need to see everything."""
    return max(size * most_window(size, workload) for size in (*FREE_BLOCK_SIZES, *BLOCK_SIZES))


__all__ = ["grid", "most_window", "widest_window"]
