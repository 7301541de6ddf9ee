"""The last steps: from the best candidate on to a neighbour that is better, as long as there is one, so that
no single step of those that an answer lists would improve it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from attention.config import MIB, AttentionConfig
from attention.errors import ConfigError
from planner.search.scenario import Point, Scenario, failed, gain, point
from planner.search.space import Space, parameters

MOVES: Final = 6
"""At most."""


def climbed(scenario: Scenario, space: Space, best: Point) -> Point:
    """The best point that single steps lead to, each to the best neighbour in the space that passes."""
    if scenario.free_length:
        return best  # there a neighbour has another length, and is found by the grid
    for _ in range(MOVES):
        found = best
        for *_, config in neighbours(best.config):
            if parameters(config, space, scenario.workload) is None:
                continue
            try:
                other = point(scenario, config, best.seq)
            except ConfigError:
                continue
            if gain(scenario, found, other) > 0 and not failed(scenario, other):
                found = other
        if found is best:
            break
        best = found
    return best


def neighbours(config: AttentionConfig) -> Iterator[tuple[str, str, str, AttentionConfig]]:
    """(dimension, value now, value then, the config) of half and double of each dimension."""
    for factor in (0.5, 2.0):
        for name, value in _dimensions(config).items():
            after = _times(name, value, factor)
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


def _times(name: str, value: Any, factor: float) -> Any:
    if name == "dilation_rates":
        return tuple(math.ceil(rate * factor) if rate > 1 else 1 for rate in value)
    if isinstance(value, tuple):
        return tuple(max(round(length * factor), 1) for length in value)
    return min(value * factor, 1.0) if isinstance(value, float) else max(round(value * factor), 1)


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
