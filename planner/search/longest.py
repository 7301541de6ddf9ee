"""The longest sequence within a budget, what the next block would take, and what to change where nothing
fits. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from attention.config import AttentionConfig
from planner.gpus import Gpu
from planner.memory.estimate import MemoryEstimate, estimate, max_sequence
from planner.units import format_bytes
from planner.workload import Workload

LEAST_WORKSPACE = 64 * 1024


class Longest(NamedTuple):
    """The longest sequence within a budget, and the one a block longer."""

    budget: int
    fits: MemoryEstimate | None
    """None if not even one block does."""
    beyond: MemoryEstimate
    """Of one block more."""
    relaxations: tuple[str, ...]
    """Where nothing fits: options, each of which lets one block fit."""


def longest(
    config: AttentionConfig, workload: Workload, budget: int, device: str | Gpu, options: dict[str, Any]
) -> Longest:
    """The answer for `budget` bytes on a device; `options` as in `estimate`. `workload.seq` is not read."""
    unit = config.pattern.block_size if config.pattern else 64
    seq = max_sequence(config, workload, budget, device, **options)

    def at(tokens: int, **changes: Any) -> MemoryEstimate:
        asked = workload.model_copy(update={"seq": tokens} | changes)
        return estimate(config, asked, device, **options)

    if seq:
        return Longest(budget, at(seq), at(seq + unit), ())
    relaxed = _relaxations(config, workload.model_copy(update={"seq": unit}), budget, device, options)
    return Longest(budget, None, at(unit), tuple(relaxed))


def _relaxations(
    config: AttentionConfig, workload: Workload, budget: int, device: str | Gpu, options: dict[str, Any]
) -> Iterator[str]:
    """The smallest change of one option each that lets this workload fit."""

    def fits(config: AttentionConfig = config, more: dict[str, Any] | None = None, **changes: Any) -> bool:
        asked = workload.model_copy(update=changes)
        return estimate(config, asked, device, **{**options, **(more or {})}).upper <= budget

    if workload.batch > 1 and (batch := _largest(workload.batch - 1, lambda n: fits(batch=n))):
        yield f"--batch {batch}"
    if workload.mode == "training" and fits(mode="inference"):
        yield "--mode inference"
    if workload.dtype in ("float32", "float64") and fits(dtype="float16"):
        yield "--dtype float16"
    if options.get("display") == "desktop" and fits(more={"display": "headless"}):
        yield "--display headless"
    if others := options.get("others_bytes"):
        most = _largest(others - 1, lambda n: fits(more={"others_bytes": n})) or 0
        if most or fits(more={"others_bytes": 0}):
            yield f"--others {most}" if most else "no others on the card"
    if config.workspace_bytes > LEAST_WORKSPACE and fits(
        config.model_copy(update={"workspace_bytes": LEAST_WORKSPACE})
    ):
        yield f"a config with workspace_bytes={LEAST_WORKSPACE}"
    needed = estimate(config, workload, device, **options).upper
    yield f"--vram {needed} ({format_bytes(needed)})"


def _largest(limit: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of 1..limit that fits, where smaller ones fit too; None if 1 does not."""
    if limit < 1 or not fits(1):
        return None
    low, high = 1, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
