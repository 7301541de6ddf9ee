"""Is every way of CUDA right? Forward and gradients of a call against the oracle in float64 on the CPU.

An error is relative to the largest value of the oracle's; gradients share one scale. float64 is held to fixed
bars, lower precisions to what a naive attention in the same type reaches on the same device: at most twice
its error forward and three times in gradients, and always an ulp of the type, and what a log-sum-exp in
single precision cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from attention.config import AdaptiveConfig, AttentionConfig, Edges, PatternType, SparsePatternConfig
from attention.reference import multiplicity, reference_attention
from planner.measuring.call import call_of
from planner.workload import Workload
from studies.bench.records import Row

HEADS, KV_HEADS, CHANNELS = 4, 2, 64
SEQ: Final = 597
"""No multiple of anything, and enough for cuDNN's attention, which is not given less than 512 tokens."""
BLOCK: Final = 64
FORWARD, GRADIENTS = 2.0, 3.0
"""Times the naive attention's error."""
EXACT_FORWARD, EXACT_GRADIENTS = 1e-12, 1e-10


def attentions() -> dict[str, AttentionConfig]:
    """Every attention, at sizes that suit so few tokens."""

    def pattern(kind: PatternType, edges: Edges = "block", **fields: Any) -> AttentionConfig:
        branches: dict[str, Any] = {}
        if kind == "dilated_sparse":
            branches = {"segment_lengths": (4 * BLOCK, 8 * BLOCK), "dilation_rates": (1, 3)}
        sparse = SparsePatternConfig(pattern_type=kind, block_size=BLOCK, edges=edges, **fields)
        return AttentionConfig(variant="block_sparse", pattern=sparse, **branches)

    return {
        "dense": AttentionConfig(variant="dense"),
        "local_window": pattern("local_window", local_window_size=2 * BLOCK),
        "dilated": AttentionConfig(
            variant="dilated", segment_lengths=(100, 256, 597), dilation_rates=(1, 3, 5)
        ),
        "dilated_sparse": pattern("dilated_sparse", sparsity_ratio=0.4),
        "adaptive": AttentionConfig(
            variant="adaptive",
            pattern=SparsePatternConfig(block_size=BLOCK, sparsity_ratio=0.4),
            adaptive=AdaptiveConfig(num_heads=HEADS, head_dim=CHANNELS),
        ),
        "global_local": pattern("global_local", local_window_size=BLOCK, global_tokens=70),
        "local_window, to the token": pattern("local_window", "token", local_window_size=90),
        "global_local, to the token": pattern(
            "global_local", "token", local_window_size=90, global_tokens=70
        ),
    }


def cases() -> Iterator[tuple[str, AttentionConfig, Workload]]:
    """(name, config, workload) of every check, the most telling first: each attention in the types that
    models run in, then what models ask for beside, kernels by name, and all the rest."""
    every = attentions()
    usual = Workload(
        seq=SEQ, batch=2, heads=HEADS, kv_heads=KV_HEADS, head_dim=CHANNELS, mode="training", causal=True
    )

    def named(name: str, config: AttentionConfig, what: str = "", **changes: Any) -> Any:
        workload = Workload(**{**usual.model_dump(), **changes})
        causal = "causal" if workload.causal else "not causal"
        parts = (name, workload.dtype, causal, what)
        return ", ".join(filter(None, parts)), config, workload

    for dtype in ("bfloat16", "float16"):
        for name, config in every.items():
            yield named(name, config, dtype=dtype)
    for name in ("dense", "local_window", "dilated"):
        yield named(name, every[name], "100 queries", dtype="float16", queries=100)
        yield named(name, every[name], "documents", dtype="float16", documents=(200, 3, 394))
        yield named(name, every[name], "sinks", dtype="float16", sinks=True)
    for backend in ("flash", "cudnn"):
        for name in ("dense", "dilated"):
            config = every[name].model_copy(update={"backend": backend})
            yield named(name, config, f"backend {backend}", dtype="bfloat16")
    for dtype in ("float32", "float64"):
        for name, config in every.items():
            yield named(name, config, dtype=dtype)
    for name in ("dense", "dilated"):
        for channels in (40, 128, 256):
            yield named(name, every[name], f"{channels} channels", dtype="float16", head_dim=channels)
        yield named(name, every[name], "as many kv heads", dtype="bfloat16", kv_heads=HEADS)
    for name in ("local_window", "global_local", "dilated_sparse"):
        config = every[name].model_copy(update={"backend": "flex"})
        yield named(name, config, "backend flex", dtype="bfloat16")
    for dtype in ("bfloat16", "float16", "float32"):
        for name, config in every.items():
            yield named(name, config, dtype=dtype, causal=False)


