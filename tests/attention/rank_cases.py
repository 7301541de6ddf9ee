"""Random cases of attention over shards."""

from __future__ import annotations

import random

import torch

from attention import AttentionConfig, SparsePatternConfig, build

Documents = tuple[tuple[int, ...], ...]
KINDS = ("dense", "zigzag", "dilated", "local_window", "global_local", "dilated_sparse")


def random_config(rng: random.Random, kind: str) -> AttentionConfig:
    workspace = {"workspace_bytes": rng.choice((65536, 1 << 20))}
    block = rng.choice((1, 4, 8, 16, 32))
    if kind in ("dense", "zigzag"):
        return AttentionConfig(variant="dense", **workspace)
    if kind == "dilated":
        lengths, rates = [rng.choice((4, 8, 9, 13, 16))], [1]
        for _ in range(rng.choice((0, 1, 2))):
            lengths.append(lengths[-1] * rng.choice((2, 3, 4)) + rng.choice((0, 0, 1)))
            rates.append(min(rates[-1] * rng.choice((1, 2, 3)), lengths[-1]))
        return AttentionConfig(
            variant="dilated", segment_lengths=tuple(lengths), dilation_rates=tuple(rates), **workspace
        )
    branches = {}
    if kind == "dilated_sparse":
        count = rng.choice((1, 2, 3))
        branches["segment_lengths"] = tuple(block * rng.choice((2, 3, 4, 8, 16)) for _ in range(count))
        branches["dilation_rates"] = tuple(rng.choice((1, 2, 3)) for _ in range(count))
    pattern = SparsePatternConfig(
        pattern_type=kind,
        block_size=block,
        sparsity_ratio=rng.choice((0.1, 0.3, 0.7)),
        local_window_size=rng.choice((1, 5, 16, 40, 100)),
        global_tokens=rng.choice((1, 5, 16, 40)),
        edges=rng.choice(("block", "token")),
    )
    return AttentionConfig(variant="block_sparse", pattern=pattern, **branches, **workspace)


def random_documents(rng: random.Random, batch: int, seq: int) -> tuple[tuple[int, ...], ...]:
    items = []
    for _ in range(batch):
        ends = sorted({seq, *rng.choices(range(1, seq + 1), k=rng.choice((1, 2, 5)))})
        items.append(tuple(end - begin for begin, end in zip([0, *ends], ends, strict=False)))
    return tuple(items)


def numbers(documents: tuple[tuple[int, ...], ...] | None) -> torch.Tensor | None:
    """[batch, seq]."""
    if documents is None:
        return None
    rows = [torch.arange(len(item)).repeat_interleave(torch.tensor(item)) for item in documents]
    return torch.stack(rows)


def on_one_device(config, tensors, causal, documents=None, sinks=None):
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    logits = None if sinks is None else sinks.clone().requires_grad_()
    out = build(config)(q, k, v, is_causal=causal, documents=numbers(documents), sinks=logits)
    out.backward(tensors[3])
    return [out.detach(), q.grad, k.grad, v.grad, *([] if logits is None else [logits.grad])]


def random_tensors(rng: random.Random, seq: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    batch, kv_heads = rng.choice((1, 2)), rng.choice((1, 2, 3))
    heads = kv_heads * rng.choice((1, 2, 4))
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    return [
        torch.randn(batch, seq, count, dim, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
