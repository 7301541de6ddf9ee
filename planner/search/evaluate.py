"""What a candidate answers: memory, seconds, quality. Imports no torch.

`figures` has many candidates at once, from the models over arrays. `point` has one config exactly: its
memory estimate with the allocator replayed, its reach by search. What `figures` says of memory is never
above what `point` does, so that candidates may be passed over by it.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attention.config import AttentionConfig
from attention.sizes.arrays import Floats, Ints
from planner.calibration import least_upper
from planner.configs import Columns
from planner.memory.dry_runs import dry_runs, dry_upper
from planner.memory.estimate import MemoryEstimate, estimate
from planner.memory.nccl import nccl_share
from planner.memory.peaks import peaks
from planner.memory.rank_peaks import rank_peaks
from planner.quality import mass as quality
from planner.quality import reach
from planner.ranks.links import network_of
from planner.search.gates import MASS, MEMORY, REACH, SECONDS
from planner.search.scenario import Scenario
from planner.speed import seconds as speed
from planner.speed.call_time import seconds_and_range
from planner.speed.rank_seconds import rank_seconds
from planner.speed.rates import speed_fit_of
from planner.speed.timeline import longest_rank

CLEARLY: Final = 1e-9
"""By more than this a mass is below the gate, whatever was rounded on the way."""


class Figures(NamedTuple):
    """Of many candidates, an entry each."""

    memory: Floats
    """Bytes: at most what the upper bound is."""
    seconds: Floats
    mass: Floats
    """What is below the gate of mass may be too large, but is below it: see `masses`."""


def figures(scenario: Scenario, columns: Columns) -> Figures:
    """What the models have for candidates."""
    return Figures(least_memory(scenario, columns), times(scenario, columns), masses(scenario, columns))


def least_memory(scenario: Scenario, columns: Columns) -> Floats:
    """Bytes of the upper bound, or fewer: what the caching allocator rounds up is not among it, and where
    ranks share the call, what their closed forms leave out."""
    found, likely, most = _peaks(scenario, columns)
    calibration, outside = scenario.calibration, scenario.outside + likely
    if calibration is None and not isinstance(scenario.card, str):
        upper = dry_upper(found, outside, dry_runs(), scenario.workload.dtype)
    else:
        upper = least_upper(calibration, found + outside)
    return np.asarray(upper + most - likely, np.float64)


def _peaks(scenario: Scenario, columns: Columns) -> tuple[Ints, Any, Any]:
    """(bytes at the peak, of NCCL likely, of NCCL at most) of each candidate."""
    workload = scenario.workload
    if workload.gpus == 1:
        return peaks(columns, workload, scenario.machine), 0, 0
    found, peers = rank_peaks(columns, workload, scenario.machine)
    if isinstance(scenario.card, str):
        return found, 0, 0
    network = network_of(workload.gpus, scenario.card)
    shares = [nccl_share(workload.gpus, count, network) for count in range(int(peers.max()) + 1)]
    likely, most = (np.array([share[which] for share in shares])[peers] for which in (0, 1))
    return found, likely, most


def times(scenario: Scenario, columns: Columns) -> Floats:
    """Seconds of candidates; where ranks share the call, about those."""
    asked = columns, scenario.workload, scenario.machine, scenario.rates
    return speed.seconds(*asked) if scenario.network is None else rank_seconds(*asked, scenario.network)


def masses(scenario: Scenario, columns: Columns, *, exactly: bool = False) -> Floats:
    """Of candidates that differ in backend or workspace alone it is the same, and computed once.

    Unless it is asked for `exactly`, a dilated_sparse candidate that is below the gate may have the mass of
    one that keeps more blocks in its place, if that is below the gate too: few pass, and each takes long.
    """
    table, back = quality.distinct(columns)
    known: dict[tuple[float, ...], float]
    known = scenario.known.setdefault(f"mass of {columns.variant} {columns.pattern_type}", {})
    rows = [tuple(row) for row in table.tolist()]
    first = np.zeros(len(table), np.int64)
    first[back[::-1]] = np.arange(len(columns))[::-1]

    def computed(which: Ints) -> Floats:
        new = np.array([at for at in which if rows[at] not in known], np.int64)
        if new.size:
            found = quality.mass(columns.take(first[new]), scenario.workload, scenario.profile)
            known.update(zip((rows[at] for at in new), found.tolist(), strict=True))
        return np.array([known[rows[at]] for at in which])

    gate = scenario.gates.min_mass
    if exactly or gate is None or not bounds_mass(columns):
        return computed(np.arange(len(table)))[back]
    # Alike but for the fraction kept, the widest first: of which no mass is above the one before it.
    _, family = np.unique(np.delete(table, quality.KEPT, axis=1), axis=0, return_inverse=True)
    ordered = np.lexsort((-table[:, quality.KEPT], family.ravel()))
    begins = np.flatnonzero(np.diff(family.ravel()[ordered], prepend=-1))
    found = np.empty(len(table))
    ends, at = np.append(begins[1:], len(table)), begins
    while at.size:
        found[ordered[at]] = computed(ordered[at])
        below = found[ordered[at]] < gate - CLEARLY
        for start, end in zip(at[below], ends[below], strict=True):
            found[ordered[start:end]] = found[ordered[start]]
        at, ends = at[~below] + 1, ends[~below]
        at, ends = at[at < ends], ends[at < ends]
    return found[back]


def bounds_mass(columns: Columns) -> bool:
    """Whether `masses` may have bounds in place of masses."""
    return columns.pattern_type == "dilated_sparse" and not np.ptp(columns.seq)


def reaching(scenario: Scenario, columns: Columns) -> NDArray[np.bool_]:
    """Which candidates pass the gate of reach."""
    if scenario.gates.layers is None:
        return np.ones(len(columns), bool)
    return reach.reaches(columns, scenario.workload, scenario.gates.layers)


def may_reach(scenario: Scenario, columns: Columns) -> NDArray[np.bool_]:
    """Which candidates may pass the gate of reach, as far as is told without a search."""
    if scenario.gates.layers is None:
        return np.ones(len(columns), bool)
    return reach.may_reach(columns, scenario.workload, scenario.gates.layers)


def searches_reach(columns: Columns) -> bool:
    """Whether reach of these candidates is found by a search over their blocks or tokens."""
    return columns.variant == "dilated" or columns.pattern_type == "dilated_sparse"


class Point(NamedTuple):
    """One config on one length, exactly."""

    config: AttentionConfig
    memory: MemoryEstimate
    seconds: float
    low: float
    """The range that the seconds are probably in; see `planner.calibration.Prediction`."""
    high: float
    mass: float
    layers: int | None
    """Until the last token hears of all; None for never."""

    @property
    def seq(self) -> int:
        return self.memory.workload.seq


def memory_of(scenario: Scenario, config: AttentionConfig, seq: int) -> MemoryEstimate:
    """A config's memory, computed once for a scenario."""
    known: dict[tuple[AttentionConfig, int], MemoryEstimate] = scenario.known.setdefault("memory", {})
    if (config, seq) not in known:
        known[config, seq] = estimate(config, scenario.at(seq), scenario.card, **scenario.options)
    return known[config, seq]


