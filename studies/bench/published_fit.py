"""Fits what GPU kernels cost to published measurements: `python -m studies.bench.published_fit`

Writes `planner/data/gpu_seconds.json`, which the planner reads: the coefficients, and how far they were off
where a file of the sources was left out.

    published_i ~ sum_j terms_ij x_j, every x_j >= 0, by least squares of relative errors

Forward first, then backward in units of forward's costs. Rows that are far off count less (Huber's weights).
A coefficient of few rows is drawn a little towards its like (of another generation of cards, of the other
size of shared memory), and one without rows is as its like. A source counts as its rows, with their square
root.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any, Final, NamedTuple, get_args

import numpy as np

from attention.sizes.arrays import Floats
from planner.files import write_whole
from planner.fitting.speed import nnls
from planner.gpus import Gpu, backends, known
from planner.speed.gpu_kernels import (
    COEFFICIENTS,
    KERNELS,
    STEPS,
    UNSEEN,
    Coefficients,
    Direction,
    family_of,
    terms,
)
from planner.workload import Dtype
from studies.bench.published import BACKENDS, Published, read_published

FAMILIES: Final = ("flash2", "cudnn", "efficient", "flex")
ALIKE: Final = 0.1
"""Weight of a coefficient being as its like, beside a row's of 1."""
ALIKE_SOFTMAX: Final = 0.02
"""The same of what softmax costs: generations differ in their units for exponentials more than in how well
they multiply."""
ALIKE_MULTIPLE: Final = 0.5
"""The same of a backward's cost in units of forward's, which differs less."""
COVERED: Final = 0.8
"""Share of held-out rows that a range is to cover."""
LEVELS: Final = tuple(level / 100 for level in range(70, 100))
LEAST_ROWS: Final = 8
"""Held-out rows of a class from which it has a range of its own."""
ROUNDS: Final = 12
"""Of reweighting."""
TURNS: Final = 6
"""Of forward and backward."""
FIRST_MULTIPLE: Final = 2.5
"""Of forward's costs, in backward, before any row told: it multiplies five matrices where forward does
two."""
LIKE: Final = (
    ("cudnn forward calls", "flash2 forward calls"),
    ("flash2 backward pairs", "flash2 backward work ampere"),
    ("efficient backward pairs", "efficient backward work ampere"),
    ("cudnn backward pairs", "cudnn backward work hopper"),
    (" blackwell ultra", " blackwell"),
    (" geforce blackwell", " ampere"),
    (" blackwell", " hopper"),
    (" hopper", " ampere"),
    ("work pascal", "work volta single"),
    ("pairs pascal half", "pairs pascal"),
    ("pairs pascal", "pairs volta"),
    ("work volta single", "work volta"),
    ("pairs volta", "pairs 64 large"),
    (" pascal", " volta"),
    (" volta", " ampere"),
    (" wide single", " wide"),
    (" small", " large"),
    (" 128 ", " 64 "),
    (" single", ""),
    (" wide", ""),
    ("backward calls", "forward calls"),
    ("backward numbers", "forward numbers"),
)
"""(what a coefficient's name has, what its like has there): the first that makes the name of another one."""


class HeldOut(NamedTuple):
    """A row, and what was predicted for it by rows of other groups alone."""

    row: Published
    predicted: float
    unseen: bool
    """Whether none of those rows has some coefficient of its kernel on its card: it is alone in its class."""

    @property
    def error(self) -> float:
        """predicted / published - 1."""
        return self.predicted / self.row.seconds - 1

    @property
    def kind(self) -> str:
        """The class whose errors are pooled; see `planner.speed.gpu_kernels.range_of`."""
        return UNSEEN if self.unseen else f"{self.row.kernel} {self.row.steps[-1]}"


class _Fact(NamedTuple):
    """A row with what the model takes of it."""

    row: Published
    gpu: Gpu
    units: dict[Direction, dict[str, float]]


def fitted(rows: Sequence[Published]) -> dict[str, float]:
    """The coefficients that fit the rows best."""
    found: dict[str, float] = {}
    for family in FAMILIES:
        found |= fitted_family([row for row in rows if row.kernel == family], family, found)
    return found


