"""A comparison as text and as data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from planner.answers.comparison import Comparison, Side
from planner.answers.shared import SharedEstimate, Sharing
from planner.calibration import Prediction
from planner.report.text.times import are_apart, seconds, span
from planner.units import format_bytes


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain data."""

    def pair(both: Iterable[Any]) -> dict[str, Any]:
        return dict(zip("ab", both, strict=True))

    sides = (comparison.a, comparison.b)
    return {
        "asked": {name: pair(both) for name, both in comparison.asked.items()},
        "components": {name: pair(both) for name, both in comparison.components.items()},
        "buffers": [buffer._asdict() for buffer in comparison.buffers],
        **{
            name: pair(getattr(each.estimate, name) for each in sides)
            for name in ("allocated", "reserved", "device", "needed", "upper", "at")
        },
        "measured": pair(each.measured for each in sides),
        "time": pair(each.estimate.time and each.estimate.time.model_dump(mode="json") for each in sides),
        **_sharing_data(comparison),
    }


def _sharing_data(comparison: Comparison) -> dict[str, Any]:
    """How either is shared, where one is."""
    both = [_sharing(each) for each in (comparison.a, comparison.b)]
    if not any(both):
        return {}
    data = (one and one.model_dump(mode="json") for one in both)
    return {"sharing": dict(zip("ab", data, strict=True))}


def _sharing(side: Side) -> Sharing | None:
    return side.estimate.sharing if isinstance(side.estimate, SharedEstimate) else None


def comparison_text(comparison: Comparison, names: tuple[str, str]) -> str:
    """A comparison as text of at most 80 columns."""
    from planner.report.text import words
    from planner.report.text.estimate import label, wrapped
    from planner.report.text.shared import traffic_of

    a, b = comparison.a.estimate, comparison.b.estimate
    head = [
        f"{letter}: {name}: {words.attention(each.config)}, on {each.on}, peak in {each.at!r}"
        for letter, name, each in zip("AB", names, (a, b), strict=True)
    ]
    differences = [f"{name}: {_value(one)} -> {_value(two)}" for name, (one, two) in comparison.asked.items()]
    rows = [_row(label(name), *both) for name, both in comparison.components.items() if name != "context"]
    figures = {"allocated": (a.allocated, b.allocated)}
    if (a.on, b.on) != ("cpu", "cpu"):
        figures |= {"reserved": (a.reserved, b.reserved), "device": (a.device, b.device)}
    figures["upper bound"] = (a.upper, b.upper)
    if comparison.a.measured and comparison.b.measured:
        figures["measured"] = (comparison.a.measured, comparison.b.measured)
    shared = []
    if (one := _sharing(comparison.a)) and (two := _sharing(comparison.b)):
        for way, ours, theirs in zip(("sent", "received"), traffic_of(one), traffic_of(two), strict=True):
            shared.append(_row(f"{way} by a GPU", ours, theirs))
    shared += _times(a.time, b.time)
    buffers = []
    for buffer in comparison.buffers:
        buffers += [_row(buffer.name, buffer.a, buffer.b), *wrapped(buffer.formula, "    ", first="    ")]
    parts = [
        [line for each in head for line in wrapped(each, "   ")],
        ["what differs"] + [line for each in differences for line in wrapped(each, "    ", first="  ")],
        [f"{'component':<38}{'A':>13}{'B':>13}{'B - A':>14}", *rows],
        ["buffers at the peak that differ", *buffers] if buffers else ["all buffers at the peak are alike"],
        [_row(name, *both) for name, both in figures.items()],
        *([shared] if shared else []),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _times(one: Prediction | None, other: Prediction | None) -> list[str]:
    """Seconds of both and their ranges, and whether they can be told apart; none where one has none."""
    if one is None or other is None:
        return []
    cells = [(seconds(one.seconds), seconds(other.seconds), f"x {other.seconds / one.seconds:.3g}")]
    cells.append((span(one.low, one.high), span(other.low, other.high), ""))
    names = ("time of a call", "probably")
    rows = [
        f"{name:<25.24}{a:>19}{b:>19}{change:>15}".rstrip()
        for name, (a, b, change) in zip(names, cells, strict=True)
    ]
    alike = one.seconds != other.seconds and not are_apart(one, other)
    return [*rows, *["The times of A and B cannot be told apart."] * alike]


def _row(name: str, a: int, b: int) -> str:
    change = f"{'+' if b > a else '-'}{format_bytes(abs(b - a))}" if a != b else "="
    return f"{name:<38.37}{format_bytes(a):>13}{format_bytes(b):>13}{change:>14}"


def _value(value: Any) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
