"""What `estimate` and `max-seq` show, as plain text of at most 80 columns: a waterfall from nothing to the
peak, figures, notes. Imports neither torch nor rich, whose import would take longer than the answer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Final, NamedTuple

from planner.memory.estimate import MemoryEstimate
from planner.question.relaxation import spelt
from planner.report.text import words
from planner.search.longest import Longest
from planner.units import format_bytes

WIDTH: Final = 80
BAR: Final = 41
"""Columns of a waterfall's bars."""
_LABELS: Final = {"qkv": "q, k, v", "output": "out"}


class Bar(NamedTuple):
    """One share of a peak, on top of those before it."""

    name: str
    start: int
    bytes: int


def waterfall(found: MemoryEstimate) -> tuple[Bar, ...]:
    """The peak of what the device loses, share by share: components of what is allocated, what the caching
    allocator adds, what lies outside of it."""
    shares = {name: count for name, count in found.components.items() if name != "context"}
    shares["rounding"] = found.allocated - sum(shares.values())
    shares["cached segments"] = found.reserved - found.allocated
    shares["context"] = found.device - found.reserved
    steps: list[Bar] = []
    for name, count in shares.items():
        if count > 0:
            steps.append(Bar(name, sum(step.bytes for step in steps), count))
    return tuple(steps)


def label(component: str) -> str:
    """A component's name for people."""
    return _LABELS.get(component, component.replace("_", " "))


def estimate_text(found: MemoryEstimate, budget: int | None, *, lines: bool, ink: str = "#") -> str:
    """What was asked, the waterfall, the figures and whether they fit. `lines`: every buffer too. `ink`:
    what bars are drawn with."""
    parts = [
        [f"{words.attention(found.config)}, on {found.on}", words.task(found.workload)],
        _waterfall(found, ink),
        _pairs(_figures(found) + _budget(found, budget)),
    ]
    if lines:
        parts.append(_lines(found))
    parts.append([line for note in found.notes for line in wrapped(f"note: {note}", "  ")])
    return "\n\n".join("\n".join(part) for part in parts if part)


def _waterfall(found: MemoryEstimate, ink: str) -> list[str]:
    drawn = [_row(f"at the peak, in {found.at!r}", "bytes", "share")]
    for step in waterfall(found):
        drawn.append(_step(label(step.name), step.start, step.bytes, found.device, ink))
    return [*drawn, _step("together", 0, found.device, found.device, ink)]


def _step(name: str, start: int, count: int, whole: int, ink: str) -> str:
    first = min(start * BAR // whole, BAR - 1)
    last = max(-(-(start + count) * BAR // whole), first + 1)
    bar = " " * first + ink * (last - first)
    return _row(f"{name:<18.18} {bar}", format_bytes(count), f"{count / whole:.1%}")


def _row(left: str, figure: str, share: str) -> str:
    return f"{left:<{WIDTH - 20}} {figure:>11} {share:>7}".rstrip()


def _figures(found: MemoryEstimate) -> list[tuple[str, str]]:
    floor = found.workload.floor
    rows = [("floor", f"{_bytes(floor)}: q + k + v + out"), ("allocated", _bytes(found.allocated))]
    if found.on != "cpu":
        rows += [
            ("reserved", f"{_bytes(found.reserved)}, by the caching allocator"),
            ("device", f"{_bytes(found.device)}, context included"),
            ("needed", f"{_bytes(found.needed)}, to run at all"),
        ]
    return [*rows, ("upper bound", _bytes(found.upper)), ("", found.confidence)]


def _budget(found: MemoryEstimate, budget: int | None) -> list[tuple[str, str]]:
    if budget is None:
        return []
    spare = budget - found.upper
    if spare >= 0:
        said = f"fits, {format_bytes(spare)} to spare at the upper bound"
    elif found.needed <= budget:
        said = f"may fit: the upper bound is {format_bytes(-spare)} above it"
    else:
        said = f"does not fit: {format_bytes(found.needed - budget)} too little"
    return [("budget", _bytes(budget)), ("", said)]


def _lines(found: MemoryEstimate) -> list[str]:
    shown = ["alive at the peak"]
    for line in sorted(found.lines, key=lambda line: -line.bytes):
        shown.append(_row(f"  {line.name} ({label(line.component)})", f"{line.bytes:,}", ""))
        shown += wrapped(line.source, "      ", first="      ")
    return shown


def longest_text(found: Longest) -> str:
    """The answer of `max-seq`."""
    asked, on = found.beyond, found.beyond.on
    head = [f"{words.attention(asked.config)}, on {on}", words.sizes(asked.workload)]
    rows = [("budget", _bytes(found.budget))]
    if found.fits is not None:
        rows += [
            ("longest", f"{found.fits.workload.seq:,} tokens"),
            ("upper bound", _bytes(found.fits.upper)),
            ("", found.fits.confidence),
        ]
    what = "next block" if found.fits else "one block"
    rows += [(what, f"{asked.workload.seq:,} tokens: {_bytes(asked.upper)}")]
    rows += [("would fit", spelt(change, exactly=True)) for change in found.relaxations]
    notes = [line for note in asked.notes for line in wrapped(f"note: {note}", "  ")]
    return "\n\n".join("\n".join(part) for part in (head, _pairs(rows), notes) if part)


def _bytes(count: int) -> str:
    return f"{format_bytes(count)} ({count:,} bytes)"


def _pairs(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [line for name, value in rows for line in wrapped(value, " " * 13, first=f"{name:<12} ")]


def wrapped(text: str, indent: str, first: str = "") -> list[str]:
    """Lines of at most 80 columns."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent)
