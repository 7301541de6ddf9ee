"""Counts the kernels of attentions, in a process of dry runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attention import AttentionConfig, build
from planner.workload import Workload


def run(log: str, cases: list[dict[str, Any]]) -> list[list[int]]:
    """Kernels of forward, and of backward where one is asked for, of each case, which go to `log`."""
    return [
        _one(Path(log), AttentionConfig(**case["config"]), Workload(**case["workload"])) for case in cases
    ]


def _one(log: Path, config: AttentionConfig, task: Workload) -> list[int]:
    module, trains = build(config).cuda(), task.mode == "training"
    sizes = [(task.batch, task.seq, heads, task.head_dim) for heads in (task.heads, task.groups, task.groups)]
    dtype = getattr(torch, task.dtype)
    inputs = [torch.empty(size, dtype=dtype, device="cuda", requires_grad=trains) for size in sizes]
    start = _lines(log)
    with torch.set_grad_enabled(trains):
        out = module(*inputs, is_causal=task.causal)
    middle = _lines(log)
    if trains:
        torch.autograd.grad(out, inputs, torch.empty_like(out))
    return [middle - start, _lines(log) - middle]


def _lines(log: Path) -> int:
    return len(log.read_bytes().splitlines()) if log.exists() else 0
