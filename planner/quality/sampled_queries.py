"""Captured mass of dilated branches that do not nest or are no multiple of their rate, by queries. Imports no
torch.

Letters: `a` decays [J, 1, 1], `w` their shares; `N` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attention.sizes.arrays import Floats, Ints
from planner.quality.sampled_blocks import common, subsets
from planner.quality.sums import series
from planner.sampling import golden, stratified

POINTS = 4096
"""Queries looked at of irregular dilated branches; all of them where there are no more."""


def points(
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
    """(mass of the exponentials, share of the permitted sinks kept), each [N], of dilated branches that are
    not regular, over the queries from the `first` on: exact up to POINTS of them."""
    parts = []
    chunk = max(1, (1 << 20) // (min(POINTS, int((seq - first).max(initial=1))) * max(len(a), 4)))
    for begin in range(0, seq.size, chunk):
        some = slice(begin, begin + chunk)
        parts.append(
            _points(
                a,
                w,
                seq[some],
                first[some],
                [x[some] for x in lengths],
                [x[some] for x in rates],
                sinks,
                heads,
                causal,
            )
        )
    return np.concatenate([mass for mass, _ in parts]), np.concatenate(
        [sinks_kept for _, sinks_kept in parts]
    )


def _points(
    a: Floats,
    w: Floats,
    seq: Ints,
    first: Ints,
    lengths: Any,
    rates: Any,
    sinks: int,
    heads: int,
    causal: bool,
) -> tuple[Floats, Floats]:
    n, queries = seq[:, None], (seq - first)[:, None]
    count = min(POINTS, int(queries.max(initial=1)))
    at = np.arange(count)
    spread = (stratified(golden(at)) * queries / count).astype(np.int64)
    q = first[:, None] + np.where(queries <= count, np.minimum(at, queries - 1), spread)
    weights = np.where(queries <= count, (at < queries) / queries, 1.0 / count)
    offsets = [q % np.minimum(s[:, None], n) for s in lengths]
    sides = [np.minimum(s[:, None], n - q + o) - 1 - o for s, o in zip(lengths, offsets, strict=True)]
    whole = series(a, 1, q + 1) + (0 if causal else series(a, 1, n - q) - 1)
    mass, sinks_kept = np.zeros(q.shape), np.zeros(q.shape)
    for sign, members in subsets(len(lengths)):
        step = common(rates[t] for t in members)[:, None]
        covered = np.zeros(q.shape)
        # Heads that differ by a multiple of `step` take the same positions.
        for h in range(min(heads, int(step.max(initial=1)))):
            alike = np.where(h < step, (heads - 1 - h) // step + 1, 0)
            covered += alike * np.logical_and.reduce(
                [offsets[t] % rates[t][:, None] == h % rates[t][:, None] for t in members]
            )
        covered *= sign / heads
        left = np.minimum.reduce([offsets[t] for t in members])
        right = np.minimum.reduce([sides[t] for t in members])
        visible = series(a, step, left // step + 1)
        if not causal:
            visible = visible + series(a, step, right // step + 1) - 1
        mass += covered * (np.tensordot(w, visible / whole, axes=1))
        for k in range(sinks):
            away = q - k
            sees = (away % step == 0) & (away <= left) & (away >= (0 if causal else -right)) & (k < n)
            sinks_kept += covered * sees
    number = np.maximum(np.minimum(np.minimum(sinks, n), q + 1 if causal else n), 1)  # profiles may have none
    return (mass * weights).sum(axis=1), (sinks_kept / number * weights).sum(axis=1)
