"""The grid's exact optimum and Pareto front.

The grid is evaluated whole, as arrays. What arrays cannot tell (what the caching allocator rounds up, how far
a pattern reaches) is computed for one candidate after another, in the order of the objective, until one
passes: the first to pass is the optimum of the grid. Imports no torch and no Optuna.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attention.config import AttentionConfig
from attention.sizes.arrays import Floats, Ints
from planner.bisection import largest
from planner.configs import Columns, columns_of
from planner.quality.mass import distinct, shape_of
from planner.search import evaluate
from planner.search.evaluate import Figures, Point
from planner.search.scenario import Scenario

UNIT: Final = 64
"""Tokens that lengths are found to where there are no blocks."""
FIRST_LOOK: Final = 16
"""Candidates whose reach is asked for at once, to begin with."""
CLOSE: Final = 8
"""Candidates whose exact lengths are compared."""
FAMILIES: Final = 4
"""Families of candidates that ranks share of which one is looked at exactly."""
STEPS: Final = 16
"""Most lengths that are tried for a candidate of ranks."""
FAILURES: Final = 12
"""Candidates of a family that may fail exactly until no more of it are looked at."""
OFF: Final = 2.0
"""Times by which arrays may have too many seconds of ranks."""
SAME: Final = 0.005
"""Lengths that are shorter than the longest by less are taken as equal to it, and the faster config wins:
nobody waits ten times as long for one token in two hundred."""


class Table(NamedTuple):
    """Candidates of all kinds in one row of arrays."""

    parts: tuple[Columns, ...]
    starts: Ints
    """Where each part begins."""
    seq: Ints
    figures: Figures

    def __len__(self) -> int:
        return int(self.seq.size)

    def config(self, index: int, scenario: Scenario) -> AttentionConfig:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part].config(int(index - self.starts[part]), scenario.at(int(self.seq[index])))

    def family(self, index: int) -> tuple[Any, ...]:
        """What makes candidates different in kind."""
        part = self.parts[int(np.searchsorted(self.starts, index, side="right")) - 1]
        kind = part.variant, part.pattern_type, len(part.lengths)
        return *kind, part.edges, part.backend, part.sharding

    def apart(self, which: Ints) -> Iterator[tuple[NDArray[np.bool_], Columns]]:
        """Some candidates, part by part: (which of `which`, the candidates)."""
        home = np.searchsorted(self.starts, which, side="right") - 1
        for part in np.flatnonzero(np.bincount(home)):  # np.unique would import all of np.ma
            mine = home == part
            yield mine, self.parts[part].take(which[mine] - self.starts[part])

    def shaped(self, config: AttentionConfig, which: Ints) -> NDArray[np.bool_]:
        """[len(which)]: whether each of some candidates attends to what a config does, perhaps with another
        workspace or backend."""
        matches = np.zeros(which.size, bool)
        wanted = columns_of(config, 0)
        kind = wanted.variant, wanted.pattern_type, len(wanted.lengths)
        for mine, columns in self.apart(which):
            if (columns.variant, columns.pattern_type, len(columns.lengths)) == kind:
                fields = zip(shape_of(columns)[1:], shape_of(wanted)[1:], strict=True)
                matches[mine] = reduce(np.logical_and, [field == value for field, value in fields])
        return matches

    def reaching(self, scenario: Scenario, which: Ints) -> NDArray[np.bool_]:
        """[len(which)]: whether each of some candidates passes the gate of reach."""
        passes = np.empty(which.size, bool)
        for mine, columns in self.apart(which):
            passes[mine] = evaluate.reaching(scenario, columns)
        return passes

    def may_reach(self, scenario: Scenario, which: Ints) -> Ints:
        """Some candidates without those that fail that gate, as far as can be told without a search."""
        possible = np.empty(which.size, bool)
        for mine, columns in self.apart(which):
            possible[mine] = evaluate.may_reach(scenario, columns)
        return which[possible]

    def settled(self, scenario: Scenario, which: Ints) -> Table:
        """The table with the masses of some candidates as they are, also if they are below the gate."""
        mass = self.figures.mass.copy()
        for mine, columns in self.apart(which):
            if evaluate.bounds_mass(columns):
                mass[which[mine]] = evaluate.masses(scenario, columns, exactly=True)
        return Table(self.parts, self.starts, self.seq, self.figures._replace(mass=mass))


@dataclass(frozen=True)
class Solved:
    """The solution of the grid."""

    table: Table
    best: Point | None
    """The optimum; None if nothing passes."""
    evaluated: int
    """Candidates of the grid, all of which were evaluated."""
    fit: int
    """Candidates that fit by memory, as arrays tell."""
    passed: int
    """Candidates that fit and pass the gates of mass and time."""


def tabulate(scenario: Scenario, parts: Sequence[Columns]) -> Table:
    """All figures of all candidates; with the length free, each at the longest that fits."""
    if scenario.free_length:
        parts = [part for part in (_at_longest(scenario, part) for part in parts) if len(part)]
    return tabled(parts, [evaluate.figures(scenario, part) for part in parts])


def tabled(parts: Sequence[Columns], figures: Sequence[Figures]) -> Table:
    """Candidates and their figures, part by part, in one table."""
    if not parts:
        nothing = np.zeros(0)
        return Table((), np.zeros(1, np.int64), nothing.astype(np.int64), Figures(nothing, nothing, nothing))
    return Table(
        tuple(parts),
        np.cumsum([0, *map(len, parts[:-1])]),
        np.concatenate([np.broadcast_to(np.asarray(part.seq, np.int64), len(part)) for part in parts]),
        Figures(*(np.concatenate(column) for column in zip(*figures, strict=True))),
    )


def passing(scenario: Scenario, table: Table) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(which fit, which of those pass the gates of mass and time too), as far as arrays tell."""
    beyond = evaluate.excess(scenario, *table.figures)
    return beyond["memory"] <= 0, _none(beyond)