def check(config: Row, workload: Row, device: str) -> Row:
    """The row of one case: which kernel ran, and errors beside those allowed."""
    torch.set_float32_matmul_precision("highest")
    asked = Workload(**workload)
    call = call_of(AttentionConfig(**config), asked, torch.device(device))
    module: Any = call.module
    q, k, v = call.inputs
    assert call.grad is not None, "checks are of training"
    layout = module.select(q, k, asked.causal) if module.config.variant == "adaptive" else None
    ours = _forward_and_gradients(lambda *_: _output(call()), call.inputs, call.grad, done=True)
    kernel = str(module.kernels(q, k, v, asked.causal))
    where = None if layout is None else layout.cpu()
    documents, sinks = call.documents, call.sinks
    exact_inputs = tuple(x.detach().cpu().double() for x in call.inputs)
    exact = _forward_and_gradients(
        lambda q, k, v: reference_attention(
            q,
            k,
            v,
            module.config,
            asked.causal,
            where,
            documents=None if documents is None else documents.cpu(),
            sinks=None if sinks is None else sinks.detach().cpu(),
        ),
        exact_inputs,
        call.grad.cpu().double(),
    )
    errors = _errors(ours, exact)
    if asked.dtype == "float64":
        limits = [EXACT_FORWARD, *[EXACT_GRADIENTS] * 3]
    else:
        m = _counts(module.config, asked, where)
        if documents is not None:
            same = documents[:, asked.seq - asked.query_tokens :, None] == documents[:, None, :]
            m = m * same[:, None].cpu()
        naive = _forward_and_gradients(
            lambda q, k, v: _naive(q, k, v, m.to(device), sinks),
            tuple(x.detach() for x in call.inputs),
            call.grad,
        )
        rounding = torch.finfo(q.dtype).eps + torch.finfo(torch.float32).eps * _largest_score(*exact_inputs)
        factors = (FORWARD, *[GRADIENTS] * 3)
        limits = [
            factor * error + rounding for factor, error in zip(factors, _errors(naive, exact), strict=True)
        ]
    names = ("out", "dq", "dk", "dv")
    wrong = [
        f"{name}: error {error:.2e} of {limit:.2e} allowed"
        for name, error, limit in zip(names, errors, limits, strict=True)
        if not error <= limit
    ]
    return {
        "kernel": kernel,
        "errors": dict(zip(names, errors, strict=True)),
        "allowed": dict(zip(names, limits, strict=True)),
        **({"outcome": "wrong", "message": "; ".join(wrong)} if wrong else {}),
    }


def _output(result: object) -> Tensor:
    out = result[0] if isinstance(result, tuple) else result
    assert isinstance(out, Tensor)
    return out


def _forward_and_gradients(
    run: Any, inputs: tuple[Tensor, ...], grad: Tensor, *, done: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """(out, gradients of q, k and v) of a function; `done`: it goes backward itself."""
    leaves = inputs if done else tuple(x.detach().requires_grad_() for x in inputs)
    out = run(*leaves)
    if not done:
        out.backward(grad.to(out.dtype))
    gradients = []
    for x in leaves:
        assert x.grad is not None
        gradients.append(x.grad.detach().cpu().double())
    return out.detach().cpu().double(), gradients


def _errors(found: tuple[Tensor, list[Tensor]], exact: tuple[Tensor, list[Tensor]]) -> list[float]:
    """Relative errors of out, dq, dk and dv; infinite where a number is none."""
    scale = max(float(x.abs().max()) for x in exact[1])
    pairs = [(found[0], exact[0], float(exact[0].abs().max()))]
    pairs += [(x, y, scale) for x, y in zip(found[1], exact[1], strict=True)]
    errors = [float((x - y).abs().max()) / (size or 1.0) for x, y, size in pairs]
    return [math.inf if math.isnan(error) else error for error in errors]


def _counts(config: AttentionConfig, workload: Workload, layout: Tensor | None) -> Tensor:
    """How often each query pairs with each key: float64 [H, Q, S], or [B, H, Q, S] of chosen blocks."""
    seq, first = workload.seq, workload.seq - workload.query_tokens
    if layout is None:
        return multiplicity(config, seq, workload.heads, workload.causal)[..., first:, :]
    assert config.pattern is not None
    size, blocks = config.pattern.block_size, layout.shape[2]
    kept = torch.zeros(*layout.shape[:3], blocks + 1, dtype=torch.float64)
    kept.scatter_(-1, layout.masked_fill(layout < 0, blocks).long(), 1.0)
    m = kept[..., :blocks].repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :seq, :seq]
    return (m.tril() if workload.causal else m)[..., first:, :]


def _naive(q: Tensor, k: Tensor, v: Tensor, m: Tensor, sinks: Tensor | None) -> Tensor:
    """Masked softmax(q k^T scale + log M) v, every step in the type of q; `sinks` are one more key without a
    value."""
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    key, value = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (key, value))
    empty = (m == 0).all(dim=-1, keepdim=True)
    scores = query @ key.transpose(-1, -2) / math.sqrt(q.shape[3])
    scores = scores + m.log().masked_fill(empty, 0.0).to(q.dtype)
    if sinks is not None:
        extra = sinks.detach()[:, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, extra], -1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights.masked_fill(empty, 0.0) @ value).transpose(1, 2)


def _largest_score(q: Tensor, k: Tensor, _: Tensor) -> float:
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return float(torch.einsum("bqhd,bkhd->bhqk", q, keys).abs().max()) / math.sqrt(q.shape[3])
