"""Training at the sizes that people run, which no dense reference fits: some queries are told in float64 one
by one, and all values by what their gradients sum to."""

from __future__ import annotations

import random
from itertools import pairwise

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


def packed_lengths(rng, seq):
    """Documents as they are packed: many short ones, few long."""
    edges = [0]
    while edges[-1] < seq:
        edges.append(min(edges[-1] + 1 + round(2 ** rng.uniform(4, 13)), seq))
    return [b - a for a, b in pairwise(edges)]


def assert_packed_training(window, seq, heads, kv_heads, dim, seed, queries=None):
    """Causal, in bfloat16, with learned sinks: some queries of several documents told in float64."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = packed_lengths(rng, seq)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    begins = torch.tensor([0, *lengths]).cumsum(0)
    q, grad = (torch.randn(1, seq, heads, dim, generator=generator).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, seq, kv_heads, dim, generator=generator).bfloat16() for _ in range(2))
    first = seq - (queries or seq)
    q, grad = q[:, first:].contiguous(), grad[:, first:]
    sinks = torch.randn(heads, generator=generator)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    pattern = SparsePatternConfig(
        pattern_type="local_window", block_size=128, local_window_size=window - 1, edges="token"
    )
    module = build(AttentionConfig(variant="block_sparse", pattern=pattern))
    out = module(q, k, v, True, documents=documents[None], sinks=sinks)
    out.backward(grad)
    bar = 40 * torch.finfo(torch.bfloat16).eps
    with torch.no_grad():
        assert all(bool(x.isfinite().all()) for x in (out, *(leaf.grad for leaf in leaves)))
        hidden = documents < documents[first]
        assert not k.grad[0, hidden].any()
        assert not v.grad[0, hidden].any()
        for query in {first, seq - 1, *(rng.randrange(first, seq) for _ in range(10))}:
            head = rng.randrange(heads)
            group = head * kv_heads // heads
            begin = max(int(begins[documents[query]]), query - window + 1)
            keys, values = (x[0, begin : query + 1, group].double() for x in (k, v))
            one, above = q[0, query - first, head].double(), grad[0, query - first, head].double()
            scores = torch.cat([keys @ one * dim**-0.5, sinks[head, None].double()])
            weights = scores.softmax(0)[:-1]
            expected = weights @ values
            expected_dq = (weights * (values @ above - expected @ above)) @ keys * dim**-0.5
            assert largest(out[0, query - first, head].double() - expected) <= bar * largest(v)
            assert largest(q.grad[0, query - first, head].double() - expected_dq) <= bar * largest(q.grad)
        # Of all weights of a query the sink's share is missing: that of the first query of each document,
        # which sees itself alone, is told here.
        for query in [int(b) for b in begins[:-1] if b >= first][:20]:
            own = (
                torch.einsum(
                    "hd,hd->h",
                    q[0, query - first].double(),
                    k[0, query].double().repeat_interleave(heads // kv_heads, 0),
                )
                * dim**-0.5
            )
            share = (own - sinks.double()).sigmoid()[:, None]
            value = v[0, query].double().repeat_interleave(heads // kv_heads, 0)
            assert largest(out[0, query - first].double() - share * value) <= bar * largest(v)


def test_packed_documents_in_a_window_train_in_16_bits():
    assert_packed_training(512, 4096, 8, 2, 64, seed=1)


@pytest.mark.slow
def test_30714_packed_tokens_in_a_window_of_4096_train_in_16_bits(seed):
    assert_packed_training(4096, 30_714, 12, 3, 128, seed)


@pytest.mark.slow
def test_a_last_chunk_of_30714_packed_tokens_trains_in_16_bits(seed):
    assert_packed_training(4096, 30_714, 12, 3, 128, seed, queries=2048)