def fitted_family(rows: Sequence[Published], family: str, others: Coefficients) -> dict[str, float]:
    """The coefficients of a family, by rows of it alone; `others`: those of families in whose units its
    are."""
    facts = [
        _Fact(
            row,
            row.gpu,
            {step: {u: float(n) for u, n in row.call.units(step, row.gpu).items()} for step in row.steps},
        )
        for row in rows
    ]
    found = {name: float(_is_times(name)) for name in names_of(family, "forward")}
    for name in names_of(family, "backward"):
        found[name] = FIRST_MULTIPLE if _is_multiple(name) else float(_is_times(name))
    # Each step with the other one as it is: a measurement of both tells about either.
    for _ in range(TURNS):
        for step in STEPS:
            mine = [fact for fact in facts if step in fact.units]
            if mine:
                found |= _step(mine, family, step, {**others, **found})
    return found


def _is_multiple(name: str) -> bool:
    """Whether a coefficient of backward is in units of forward's costs."""
    return name.partition(" backward ")[2].startswith(("work", "pairs"))


def _is_times(name: str) -> bool:
    """Whether a coefficient is in units of another kernel's costs."""
    return name.endswith(" times")


def _step(facts: Sequence[_Fact], family: str, step: Direction, found: Coefficients) -> dict[str, float]:
    """The coefficients of a step of a family, the others being as they were found."""
    names = names_of(family, step)
    at = {name: index for index, name in enumerate(names)}
    matrix, target = np.zeros((len(facts), len(names))), np.ones(len(facts))
    for index, fact in enumerate(facts):
        for name, seconds in _parts(fact, step, found):
            if name in at:
                matrix[index, at[name]] += seconds / fact.row.seconds
            else:
                target[index] -= found.get(name, 0.0) * seconds / fact.row.seconds
    return dict(zip(names, _solved(matrix, target, names, found).tolist(), strict=True))


def _parts(fact: _Fact, step: Direction, found: Coefficients) -> Iterator[tuple[str, float]]:
    """(coefficient, seconds for 1 of it) of a row. In `forward` those of a backward in units of forward's
    costs are forward's, so many times."""
    kernel, dtype = fact.row.call.kernel, fact.row.dtype
    ahead = terms(kernel, "forward", fact.gpu, dtype, found)
    for each, units in fact.units.items():
        for term in ahead if each == "forward" else terms(kernel, each, fact.gpu, dtype, found):
            if each == "backward" and step == "forward" and _is_multiple(term.coefficient):
                times = units[term.unit] * found[term.coefficient]
                yield from ((one.coefficient, times * one.scale) for one in ahead if one.unit == term.unit)
            else:
                yield term.coefficient, units[term.unit] * term.scale


@cache
def names_of(family: str, step: Direction) -> tuple[str, ...]:
    """The coefficients of a family's step on all known cards."""
    names: set[str] = set()
    for gpu, kernel, dtype in product(known(), KERNELS, get_args(Dtype)):
        if (
            family_of(kernel) == family
            and dtype != "float64"
            and gpu.rates["float16"]
            and can_run(family, gpu)
        ):
            names |= {term.coefficient for term in terms(kernel, step, gpu, dtype, {})}
    return tuple(sorted(names))


def can_run(family: str, gpu: Gpu) -> bool:
    return BACKENDS.get(family, family) in backends(gpu, "float16")


def like_of(name: str, names: Container[str]) -> str | None:
    """The coefficient that this one is as where no row tells; None where there is none."""
    alike = (name.replace(one, other) for one, other in LIKE if one in name)
    return next((other for other in alike if other != name and other in names), None)


def _weight(name: str) -> float:
    """Of a coefficient being as its like, beside a row's of 1."""
    if _is_multiple(name):
        return ALIKE_MULTIPLE
    return ALIKE_SOFTMAX if " pairs " in name else ALIKE


def _solved(relative: Floats, target: Floats, names: Sequence[str], found: Coefficients) -> Floats:
    likes = [like_of(name, found) for name in names]
    at = {name: index for index, name in enumerate(names)}
    weights, x = np.ones(len(target)), np.array([found[name] for name in names])
    for _ in range(ROUNDS):
        prior, expected = np.zeros((len(names), len(names))), np.zeros(len(names))
        for index, like in enumerate(likes):
            if like is None:
                continue
            of_like = x[at[like]] if like in at else found[like]
            size = max(x[index], of_like, 1e-9)
            weight = _weight(names[index]) / size
            prior[index, index] = weight
            if like in at:
                prior[index, at[like]] = -weight
            else:
                expected[index] = weight * of_like
        x = nnls(
            np.concatenate([relative * weights[:, None], prior]), np.concatenate([target * weights, expected])
        )
        errors = np.abs(relative @ x - target)
        bound = 1.5 * max(float(np.median(errors)), 0.01)
        weights = np.sqrt(np.minimum(1, bound / np.maximum(errors, 1e-12)))
    return x