def seconds_of(scenario: Scenario, config: AttentionConfig, seq: int) -> float:
    """A config's seconds, of the rank that takes longest; computed once for a scenario."""
    known: dict[tuple[AttentionConfig, int], float] = scenario.known.setdefault("seconds", {})
    if (config, seq) not in known:
        asked = config, scenario.at(seq), scenario.machine, scenario.rates
        known[config, seq] = (
            speed.seconds_of(*asked)
            if scenario.network is None
            else longest_rank(*asked, scenario.network).seconds
        )
    return known[config, seq]


def point(scenario: Scenario, config: AttentionConfig, seq: int) -> Point:
    """All figures of one config, computed once for a scenario."""
    known: dict[tuple[AttentionConfig, int], Point] = scenario.known.setdefault("points", {})
    if (config, seq) not in known:
        known[config, seq] = _point(scenario, config, seq)
    return known[config, seq]


def _point(scenario: Scenario, config: AttentionConfig, seq: int) -> Point:
    workload, card = scenario.at(seq), scenario.card
    fit = speed_fit_of(card, workload, scenario.options)
    of_card = None if isinstance(card, str) else card
    one = workload.model_copy(update={"gpus": 1})
    time = seconds_and_range(config, one, scenario.machine, scenario.rates, of_card, fit)
    if scenario.network is not None:
        time = time.around(seconds_of(scenario, config, seq))
    return Point(
        config,
        memory_of(scenario, config, seq),
        *time,
        quality.mass_of(config, workload, scenario.profile),
        reach.layers(config, workload),
    )


def excess(scenario: Scenario, memory: Any, seconds: Any, mass: Any) -> dict[str, Any]:
    """By how much each gate but reach is exceeded, 0 or less where it is met; floats, or arrays."""
    shares = {
        "memory": MEMORY.excess(scenario, memory),
        "mass": MASS.excess(scenario, mass),
        "seconds": SECONDS.excess(scenario, seconds),
    }
    return {name: share for name, share in shares.items() if share is not None}


def failed(scenario: Scenario, found: Point) -> tuple[str, ...]:
    """The gates that a config does not pass, by name."""
    shares = excess(scenario, found.memory.upper, found.seconds, found.mass)
    shares["reach"] = REACH.excess(scenario, found.layers) or 0.0
    return tuple(name for name, share in shares.items() if share > 0)


def gain(scenario: Scenario, old: Point, new: Point) -> float:
    """By how much of the objective `new` is better than `old`; below 0 if it is worse."""
    if scenario.objective == "speed":
        return old.seconds / max(new.seconds, 1e-12) - 1
    if scenario.objective == "quality":
        return new.mass - old.mass
    return new.seq / old.seq - 1


def gains(scenario: Scenario, old: Point, seq: NDArray[np.int64], new: Figures) -> Floats:
    """`gain` of many candidates, as arrays tell."""
    if scenario.objective == "speed":
        return old.seconds / np.maximum(new.seconds, 1e-12) - 1
    if scenario.objective == "quality":
        return new.mass - old.mass
    return np.asarray(seq / old.seq - 1, np.float64)
