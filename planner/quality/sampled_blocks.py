"""Captured mass of rows that no closed form sums over the whole sequence: of dilated_sparse and adaptive
patterns, by a fixed sample of query blocks. Imports no torch.

Letters: `a` decays [J, 1, 1], `w` their shares; `N` candidates, `M` rows of each, `T` branches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from attention.layout import BranchRows
from attention.sizes.arrays import Amount, Floats, Ints, row_blocks
from planner.quality.sums import series, triangle
from planner.sampling import stratified

ROWS = 128
"""Query blocks looked at; all of them where there are no more."""
FIRST = 15
"""Query blocks at the beginning that are looked at besides."""
RECALL = 0.95
"""Assumed of a trained scorer: how much of the best blocks' mass it finds."""


def subsets(count: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(sign, members) of every union's inclusion and exclusion over `count` sets."""
    for size in range(1, count + 1):
        for members in itertools.combinations(range(count), size):
            yield (1 if size % 2 else -1), members


def common(steps: Iterable[Ints]) -> Ints:
    """Least common multiples; 2^31, which is beyond any sequence, in place of larger ones."""
    return np.asarray(reduce(lambda x, y: np.minimum(np.lcm(x, y), 1 << 31), steps))


@dataclass(frozen=True, slots=True, eq=False)
class PatternRows(BranchRows):
    """Rows of many patterns at once: `lengths`, `rates` [T, rows], `blocks` [rows], or one for all;
    rates ascend and each divides the next where `chains`."""

    chains: bool

    def _offsets(self, reach: tuple[Ints, Ints]) -> Ints:
        total: Ints = np.zeros_like(reach[0][0])
        for side in reach[:1] if self.causal else reach:
            for sign, step, near in disjoint(self.rates, side, self.chains):
                total = total + sign * (near // step)
        return np.asarray(total)


def disjoint(rates: Ints, reach: Ints, chains: bool) -> Iterator[tuple[int, Ints, Ints]]:
    """(sign, step, reach): progressions whose signed sum is the union of those of all branches."""
    if not chains:
        for sign, members in subsets(len(rates)):
            yield (sign, common(rates[t] for t in members), np.minimum.reduce([reach[t] for t in members]))
        return
    # A branch adds what lies beyond the reach of all finer ones.
    finer = None
    for step, near in zip(rates, reach, strict=True):
        if finer is None:
            yield 1, step, near
            finer = near
        else:
            far = np.maximum(finer, near)
            yield 1, step, far
            yield -1, step, finer
            finer = far


def _spread() -> Floats:
    """[ROWS], in [0, 1): the second dimension of Sobol's sequence. Sequence number, its mirror image and this
    fill boxes of powers of two evenly, and so do places in nested segments of rows picked by it."""
    bits = ROWS.bit_length() - 1
    k, value, direction = np.arange(ROWS), np.zeros(ROWS, np.int64), 1 << (bits - 1)
    for bit in range(bits):
        value ^= ((k >> bit) & 1) * direction
        direction ^= direction >> 1
    return (value + 0.5) / ROWS


def _sample(blocks: Ints, unit: Ints) -> tuple[Ints, Ints, Ints, Floats]:
    """(rows, part, parts, weights in rows), each [N, M]: which parts of which of so many query blocks are
    looked at.

    All rows of few, each in as many parts as there is room for. Otherwise one row of each of up to ROWS
    strata, spread over the places in segments of `unit` blocks times a power of two, and more of the first,
    in which each sees a larger part of what it is permitted.
    """
    n, entry = blocks[:, None], np.arange(ROWS + FIRST)
    few = n <= ROWS
    parts = np.maximum(ROWS // n, 1)
    inside = entry < n * parts
    every = np.where(inside, entry // parts, 0)
    stratum = np.minimum(unit, blocks)[:, None] / ROWS
    stratum = stratum * np.exp2(np.ceil(np.log2(n / (stratum * ROWS))))
    later = (stratified(_spread())[1:] * stratum).astype(np.int64)
    count = np.where(later < n, np.minimum(stratum, n - np.arange(1, ROWS) * stratum), 0.0)
    # Of the first stratum, runs that grow: their ends, then rows in their middles.
    ends = np.rint(np.expm1(np.arange(FIRST + 2) / (FIRST + 1) * np.log1p(stratum)))
    early = np.minimum(((ends[:, :-1] + ends[:, 1:]) / 2).astype(np.int64), n - 1)
    rows = np.concatenate([early, np.where(later < n, later, 0)], axis=1)
    weights = np.concatenate([np.diff(ends, axis=1), np.maximum(count, 0)], axis=1)
    return (
        np.where(few, every, rows),
        np.where(few, entry % parts, 0),
        np.where(few, parts, 1 + 0 * entry),
        np.where(few, inside, weights).astype(np.float64),
    )


class _Grid:
    """Sampled rows, or parts of them, of the queries from the `first` on, and what their queries are
    permitted, summed over the queries."""

    def __init__(self, a: Floats, seq: Ints, first: Ints, size: Ints, causal: bool, unit: Ints) -> None:
        self.a, self.causal, self.seq, self.size = a, causal, seq[:, None], size[:, None]
        self.blocks = -(-self.seq // self.size)
        before = (first // size)[:, None]
        self.every = self.blocks - before <= ROWS
        """[N, 1]: whether all rows that ask are looked at."""
        rows, part, parts, weights = _sample((self.blocks - before)[:, 0], unit)
        self.rows = before + rows
        inside = np.minimum(self.size, self.seq - self.rows * self.size)  # tokens of the block
        begin, end = (np.minimum(x * self.size // parts, inside) for x in (part, part + 1))
        begin = np.maximum(begin, first[:, None] - self.rows * self.size)  # what does not ask
        weights = weights * np.maximum(end - begin, 0)
        # Rows that stand for others are whole, and so the weights are not exactly the tokens.
        self.weights = weights / weights.sum(axis=1, keepdims=True)
        # What has no queries weighs nothing; a query is put there so that nothing divides by zero.
        begin = np.where(end > begin, begin, 0)
        end = np.maximum(end, begin + 1)
        self.first, self.queries = self.rows * self.size + begin, end - begin
        self.before, self.after = begin, self.size - end  # tokens of the whole block on both sides
        last = self.first + self.queries
        self.whole = triangle(a, last) - triangle(a, self.first)
        self.own = triangle(a, end) - triangle(a, begin)
        if not causal:
            self.whole = self.whole + _mirrored(a, self.seq - last, self.queries)
            self.own = self.own + _mirrored(a, inside - end, self.queries)
        self.near = series(a, 1, self.queries)  # these queries seen from next to them
        self.full = series(a, 1, self.size)

    def steps(self, step: Amount, count: Amount) -> Floats:
        """Mass, for a query at the near end of its block, of the whole blocks at `step`, 2 step, ...
        count step; `near` and the way to that end make it the sum over the queries of each row."""
        a, size = self.a, self.size
        return np.asarray(np.exp(-a * ((step - 1) * size + 1)) * self.full * series(a, step * size, count))

    def beside(self, left: Ints, right: Ints) -> Floats:
        """Mass sum of the `left` and `right` nearest blocks, over the queries of each row."""
        near = self.steps(1, left) * np.exp(-self.a * self.before)
        if not self.causal:
            near = near + self.steps(1, right) * np.exp(-self.a * self.after)
            near = near - self.missing() * ((right > 0) & (self.rows + right == self.blocks - 1)) / self.near
        return np.asarray(near * self.near)

    def missing(self) -> Floats:
        """Mass sum that the last block would have beyond the last token, over the queries of each row."""
        away = self.seq - self.first - self.queries + 1
        pads = self.blocks * self.size - self.seq
        return np.asarray(np.exp(-self.a * away) * self.near * series(self.a, 1, pads))


def _mirrored(a: Floats, after: Ints, queries: Ints) -> Floats:
    """What `queries` with `after` tokens to their right see on that side, without themselves."""
    return triangle(a, after + queries) - triangle(a, after) - queries


def dilated_sparse(
    a: Floats,
    w: Floats,
    seq: Ints,
    first: Ints,
    size: Ints,
    ratio: Floats,
    lengths: Sequence[Ints],
    rates: Sequence[Ints],
    sinks: int,
    causal: bool,
) -> tuple[Floats, Floats]:
    """(mass of the exponentials, share of the permitted sinks kept), each [N]; arguments [N]."""
    chains = np.logical_and.reduce(
        [fine <= coarse for fine, coarse in itertools.pairwise(rates)] or [size > 0]
    )
    chains &= np.logical_and.reduce(
        [coarse % fine == 0 for fine, coarse in itertools.pairwise(rates)] or [size > 0]
    )
    mass, sinks_kept = np.zeros(seq.shape), np.zeros(seq.shape)
    for chain in (True, False):
        some = np.flatnonzero(chains == chain)
        if some.size:
            shortest = reduce(np.minimum, lengths)[some] // size[some]
            grid = _Grid(a, seq[some], first[some], size[some], causal, shortest)
            branches = _patterns(grid, [s[some] for s in lengths], [r[some] for r in rates], chain)
            mass[some], sinks_kept[some] = _selected(grid, w, branches, ratio[some], sinks)
    return mass, sinks_kept


def _patterns(grid: _Grid, lengths: Sequence[Ints], rates: Sequence[Ints], chains: bool) -> PatternRows:
    """The branches of every row of a grid. Small numbers, because half as wide ones divide in half the
    time."""
    blocks = grid.blocks
    largest = max(int(blocks.max()) * len(rates), *(int(r.max()) for r in rates))
    kind = np.int32 if chains and largest < 1 << 30 else np.int64

    def each(values: Ints) -> Ints:
        return np.broadcast_to(values, grid.rows.shape).ravel().astype(kind)

    return PatternRows(
        lengths=np.stack([each(np.minimum(s[:, None] // grid.size, blocks)) for s in lengths]),
        rates=np.stack([each(r[:, None]) for r in rates]),
        blocks=each(blocks),  # type: ignore[arg-type]  # arithmetic on it is elementwise
        causal=grid.causal,
        chains=chains,
    )


def _selected(
    grid: _Grid, w: Floats, branches: PatternRows, ratio: Floats, sinks: int
) -> tuple[Floats, Floats]:
    shape, count = grid.rows.shape, len(branches.rates)
    kind = branches.rates.dtype
    budget = np.asarray(row_blocks(ratio, grid.blocks[:, 0]))[:, None]  # type: ignore[arg-type]
    flat = np.broadcast_to(budget, shape).ravel().astype(kind)
    rows = grid.rows.ravel().astype(kind)
    # A selection stops where a row has all there is, and in some branches that is before their end; what
    # these offer holds for the row's neighbours too, whose turn it is in another of them.
    rooms, all_there_is = branches.rooms(rows), branches.kept(rows, flat) < flat  # type: ignore[arg-type]
    chosen = branches.select(rows, flat)  # type: ignore[arg-type]
    left, right = (
        np.where(all_there_is, room * branches.rates, near).reshape(count, *shape)
        for room, near in zip(rooms, chosen, strict=True)
    )
    steps = branches.rates.reshape(count, *shape)[:, :, :1].astype(np.int64)
    sums = grid.own.copy()
    for side, away in ((left, grid.before), (right, grid.after))[: 1 if grid.causal else 2]:
        total = np.zeros_like(sums)
        for sign, step, near in disjoint(steps, side, branches.chains):
            total += sign * grid.steps(step, near // step)
        sums += total * grid.near * np.exp(-grid.a * away)
    if not grid.causal:
        to_last = grid.blocks - 1 - grid.rows
        sees = np.any([(to_last % steps[t] == 0) & (to_last <= right[t]) for t in range(count)], axis=0)
        sums -= grid.missing() * (sees & (to_last > 0))
    mass = (np.tensordot(w, sums / grid.whole, axes=1) * grid.weights).sum(axis=1)
    return mass, _sinks_kept(grid, steps, left, right, sinks, branches.chains)


def _sinks_kept(grid: _Grid, steps: Ints, left: Ints, right: Ints, sinks: int, chains: bool) -> Floats:
    """[N], share of the permitted sinks that a query keeps.

    Where rows are sampled, a branch of rate r keeps a block for one row in r, whatever rows the sample
    hit: which one it is, is averaged over.
    """
    total = share = np.zeros(grid.rows.shape)
    for k in range(sinks):
        away = grid.rows - k // grid.size
        if k and (grid.size >= sinks).all():  # all in one block, seen by the same rows
            total = total + share * _weight(grid, k, sinks)
            continue
        exact = np.zeros(total.shape, np.bool_)
        for t in range(len(steps)):
            exact |= (away % steps[t] == 0) & (away <= left[t]) & (away >= -right[t])
        mean = np.zeros(total.shape)
        for sign, step, near in disjoint(steps, left + steps, chains):
            mean += sign * (away < near) / step
        share = np.where(grid.every | (away <= 0), exact, mean)
        total = total + share * _weight(grid, k, sinks)
    return np.asarray((total * grid.weights).sum(axis=1))


def _weight(grid: _Grid, k: int, sinks: int) -> Floats:
    """1 / (sinks permitted) of the queries of each row that are permitted sink k, averaged over all."""
    number = np.minimum(sinks, grid.seq)
    if not grid.causal:
        return np.asarray((k < number) / number + np.zeros(grid.rows.shape))
    weight = np.maximum(grid.first + grid.queries - np.maximum(grid.first, sinks), 0) / number
    for q in range(k, sinks):  # early queries share their sink mass among few
        weight = weight + ((grid.first <= q) & (q < grid.first + grid.queries)) / (q + 1)
    return np.asarray(weight / grid.queries)


def adaptive(
    a: Floats,
    w: Floats,
    far: float,
    sink_mass: float,
    seq: Ints,
    first: Ints,
    size: Ints,
    ratio: Floats,
    causal: bool,
) -> Floats:
    """[N], mass of a trained scorer's choice: the own block, and RECALL of the best set among
    {with or without the first block} x {with or without one block of planted tokens} and the nearest ones
    for the rest. A row that may keep all of its blocks keeps all mass.

    The last decay and share are those of uniform mass; `far` of it is planted.
    """
    grid = _Grid(a, seq, first, size, causal, -(-seq // size))
    budget = np.asarray(row_blocks(ratio[:, None], grid.blocks))  # type: ignore[arg-type]
    after = np.zeros_like(grid.rows) if causal else grid.blocks - 1 - grid.rows
    choices = grid.rows + after
    own = grid.own / grid.whole
    best = np.zeros(grid.rows.shape)
    for sink, needle in itertools.product((0, 1), (0, 1)):
        rest = np.minimum(budget - 1 - sink - needle, choices)
        count = np.maximum(rest, 0)
        right = np.minimum(after, np.maximum(count // 2, count - grid.rows))  # sides by turns, left first
        left = count - right
        near = grid.beside(left, right) / grid.whole
        gain = np.tensordot(w, near, axes=1)
        gain += sink_mass * (grid.rows > 0) * (1 if sink else left >= grid.rows)
        gain += needle * far * (1 - own[-1] - near[-1])
        best = np.maximum(best, np.where(rest >= 0, gain, 0.0))
    # The sinks are taken to lie in the first block, which is the first row's own.
    mass = np.tensordot(w, own, axes=1) + (grid.rows == 0) * sink_mass + RECALL * best
    return np.asarray((np.where(budget - 1 >= choices, 1.0, mass) * grid.weights).sum(axis=1))
