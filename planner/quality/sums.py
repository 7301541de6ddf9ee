"""Closed-form sums of exponentials over rows of keys: the arithmetic under `quality`. Imports no torch.

Letters: `a` a decay, 1 / scale; `x = exp(-a)`; `y` a position; `L` a step; `W` a window with the own block.
Arrays broadcast; a decay may be as small as 1e-5 / seq, which stands for a uniform share.
"""

from __future__ import annotations

import numpy as np

from attention.sizes.arrays import Amount, Floats, Ints

RATIO = 1.2
"""Ratio of a cell's last query to its first, far from an edge."""


def series(a: Floats, step: Amount, terms: Amount) -> Floats:
    """sum over m < terms of exp(-a step m)."""
    decay = a * step
    return np.asarray(np.expm1(-decay * terms) / np.expm1(-decay))


def triangle(a: Floats, y: Amount, step: Amount = 1) -> Floats:
    """sum over q < y of series(a, step, q // step + 1) / step: what the queries of a segment's first y
    tokens see of its start, of every `step`-th token from themselves on, one query in `step` seeing."""
    gap = -np.expm1(-a * step)
    if isinstance(step, int) and step == 1:
        return np.asarray((y + (1 - gap) * np.expm1(-a * y) / gap) / gap)
    whole, rest = y // step, y % step
    full = (whole + (1 - gap) * np.expm1(-a * step * whole) / gap) / gap
    return np.asarray(full + rest / step * series(a, step, whole + 1))


def cells(seq: Ints, causal: bool, first: Ints | int = 0) -> Ints:
    """[candidates, cells + 1]: ends of runs of queries from the `first` of each candidate on, single near an
    edge of the sequence and longer by `RATIO` away from it. Runs may be empty."""
    return np.asarray(np.maximum(_cells(seq, causal), np.asarray(first)[..., None]))


def _cells(seq: Ints, causal: bool) -> Ints:
    longest = int(seq.max(initial=1))
    ends = [0]
    while ends[-1] < longest:
        ends.append(max(ends[-1] + 1, int(ends[-1] * RATIO)))
    near = np.array(ends, np.int64)
    if causal:
        return np.minimum(near, seq[:, None])
    half = (seq // 2)[:, None]
    left = np.minimum(near[near < longest // 2 + 2], half)
    return np.concatenate([left, half, seq[:, None] - left[:, ::-1]], axis=1)


def permitted(a: Floats, ends: Ints, seq: Amount, causal: bool) -> Floats:
    """Exponentials over all permitted keys, summed over the queries before each of `ends`."""
    left = triangle(a, ends)
    return left if causal else np.asarray(left + triangle(a, seq) - triangle(a, seq - ends) - ends)


def segments(a: Floats, ends: Ints, seq: Amount, length: Amount, step: Amount, causal: bool) -> Floats:
    """Exponentials over the keys in the own segment at distances of multiples of `step`, one query in `step`
    seeing; summed over queries like `permitted`."""
    whole, rest = ends // length, ends % length
    left = whole * triangle(a, length, step) + triangle(a, rest, step)
    if causal:
        return np.asarray(left)
    inside = np.minimum(length, seq - whole * length)  # of the segment that `ends` is in
    right = triangle(a, inside, step) - triangle(a, inside - rest, step)
    return np.asarray(left + whole * triangle(a, length, step) + right - ends / step)


def windows(
    a: Floats, ends: Ints, seq: Amount, size: Amount, reach: Amount, shared: Amount, causal: bool
) -> Floats:
    """Exponentials over blocks of `size` up to `reach` away and over the `shared` first, which see all
    keys; summed over queries like `permitted`."""
    wide = (reach + 1) * size
    start, head = (shared + reach) * size, shared * size  # from `start` on, rows leave out something
    after = np.maximum(ends - start, 0)
    rows, rest = after // size, after % size
    # Of the smaller or larger of an end and a place there are few: those of all ends, and of all places.
    to_ends = triangle(a, ends)
    full = np.where(ends < start, to_ends, triangle(a, start))
    block = triangle(a, wide) - triangle(a, wide - size)
    left = full + rows * block + triangle(a, wide - size + rest) - triangle(a, wide - size)
    gap = -np.expm1(-a)
    before = np.exp(-a * (start - head + 1)) * -np.expm1(-a * head)
    left = left + before / gap * (-np.expm1(-a * after)) / gap
    if causal:
        return np.asarray(left)
    blocks = -(-seq // size)
    last = np.maximum((blocks - 1 - reach) * size, head)  # from here on rows see up to the end
    first = np.minimum(head, seq)
    last = np.minimum(np.maximum(last, first), seq)
    from_ends = triangle(a, seq - ends)
    early = np.where(ends < first, from_ends, triangle(a, seq - first))
    late = np.where(ends > last, from_ends, triangle(a, seq - last))
    middle = np.clip(ends, first, last) - first
    rows, rest = middle // size, middle % size
    right = triangle(a, seq) - early + rows * block
    right = right + triangle(a, wide) - triangle(a, wide - rest)
    right = right + triangle(a, seq - last) - late
    return np.asarray(left + right - ends)