def _none(beyond: dict[str, Any]) -> NDArray[np.bool_]:
    """[candidates]: whether a candidate exceeds no constraint."""
    passes: NDArray[np.bool_] = np.logical_and.reduce([share <= 0 for share in beyond.values()])
    return passes


def order(scenario: Scenario, table: Table, which: Ints) -> Ints:
    """Candidates, the best first."""
    memory, seconds, mass = (column[which] for column in table.figures)
    if scenario.objective == "speed":
        keys: tuple[Any, ...] = (-mass, memory, seconds)
    elif scenario.objective == "quality":
        keys = (memory, seconds, -np.round(mass, 9))
    else:
        longest = table.seq[which].max(initial=1)
        keys = (-table.seq[which], seconds, _lost(longest, np.maximum(table.seq[which], 1)))
    return which[np.lexsort(keys)]


def _lost(longest: int, seq: Any) -> Any:
    """How often a length is `SAME` below the longest: those of one number count as equal."""
    return np.floor(np.log(longest / seq) / np.log1p(SAME))


def enumerate_grid(scenario: Scenario, parts: Sequence[Columns]) -> Solved:
    """The grid's optimum."""
    table = tabulate(scenario, parts)
    fits = int(passing(scenario, table)[0].sum())
    if scenario.free_length:
        table = _shortened(scenario, table)
    good = np.flatnonzero(passing(scenario, table)[1])
    best = first(scenario, table, order(scenario, table, good))
    return Solved(table, best, sum(map(len, parts)), fits, good.size)


def first(scenario: Scenario, table: Table, ordered: Ints) -> Point | None:
    """The figures of the first of candidates that passes everything. Where the length is free, arrays say a
    little too much of it, and the best of the first few is taken; where ranks share the call, of those of
    different kinds (`_first_of_ranks`)."""
    if scenario.network is not None:
        return _first_of_ranks(scenario, table, ordered)
    points = (exact(scenario, table, index) for index in _reaching_in_order(scenario, table, ordered))
    passed = (point for point in points if point is not None)
    nearest = list(itertools.islice(passed, CLOSE if scenario.free_length else 1))
    longest = max((point.seq for point in nearest), default=1)
    return min(nearest, key=lambda one: (_lost(longest, one.seq), one.seconds), default=None)


