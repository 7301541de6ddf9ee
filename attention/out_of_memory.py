"""Running out of memory: told by its error, and once more with what pools and caches held given back."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from attention.errors import AttentionPlannerError, OutOfMemoryError
from attention.pool import Buffers, T, free_bytes

# How errors without a class of their own say that memory ran out: the CPU allocator, then the CUDA
# runtime and cuBLAS where they allocate past torch's allocator.
_OUT_OF_MEMORY = ("you tried to allocate", "error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


_REQUESTED = re.compile(r"allocate (\d+(?:\.\d+)?) (bytes|[KMGTPE]iB)")


_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def _ran_out(error: Exception) -> bool:
    if isinstance(error, AttentionPlannerError):
        return False  # said clearly already
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(phrase in str(error) for phrase in _OUT_OF_MEMORY)


def _requested_bytes(message: str) -> int | None:
    """The size that an allocator's message names, to the digits that it gives."""
    match = _REQUESTED.search(message)
    return int(float(match[1]) * 1024 ** _UNITS.index(match[2])) if match else None


def _readable(nbytes: int | None) -> str:
    if nbytes is None:
        return "an unknown number of bytes"
    power = max(0, min((nbytes.bit_length() - 1) // 10, len(_UNITS) - 1))
    return f"{nbytes} bytes" if not power else f"{nbytes / 1024**power:.2f} {_UNITS[power]}"


def with_emergency_release(run: Callable[[], T], buffers: Buffers, device: torch.device) -> T:
    """`run()`; if memory runs out, frees `buffers` and runs once more.

    Out of memory again is `attention.errors.OutOfMemoryError`. Any other exception passes untouched,
    and so does that one, from a module inside. `run` must be fit to start over.
    """
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
    # Only here, outside the except block, are the failed run's frames gone and its tensors free.
    buffers.release()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        requested, available = _requested_bytes(str(error)), free_bytes(device)
        raise OutOfMemoryError(
            f"out of memory on {device}: requested {_readable(requested)}, available "
            f"{_readable(available)}, after freeing the pool and the caches and trying again; use a "
            "shorter sequence, a smaller batch, fewer branches, a smaller workspace_bytes or pool='off'",
            requested=requested,
            available=available,
        ) from error
