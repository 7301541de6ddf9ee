"""Attention by moving keys equals that of one device: ranks are threads here (`rank_threads.py`)."""

from __future__ import annotations

import random

import pytest
import torch
from flash import flash_attention
from rank_threads import attended

from attention import AttentionConfig, SparsePatternConfig, build

FAST, WIDE = 60, 600
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


def assert_is_of_one_device(seed: str) -> None:
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    config, world = random_config(rng, kind), rng.choice((1, 2, 3, 4, 5, 8))
    seq, causal = rng.choice((1, 3, 7, 17, 40, 63, 64, 100, 203)), rng.random() < 0.5
    tensors = random_tensors(rng, seq, rng.choice((4, 8)), torch.float64)
    documents = random_documents(rng, len(tensors[0]), seq) if rng.random() < 0.3 else None
    sinks = torch.randn(tensors[0].shape[2], dtype=torch.float64) if rng.random() < 0.3 else None
    got, _ = attended(config, world, tensors, causal, documents, sinks, zigzag=kind == "zigzag")
    wanted = on_one_device(config, tensors, causal, documents, sinks)
    for name, a, b, bar in zip(
        ("out", "dq", "dk", "dv", "dsinks"), got, wanted, [1e-12, *[1e-10] * 4], strict=False
    ):
        assert (a - b).abs().max() <= bar * b.abs().max().clamp(min=1), (seed, name, kind, world, seq, causal)


@pytest.mark.parametrize("number", range(FAST))
def test_random_cases_are_those_of_one_device(number):
    assert_is_of_one_device(f"fast {number}")


@pytest.mark.slow
def test_many_random_cases_are_those_of_one_device():
    for number in range(WIDE):
        assert_is_of_one_device(f"wide {number}")


@pytest.mark.parametrize("number", range(30))
def test_whole_calls_of_a_gpu_are_those_of_one_device(number):
    with flash_attention("any"):
        assert_is_of_one_device(f"flash {number}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_as_near_as_one_device(kind, dtype):
    """By the norm of errors, over 5 ranks: within 1.6 of what one device's own rounding does."""
    rng = random.Random(f"{kind} {dtype}")
    config = random_config(rng, kind)
    for causal in (False, True):
        tensors = random_tensors(rng, 203, 16, dtype)
        exact = on_one_device(config, [x.double() for x in tensors], causal)
        rounded = on_one_device(config, tensors, causal)
        got, _ = attended(config, 5, tensors, causal, zigzag=kind == "zigzag")
        for a, b, wanted in zip(got, rounded, exact, strict=True):
            error, own = ((x.double() - wanted).norm() / wanted.norm() for x in (a, b))
            assert error <= 1.6 * max(own, torch.finfo(dtype).eps / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_causal_window_sends_the_same_whatever_the_length_and_the_world(dtype):
    pattern = SparsePatternConfig(
        pattern_type="local_window", block_size=16, local_window_size=64, edges="token"
    )
    config = AttentionConfig(variant="block_sparse", pattern=pattern)
    sent = set()
    for world, seq in ((3, 512), (4, 512), (8, 1024), (4, 2048)):
        tensors = random_tensors(random.Random(0), seq, 8, dtype)
        sent.add(max(sum(count.values()) for count in attended(config, world, tensors, True)[1]))
    batch, _, kv_heads, dim = tensors[1].shape
    halo = batch * 64 * kv_heads * dim * dtype.itemsize
    # Keys and values forward, both again backward to the next rank, and their gradients to the one before.
    assert sent == {6 * halo}


def test_keys_that_nobody_may_see_are_not_read():
    """NaN in what a window hides does not come through messages."""
    pattern = SparsePatternConfig(pattern_type="local_window", block_size=8, local_window_size=16)
    config = AttentionConfig(variant="block_sparse", pattern=pattern)
    tensors = random_tensors(random.Random(1), 96, 8, torch.float64)
    clean, _ = attended(config, 3, tensors, True)
    tensors[1][:, :8], tensors[2][:, :8] = torch.nan, torch.inf
    spoilt, _ = attended(config, 3, tensors, True)
    assert torch.equal(clean[0][:, 32:], spoilt[0][:, 32:])
    assert spoilt[0][:, :8].isnan().any()
