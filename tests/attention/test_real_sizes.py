"""Training at the sizes that people run, which no dense reference fits: some queries are told in float64 one
by one, and all values by what their gradients sum to."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tolerance import largest

from attention import AttentionConfig, SparsePatternConfig, build
from attention.layout import build_layout


def meets(config, seq, causal, query, head):
    """[seq], how often a query of a head meets each key."""
    keys = np.arange(seq)
    if config.variant == "block_sparse":
        layout = build_layout(config, seq, causal)
        found = np.isin(keys // layout.block_size, layout.row(query // layout.block_size)) * 1
    else:
        found = np.zeros(seq, np.int64)
        for length, rate in config.branches or ((seq, 1),):
            here = (query % length) % rate == head % rate
            found += here * (keys // length == query // length) * ((keys % length) % rate == head % rate)
    return found * (keys <= query) if causal else found


def told(config, q, k, v, grad, query, head, causal):
    """(out, dq) of one query of one head in float64."""
    group = head * k.shape[2] // q.shape[2]
    scale = q.shape[3] ** -0.5
    one, keys, values = q[0, query, head].double(), k[0, :, group].double(), v[0, :, group].double()
    counts = torch.from_numpy(meets(config, q.shape[1], causal, query, head)).double()
    weights = (keys @ one * scale + counts.log()).softmax(0)
    out, above = weights @ values, grad[0, query, head].double()
    return out, (weights * (values @ above - out @ above)) @ keys * scale


def assert_trains(config, seq, heads, kv_heads, dim, dtype, causal, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random_tensor(count):
        return torch.randn(1, seq, count, dim, generator=generator).to(dtype)

    q, grad = random_tensor(heads), random_tensor(heads)
    k, v = random_tensor(kv_heads), random_tensor(kv_heads)
    for x in (q, k, v):
        x.requires_grad_()
    module = build(config)
    out = module(q, k, v, is_causal=causal)
    out.backward(grad)
    with torch.no_grad():
        assert all(bool(x.isfinite().all()) for x in (out, q.grad, k.grad, v.grad))
        places = {(seq - 1, heads - 1), (0, 0), (seq // 2, heads // 2), (seq * 2 // 3, 0)}
        covered = [(t, h) for t, h in places if meets(config, seq, causal, t, h).any()]
        bar = 40 * torch.finfo(dtype).eps
        for query, head in covered:
            expected, expected_dq = told(config, q, k, v, grad, query, head, causal)
            assert largest(out[0, query, head].double() - expected) <= bar * largest(v)
            assert largest(q.grad[0, query, head].double() - expected_dq) <= bar * largest(q.grad)
        if len(covered) == len(places) and all(rate == 1 for _, rate in config.branches or ((1, 1),)):
            # Weights of a query sum to one: what its gradient says of values, all values together get.
            sums = grad[0].double().sum(0).view(kv_heads, -1, dim).sum(1)
            spread = largest(v.grad) * seq**0.5
            assert largest(v.grad[0].double().sum(0) - sums) <= bar * max(spread, largest(sums))


def window(block, window):
    pattern = SparsePatternConfig(pattern_type="local_window", block_size=block, local_window_size=window)
    return AttentionConfig(variant="block_sparse", pattern=pattern)


def unnested():
    pattern = SparsePatternConfig(pattern_type="dilated_sparse", block_size=32, sparsity_ratio=0.25)
    return AttentionConfig(
        variant="block_sparse", pattern=pattern, segment_lengths=(736, 640), dilation_rates=(1, 1)
    )


@pytest.mark.parametrize(
    "config, seq, heads, kv_heads, dim, causal",
    [
        (window(64, 256), 6144, 12, 12, 128, True),
        (
            AttentionConfig(variant="dilated", segment_lengths=(9,), dilation_rates=(5,), uncovered="zero"),
            32,
            16,
            16,
            128,
            True,
        ),
        (unnested(), 4096, 16, 2, 128, False),
    ],
    ids=["window", "dilated", "unnested segments"],
)
def test_ordinary_configs_train_in_16_bits(config, seq, heads, kv_heads, dim, causal):
    assert_trains(config, seq, heads, kv_heads, dim, torch.bfloat16, causal)


def ordinary(rng):
    """(config, seq, heads, kv_heads, head_dim, dtype, causal) as people have them."""
    seq = rng.choice((1000, 4096, 6144, 8192, 16_384, 30_714, 32_768, rng.randint(1000, 40_000)))
    heads = rng.choice((4, 8, 12, 16))
    kv_heads = heads // rng.choice((1, 1, 2, 4))
    dim = rng.choice((64, 80, 128))
    block = rng.choice((16, 64, 128, 256))
    kind = rng.choice(("local_window", "local_window", "global_local", "dilated_sparse", "dilated", "dense"))
    fields = {}
    if kind in ("dilated", "dilated_sparse"):
        unit = block if kind == "dilated_sparse" else 1
        count = rng.randint(1, 3)
        blocks = [max(rng.choice((512, 1024, 2048, rng.randint(300, 4000))) // unit, 1) for _ in range(count)]
        rates = [min(rng.choice((1, 2, 3, 4)), length) for length in blocks]
        fields = {"segment_lengths": [length * unit for length in blocks], "dilation_rates": [1, *rates[1:]]}
    if kind == "dense":
        seq = min(seq, 4096)
    if kind in ("dense", "dilated"):
        config = AttentionConfig(variant=kind, **fields)
    else:
        extra = {"sparsity_ratio": 0.02} if kind == "dilated_sparse" else {}
        extra |= {"global_tokens": 64} if kind == "global_local" else {}
        size = rng.choice((256, 512, 1024, 4096))
        pattern = SparsePatternConfig(pattern_type=kind, block_size=block, local_window_size=size, **extra)
        config = AttentionConfig(variant="block_sparse", pattern=pattern, **fields)
    dtype = rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    return config, seq, heads, kv_heads, dim, dtype, rng.random() < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_300_ordinary_trainings(seed, part):
    first = 300 * seed + 15 * part
    for number in range(first, first + 15):
        case = ordinary(random.Random(number))
        try:
            assert_trains(*case, seed=number)
        except AssertionError as error:
            raise AssertionError(f"training {number}: {case}") from error
