"""Two predictions side by side: what differs in what was asked, and what that changes, component by component
and buffer by buffer. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner.files import read_json
from planner.measuring.measure import Measurement
from planner.memory.estimate import MemoryEstimate, estimate
from planner.memory.table import COMPONENTS


class Side(NamedTuple):
    """One of the two."""

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
    """What two predictions have and have not in common. Bytes are of a and of b."""

    a: Side
    b: Side
    asked: dict[str, tuple[Any, Any]]
    """Settings that differ, by name."""
    components: dict[str, tuple[int, int]]
    """Every component that either has, and what the allocator adds to them."""
    buffers: tuple[BufferChange, ...]
    """Those that differ, the largest difference first."""


def side(path: Path, estimated: Callable[[AttentionConfig], MemoryEstimate]) -> Side:
    """What a file holds: an estimate as it is, a config as `estimated` has it, a measurement beside what is
    predicted where it was made."""
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
            return Side(MemoryEstimate(**data))
        if "environment" not in data:
            config = AttentionConfig(**data)
        else:
            return _measured(Measurement(**data))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Side(estimated(config))


def _measured(found: Measurement) -> Side:
    place = found.environment
    on = found.device if found.device == "cpu" else place.device or found.device
    threads = place.threads if on == "cpu" else None
    return Side(estimate(found.config, found.workload, on, threads=threads), found.allocated)


def compare(a: Side, b: Side) -> Comparison:
    """What differs."""
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


def _shares(found: MemoryEstimate) -> dict[str, int]:
    """Bytes by component, with what the allocator adds by rounding."""
    inside = sum(count for name, count in found.components.items() if name != "context")
    return {**found.components, "rounding": found.allocated - inside}


def _flat(found: MemoryEstimate) -> dict[str, Any]:
    """All that was asked, by dotted name."""
    asked: dict[str, Any] = {"device": found.on}
    for value in (found.config, found.workload):
        for name, entry in value.model_dump(mode="json").items():
            if isinstance(entry, Mapping):
                asked |= {f"{name}.{inner}": each for inner, each in entry.items()}
            else:
                asked[name] = entry
    return asked


def _buffers(a: MemoryEstimate, b: MemoryEstimate) -> tuple[BufferChange, ...]:
    ours, theirs = ({line.name: line for line in found.lines} for found in (a, b))
    differ = []
    for name in dict.fromkeys([*ours, *theirs]):
        line = theirs.get(name) or ours[name]
        sizes = [lines[name].bytes if name in lines else 0 for lines in (ours, theirs)]
        if sizes[0] != sizes[1]:
            differ.append(BufferChange(name, line.component, sizes[0], sizes[1], line.source))
    return tuple(sorted(differ, key=lambda buffer: -abs(buffer.b - buffer.a)))