def held_out(rows: Sequence[Published], group_of: Callable[[Published], str]) -> list[HeldOut]:
    """Each row as predicted by the rows of all other groups."""
    every = fitted(rows)
    found = []
    for group in sorted({group_of(row) for row in rows}):
        out = [row for row in rows if group_of(row) == group]
        rest = [row for row in rows if group_of(row) != group]
        kernels: set[str] = {row.kernel for row in out}
        known = dict(every)
        for family in FAMILIES:
            if family in kernels or (family == "flex" and "flash2" in kernels):
                known |= fitted_family([row for row in rest if row.kernel == family], family, known)
        seen = seen_of(rest)
        found += [HeldOut(row, row.predicted(known), not coefficients_of(row) <= seen) for row in out]
    return found


def coefficients_of(row: Published) -> set[str]:
    """The coefficients of a row's kernel on its card."""
    kernel, gpu = row.call.kernel, row.gpu
    return {term.coefficient for step in row.steps for term in terms(kernel, step, gpu, row.dtype, {})}


def seen_of(rows: Iterable[Published]) -> set[str]:
    """The coefficients that rows tell something about."""
    return {name for row in rows for name in coefficients_of(row)}


RatioRange = tuple[float, float]


def ranges(rows: Sequence[HeldOut], level: float) -> dict[str, RatioRange]:
    """(low, high) of published / predicted of so large a share of each class, each file of the sources
    counting alike; of a class of few rows or one file that of all."""
    everyone = _quantiles(rows, level)
    found = {}
    for kind in (UNSEEN, *(f"{family} {step}" for family in FAMILIES for step in STEPS)):
        mine = [row for row in rows if row.kind == kind]
        enough = len(mine) >= LEAST_ROWS and len({row.row.source for row in mine}) > 1
        found[kind] = _quantiles(mine, level) if enough else everyone
    return found


def _quantiles(rows: Sequence[HeldOut], level: float) -> RatioRange:
    counts = Counter(row.row.source for row in rows)
    weights = np.array([1 / counts[row.row.source] for row in rows])
    ratios = np.array([row.row.seconds / row.predicted for row in rows])
    order = np.argsort(ratios)
    places = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    low, high = np.interp([(1 - level) / 2, (1 + level) / 2], places, ratios[order])
    return min(float(low), 1.0), max(float(high), 1.0)


def covered(rows: Sequence[HeldOut], level: float) -> float:
    """Share of the rows within the ranges that the rows of all other files give."""
    inside = 0
    for source in {row.row.source for row in rows}:
        of_others = ranges([row for row in rows if row.row.source != source], level)
        for row in rows:
            if row.row.source == source:
                low, high = of_others[row.kind]
                inside += low <= row.row.seconds / row.predicted <= high
    return inside / len(rows)


def least_level(rows: Sequence[HeldOut]) -> float:
    """The least level whose ranges cover as many held-out rows as they are to."""
    return next((level for level in LEVELS if covered(rows, level) >= COVERED), LEVELS[-1])


def record(rows: Sequence[Published]) -> dict[str, Any]:
    """What the planner reads."""
    apart = held_out(rows, lambda row: row.source)
    found, level = fitted(rows), least_level(apart)
    seen = seen_of(rows)
    return {
        "note": "What attention kernels cost on GPUs; see planner/speed/gpu_kernels.py.",
        "command": "python -m studies.bench.published_fit",
        "rows": len(rows),
        "sources": len({row.source for row in rows}),
        "coefficients": {name: _rounded(value) for name, value in found.items()},
        "unseen": sorted(found.keys() - seen),
        "level": level,
        "covered": round(covered(apart, level), 3),
        "ranges": {kind: [_rounded(end) for end in both] for kind, both in ranges(apart, level).items()},
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    data = record(read_published())
    write_whole(COEFFICIENTS, f"{json.dumps(data, indent=1)}\n".encode(), "the coefficients")
    print(f"{COEFFICIENTS}: {len(data['coefficients'])} coefficients of {data['rows']} measurements")


if __name__ == "__main__":
    main()
