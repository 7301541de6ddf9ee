"""What `estimate` and `max-seq` show, as plain text of at most 80 columns: a waterfall from nothing to the
peak, figures, notes. Imports neither torch nor rich, whose import would take longer than the answer."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Final, NamedTuple

from planner.answers.shared import SharedEstimate
from planner.memory.estimate import MemoryEstimate
from planner.question.relaxation import spelt
from planner.report.text import words
from planner.report.text.shared import sharing_rows
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


def waterfall(estimate: MemoryEstimate) -> tuple[Bar, ...]:
    """The peak of device memory, share by share: the components of allocated memory, what the caching
    allocator adds, and what lies outside of it."""
    shares = {name: count for name, count in estimate.components.items() if name != "context"}
    shares["rounding"] = estimate.allocated - sum(shares.values())
    shares["cached segments"] = estimate.reserved - estimate.allocated
    shares["context"] = estimate.device - estimate.reserved
    steps: list[Bar] = []
    for name, count in shares.items():
        if count > 0:
            steps.append(Bar(name, sum(step.bytes for step in steps), count))
    return tuple(steps)


def label(component: str) -> str:
    """A component's name for people."""
    return _LABELS.get(component, component.replace("_", " "))


def estimate_text(estimate: MemoryEstimate, budget: int | None, *, lines: bool, ink: str = "#") -> str:
    """The config and workload, the waterfall, the figures and whether they fit `budget` bytes. `lines`: list
    every buffer too. `ink`: the character that bars are drawn with."""
    parts = [
        [f"{words.attention(estimate.config)}, on {estimate.on}", words.task(estimate.workload)],
        _waterfall(estimate, ink),
        _pairs(_figures(estimate) + _budget(estimate, budget)),
    ]
    if isinstance(estimate, SharedEstimate):
        parts.append(_pairs(sharing_rows(estimate)))
    if lines:
        parts.append(_lines(estimate))
    parts.append([line for note in notes(estimate) for line in wrapped(f"note: {note}", "  ")])
    return "\n\n".join("\n".join(part) for part in parts if part)


def notes(estimate: MemoryEstimate) -> tuple[str, ...]:
    """The remarks on an estimate, where GPUs share the call on how they do too."""
    shared = estimate.sharing.notes if isinstance(estimate, SharedEstimate) else ()
    return (*estimate.notes, *shared)


def _waterfall(estimate: MemoryEstimate, ink: str) -> list[str]:
    drawn = [_row(f"at the peak, in {estimate.at!r}", "bytes", "share")]
    for step in waterfall(estimate):
        drawn.append(_step(label(step.name), step.start, step.bytes, estimate.device, ink))
    return [*drawn, _step("together", 0, estimate.device, estimate.device, ink)]


def _step(name: str, start: int, count: int, whole: int, ink: str) -> str:
    first = min(start * BAR // whole, BAR - 1)
    last = max(-(-(start + count) * BAR // whole), first + 1)
    bar = " " * first + ink * (last - first)
    return _row(f"{name:<18.18} {bar}", format_bytes(count), f"{count / whole:.1%}")


def _row(left: str, figure: str, share: str) -> str:
    return f"{left:<{WIDTH - 20}} {figure:>11} {share:>7}".rstrip()


def _figures(estimate: MemoryEstimate) -> list[tuple[str, str]]:
    floor = estimate.workload.floor
    rows = [("floor", f"{_bytes(floor)}: q + k + v + out"), ("allocated", _bytes(estimate.allocated))]
    if estimate.on != "cpu":
        rows += [
            ("reserved", f"{_bytes(estimate.reserved)}, by the caching allocator"),
            ("device", f"{_bytes(estimate.device)}, context included"),
            ("needed", f"{_bytes(estimate.needed)}, to run at all"),
        ]
    rows += [("upper bound", _bytes(estimate.upper)), ("", estimate.confidence)]
    kernel, _, why = estimate.kernel.partition(": ")
    if kernel:
        rows += [("kernel", kernel), ("", why)]
    if estimate.launches is not None:
        rows.append(("launches", launches(estimate.launches)))
    return rows


def launches(count: int) -> str:
    """The kernels that a call launches, as `312 kernels`."""
    return f"{count:,} kernel{'s' * (count != 1)}"


def _budget(estimate: MemoryEstimate, budget: int | None) -> list[tuple[str, str]]:
    if budget is None:
        return []
    spare = budget - estimate.upper
    if spare >= 0:
        verdict = f"fits, {format_bytes(spare)} to spare at the upper bound"
    elif estimate.needed <= budget:
        verdict = f"may fit: the upper bound is {format_bytes(-spare)} above it"
    else:
        verdict = f"does not fit: {format_bytes(estimate.needed - budget)} too little"
    return [("budget", _bytes(budget)), ("", verdict)]


def _lines(estimate: MemoryEstimate) -> list[str]:
    shown = ["alive at the peak"]
    for line in sorted(estimate.lines, key=lambda line: -line.bytes):
        shown.append(_row(f"  {line.name} ({label(line.component)})", f"{line.bytes:,}", ""))
        shown += wrapped(line.source, "      ", first="      ")
    return shown


def longest_text(answer: Longest) -> str:
    """The answer of `max-seq`."""
    beyond, on = answer.beyond, answer.beyond.on
    head = [f"{words.attention(beyond.config)}, on {on}", words.sizes(beyond.workload)]
    rows = [("budget", _bytes(answer.budget))]
    if answer.fits is not None:
        rows += [
            ("longest", f"{answer.fits.workload.seq:,} tokens"),
            ("upper bound", _bytes(answer.fits.upper)),
            ("", answer.fits.confidence),
        ]
        if isinstance(answer.fits, SharedEstimate):
            rows += sharing_rows(answer.fits)
    what = "next block" if answer.fits else "one block"
    rows += [(what, f"{beyond.workload.seq:,} tokens: {_bytes(beyond.upper)}")]
    rows += [("would fit", spelt(change, exactly=True)) for change in answer.relaxations]
    more = answer.fits.sharing.notes if isinstance(answer.fits, SharedEstimate) else ()
    notes = [line for note in (*beyond.notes, *more) for line in wrapped(f"note: {note}", "  ")]
    return "\n\n".join("\n".join(part) for part in (head, _pairs(rows), notes) if part)


def _bytes(count: int) -> str:
    return f"{format_bytes(count)} ({count:,} bytes)"


def _pairs(rows: Iterable[tuple[str, str]]) -> list[str]:
    return [line for name, value in rows for line in wrapped(value, " " * 13, first=f"{name:<12} ")]


def wrapped(text: str, indent: str, first: str = "") -> list[str]:
    """The text in lines of at most 80 columns."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent)
