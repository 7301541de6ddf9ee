"""Layouts seen from afar: how much of each cell of a coarse grid is kept, at any length. Imports no torch.

Rows and columns are *units*: blocks, and of a dilated config, whose heads see every so manyth position, or of
windows that end at the token, tokens. Nothing is larger than a cell or a row each, so that a million tokens
take no longer than a thousand.

Of documents, `lengths` one behind the other, and of the queries from token `origin` on alone, what is kept is
clipped: a block is kept where a pair of tokens of one document is in it.

Letters: `i` a row, `c` a column, `d = c - i` an offset, `t` a branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from attention.config import AttentionConfig
from attention.layout import BranchRows, grid_of, is_dilated_sparse, row_budget, spans, union_size
from attention.sizes.arrays import Floats, Ints

SAMPLED: Final = 64
"""Rows of a cell that are looked at, where it has more."""
COUNTED: Final = 1 << 18
"""Rows whose units are counted, where there are more."""


class Units(NamedTuple):
    """The units that the rows and columns of a config's picture stand for."""

    size: int
    """Tokens each; the last may have fewer."""
    number: int


def units(config: AttentionConfig, seq: int) -> Units:
    """The blocks of a config over `seq` tokens, or, of a dilated one or of windows that end at the token,
    tokens; ConfigError for adaptive."""
    if config.variant == "dilated" or config.token_edges:
        return Units(1, seq)
    return Units(*grid_of(config, seq, None))


def shares(
    config: AttentionConfig,
    seq: int,
    causal: bool,
    rows: int,
    columns: int,
    *,
    head: int = 0,
    origin: int = 0,
    lengths: Sequence[int] = (),
) -> Floats:
    """[rows, columns], no more than there are units: the share of each cell's pairs of units that is kept, of
    a dilated config by `head`. Cells of more rows than SAMPLED are judged by so many, the first with them."""
    size, count = units(config, seq)
    edges = _edges(columns, count)
    first = origin // size
    at = first + _edges(rows, count - first)
    i = np.concatenate([_spread(a, z, SAMPLED) for a, z in pairwise(at.tolist())])
    clipped = _clipped(edges, *_bounds(config, seq, i, origin, lengths))
    inside = np.diff(_before(config, seq, causal, i, clipped, head), axis=1) / np.diff(edges)
    begins = np.concatenate([[0], np.cumsum(np.minimum(np.diff(at), SAMPLED))[:-1]])
    total = np.add.reduceat(inside, begins, axis=0)
    return np.asarray(total / np.minimum(np.diff(at), SAMPLED)[:, None])


def row_counts(
    config: AttentionConfig,
    seq: int,
    causal: bool,
    *,
    head: int = 0,
    origin: int = 0,
    lengths: Sequence[int] = (),
) -> Ints:
    """The units that each row keeps, of a dilated config for `head`; of COUNTED rows where there are more."""
    size, count = units(config, seq)
    i = _spread(origin // size, count, COUNTED)
    clipped = _clipped(np.array([0, count]), *_bounds(config, seq, i, origin, lengths))
    return np.diff(_before(config, seq, causal, i, clipped, head), axis=1)[:, 0]


def row_permitted(
    config: AttentionConfig, seq: int, causal: bool, *, origin: int = 0, lengths: Sequence[int] = ()
) -> Ints:
    """The units that each row of `row_counts` may keep: of its documents, and before it if causal."""
    size, count = units(config, seq)
    i = _spread(origin // size, count, COUNTED)
    begin, end = _bounds(config, seq, i, origin, lengths)
    return (np.minimum(end, i + 1) if causal else end) - begin


def _bounds(
    config: AttentionConfig, seq: int, i: Ints, origin: int, lengths: Sequence[int]
) -> tuple[Ints, Ints]:
    """(first, one past the last) unit of the documents of the tokens of row i that ask."""
    size, _ = units(config, seq)
    ends = np.cumsum(lengths or (seq,))
    first, last = np.maximum(i * size, origin), np.minimum((i + 1) * size, seq) - 1
    begins = np.concatenate([[0], ends])[np.searchsorted(ends, first, side="right")]
    return begins // size, -(-ends[np.searchsorted(ends, last, side="right")] // size)


def _clipped(edges: Ints, begin: Ints, end: Ints) -> Ints:
    """[rows, edges]: edges that are no further than the bounds of each row."""
    return np.clip(edges, begin[:, None], end[:, None])


def taken(length: int, rate: int, head: int) -> Ints:
    """Which of the first `length` positions of a dilated branch's segment a head takes."""
    return np.arange(head % rate, length, rate)


def _edges(cells: int, count: int) -> Ints:
    cells = min(cells, count)
    return np.arange(cells + 1, dtype=np.int64) * count // cells


def _spread(begin: int, end: int, maximum: int) -> Ints:
    """All numbers from `begin` to `end`, or one of each of `maximum` strata; which one, by the golden ratio:
    without a period that dilation rates could have."""
    count = min(maximum, end - begin)
    at = np.arange(count)
    if count == end - begin:
        return at + begin
    return begin + ((at + (at * 0.6180339887498949) % 1.0) * (end - begin) / count).astype(np.int64)


def _before(config: AttentionConfig, seq: int, causal: bool, i: Ints, edges: Ints, head: int) -> Ints:
    """[rows, edges]: units that row i keeps before each of its edges, [rows, edges]."""
    size, count = units(config, seq)
    if config.variant == "dilated":
        return _progressions(*_of_head(config, seq, causal, i, head), i, edges)
    if is_dilated_sparse(config):
        branches = BranchRows.of(config, count, causal)
        reach = branches.select(i, row_budget(config, seq))
        return _progressions(branches.rates, *reach, np.ones_like(i), i, edges)
    start, stop = spans(config, seq, size, i, count, causal)
    within = np.minimum(stop[:, :, None], edges[:, None, :]) - start[:, :, None]
    return np.asarray(np.maximum(within, 0).sum(axis=1))


def _of_head(
    config: AttentionConfig, seq: int, causal: bool, i: Ints, head: int
) -> tuple[Ints, Ints, Ints, Ints]:
    """(rates [T, 1], reach to the left and to the right [T, rows], whether the row keeps itself [rows])."""
    lengths = np.minimum(np.array(config.segment_lengths, np.int64), seq)[:, None]
    rates = np.array(config.dilation_rates, np.int64)[:, None]
    place = i % lengths
    takes = place % rates == head % rates
    after = np.minimum(lengths, seq - i + place) - 1 - place
    right = np.zeros_like(place) if causal else after
    return rates, place * takes, right * takes, takes.any(axis=0).astype(np.int64)


def _progressions(rates: Ints, left: Ints, right: Ints, own: Ints, i: Ints, edges: Ints) -> Ints:
    """`_before` of rows that keep the multiples of rates[t] from -left[t] to right[t], over all t, and
    themselves where `own` is 1. Counted from the row on, which is where the sets of offsets meet."""
    x = edges - i[:, None]
    near = np.minimum(left[:, :, None], np.maximum(-x, 0)).reshape(len(rates), -1)
    far = np.minimum(right[:, :, None], np.maximum(x - 1, 0)).reshape(len(rates), -1)
    steps = rates.ravel().tolist()
    count = union_size(zip(steps, near, far, strict=True), x.size).reshape(x.shape)
    all_left = union_size(zip(steps, left, np.zeros_like(left), strict=True), i.size)
    return np.asarray(all_left[:, None] + np.where(x > 0, count + own[:, None], -count))
