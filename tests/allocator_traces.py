"""Random allocations and frees under which this project's replay and torch's own allocator are compared.

Drawn from `random.random()` alone, whose sequence for a seed is the same in all versions of Python.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, NamedTuple

from planner.memory.allocator import Limit, Replay, replay
from planner.memory.allocator_settings import AllocatorSettings

MIB = 1 << 20
LARGE_CARD = 1 << 30
"""Bytes of the card whose memory a fraction caps."""
TOGETHER = 10
"""Traces that have a cap in common: torch reads it once a process."""

SETTINGS: dict[str, tuple[str, Literal["card", "fraction"] | None]] = {
    "default": ("", None),
    "max_split": ("max_split_size_mb:32", None),
    "roundup": ("roundup_power2_divisions:4", None),
    "fraction": ("", "fraction"),
    "small card": ("", "card"),
    "garbage": ("garbage_collection_threshold:0.5", "fraction"),
    "max_split, small card": ("max_split_size_mb:24", "card"),
    "mix": ("max_split_size_mb:40,roundup_power2_divisions:8,garbage_collection_threshold:0.6", "fraction"),
    "expandable": ("expandable_segments:True", None),
    "expandable, fraction": ("expandable_segments:True", "fraction"),
    "expandable, small card": ("expandable_segments:True", "card"),
}
"""PYTORCH_ALLOC_CONF, and what limits the memory, by a name."""
USUAL = (MIB, MIB + 1, 2 * MIB, 8_519_680, 10 * MIB - 512, 10 * MIB, 11 * MIB, 19 * MIB, 20 * MIB, 64 * MIB)


class Question(NamedTuple):
    """Traces, and the card they run on."""

    setting: str
    cap: int | None
    traces: list[list[tuple[int, int]]]

    @property
    def conf(self) -> str:
        return SETTINGS[self.setting][0]

    @property
    def card(self) -> int | None:
        """Memory of the card, where it matters."""
        kind = SETTINGS[self.setting][1]
        return self.cap if kind == "card" else LARGE_CARD if kind == "fraction" else None

    @property
    def fraction(self) -> float | None:
        return self.cap / LARGE_CARD if SETTINGS[self.setting][1] == "fraction" and self.cap else None


def questions(setting: str, count: int, seed: int) -> Iterator[Question]:
    """`count` traces in all."""
    for batch in range(count // TOGETHER):
        draw = random.Random(seed * 1_000_003 + batch).random
        cap = 30 * MIB + int(draw() * 390 * MIB)
        if draw() < 0.7:
            cap = cap // MIB * MIB
        limited = SETTINGS[setting][1] is not None
        yield Question(setting, cap if limited else None, [_trace(draw) for _ in range(TOGETHER)])


def _trace(draw) -> list[tuple[int, int]]:
    """60 allocations, up to 70% of them freed again."""
    events: list[tuple[int, int]] = []
    live: list[int] = []
    most = (12, 40, 90, 200)[int(draw() * 4)] * MIB
    for key in range(60):
        if live and draw() < 0.42:
            events.append((live.pop(int(draw() * len(live))), 0))
        kind, share = draw(), draw()
        if kind < 0.25:
            size = 1 + int(share * 4096)
        elif kind < 0.4:
            size = USUAL[int(share * len(USUAL))]
        elif kind < 0.6:
            size = 1 + int(share * 2 * MIB)
        elif kind < 0.8:
            size = MIB + int(share * 11 * MIB)
        else:
            size = MIB + int(share * most)
        events.append((key, size))
        live.append(key)
    return events


def replayed(question: Question) -> list[list[int | None]]:
    """Of each trace, what this project's replay says."""
    limit: Limit = SETTINGS[question.setting][1] or "either"
    settings = AllocatorSettings.parse(question.conf)
    return [outcome(replay(trace, settings, question.cap, limit, question.card)) for trace in question.traces]


def outcome(found: Replay) -> list[int | None]:
    """[peak allocated, reserved, requested, retries, event that ran out]."""
    peaks = [found.peak_allocated, found.peak_reserved, found.peak_requested]
    return [*peaks, found.retries, found.oom.event if found.oom else None]
