"""Attention by moving keys equals that of one device: ranks are threads here (`rank_threads.py`)."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from flash import flash_attention
from played_cudnn import cudnn_attention
from rank_cases import KINDS, on_one_device, random_config, random_documents, random_tensors
from rank_threads import attended, plan_for

from attention import AttentionConfig, SparsePatternConfig
from attention.sharding.shards import shards_of
from attention.sharding.traffic import traffic

FAST, WIDE = 20, 600


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


def test_lists_of_blocks_that_shards_cut_are_read_where_they_are():
    """Shards begin at tokens 68 and 136, inside of blocks of 16."""
    pattern = SparsePatternConfig(
        pattern_type="global_local", block_size=16, local_window_size=100, global_tokens=40
    )
    config = AttentionConfig(variant="block_sparse", pattern=pattern, workspace_bytes=1 << 16)
    tensors = random_tensors(random.Random(0), 203, 8, torch.float64)
    documents = ((127, 2, 74),) * len(tensors[0])
    got, _ = attended(config, 3, tensors, True, documents)
    for a, b in zip(got, on_one_device(config, tensors, True, documents), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("number", range(10))
def test_whole_calls_of_a_gpu_are_those_of_one_device(number):
    with flash_attention("any"):
        assert_is_of_one_device(f"flash {number}")


@pytest.mark.parametrize("number", range(6))
def test_calls_of_cudnns_attention_are_those_of_one_device(number):
    with cudnn_attention():
        assert_is_of_one_device(f"cudnn {number}")


@pytest.mark.parametrize("causal", [False, True])
def test_dense_parts_go_to_cudnns_attention(causal):
    tensors = random_tensors(random.Random(3), 96, 8, torch.bfloat16)
    config = AttentionConfig(variant="dense")
    with cudnn_attention(least=16) as counts:
        attended(config, 3, tensors, causal)
    # Each rank's own part, and one for each source.
    parts = 3 + (3 if causal else 6)
    assert counts["forward"] == counts["backward"] >= parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("kind", KINDS)
def test_whole_calls_in_low_precision_are_as_near_as_one_device(kind):
    rng = random.Random(f"{kind} flash")
    config = random_config(rng, kind)
    for causal in (False, True):
        tensors = random_tensors(rng, 203, 16, torch.bfloat16)
        exact = on_one_device(config, [x.double() for x in tensors], causal)
        with flash_attention():
            rounded = on_one_device(config, tensors, causal)
            got, _ = attended(config, 5, tensors, causal, zigzag=kind == "zigzag")
        for a, b, wanted in zip(got, rounded, exact, strict=True):
            error, own = ((x.double() - wanted).norm() / wanted.norm() for x in (a, b))
            assert error <= 1.6 * max(own, torch.finfo(torch.bfloat16).eps / 4)


@pytest.mark.parametrize(
    "world, seq, causal, on_gpu",
    [(8, 128, False, False), (16, 256, True, True), (12, 250, True, False), (12, 250, False, True)],
)
def test_peers_that_are_fetched_together_are_those_of_one_device(world, seq, causal, on_gpu):
    """LongNet's branches up to the whole sequence; of 250 tokens, shards begin out of stride."""
    config = AttentionConfig(
        variant="dilated",
        segment_lengths=(8, 32, 128, 512),
        dilation_rates=(1, 4, 8, 16),
        workspace_bytes=1 << 16,
    )
    heads, kv_heads, head_dim = 4, 2, 4
    tensors = [
        torch.randn(1, seq, n, head_dim, dtype=torch.float64) for n in (heads, kv_heads, kv_heads, heads)
    ]
    shards = shards_of(config, seq, world)
    plans = [plan_for(config, shards, rank, *tensors[:2], causal) for rank in range(world)]
    fetches = [fetch for plan in plans for stage in plan.stages for fetch in stage.fetches]
    assert (max(len(fetch.sources) for fetch in fetches) > 1) == (seq != 250)
    assert len(plans[0].stages) < world - 1
    with flash_attention("any") if on_gpu else nullcontext():
        got, sent = attended(config, world, tensors, causal)
    for a, b, bar in zip(got, on_one_device(config, tensors, causal), [1e-12, *[1e-10] * 3], strict=True):
        assert (a - b).abs().max() <= bar * b.abs().max().clamp(min=1)
    sizes = {"batch": 1, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "itemsize": 8}
    for rank in range(world):
        said = traffic(config, shards, rank, causal, **sizes, training=True, exchange="keys")
        counts = Counter()
        for peers in said:
            counts.update({peer: to for peer, (to, _) in peers.items() if to})
        assert sent[rank] == counts


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
