"""The last steps: from the best candidate on to a neighbour that is better, as long as there is one, coarse
steps before fine ones, so that no single step of those that an answer lists would improve it. The grid and
the trials find which attention it is, these how wide exactly. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from attention.config import MIB, AttentionConfig
from attention.errors import ConfigError
from planner.question.space import Space
from planner.search.evaluate import Point, failed, gain, point, seconds_of
from planner.search.scenario import Scenario
from planner.search.suggest import parameters

MOVES: Final = 24
"""At most."""
STEPS: Final = ((0.5, 2.0), (0.7, 1.4), (0.85, 1.18), (0.93, 1.08))
"""Factors of a step down and of one up, coarse before fine. An answer lists the first."""
UNIT: Final = 64
"""Tokens that segment lengths without blocks are multiples of."""


def climbed(scenario: Scenario, space: Space, best: Point) -> Point:
    """The best point that single steps lead to, each to the best neighbour in the space that passes."""
    if scenario.free_length:
        return best  # there a neighbour has another length, and is found by the grid
    known: dict[AttentionConfig, Point | None] = {best.config: best}
    for _ in range(MOVES):
        for factors in STEPS:
            found = best
            for *_, config in neighbours(best.config, factors):
                if config not in known:
                    # What is no faster than the best so far is none that helps, however the rest of it is.
                    known[config] = _passing(scenario, space, config, found)
                other = known[config]
                if other is not None and gain(scenario, found, other) > 0:
                    found = other
            if found is not best:
                break
        else:
            break
        best = found
    return best


def _passing(scenario: Scenario, space: Space, config: AttentionConfig, best: Point) -> Point | None:
    """A config's figures, if it is in the space, may be better than the best and passes everything."""
    if parameters(config, space, scenario.workload) is None:
        return None
    try:
        if scenario.objective == "speed" and seconds_of(scenario, config, best.seq) >= best.seconds:
            return None
        found = point(scenario, config, best.seq)
    except ConfigError:
        return None
    return None if failed(scenario, found) else found


def neighbours(
    config: AttentionConfig, factors: tuple[float, ...] = STEPS[0]
) -> Iterator[tuple[str, str, str, AttentionConfig]]:
    """(dimension, value now, value then, the config) of each dimension times each factor."""
    unit = config.pattern.block_size if config.pattern else UNIT
    for factor in factors:
        for name, value in _dimensions(config).items():
            after = _times(name, value, factor, unit)
            if after == value:
                continue
            try:
                yield name, _said(value), _said(after), _changed(config, name, after)
            except ConfigError:
                continue


def _dimensions(config: AttentionConfig) -> dict[str, Any]:
    """What a config's attention depends on, and its workspace."""
    found: dict[str, Any] = {}
    pattern = config.pattern
    if pattern is not None:
        found["block_size"] = pattern.block_size
        if config.variant == "adaptive" or pattern.pattern_type == "dilated_sparse":
            found["sparsity_ratio"] = pattern.sparsity_ratio
        else:
            found["local_window_size"] = pattern.local_window_size
            if pattern.pattern_type == "global_local":
                found["global_tokens"] = pattern.global_tokens
    if config.segment_lengths:
        found["segment_lengths"] = config.segment_lengths
    if len(config.dilation_rates) > 1:
        found["dilation_rates"] = config.dilation_rates
    return found | {"workspace_bytes": config.workspace_bytes}


def _times(name: str, value: Any, factor: float, unit: int) -> Any:
    """A dimension's value times a factor: windows, global tokens and segments in whole blocks of `unit`,
    what is a power of two by powers of two."""
    if name == "dilation_rates":
        return tuple(math.ceil(rate * factor) if rate > 1 else 1 for rate in value)
    if isinstance(value, tuple):
        return tuple(_whole(length * factor, unit) for length in value)
    if isinstance(value, float):
        return min(float(f"{value * factor:.3g}"), 1.0)
    if name in ("local_window_size", "global_tokens"):
        return _whole(value * factor, unit)
    return max(round(value * factor), 1) if factor in STEPS[0] else value


def _whole(tokens: float, unit: int) -> int:
    return max(round(tokens / unit), 1) * unit


def _changed(config: AttentionConfig, name: str, after: Any) -> AttentionConfig:
    if config.pattern is not None and name in type(config.pattern).model_fields:
        return config.model_copy(update={"pattern": config.pattern.model_copy(update={name: after})})
    return config.model_copy(update={name: after})


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, int) and value >= MIB and value % MIB == 0:
        return f"{value // MIB} MiB"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"
