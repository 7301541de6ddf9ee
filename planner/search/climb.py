"""The last steps: from the best candidate on to a neighbour that is better, as long as there is one, coarse
steps before fine ones, so that no single step of those that an answer lists would improve it. The grid and
the trials find which attention it is, these how wide exactly. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from attention.config import MIB, AttentionConfig
from attention.errors import ConfigError
from planner.configs import columns_of
from planner.question.dimensions import Stride, attention_kind, dimensions_of
from planner.question.space import Space
from planner.ranks.ring import shardings, way_text
from planner.search.candidates import unit_of
from planner.search.evaluate import Point, failed, gain, point, seconds_of
from planner.search.scenario import Scenario
from planner.search.suggest import parameters
from planner.workload import Workload

MOVES: Final = 24
"""Most moves of one climb."""
STEPS: Final = ((0.5, 2.0), (0.7, 1.4), (0.85, 1.18), (0.93, 1.08))
"""Factors of a step down and of one up, coarse before fine. An answer lists the first."""


def climbed(scenario: Scenario, space: Space, best: Point) -> Point:
    """The best point that single steps lead to, each to the best neighbour in the space that passes."""
    if scenario.free_length:
        return best  # there a neighbour has another length, and is found by the grid
    tried: dict[AttentionConfig, Point | None] = {best.config: best}
    for _ in range(MOVES):
        for factors in STEPS:
            ahead = best
            for *_, config in neighbours(best.config, scenario.workload, factors):
                if config not in tried:
                    # What is no faster than the best so far is none that helps, however the rest of it is.
                    tried[config] = _passing(scenario, space, config, ahead)
                other = tried[config]
                if other is not None and gain(scenario, ahead, other) > 0:
                    ahead = other
            if ahead is not best:
                break
        else:
            break
        best = ahead
    return best


def _passing(scenario: Scenario, space: Space, config: AttentionConfig, best: Point) -> Point | None:
    """A config's figures, if it is in the space, may be better than the best and passes everything."""
    if parameters(config, space, scenario.workload) is None:
        return None
    try:
        if scenario.objective == "speed" and seconds_of(scenario, config, best.seq) >= best.seconds:
            return None
        other = point(scenario, config, best.seq)
    except ConfigError:
        return None
    return None if failed(scenario, other) else other


def neighbours(
    config: AttentionConfig, workload: Workload, factors: tuple[float, ...] = STEPS[0]
) -> Iterator[tuple[str, str, str, AttentionConfig]]:
    """(dimension, value now, value then, the config) of each dimension times each factor, and of each other
    way in which ranks may share the call."""
    pattern = config.pattern
    unit = unit_of(pattern.block_size, pattern.edges) if pattern else unit_of(None, "block")
    for factor in factors:
        for dimension in dimensions_of(attention_kind(config)):
            if dimension.step is None:
                continue
            value = dimension.of(config)
            after = _stepped(dimension.step, value, factor, unit)
            if after == value:
                continue
            try:
                yield dimension.attribute, _text(value), _text(after), dimension.changed(config, after)
            except ConfigError:
                continue
    if workload.gpus > 1 and config.sharding is not None:
        for sharding in shardings(columns_of(config, workload.seq), workload):
            if sharding != config.sharding:
                names = way_text(config.sharding), way_text(sharding)
                yield "exchange", *names, config.model_copy(update={"sharding": sharding})


def _stepped(step: Stride, value: Any, factor: float, unit: int) -> Any:
    """A value times a factor, as far as its dimension takes such steps; blocks have `unit` tokens."""
    if isinstance(value, tuple) and step == "blocks":
        return tuple(_whole(length * factor, unit) for length in value)
    if step == "blocks":
        return _whole(value * factor, unit)
    if step == "rates":
        rates = tuple(math.ceil(rate * factor) if rate > 1 else 1 for rate in value)
        return rates if len(value) > 1 else value
    if step == "share":
        return min(float(f"{value * factor:.3g}"), 1.0)
    return max(round(value * factor), 1) if factor in STEPS[0] else value


def _whole(tokens: float, unit: int) -> int:
    return max(round(tokens / unit), 1) * unit


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, int) and value >= MIB and value % MIB == 0:
        return f"{value // MIB} MiB"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"
