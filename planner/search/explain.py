"""Why an answer is the answer: what binds it, what came next, what one step in each dimension would change.
Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Final

import numpy as np
from pydantic import BeforeValidator

from attention.config import MIB, AttentionConfig, Value
from attention.errors import ConfigError
from planner.search import scenario as asked
from planner.search.grid import Found, first, order, passing
from planner.search.picks import Pick, pick
from planner.search.scenario import Point, Scenario

WITHOUT: Final = {
    "memory": "without the memory budget",
    "mass": "without the gate of mass",
    "reach": "without the gate of reach",
    "seconds": "without the gate of time",
}
GAIN: Final = 0.005
"""A constraint binds if without it the answer would be better by more than this."""
LOOKED_AT: Final = 64
"""Candidates behind the best among which the runner-up is looked for."""


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Without(Value):
    """What the answer would be without one constraint."""

    constraint: str
    gain: float
    """By how much better: 0.25 is 25% of the objective."""
    pick: Pick


class Step(Value):
    """The answer with one dimension changed by a step."""

    dimension: str
    before: str
    after: str
    seconds: float
    upper: int
    mass: float
    layers: int | None
    failed: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
    """Constraints that it would not meet."""


class Why(Value):
    """The reasons."""

    binding: str | None
    """The constraint without which the answer would be better by most; None if none keeps it back."""
    without: Annotated[tuple[Without, ...], BeforeValidator(_as_tuple)]
    runner_up: Pick | None
    """The best of another shape: not the same attention with another workspace or backend."""
    behind: float | None
    """By how much of the objective it is behind."""
    steps: Annotated[tuple[Step, ...], BeforeValidator(_as_tuple)]


def explain(scenario: Scenario, found: Found, best: Point) -> Why:
    """The reasons for `best`."""
    without = tuple(sorted(_without(scenario, found, best), key=lambda one: -one.gain))
    runner_up = _runner_up(scenario, found, best)
    return Why(
        binding=without[0].constraint if without else None,
        without=without,
        runner_up=pick(runner_up) if runner_up else None,
        behind=-gain(scenario, best, runner_up) if runner_up else None,
        steps=tuple(_steps(scenario, best)),
    )


def gain(scenario: Scenario, old: Point, new: Point) -> float:
    """By how much of the objective `new` is better than `old`; below 0 if it is worse."""
    if scenario.objective == "speed":
        return old.seconds / max(new.seconds, 1e-12) - 1
    if scenario.objective == "quality":
        return new.mass - old.mass
    return new.seq / old.seq - 1


def _without(scenario: Scenario, found: Found, best: Point) -> Iterator[Without]:
    """Each constraint without which the answer would be better."""
    gates = scenario.gates
    loosened = {
        "memory": replace(scenario, budget=1 << 60),
        "mass": replace(scenario, gates=replace(gates, min_mass=None)),
        "reach": replace(scenario, gates=replace(gates, layers=None)),
        "seconds": replace(scenario, gates=replace(gates, max_seconds=None)),
    }
    for name, other in loosened.items():
        if other == scenario or (name == "memory" and scenario.free_length):
            continue
        _, good = passing(other, found.table)
        new = first(other, found.table, order(other, found.table, np.flatnonzero(good)))[1]
        if new is not None and gain(scenario, best, new) > GAIN:
            yield Without(constraint=name, gain=gain(scenario, best, new), pick=pick(new))


def _runner_up(scenario: Scenario, found: Found, best: Point) -> Point | None:
    """The grid's best of another shape."""
    _, good = passing(scenario, found.table)
    ordered = order(scenario, found.table, np.flatnonzero(good))
    ordered = ordered[: LOOKED_AT * 16]
    others = [at for at in ordered if _shape(found.table.config(int(at), scenario)) != _shape(best.config)]
    return first(scenario, found.table, np.array(others[:LOOKED_AT], np.int64))[1]


def _shape(config: AttentionConfig) -> tuple[object, ...]:
    """What is attended to."""
    return config.variant, config.segment_lengths, config.dilation_rates, config.pattern


def _steps(scenario: Scenario, best: Point) -> Iterator[Step]:
    """One step down and one up in each dimension that there is."""
    for dimension, before, after, config in neighbours(best.config):
        try:
            found = asked.point(scenario, config, best.seq)
        except ConfigError:
            continue
        yield Step(
            dimension=dimension, before=before, after=after, seconds=found.seconds, upper=found.memory.upper,
            mass=found.mass, layers=found.layers, failed=asked.failed(scenario, found),
        )  # fmt: skip


def neighbours(config: AttentionConfig) -> Iterator[tuple[str, str, str, AttentionConfig]]:
    """(dimension, value now, value then, the config) of half and double of each dimension."""
    pattern = config.pattern
    for factor in (0.5, 2.0):
        if pattern is not None:
            read = {"block_size": pattern.block_size}
            if config.variant == "adaptive" or pattern.pattern_type == "dilated_sparse":
                read |= {"sparsity_ratio": pattern.sparsity_ratio}  # type: ignore[dict-item]
            else:
                read |= {"local_window_size": pattern.local_window_size}
            if pattern.pattern_type == "global_local" and config.variant != "adaptive":
                read |= {"global_tokens": pattern.global_tokens}
            for name, value in read.items():
                after: Any = min(value * factor, 1.0) if isinstance(value, float) else round(value * factor)
                if after != value and after > 0:
                    yield from _changed(config, name, value, after, pattern=(name, after))
        if config.segment_lengths:
            lengths = tuple(round(length * factor) for length in config.segment_lengths)
            yield from _changed(config, "segment_lengths", config.segment_lengths, lengths)
        if len(config.dilation_rates) > 1:
            rates = tuple(math.ceil(rate * factor) if rate > 1 else 1 for rate in config.dilation_rates)
            if rates != config.dilation_rates:
                yield from _changed(config, "dilation_rates", config.dilation_rates, rates)
        after = round(config.workspace_bytes * factor)
        yield from _changed(config, "workspace_bytes", config.workspace_bytes, after)


def _changed(
    config: AttentionConfig, name: str, before: Any, after: Any, pattern: tuple[str, Any] | None = None
) -> Iterator[tuple[str, str, str, AttentionConfig]]:
    """The config with one field changed, if there is such a config."""
    update: dict[str, Any] = {name: after}
    if pattern is not None and config.pattern is not None:
        try:
            update = {"pattern": config.pattern.model_copy(update={pattern[0]: pattern[1]})}
        except ConfigError:
            return
    try:
        yield name, _said(before), _said(after), config.model_copy(update=update)
    except ConfigError:
        return


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, int) and value >= MIB and value % MIB == 0:
        return f"{value // MIB} MiB"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"
