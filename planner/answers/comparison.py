"""Two predictions side by side: what differs in what was asked, and what that changes, component by component
and buffer by buffer. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner.answers.shared import SharedEstimate
from planner.files import read_json
from planner.measuring.measure import Measurement
from planner.memory.estimate import MemoryEstimate, estimate
from planner.memory.table import COMPONENTS


class Side(NamedTuple):
    """One of the two predictions."""

    estimate: MemoryEstimate
    measured: int | None = None
    """Bytes that were allocated, where it was measured."""


class BufferChange(NamedTuple):
    """A named buffer that is not the same in both."""

    name: str
    component: str
    a: int
    b: int
    formula: str


class Comparison(NamedTuple):
    """Two predictions and their differences. Pairs of bytes are those of a and of b."""

    a: Side
    b: Side
    asked: dict[str, tuple[Any, Any]]
    """Settings that differ, by name."""
    components: dict[str, tuple[int, int]]
    """Every component that either has, and what the allocator adds to them."""
    buffers: tuple[BufferChange, ...]
    """Buffers that differ, the largest difference first."""


def side(path: Path, estimated: Callable[[AttentionConfig], MemoryEstimate]) -> Side:
    """One side of a comparison from a file: an estimate as it is, a config as `estimated` predicts it, a
    measurement beside the prediction for the device that it was made on."""
    data = read_json(path)
    if isinstance(data, dict) and "environment" not in data and "components" not in data:
        # A recommendation has an estimate of its answer; what tuning found is a config.
        data = data.get("memory", data.get("config", data))
    if not isinstance(data, dict) or not data.keys() & {"variant", "components", "environment"}:
        raise ConfigError(
            f"{path} is no JSON of an AttentionConfig, an estimate or a measurement; "
            "`planner estimate --format json` prints one"
        )
    try:
        if "components" in data:
            return Side((SharedEstimate if "sharing" in data else MemoryEstimate)(**data))
        if "environment" not in data:
            config = AttentionConfig(**data)
        else:
            return _measured(Measurement(**data))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Side(estimated(config))


def _measured(measurement: Measurement) -> Side:
    place = measurement.environment
    on = measurement.device if measurement.device == "cpu" else place.device or measurement.device
    threads = place.threads if on == "cpu" else None
    return Side(
        estimate(measurement.config, measurement.workload, on, threads=threads, dry=measurement.is_dry),
        measurement.allocated,
    )


def compare(a: Side, b: Side) -> Comparison:
    """The comparison of two sides: settings, components and buffers that differ."""
    one, two = _shares(a.estimate), _shares(b.estimate)
    names = [name for name in (*COMPONENTS, "rounding") if one.get(name) or two.get(name)]
    ours, theirs = _flat(a.estimate), _flat(b.estimate)
    return Comparison(
        a,
        b,
        {
            name: (ours.get(name), theirs.get(name))
            for name in dict.fromkeys([*ours, *theirs])
            if ours.get(name) != theirs.get(name)
        },
        {name: (one.get(name, 0), two.get(name, 0)) for name in names},
        _buffers(a.estimate, b.estimate),
    )


def _shares(memory: MemoryEstimate) -> dict[str, int]:
    """Bytes by component, with what the allocator adds by rounding."""
    inside = sum(count for name, count in memory.components.items() if name != "context")
    return {**memory.components, "rounding": memory.allocated - inside}


def _flat(memory: MemoryEstimate) -> dict[str, Any]:
    """All settings of an estimate's question, by dotted name."""
    settings: dict[str, Any] = {"device": memory.on}
    if isinstance(memory, SharedEstimate):
        sharing = memory.sharing
        settings |= {name: getattr(sharing, name) for name in ("link", "node", "exchange", "shards", "ring")}
    for value in (memory.config, memory.workload):
        for name, entry in value.model_dump(mode="json").items():
            if isinstance(entry, Mapping):
                settings |= {f"{name}.{inner}": each for inner, each in entry.items()}
            else:
                settings[name] = entry
    return settings


def _buffers(a: MemoryEstimate, b: MemoryEstimate) -> tuple[BufferChange, ...]:
    ours, theirs = ({line.name: line for line in memory.lines} for memory in (a, b))
    differ = []
    for name in dict.fromkeys([*ours, *theirs]):
        line = theirs.get(name) or ours[name]
        sizes = [lines[name].bytes if name in lines else 0 for lines in (ours, theirs)]
        if sizes[0] != sizes[1]:
            differ.append(BufferChange(name, line.component, sizes[0], sizes[1], line.source))
    return tuple(sorted(differ, key=lambda buffer: -abs(buffer.b - buffer.a)))
