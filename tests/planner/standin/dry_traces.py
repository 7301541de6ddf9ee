"""Runs traces of allocations on torch's own allocator, in a process of dry runs; needs torch alone."""

from __future__ import annotations

from typing import Any

import torch


def run(traces: list[list[list[int]]], fraction: float | None = None) -> list[list[Any]]:
    """Of each trace [peak allocated, reserved, requested, retries, event that ran out or None].

    A trace is a list of [key, bytes]; no bytes free the key. The allocator is empty before each.
    """
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction)
    return [_one(trace) for trace in traces]


def _one(trace: list[list[int]]) -> list[Any]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    assert torch.cuda.memory_reserved() == 0
    live: dict[int, torch.Tensor] = {}
    out = None
    for index, (key, size) in enumerate(trace):
        if not size:
            del live[key]
            continue
        try:
            live[key] = torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError:
            out = index
            break
    stats = torch.cuda.memory_stats()
    live.clear()
    peaks = [stats[f"{name}_bytes.all.peak"] for name in ("allocated", "reserved", "requested")]
    return [*peaks, stats["num_alloc_retries"], out]
