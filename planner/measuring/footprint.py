"""How much memory something takes, with every allocation counted."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

LARGEST = 8
"""How many of the largest allocations are told."""


class Footprint(NamedTuple):
    """Bytes while something ran, above what was allocated when the count began."""

    peak: int
    """Most bytes that were allocated at once."""
    kept: int
    """Bytes that were still allocated at the end."""
    largest: tuple[int, ...]
    """Sizes of the largest single allocations, descending."""


def footprint(run: Callable[[], object], device: torch.device) -> Footprint:
    """Runs `run` once and counts. What `run` returns is dropped only after the count."""
    return footprints([run], device)[0]


def footprints(runs: Sequence[Callable[[], object]], device: torch.device) -> list[Footprint]:
    """Runs one after the other under one count, each above what was allocated when the *first* began.

    What a run returns is dropped between it and the next. CPU: every allocation of torch's CPU
    allocator that the calling thread makes, the kernels' own scratch included, by torch's profiler;
    what libraries such as oneDNN allocate by themselves is not among them. Memory from before the
    count is not seen when it is freed, so a run that frees some of it has less than `peak`. CUDA: the
    blocks of the caching allocator, its rounding included; `largest` is empty.
    """
    return (_on_cuda if device.type == "cuda" else _on_cpu)(runs, device)


def _on_cuda(runs: Sequence[Callable[[], object]], device: torch.device) -> list[Footprint]:
    import torch

    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    counts = []
    for run in runs:
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        peak, held = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        counts.append(Footprint(peak - before, held - before, ()))
        del result
    return counts


def _on_cpu(runs: Sequence[Callable[[], object]], device: torch.device) -> list[Footprint]:
    import torch

    # Its collector would otherwise print lines of its own to stderr. A level that was asked for stays.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    name = f"{__name__} {id(runs)}"
    # What `torch.profiler.profile` is made of; that one imports torch's compiler, which takes seconds.
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        for run in runs:
            with torch.autograd.profiler.record_function(name):
                result = run()
            del result
    events = _events(profile, name)

    # By address, and not by the size that a freed block is reported with: torch remembers blocks from
    # earlier counts that were freed unseen, and reports their size for whatever is at the address now.
    living: dict[int, int] = {}
    counts: list[Footprint] = []
    held = peak = 0
    sizes: list[int] = []
    for _, kind, address, nbytes in events:
        if kind == "begin":
            peak, sizes = held, []
        elif kind == "end":
            counts.append(Footprint(peak, held, tuple(sorted(sizes, reverse=True)[:LARGEST])))
        elif nbytes > 0:
            held += nbytes - living.pop(address, 0)
            living[address] = nbytes
            sizes.append(nbytes)
            peak = max(peak, held)
        else:
            held -= living.pop(address, 0)
    return counts


def _events(profile: Any, name: str) -> list[tuple[int, str, int, int]]:
    """(time, "begin" | "end" | "memory", address, bytes) of the spans called `name` and of all
    allocations (bytes above 0) and frees, in the order in which they happened."""
    events: list[tuple[int, str, int, int]] = []
    left = list(profile.kineto_results.experimental_event_tree())
    while left:
        node = left.pop()
        left.extend(node.children)
        if node.name == "[memory]":
            fields = node.extra_fields
            if fields.device.type == "cpu":
                events.append((node.start_time_ns, "memory", fields.ptr, fields.alloc_size))
        elif node.name == name:
            events.append((node.start_time_ns, "begin", 0, 0))
            events.append((node.end_time_ns, "end", 0, 0))
    return sorted(events, key=lambda event: event[0])
