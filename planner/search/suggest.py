"""The full space, of which a sampler suggests a candidate dimension by dimension. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from attention.config import AttentionConfig, Edges
from attention.sizes.shape import Windows
from planner.configs import Columns
from planner.question.dimensions import (
    DIMENSIONS,
    AttentionKind,
    attention_kind,
    dimensions_of,
    pattern_of,
    variant_of,
)
from planner.question.space import MAX_BRANCHES, Space
from planner.ranks.ring import shardings, way_text
from planner.search.candidates import (
    FREE_BLOCK_SIZES,
    FREE_WORKSPACES,
    LEAST_RATIO,
    MOST_GLOBAL,
    MOST_GROWTH,
    MOST_RATE_GROWTH,
    UNIT,
    Lists,
    divides,
    ends,
    most_window,
    tries_flex,
    unit_of,
    widest_window,
)
from planner.workload import Workload


class Suggestions(Protocol):
    """A chooser: an `optuna.Trial`, or anything with its suggestions."""

    def suggest_categorical(self, name: str, choices: Any, /) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...


def chosen(
    trial: Suggestions, space: Space, workload: Workload, *, flex: bool = False, windows: Windows = "none"
) -> Columns:
    """One candidate of the full space, as the trial suggests it."""
    sizes = space.block_sizes or FREE_BLOCK_SIZES
    fitting = tuple(size for size in sizes if divides(size, space.segments))
    kinds = tuple(kind for kind in space.kinds if kind != "dilated_sparse" or fitting)
    kind: AttentionKind = kinds[0] if len(kinds) == 1 else trial.suggest_categorical("kind", kinds)
    fields: dict[str, Any] = {
        "workspace": 1 << trial.suggest_int("workspace_log2", *FREE_WORKSPACES)
        if space.workspaces is None
        else _one(trial, "workspace", space.workspaces)
    }
    unit = UNIT
    for dimension in dimensions_of(kind):
        name, allowed = dimension.parameter, getattr(space, dimension.field)
        if name == "block_size":
            unit = fields[name] = _nearest(trial, name, fitting if kind == "dilated_sparse" else sizes)
        elif name == "edges":
            fields[name] = _one(trial, name, ends(space, kind, windows))
            unit = unit_of(fields.get("block_size"), fields[name])
        elif name in _FREE:
            fields[name] = _one(trial, name, allowed) if allowed else _FREE[name](trial, name, unit, workload)
    if "window" in fields:
        fields["window"] = min(fields["window"], unit * most_window(unit, workload))
    if "sparsity_ratio" in fields:
        fields["sparsity_ratio"] = float(f"{fields['sparsity_ratio']:.3g}")
    if kind in DIMENSIONS["branches"].kinds:
        fields["lengths"], fields["rates"] = _suggested(trial, space, workload.seq, unit)
    edges: Edges = fields.get("edges", "block")
    backends = space.backends(tries_flex(space, kind, edges, flex, windows))
    columns = Columns(
        variant_of(kind),
        pattern_of(kind),
        seq=workload.seq,
        pool=space.pool,
        backend=_one(trial, "backend", backends),
        **fields,
    )
    return columns if workload.gpus == 1 else _shared(trial, columns, workload)


def _shared(trial: Suggestions, columns: Columns, workload: Workload) -> Columns:
    """The candidate as ranks share it. All kinds choose among the same names, of which not all take each."""
    ways = {way_text(one): one for one in shardings(columns, workload)}
    kinds = Columns("dense", backend=columns.backend), Columns("adaptive", backend=columns.backend)
    names = dict.fromkeys(way_text(one) for kind in kinds for one in shardings(kind, workload))
    way = ways.get(_one(trial, "sharding", tuple(names)), next(iter(ways.values())))
    return replace(columns, sharding=way)


_FREE: Final[dict[str, Callable[[Suggestions, str, int, Workload], Any]]] = {
    "window": lambda trial, name, unit, workload: _tokens(trial, name, unit, widest_window(workload)),
    "global_tokens": lambda trial, name, unit, workload: _tokens(trial, name, unit, MOST_GLOBAL),
    "sparsity_ratio": lambda trial, name, unit, workload: trial.suggest_float(
        name, LEAST_RATIO, 1.0, log=True
    ),
}
"""(trial, parameter, tokens a block, workload) -> a value, where the caller allows any."""


def _nearest(trial: Suggestions, name: str, values: Sequence[int]) -> int:
    """One of ascending values: the nearest to a number, so that a sampler knows which are alike."""
    if len(values) == 1:
        return values[0]
    wanted = trial.suggest_int(name, min(values), max(values), log=True)
    return min(values, key=lambda value: abs(math.log(value / wanted)))


def _tokens(trial: Suggestions, name: str, unit: int, maximum: int) -> int:
    """A number of tokens that is a multiple of `unit`."""
    return max(round(trial.suggest_int(name, 1, max(maximum, 2), log=True) / unit), 1) * unit


def _one(trial: Suggestions, name: str, values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else trial.suggest_categorical(name, tuple(values))


def _suggested(trial: Suggestions, space: Space, seq: int, unit: int) -> Lists:
    counts = space.branches or tuple(range(1, MAX_BRANCHES + 1))
    values = space.segments or space.rates
    count = len(values) if values else _one(trial, "branches", counts)
    whole = -(-seq // unit)
    lengths, rates = [], []
    length, rate = 0, 1
    for n in range(count):
        if n == 0:
            if not space.segments:
                # One range for all block sizes: the longest is what covers everything, whatever the unit.
                longest = 2 * max(seq, *FREE_BLOCK_SIZES, *(space.block_sizes or ()))
                length = min(_tokens(trial, "first_segment", unit, longest) // unit, whole)
        else:
            if not space.segments:
                growth = trial.suggest_int(f"growth_{n}", 1, MOST_GROWTH, log=True)
                length *= min(growth, -(-whole // length))
            if not space.rates:
                rate *= trial.suggest_int(f"rate_growth_{n}", 1, MOST_RATE_GROWTH, log=True)
        lengths.append(length * unit)
        rates.append(min(rate, length * unit) if not space.segments else rate)
    return space.segments or tuple(lengths), space.rates or tuple(rates)


def parameters(config: AttentionConfig, space: Space, workload: Workload) -> dict[str, Any] | None:
    """The parameters with which a trial arrives at a config; None if the full space has no such config."""
    kind = attention_kind(config)
    values: dict[str, Any] = {
        dimension.parameter: dimension.of(config)
        for dimension in dimensions_of(kind)
        if dimension.parameter and dimension.attribute
    }
    values |= {"kind": kind, "workspace_log2": config.workspace_bytes.bit_length() - 1}
    if config.sharding is not None:
        values["sharding"] = way_text(config.sharding)
    lengths, rates = config.segment_lengths, config.dilation_rates
    if lengths:
        values |= {"branches": len(lengths), "first_segment": lengths[0]}
        for n in range(1, len(lengths)):
            values[f"growth_{n}"] = lengths[n] // lengths[n - 1]
            values[f"rate_growth_{n}"] = rates[n] // rates[n - 1]
    names: dict[str, None] = {}
    devices: tuple[Windows, ...] = ("causal", "any")  # where a trial chooses the backend, and edges
    for windows in devices:
        replay = _Replay(values)
        try:
            made = chosen(replay, space, workload, flex=True, windows=windows).config(0, workload)
        except KeyError:
            continue
        if made == config:
            names.update(dict.fromkeys(replay.names))
    return {name: values[name] for name in names} or None


class _Replay:
    """A trial that suggests given values, and remembers the names that it was asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values, self.names = values, list[str]()

    def suggest_categorical(self, name: str, choices: Any, /) -> Any:
        if self.values[name] not in choices:
            raise KeyError(name)
        self.names.append(name)
        return self.values[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self._within(name, low, high))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self._within(name, low, high))

    def _within(self, name: str, low: float, high: float) -> Any:
        if not low <= self.values[name] <= high:
            raise KeyError(name)
        self.names.append(name)
        return self.values[name]


def full_size(seq: int) -> float:
    """Configs in the full space for a sequence, about: the product over what each kind chooses, distinct
    windows, kept blocks and segment lengths counted in blocks."""
    workspaces = FREE_WORKSPACES[1] - FREE_WORKSPACES[0] + 1
    total = float(workspaces)  # dense
    for block in FREE_BLOCK_SIZES:
        blocks = math.ceil(seq / block)
        total += workspaces * 2 * blocks * (1 + MOST_GLOBAL // block)  # with global tokens, and without
        total += workspaces * blocks * _branchings(blocks)
    return total + workspaces * _branchings(math.ceil(seq / UNIT))


def _branchings(units: int) -> float:
    """Lists of one to four branches: first length, factors of lengths whose product stays within, rates."""
    total = 0.0
    for count in range(1, MAX_BRANCHES + 1):
        lengths = units * math.log(max(units, 2)) ** (count - 1) / math.factorial(count - 1)
        total += lengths * MOST_RATE_GROWTH ** (count - 1)
    return total
