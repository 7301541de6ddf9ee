"""How much memory something takes, with every allocation counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Footprint(NamedTuple):
    """Bytes while something ran, above what was allocated when it began."""

    peak: int
    """Most that was allocated at once."""
    kept: int
    """What was still allocated at the end."""
    largest: tuple[int, ...]
    """Sizes of the largest single allocations, descending."""


def footprint(run: Callable[[], object], device: torch.device) -> Footprint:
    """Runs `run` once and counts. What `run` returns is dropped only after the count.

    CPU: every allocation of the CPU allocator, the kernels' own scratch included, from
    `torch.profiler` with `profile_memory=True`. CUDA: the caching allocator's requested bytes;
    `largest` is empty there.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return Footprint(peak, torch.cuda.memory_allocated(device) - before, ())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = run()
    events = profile.profiler.kineto_results.events()
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda change: change[0]
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    del result
    largest = sorted((change for _, change in changes if change > 0), reverse=True)[:8]
    return Footprint(peak, held, tuple(largest))
