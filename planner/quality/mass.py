"""How much of a dense softmax attention's mass a config still attends to. Imports no torch.

`mass(columns, workload, profile)` is the mean, over queries and heads, of the profile's mass on the keys
that the config keeps (`planner.quality.profiles` has the formula). Only whether a key is kept counts, not
how often branches pair it. 1 is all of it; with the keys renormalised, |o - o'| <= 2 (1 - mass) max|v|.

Letters: `a` decays 1 / scale [J, 1, 1] and `w` their shares [J], the last of which is the far mass: a share
that is the same at every distance is an exponential that hardly falls. `N` candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TypeAlias

import numpy as np

from attention.config import AttentionConfig
from attention.sizes.arrays import Floats, Ints
from attention.sizes.window import window_blocks, window_spans
from planner.configs import Column, Columns, columns_of
from planner.documents import parts
from planner.quality import sampled_blocks
from planner.quality.profiles import Profile
from planner.quality.sampled_blocks import common, subsets
from planner.quality.sampled_queries import points
from planner.quality.sums import cells, permitted, segments, windows
from planner.workload import Workload

KEPT = 2
"""Place of the fraction of blocks kept among the fields of dilated_sparse and adaptive."""
FLAT = 1e-5
"""A uniform share's fall over the sequence."""
_QueryCount: TypeAlias = Callable[[int, int], Floats]
"""(key, first query) to the queries from there on that keep the key, [N]."""
_CHUNK = 32  # candidates at a time: what is computed for them stays within a cache


def mass_of(config: AttentionConfig, workload: Workload, profile: Profile) -> float:
    """Mass that one config captures; 0 to 1."""
    return float(mass(columns_of(config, workload.seq), workload, profile)[0])


def mass(columns: Columns, workload: Workload, profile: Profile) -> Floats:
    """[len(columns)], float64: mass that each candidate captures, 0 to 1.

    Of `workload` only `causal`, `heads`, `queries` and `documents` are read: the length is `columns.seq`.
    Where fewer tokens ask, the mean is over those. Of documents it is a share of what dense attention has
    within each, by closed forms of their lengths (`planner.documents` has what they neglect).

    Dense, windows, global tokens and regular dilated branches (segments nested in each other and divided by
    their rates) are closed forms, dilated_sparse a fixed sample of its query blocks, other dilated branches
    one of queries. Adaptive rests on an assumption, which `sampled_blocks.adaptive` states.
    """
    if columns.variant == "dense":
        return np.ones(len(columns))
    if workload.documents is None:
        return _over(columns, workload, profile)
    of_documents = list(parts(columns, workload))
    total = sum(part.queries * _over(part.columns, part.workload, profile) for part in of_documents)
    return np.broadcast_to(total / sum(part.queries for part in of_documents), len(columns))


def _over(columns: Columns, workload: Workload, profile: Profile) -> Floats:
    """`mass` without documents."""
    table, back = distinct(columns)
    chunks = [
        _mass(columns, table[begin : begin + _CHUNK], workload, profile)
        for begin in range(0, len(table), _CHUNK)
    ]
    return np.clip(np.concatenate(chunks), 0.0, 1.0)[back]


def distinct(columns: Columns) -> tuple[Floats, Ints]:
    """(table [distinct, fields], back [len(columns)]): what pairs of tokens a kind keeps depends on these
    fields, `seq` first, then the block size and so on as in `shape_of`; candidate c has row back[c]."""
    count = len(columns)
    fields = [np.broadcast_to(np.asarray(field), count) for field in shape_of(columns)]
    if count == 1:  # sorting one takes longer than looking at it
        return np.stack(fields, axis=1).astype(np.float64), np.zeros(1, np.int64)
    table, back = np.unique(np.stack(fields, axis=1).astype(np.float64), axis=0, return_inverse=True)
    return table, back.ravel()