def _first_of_ranks(scenario: Scenario, table: Table, ordered: Ints) -> Point | None:
    """The best of the first candidates of each family that passes everything. Of ranks arrays know seconds
    within a factor and memory from below, for a family by about the same share: those are passed over that
    would take more than there is if the arrays were as far off as of the one that did, and families of which
    `FAILURES` did."""
    best: Point | None = None
    passed: set[Any] = set()
    failures: Counter[Any] = Counter()
    shares: dict[Any, tuple[float, float]] = {}
    limits = (np.inf if scenario.free_length else scenario.budget, scenario.gates.max_seconds or np.inf)

    def is_wanted(index: int) -> bool:
        family = table.family(index)
        said = table.figures.memory[index], table.figures.seconds[index]
        found = zip(said, shares.get(family, (1.0, 1.0)), limits, strict=True)
        exceeds = any(figure * share > limit for figure, share, limit in found)
        if family in passed or failures[family] >= FAILURES or exceeds:
            return False
        if best is None or scenario.objective != "speed" or not _may_be_better(scenario, table, index, best):
            return True
        # Whether it is slower is told sooner than how far it reaches.
        config, seq = table.config(index, scenario), int(table.seq[index])
        if evaluate.seconds_of(scenario, config, seq) < best.seconds:
            return True
        passed.add(family)
        return False

    for index in _reaching_in_order(scenario, table, ordered, is_wanted):
        enough = len(passed) == FAMILIES * (1 + scenario.free_length)
        if best is not None and (enough or not _may_be_better(scenario, table, index, best)):
            break
        point, family = exact(scenario, table, index), table.family(index)
        if point is not None:
            passed.add(family)
            best = point if best is None or evaluate.gain(scenario, best, point) > 0 else best
            continue
        failures[family] += 1
        if not scenario.free_length:
            config, seq = table.config(index, scenario), int(table.seq[index])
            said = table.figures.memory[index], table.figures.seconds[index]
            upper = evaluate.memory_of(scenario, config, seq).upper
            slow = evaluate.seconds_of(scenario, config, seq) if upper <= scenario.budget else said[1]
            share, known = (upper / said[0], slow / said[1]), shares.get(family, (np.inf, np.inf))
            shares[family] = min(known[0], share[0]), min(known[1], share[1])
    return best


def _may_be_better(scenario: Scenario, table: Table, index: int, best: Point) -> bool:
    """Whether a candidate may be better than a point, as far as arrays tell of ranks."""
    if scenario.objective == "speed":
        return bool(table.figures.seconds[index] <= OFF * best.seconds)
    if scenario.objective == "quality":
        return bool(table.figures.mass[index] > best.mass)
    return bool(table.seq[index] > best.seq * (1 + SAME))


def exact(scenario: Scenario, table: Table, index: int) -> Point | None:
    """A candidate's figures, if it passes; where the length is free, at the longest at which it does."""
    seq, config = int(table.seq[index]), table.config(index, scenario)
    if not scenario.free_length:
        if evaluate.memory_of(scenario, config, seq).upper > scenario.budget:
            return None
    else:
        seq = _longest_exactly(scenario, config, seq)
        if seq == 0:
            return None
    point = evaluate.point(scenario, config, seq)
    return None if evaluate.failed(scenario, point) else point


def _longest_exactly(scenario: Scenario, config: AttentionConfig, maximum: int) -> int:
    """The longest sequence of at most `maximum` tokens, to the block, that fits exactly; 0 for none."""
    unit = config.pattern.block_size if config.pattern else UNIT

    least = scenario.workload.least_blocks(unit)

    def fits(blocks: int) -> bool:
        return (
            blocks >= least and evaluate.memory_of(scenario, config, blocks * unit).upper <= scenario.budget
        )

    high = maximum // unit
    if fits(high):
        return high * unit
    if scenario.network is not None:
        return _near_longest(scenario, config, max(least, 1) * unit, high * unit, unit)
    # What arrays said is near: step back from it, further each time.
    low, step = high - 1, 1
    while low > 0 and not fits(low):
        high, low, step = low, max(low - 2 * step, 0), 2 * step
    return largest(fits, low, high) * unit


