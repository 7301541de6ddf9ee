"""What a call of fewer queries, or of documents, takes and launches, in a process of dry runs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from attention import AttentionConfig
from planner.measuring.call import call_of
from planner.workload import Workload


def run(log: str, config: dict[str, Any], workload: dict[str, Any]) -> dict[str, Any]:
    """Most bytes allocated and reserved, and the kernels of forward and backward, which go to `log`."""
    call = call_of(AttentionConfig(**config), Workload(**workload), torch.device("cuda"))
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    start = _lines(log)
    middle: list[int] = []
    call.module.register_forward_hook(lambda *_: middle.append(_lines(log)))
    result = call()
    ends = [middle[0] - start, _lines(log) - middle[0]]
    del result
    taken = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return taken | {"kernels": ends}


def _lines(log: str) -> int:
    path = Path(log)
    return len(path.read_bytes().splitlines()) if path.exists() else 0