def shape_of(columns: Columns) -> tuple[Column | float | Floats, ...]:
    """The fields on which depends what a kind attends to: `seq` first, then those that `_mass` takes apart
    again."""
    branches = (*columns.lengths, *columns.rates)
    if columns.variant == "dilated":
        return (columns.seq, *branches)
    if columns.variant == "adaptive":
        return (columns.seq, columns.block_size, columns.sparsity_ratio)
    if columns.pattern_type == "dilated_sparse":
        return (columns.seq, columns.block_size, columns.sparsity_ratio, *branches)
    shared = columns.global_tokens if columns.pattern_type == "global_local" else 0
    # Ending at the token is ending at blocks of one.
    size = 1 if columns.token_edges else columns.block_size
    return (columns.seq, size, columns.window, shared)


def _mass(columns: Columns, table: Floats, workload: Workload, profile: Profile) -> Floats:
    """[N] of the distinct rows of fields in `table` [N, fields]."""
    causal = workload.causal
    whole = [column.astype(np.int64) for column in table.T]
    seq = whole[0]
    first = seq - np.minimum(workload.queries or seq, seq)
    flat = FLAT / float(seq.max())
    a = np.array([*(1.0 / scale for scale in profile.scales), flat])[:, None, None]
    w = np.array([*profile.shares, profile.far_mass])
    sinks = min(profile.sink_tokens, int(seq.max())) if profile.sink_mass else 0
    count = len(columns.lengths)
    if columns.variant == "adaptive":
        return sampled_blocks.adaptive(
            a, w, profile.far_mass, profile.sink_mass, seq, first, whole[1], table[:, KEPT], causal
        )
    if columns.variant == "dilated":
        exponentials, sinks_kept = _dilated(
            a, w, seq, first, whole[1 : 1 + count], whole[1 + count :], sinks, workload
        )
    elif columns.pattern_type == "dilated_sparse":
        branches = whole[3 : 3 + count], whole[3 + count :]
        exponentials, sinks_kept = sampled_blocks.dilated_sparse(
            a, w, seq, first, whole[1], table[:, KEPT], *branches, sinks, causal
        )
    else:
        exponentials, sinks_kept = _windows(a, w, seq, first, whole[1], whole[2], whole[3], sinks, causal)
    return exponentials + profile.sink_mass * sinks_kept


def _mean(w: Floats, kept_sums: Floats, whole: Floats, ends: Ints) -> Floats:
    """[N], from sums [J, N, ends] over the queries before each end: `kept_sums` over `whole`, the permitted
    ones, in every cell, by its queries. Where all is kept that is 1, however long the cell."""
    queries = np.diff(ends, axis=1)
    part, total = np.diff(kept_sums, axis=2), np.diff(whole, axis=2)
    ratio = np.divide(part, total, out=np.zeros_like(part), where=queries > 0)
    return np.asarray((np.tensordot(w, ratio, axes=1) * queries).sum(axis=1) / (ends[:, -1] - ends[:, 0]))