def _near_longest(scenario: Scenario, config: AttentionConfig, least: int, beyond: int, unit: int) -> int:
    """A length of at most `SAME` below the longest that fits, of ranks, whose plans take a while; 0 for none.
    `beyond` does not fit. Memory is about linear in the length."""

    def upper(seq: int) -> int:
        return evaluate.memory_of(scenario, config, seq).upper

    if least >= beyond or upper(least) > scenario.budget:
        return 0
    low, below, high, above = least, upper(least), beyond, upper(beyond)
    for step in range(STEPS):
        if high - low <= max(unit, SAME * low):
            break
        share = 0.5 if step % 3 == 2 else (scenario.budget - below) / max(above - below, 1)
        # A little below where it should be, so that mostly what is found fits.
        seq = low + int((high - low) * min(max(share, 0.02), 0.98) * 0.998) // unit * unit
        seq = min(max(seq, low + unit), high - unit)
        found = upper(seq)
        if found <= scenario.budget:
            low, below = seq, found
        else:
            high, above = seq, found
    return low


def _reaching_in_order(
    scenario: Scenario, table: Table, ordered: Ints, is_wanted: Callable[[int], bool] = lambda index: True
) -> Iterator[int]:
    """Candidates that pass the gate of reach, in the order of `ordered`: checked in growing chunks where
    there is a formula, and where it takes a search one by one, of those that are wanted by then."""
    known: dict[Any, bool] = {}  # candidates that differ in what is not of the pattern reach as far
    start, size = 0, FIRST_LOOK
    while start < ordered.size:
        chunk = ordered[start : start + size]
        verdicts, patterns = np.full(chunk.size, None, object), np.full(chunk.size, None, object)
        for mine, columns in table.apart(chunk):
            if evaluate.searches_reach(columns):
                places = np.flatnonzero(mine)
                verdicts[places[~evaluate.may_reach(scenario, columns)]] = False
                rows, back = distinct(columns)
                kind = columns.variant, columns.pattern_type
                names = [(*kind, *row) for row in rows.tolist()]
                for place, which in zip(places.tolist(), back.tolist(), strict=True):
                    patterns[place] = names[which]
            else:
                verdicts[mine] = evaluate.reaching(scenario, columns)
        for at, passes in enumerate(verdicts):
            if not is_wanted(int(chunk[at])):
                continue
            if passes is None:
                if patterns[at] not in known:
                    known[patterns[at]] = bool(table.reaching(scenario, chunk[at : at + 1])[0])
                passes = known[patterns[at]]
            if passes:
                yield int(chunk[at])
        start, size = start + size, min(2 * size, 1024)


# Lengths.


def _units(columns: Columns) -> Any:
    return columns.block_size if columns.variant in ("block_sparse", "adaptive") else UNIT


