"""Attention over the ranks of a gloo group equals that of one device, and sends what `traffic` says."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from rank_cases import KINDS, numbers, on_one_device, random_config, random_documents, random_tensors

from attention import ShardingConfig, build

CASES = 8


def case(rank: int, world: int, seed: str, exchange: str) -> str | None:
    """What is wrong with a random case on this rank; None if nothing is."""
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    config, seq, causal = (
        random_config(rng, kind),
        rng.choice((1, 2, 7, 17, 64, 100, 203)),
        rng.random() < 0.5,
    )
    tensors = random_tensors(rng, seq, rng.choice((4, 8)), torch.float64)
    if exchange == "heads":
        tensors = [torch.cat([x] * world, 2) for x in tensors]
    documents = random_documents(rng, len(tensors[0]), seq) if rng.random() < 0.3 else None
    sinks = torch.randn(tensors[0].shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sinks = sinks if rng.random() < 0.3 else None
    sharding = ShardingConfig(
        exchange=exchange, shards="zigzag" if kind == "zigzag" else "contiguous", timeout_s=30
    )
    module = build(config.model_copy(update={"sharding": sharding}))
    q, k, v = (module.shard(x).clone().requires_grad_() for x in tensors[:3])
    logits = None if sinks is None else sinks.clone().requires_grad_()
    if world > 1:
        module.transport.sent.clear()
    out = module(q, k, v, is_causal=causal, documents=numbers(documents), sinks=logits)
    out.backward(module.shard(tensors[3]))
    if logits is not None and world > 1:
        dist.all_reduce(logits.grad)
    wanted = on_one_device(config, tensors, causal, documents, sinks)
    for number, (part, whole) in enumerate(zip((out.detach(), q.grad, k.grad, v.grad), wanted, strict=False)):
        bar = (1e-10 if number else 1e-12) * whole.abs().max().clamp(min=1)
        if part.numel() and (part - module.shard(whole)).abs().max() > bar:
            return f"{seed}: {kind} of {seq} tokens on {world} ranks, causal {causal}: tensor {number} is off"
    if logits is not None and (logits.grad - wanted[4]).abs().max() > 1e-10:
        return f"{seed}: the gradient of sinks is off"
    if world > 1 and documents is None:
        sent = dict(module.transport.sent)
        traffic = module.traffic(q, k, causal)
        peers = traffic.forward.keys() | traffic.backward.keys()
        said = {
            peer: sum(part.get(peer, (0, 0))[0] for part in (traffic.forward, traffic.backward))
            for peer in peers
        }
        if {peer: count for peer, count in said.items() if count} != sent:
            return f"{seed}: {kind} of {seq} tokens on {world} ranks sends {sent}, not {said}"
    return None


def cases(rank: int, world: int, seed: str, count: int, exchange: str) -> list[str]:
    torch.set_num_threads(1)
    found = [case(rank, world, f"{seed} {number}", exchange) for number in range(count)]
    return [text for text in found if text]


@pytest.mark.parametrize("exchange", ["keys", "heads"])
@pytest.mark.parametrize("world", [1, 3, 4])
def test_ranks_compute_what_one_device_does(world, exchange, ranks):
    assert [*chain(*ranks(world).run(cases, world, "fast", CASES, exchange))] == []


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["keys", "heads"])
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_ranks_compute_what_one_device_does_widely(world, exchange, ranks):
    assert [*chain(*ranks(world).run(cases, world, "wide", 200, exchange, patience=1200.0))] == []