def _windows(
    a: Floats,
    w: Floats,
    seq: Ints,
    first: Ints,
    size: Ints,
    window: Ints,
    shared: Ints,
    sinks: int,
    causal: bool,
) -> tuple[Floats, Floats]:
    """(mass of the exponentials, share of the permitted sinks kept) of local_window and global_local."""
    n, b = seq[:, None], size[:, None]
    blocks = -(-n // b)
    reach, head = window_blocks(window[:, None], shared[:, None], b, blocks, causal)
    if (seq == seq[0]).all():
        n = n[:1]  # what all have in common is computed once
    ends = cells(n[:, 0], causal, first[: len(n)])
    kept_sums = windows(a, ends, n, b, reach, head, causal)

    def query_count(k: int, begin: int) -> Floats:
        """Queries from `begin` on that ask and keep key k."""
        # The rows that keep a block are those that it keeps; causal, of those the later ones alone.
        (_, apart), (start, stop) = window_spans(k // b, reach, head, blocks, causal=False)
        begins = np.maximum(begin, first[:, None])
        low = np.maximum(k if causal else start * b, begins)
        queries = np.maximum(np.minimum(stop * b, n) - low, 0)
        if not causal:
            queries = queries + np.maximum(np.minimum(apart * b, n) - begins, 0)
        return np.asarray(queries[:, 0] * (k < seq))

    kept = _mean(w, kept_sums, permitted(a, ends, n, causal), ends)
    return kept, _sinks(query_count, seq, seq - first, sinks, causal)


def _sinks(query_count: _QueryCount, seq: Ints, queries: Ints, sinks: int, causal: bool) -> Floats:
    """[N], share of the permitted sinks that one of so many queries keeps, from counts of those that keep
    each."""
    total = np.zeros(seq.shape)
    for k in range(sinks):
        if not causal:
            total += query_count(k, 0) / np.minimum(sinks, seq)
            continue
        total += query_count(k, k) / (k + 1)
        for q in range(k + 1, sinks):  # later queries share their sink mass among more
            total += query_count(k, q) * (1 / (q + 1) - 1 / q)
    return total / queries


def _dilated(
    a: Floats,
    w: Floats,
    seq: Ints,
    first: Ints,
    lengths: Sequence[Ints],
    rates: Sequence[Ints],
    sinks: int,
    workload: Workload,
) -> tuple[Floats, Floats]:
    """(mass of the exponentials, share of the permitted sinks kept)."""
    regular = _regular(seq, seq - first, lengths, rates)
    exponentials, sinks_kept = np.zeros(seq.shape), np.zeros(seq.shape)
    for rule, which in ((_nested, np.flatnonzero(regular)), (points, np.flatnonzero(~regular))):
        if which.size:
            exponentials[which], sinks_kept[which] = rule(
                a,
                w,
                seq[which],
                first[which],
                [s[which] for s in lengths],
                [r[which] for r in rates],
                sinks,
                workload.heads,
                workload.causal,
            )
    return exponentials, sinks_kept


def _regular(seq: Ints, queries: Ints, lengths: Sequence[Ints], rates: Sequence[Ints]) -> Ints:
    """Whether segments nest in each other and are whole numbers of steps, and steps are short of the
    queries: then of those in any stretch one in lcm(rates) is in all branches."""
    steps = common(rates)
    holds = queries >= 64 * steps
    for s, r in zip(lengths, rates, strict=True):
        holds &= (s % r == 0) | (s >= seq)
        for other in lengths:
            holds &= (s % other == 0) | (other % s == 0) | (s >= seq) | (other >= seq)
    return np.asarray(holds)


def _nested(
    a: Floats,
    w: Floats,
    seq: Ints,
    first: Ints,
    lengths: Sequence[Ints],
    rates: Sequence[Ints],
    sinks: int,
    heads: int,
    causal: bool,
) -> tuple[Floats, Floats]:
    """`_dilated` of regular branches, by inclusion and exclusion over the branches that hold a query.

    What several share are the multiples of all their rates in the shortest of their segments.
    """
    joint = [
        (sign, members, reduce(np.minimum, (lengths[t] for t in members)), common(rates[t] for t in members))
        for sign, members in subsets(len(lengths))
    ]
    # Few of these are distinct, over all candidates.
    table = np.concatenate([np.stack([seq, first, np.minimum(s, seq), r], axis=1) for _, _, s, r in joint])
    distinct, back = np.unique(table, axis=0, return_inverse=True)
    n, begin, s, r = (column[:, None] for column in distinct.T)
    ends = cells(distinct[:, 0], causal, begin[:, 0])
    each = _mean(w, segments(a, ends, n, s, r, causal), permitted(a, ends, n, causal), ends)
    signs = np.array([sign for sign, *_ in joint])
    exponentials = signs @ each[back.ravel()].reshape(len(joint), -1)

    def query_count(k: int, begin: int) -> Floats:
        total = np.zeros(seq.shape)
        h = np.arange(heads)
        for sign, members, s, r in joint:
            # The heads that take k in all of these branches; then the queries a multiple of r away.
            takes = np.logical_and.reduce(
                [(k % lengths[t] % rates[t])[:, None] == h % rates[t][:, None] for t in members]
            ).mean(axis=1)
            low = np.maximum(np.maximum(k // s * s, max(begin, k if causal else 0)), first)
            high = np.minimum(k // s * s + s, seq)
            total += sign * takes * np.maximum((high - 1 - k) // r - (low - 1 - k) // r, 0)
        return total * (k < seq)

    return exponentials, _sinks(query_count, seq, seq - first, sinks, causal)