def _at_longest(scenario: Scenario, columns: Columns) -> Columns:
    """The candidates that fit at all, each at the longest sequence that does, up to the workload's.

    Memory is nearly linear in the length, so that interpolation between a length that fits and one that does
    not finds the boundary in a few steps; every third step halves, for what is not linear.
    """
    unit = np.broadcast_to(np.asarray(_units(columns), np.int64), len(columns))

    def bytes_at(which: Ints, blocks: Ints) -> Floats:
        longer = replace(columns.take(which), seq=blocks * unit[which])
        return evaluate.least_memory(scenario, longer)

    everything = np.arange(len(columns))
    least = np.asarray(scenario.workload.least_blocks(unit))  # type: ignore[arg-type]
    low, high = least - 1, np.maximum(scenario.workload.seq // unit, least) + 1
    below, above = np.zeros(len(columns)), np.full(len(columns), np.inf)
    budget, step = float(scenario.budget), 0
    active, guess = everything, high - 1
    while active.size:
        memory = bytes_at(active, guess)
        fits = memory <= budget
        low[active[fits]], below[active[fits]] = guess[fits], memory[fits]
        high[active[~fits]], above[active[~fits]] = guess[~fits], memory[~fits]
        active = everything[high - low > 1]
        step += 1
        bottom, width = low[active], (high - low)[active]
        share = np.where(
            np.isfinite(above[active]) & (step % 3 != 0),
            (budget - below[active]) / np.maximum(above[active] - below[active], 1),
            0.5,
        )
        guess = bottom + np.clip((share * width).astype(np.int64), 1, width - 1)
    some = np.flatnonzero(low >= least)
    return replace(columns, seq=low * unit).take(some)


def _shortened(scenario: Scenario, table: Table) -> Table:
    """The table with the lengths of candidates that fail a gate there cut to where they pass, as far as that
    could make them the longest; the others of them go. Whose reach takes a search is not cut for it."""
    if not len(table):
        return table
    good = passing(scenario, table)[1]
    for mine, columns in table.apart(np.arange(len(table))):
        good[mine] &= _quick_reach(scenario, columns)
    longest = _reaching_in_order(scenario, table, order(scenario, table, np.flatnonzero(good)))
    best_length = next((int(table.seq[at]) for at in longest), 0)
    low, high = np.where(good, table.seq, 0), table.seq.copy()
    bad = ~good
    while True:
        active = np.flatnonzero(
            bad & (high > max(best_length, 1) * (1 + SAME)) & (high - low > _table_units(table))
        )
        if not active.size:
            break
        middle = (np.maximum(low[active], best_length) + high[active]) // 2
        middle = middle // _table_units(table)[active] * _table_units(table)[active]
        stuck = middle <= low[active]
        passed = np.zeros(active.size, bool)
        for mine, part in table.apart(active):
            columns = replace(part, seq=np.maximum(middle[mine], 1))
            fits = np.zeros(mine.sum())  # it is shorter than what fits
            figures = fits, evaluate.times(scenario, columns), evaluate.masses(scenario, columns)
            passed[mine] = (
                (columns.seq >= (scenario.workload.queries or 1))
                & _none(evaluate.excess(scenario, *figures))
                & _quick_reach(scenario, columns)
            )
        low[active] = np.where(passed, middle, low[active])
        high[active] = np.where(passed & ~stuck, high[active], middle)
        high[active[stuck]] = low[active[stuck]]
        best_length = max(best_length, int(low[active].max(initial=0)))
    chosen = np.flatnonzero(low > 0)
    if not bad[chosen].any():
        return table
    parts = [replace(part, seq=low[chosen[mine]]) for mine, part in table.apart(chosen)]
    return tabulate(replace(scenario, objective="speed"), parts)


def _quick_reach(scenario: Scenario, columns: Columns) -> NDArray[np.bool_]:
    """Which candidates pass the gate of reach; those pass for which it takes a search."""
    if evaluate.searches_reach(columns):
        return np.ones(len(columns), bool)
    return evaluate.reaching(scenario, columns)


def _table_units(table: Table) -> Ints:
    """Tokens that each candidate's length is a multiple of."""
    return np.concatenate([np.broadcast_to(np.asarray(_units(p), np.int64), len(p)) for p in table.parts])


# The Pareto set.


def pareto(scenario: Scenario, solved: Solved) -> Ints:
    """Candidates that pass everything and that none surpasses in memory, time and mass (and length, where it
    is free) together, fastest first.

    Costs that differ by less than half a percent count as equal, or the set is mostly of twins.
    """
    table = solved.table
    _, good = passing(scenario, table)
    left = np.flatnonzero(good)
    memory, seconds, mass = (column[left] for column in table.figures)
    costs = np.stack(
        [
            np.round(np.log(np.maximum(seconds, 1e-12)) * 200),
            np.round(np.log(memory) * 200),
            np.round((1 - mass) * 500),
            -np.round(np.log(np.maximum(table.seq[left], 1)) * 200),
        ],
        axis=1,
    )
    # What costs least altogether is surpassed by nothing: take it, drop what it surpasses, go on.
    ordered = np.lexsort((seconds, costs.sum(axis=1)))
    left, costs = left[ordered], costs[ordered]
    front: list[int] = []
    reaches: dict[int, bool] = {}
    while left.size:
        here = int(left[0])
        if here not in reaches:
            chunk = left[: FIRST_LOOK * 2]
            reaches |= dict(zip(chunk.tolist(), table.reaching(scenario, chunk).tolist(), strict=True))
        keep = np.ones(left.size, bool)
        keep[0] = False
        if reaches[here]:
            front.append(here)
            keep = (costs < costs[0]).any(axis=1)
        left, costs = left[keep], costs[keep]
    return np.array(sorted(front, key=lambda at: float(table.figures.seconds[at])), np.int64)


__all__ = ["Solved", "Table", "enumerate_grid", "exact", "first", "order", "pareto", "passing", "tabulate"]
