"""One call of a block-sparse attention compiled by FlexAttention, in a process of dry runs."""

from __future__ import annotations

import sys
from typing import Any

import torch


def run(config: dict[str, Any], workload: dict[str, Any], packages: str, compiled: bool = True) -> int:
    """Most bytes allocated by a call after a first one. Kernels do nothing here: not `compiled` leaves them
    out, which is faster, and tells nothing of their tiles. `packages` is where the project's needs are."""
    sys.path.append(packages)  # behind this Python's own, whose torch is another
    from attention.config import AttentionConfig
    from planner.measuring.call import call_of
    from planner.workload import Workload

    if not compiled:
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.triton = lambda *_, **__: _Nothing()  # type: ignore[assignment, method-assign]
    call = call_of(AttentionConfig(**config), Workload(**workload), torch.device("cuda"))
    call()
    call.start_cold()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


class _Nothing:
    """Stands for a kernel."""

    def run(self, *_: object, **__: object) -> None: ...
