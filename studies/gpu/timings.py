"""Seconds on the device beside those of PyTorch's own attentions, and how they and bytes grow with length."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attention.config import AttentionConfig
from planner.measuring.call import ModuleCall, call_of
from planner.measuring.footprint import footprint
from planner.workload import Workload
from studies import peers
from studies.bench.records import Row, timed
from studies.gpu.worker import short

ROUNDS: Final = 7
"""Counted calls of each side, in turn."""
BACKENDS: Final[dict[str, SDPBackend | None]] = {
    "SDPA": None,
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, math": SDPBackend.MATH,
}
MOST_SCORES: Final = 1 << 33
"""Bytes of the scores that SDPA's math may store."""


def in_turn(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int = ROUNDS) -> Row:
    """Median seconds of each, and the median over rounds of its seconds beside those of the first; what
    cannot run has its reason under `absent`."""
    absent: dict[str, str] = {}
    for name, run in runs.items():
        try:
            for _ in range(2):
                timed(run, device)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if name == next(iter(runs)):
                raise
            absent[name] = short(error)
    there = {name: run for name, run in runs.items() if name not in absent}
    times: dict[str, list[float]] = {name: [] for name in there}
    for _ in range(rounds):
        for name, run in there.items():
            times[name].append(timed(run, device))
    first = next(iter(times.values()))
    return {
        "seconds": {name: median(mine) for name, mine in times.items()},
        "ratios": {
            name: median(a / b for a, b in zip(mine, first, strict=True)) for name, mine in times.items()
        },
        "absent": absent,
    }


def dense(workload: Row, device: str, rounds: int = ROUNDS) -> Row:
    """Dense attention of this project beside SDPA, with each of its backends, and compiled FlexAttention."""
    where, asked = torch.device(device), Workload(**workload)
    call = call_of(AttentionConfig(variant="dense"), asked, where)
    q, k, v = call.inputs
    training = call.grad is not None
    alike = asked.groups == asked.heads

    def stepped(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        """A call over tensors heads first, as torch has them, and in training its backward."""

        def run() -> None:
            call.drop_gradients()
            with torch.set_grad_enabled(training):
                out = attend(*(x.transpose(1, 2) for x in (q, k, v)))
            if call.grad is not None:
                out.backward(call.grad.transpose(1, 2))

        return run

    def by(backend: SDPBackend | None) -> Callable[[], object]:
        run = stepped(
            lambda q, k, v: scaled_dot_product_attention(
                q, k, v, is_causal=asked.causal, enable_gqa=not alike
            )
        )
        if backend is None:
            return run

        def forced() -> None:
            with sdpa_kernel(backend):
                run()

        return forced

    def ours() -> None:
        call.drop_gradients()
        call()

    runs: dict[str, Callable[[], object]] = {"ours": ours}
    scores = asked.batch * asked.heads * asked.seq**2 * asked.itemsize
    for name, backend in BACKENDS.items():
        if backend != SDPBackend.MATH or scores <= MOST_SCORES:
            runs[name] = by(backend)
    if where.type == "cuda":
        runs["FlexAttention"] = stepped(_flex(asked, where))
    return {"kernel": _kernel(call), **in_turn(runs, where, rounds)}


def _kernel(call: ModuleCall) -> str:
    module: Any = call.module
    q, k, v = call.inputs
    return str(module.kernels(q, k, v, call.workload.causal))


def _flex(asked: Workload, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention; what it skips of a causal mask is decided once, as a program would."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention)
    mask = None
    if asked.causal:
        mask = create_block_mask(
            lambda b, h, q, k: q >= k, None, None, asked.seq, asked.seq, device=device.type
        )
    gqa = asked.groups != asked.heads
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)


def blocks(pattern: str, dtype: str, block: int, kept: int, seq: int, device: str, step: str) -> Row:
    """A sparse attention: `forward` beside compiled FlexAttention over the same blocks (ratio: theirs /
    ours), `training` beside its own forward (ratio: step / forward)."""
    row = peers.flex_row if step == "forward" else peers.training_row
    return row(pattern, getattr(torch, dtype), block, kept, torch.device(device), ROUNDS, seq)


def length(config: Row, workload: Row, device: str, rounds: int = 3) -> Row:
    """Seconds of a warm call at one length, and bytes at the peak of a cold one above its inputs."""
    where = torch.device(device)
    call = call_of(AttentionConfig(**config), Workload(**workload), where)
    call.start_cold()
    peak = footprint(call, where).peak
    call.drop_gradients()
    call()
    seconds = []
    for _ in range(rounds):
        call.drop_gradients()
        seconds.append(timed(call, where))
    return {"kernel": _kernel(call), "seconds": median(seconds), "peak": peak, "inputs": call.nbytes}
