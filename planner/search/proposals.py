"""Where the next trial looks. Imports no torch.

From a cold start a sampler left to itself settles for the first kind of attention in which it finds something
that passes, and every kind has dimensions of its own. So at first kinds take turns; then the most promising
do, mostly by steps from their best trial so far: one dimension or two made larger or smaller, coarse steps
before fine ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from planner.question.dimensions import AttentionKind

EXPLORED: Final = 0.5
"""Share of the trials in which all kinds take turns."""
PROMISING: Final = 2
"""Kinds that take turns after that."""
SUGGESTED: Final = 3
"""One trial in so many is the sampler's own after exploring."""
COARSE, FINE = (0.5, 2.0), (1 / 3, 3.0, 0.7, 1.4, 0.85, 1.18, 0.95, 1.05)
"""Factors of steps."""

Rank = tuple[float, float]
"""(how far constraints are exceeded, value): the smaller the better."""


class Leader(NamedTuple):
    """The best trial of a kind."""

    rank: Rank
    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]


class Turns:
    """Says what the next of `trials` trials is to fix, told of those before. `explores`: nothing is
    known to be good yet."""

    def __init__(self, kinds: Sequence[AttentionKind], trials: int, *, explores: bool) -> None:
        self.kinds, self.exploring = kinds, trials * EXPLORED * explores
        self.leaders: dict[AttentionKind, Leader] = {}
        self.stepped: set[frozenset[tuple[str, Any]]] = set()

    def record(
        self, rank: Rank, params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]
    ) -> None:
        """Takes note of a trial that has ended."""
        self.stepped.add(frozenset(params.items()))
        kind: AttentionKind = params.get("kind", self.kinds[0])
        if kind not in self.leaders or rank < self.leaders[kind].rank:
            self.leaders[kind] = Leader(rank, params, distributions)

    def fixed(self, number: int) -> dict[str, Any]:
        """Parameters that are fixed for trial `number`; the sampler suggests the rest."""
        # Dense has nothing to choose and gets one turn.
        kinds = [kind for kind in self.kinds if kind != "dense" or kind not in self.leaders]
        if number >= self.exploring:
            kinds = sorted(self.leaders, key=lambda kind: self.leaders[kind].rank)[:PROMISING] or kinds
            step = None if number % SUGGESTED == 0 else self._step(kinds[number // SUGGESTED % len(kinds)])
            if step is not None:
                return step
        return {"kind": kinds[number % len(kinds)]} if len(self.kinds) > 1 else {}

    def _step(self, kind: AttentionKind) -> dict[str, Any] | None:
        """The best of a kind with one dimension changed, as no trial had it; None if all such were tried."""
        leader = self.leaders[kind]
        for change in _changes(leader):
            params = {**leader.params, **change}
            if frozenset(params.items()) not in self.stepped:
                self.stepped.add(frozenset(params.items()))
                return params
        return None


def _changes(leader: Leader) -> Iterator[dict[str, Any]]:
    """Parameters with other values: one at a time, then two, then one by less."""
    numbers = [name for name, distribution in leader.distributions.items() if not _is_choice(distribution)]
    for name in numbers:
        yield from ({name: _times(leader, name, factor)} for factor in COARSE)
    for name, distribution in leader.distributions.items():
        if isinstance(distribution, CategoricalDistribution) and name not in ("kind", "branches"):
            yield from ({name: choice} for choice in distribution.choices)
    for one, other in itertools.combinations(numbers, 2):
        for factors in itertools.product(COARSE, repeat=2):
            yield {name: _times(leader, name, by) for name, by in zip((one, other), factors, strict=True)}
    for factor in FINE:
        yield from ({name: _times(leader, name, factor)} for name in numbers)


def _is_choice(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, CategoricalDistribution)


def _times(leader: Leader, name: str, factor: float) -> Any:
    """A parameter times a factor, within its range."""
    distribution: Any = leader.distributions[name]
    wanted = leader.params[name] * factor
    if isinstance(distribution, IntDistribution):
        wanted = math.floor(wanted) if factor < 1 else math.ceil(wanted)
    return min(max(wanted, distribution.low), distribution.high)
