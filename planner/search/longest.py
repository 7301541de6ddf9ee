"""The longest sequence within a budget, what the next block would take, and what to change where nothing
fits. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from attention.config import AttentionConfig
from planner.bisection import largest
from planner.gpus import Gpu
from planner.memory.estimate import MemoryEstimate, estimate, max_sequence
from planner.question.relaxation import Relaxation, cheaper
from planner.workload import Workload

LEAST_WORKSPACE = 64 * 1024


class Longest(NamedTuple):
    """The longest sequence within a budget, and the one a block longer."""

    budget: int
    fits: MemoryEstimate | None
    """The estimate for the longest sequence that fits; None if not even one block does."""
    beyond: MemoryEstimate
    """The estimate for one block more."""
    relaxations: tuple[Relaxation, ...]
    """Where nothing fits: changes, each of which lets one block fit."""


def longest(
    config: AttentionConfig, workload: Workload, budget: int, device: str | Gpu, options: dict[str, Any]
) -> Longest:
    """The answer for `budget` bytes on a device; `options` as in `estimate`. `workload.seq` is not read."""
    unit = config.pattern.block_size if config.pattern else 64
    least = workload.least_blocks(unit) * unit
    seq = max_sequence(config, workload, budget, device, **options)

    def at(tokens: int, **changes: Any) -> MemoryEstimate:
        sized_workload = workload.model_copy(update={"seq": tokens} | changes)
        return estimate(config, sized_workload, device, **options)

    if seq:
        return Longest(budget, at(seq), at(seq + unit), ())
    relaxed = _relaxations(config, workload.model_copy(update={"seq": least}), budget, device, options)
    return Longest(budget, None, at(least), tuple(relaxed))


def _relaxations(
    config: AttentionConfig, workload: Workload, budget: int, device: str | Gpu, options: dict[str, Any]
) -> Iterator[Relaxation]:
    """The smallest change of one thing each that lets this workload fit."""

    def fits(changed_workload: Workload = workload, config: AttentionConfig = config, **more: Any) -> bool:
        return estimate(config, changed_workload, device, **{**options, **more}).upper <= budget

    batch = _below(workload.batch, lambda n: fits(workload.model_copy(update={"batch": n})))
    if batch:
        yield Relaxation("batch", batch)
    yield from (change for change in cheaper(workload) if fits(change.applied(workload)))
    if options.get("display") == "desktop" and fits(display="headless"):
        yield Relaxation("display", "headless")
    if others := options.get("others_bytes"):
        fewer = _below(others, lambda n: fits(others_bytes=n))
        if fewer or fits(others_bytes=0):
            yield Relaxation("others_bytes", fewer)
    lean = config.model_copy(update={"workspace_bytes": LEAST_WORKSPACE})
    if config.workspace_bytes > LEAST_WORKSPACE and fits(config=lean):
        yield Relaxation("workspace_bytes", LEAST_WORKSPACE)
    yield Relaxation("vram", estimate(config, workload, device, **options).upper)


def _below(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to below `limit` that fits, where smaller ones fit too; 0 if 1 does not."""
    return largest(fits, 1, limit) if limit > 1 and fits(1) else 0
