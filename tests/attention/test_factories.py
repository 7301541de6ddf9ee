"""The calls as reports and papers write them build what they say and run."""

from __future__ import annotations

import pytest
import torch
from conformance import check_float64, qkv

from attention import (
    AttentionConfig,
    ShardingConfig,
    SparsePatternConfig,
    build,
    create_block_sparse_attention,
    create_dilated_attention,
    create_multihead_block_sparse,
)

# The calls of the reports this project started from, class names replaced by the factories.
ATTENTIONS = {
    "base, 99% sparse": lambda: create_block_sparse_attention(
        variant="base", segment_lengths=[2048], dilation_rates=[1], sparsity_ratio=0.01
    ),
    "small segment": lambda: create_block_sparse_attention(
        segment_lengths=[2048],
        dilation_rates=[1],
        sparse_config=SparsePatternConfig(sparsity_ratio=0.01, block_size=64),
    ),
    "large segments": lambda: create_block_sparse_attention(
        segment_lengths=[65536, 131072],
        dilation_rates=[1, 2],
        sparse_config=SparsePatternConfig(pattern_type="dilated_sparse", sparsity_ratio=0.02, block_size=256),
    ),
    "hierarchical": lambda: create_block_sparse_attention(
        segment_lengths=[2048, 4096, 8192], dilation_rates=[1, 2, 4], sparsity_ratio=0.05, block_size=128
    ),
    "V2": lambda: create_block_sparse_attention(
        segment_lengths=[2048, 4096, 8192],
        dilation_rates=[1, 2, 4],
        sparse_config=SparsePatternConfig(pattern_type="dilated_sparse", sparsity_ratio=0.1, block_size=128),
    ),
    "local window": lambda: create_block_sparse_attention(
        sparse_config=SparsePatternConfig(pattern_type="local_window", local_window_size=512, block_size=128)
    ),
    "global and local": lambda: create_block_sparse_attention(
        sparse_config=SparsePatternConfig(
            pattern_type="global_local", global_tokens=128, local_window_size=512, block_size=128
        )
    ),
    "multi-scale": lambda: create_block_sparse_attention(
        variant="base", segment_lengths=[2048, 4096], dilation_rates=[1, 2], sparsity_ratio=0.01
    ),
    "adaptive": lambda: create_block_sparse_attention(
        "adaptive", segment_lengths=[4096], dilation_rates=[1], num_heads=8, head_dim=64
    ),
    "improved": lambda: create_dilated_attention(
        "improved", segment_lengths=[16384, 32768, 65536], dilation_rates=[1, 2, 4]
    ),
    "improved with its pool": lambda: create_dilated_attention(
        "improved", segment_lengths=[64, 128], dilation_rates=[1, 2], enable_memory_pool=True
    ),
    "improved without": lambda: create_dilated_attention(
        "improved", segment_lengths=[64, 128], dilation_rates=[1, 2], enable_memory_pool=False
    ),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("make", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_reported_attentions_build_and_equal_the_oracle(make, causal):
    check_float64(make(), *qkv(300, heads=8, head_dim=64), causal)


MULTIHEADS = {
    "base": lambda: create_multihead_block_sparse(
        embed_dim=512, num_heads=8, segment_lengths=[8192], dilation_rates=[1], sparsity_ratio=0.05
    ),
    "V2": lambda: create_multihead_block_sparse(
        embed_dim=768,
        num_heads=12,
        segment_lengths=[2048, 4096],
        dilation_rates=[1, 2],
        sparse_config=SparsePatternConfig(pattern_type="dilated_sparse", sparsity_ratio=0.1, block_size=128),
    ),
    "by variant": lambda: create_block_sparse_attention(
        "multihead",
        embed_dim=512,
        num_heads=8,
        segment_lengths=[2048],
        dilation_rates=[1],
        sparsity_ratio=0.1,
    ),
}


@pytest.mark.parametrize("make", MULTIHEADS.values(), ids=MULTIHEADS.keys())
def test_reported_multiheads_build_and_run(make):
    module = make()
    x = torch.randn(2, 200, module.config.multihead.embed_dim)
    out, weights = module(x, x, x)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert weights is None


def test_weights_come_with_the_output_on_request():
    module = ATTENTIONS["V2"]()
    q, k, v = qkv(300, heads=2, dtype=torch.float32)
    out, weights = module(q, k, v, return_attention_weights=True)
    assert out.shape == q.shape
    assert weights.block_size == 128
    assert weights.shape == (1, 2, 300, 300)
    assert weights.block_indices.shape[-1] == 2
    assert weights.block_values.shape[2:] == (len(weights.block_indices), 128, 128)


@pytest.mark.parametrize(
    "asked, switch",
    [
        ({}, "auto"),
        ({"enable_memory_pool": True}, "on"),
        ({"enable_memory_pool": False}, "off"),
        ({"pool": "off"}, "off"),
    ],
)
def test_the_pool_is_what_was_asked_for(asked, switch):
    for module in (
        create_dilated_attention(segment_lengths=[8], dilation_rates=[1], **asked),
        create_block_sparse_attention(segment_lengths=[128], dilation_rates=[1], **asked),
    ):
        assert module.config.pool == switch


@pytest.mark.parametrize("make", [*ATTENTIONS.values(), *MULTIHEADS.values()], ids=[*ATTENTIONS, *MULTIHEADS])
def test_a_config_builds_the_same_module_again(make):
    config = make().config
    again = build(AttentionConfig.from_json(config.to_json()))
    assert again.config == config
    assert type(again) is type(make())


@pytest.mark.parametrize("make", [ATTENTIONS["adaptive"], MULTIHEADS["base"]])
def test_parameters_are_made_on_the_device_asked_for(make):
    assert all(p.device.type == "cpu" for p in make().parameters())
    assert all(p.device.type == "meta" for p in build(make().config, device="meta").parameters())


RINGS = {
    "ring": (
        lambda: create_dilated_attention("ring", segment_lengths=[64], dilation_rates=[1], ring_size=8),
        lambda: create_dilated_attention(segment_lengths=[64], dilation_rates=[1]),
        ShardingConfig(ring_size=8, exchange="keys"),
    ),
    "ring of blocks": (
        lambda: create_block_sparse_attention("ring", pattern_type="local_window", travel="float32"),
        lambda: create_block_sparse_attention(pattern_type="local_window"),
        ShardingConfig(exchange="keys", travel="float32"),
    ),
    "distributed": (
        lambda: create_block_sparse_attention(
            "distributed", pattern_type="local_window", sharding=ShardingConfig(timeout_s=7)
        ),
        lambda: create_block_sparse_attention(pattern_type="local_window"),
        ShardingConfig(timeout_s=7),
    ),
    "distributed by heads": (
        lambda: create_block_sparse_attention(
            "distributed", segment_lengths=[256], dilation_rates=[1], exchange="heads"
        ),
        lambda: create_block_sparse_attention(segment_lengths=[256], dilation_rates=[1]),
        ShardingConfig(exchange="heads"),
    ),
}


@pytest.mark.parametrize("ring, twin, sharding", RINGS.values(), ids=RINGS.keys())
def test_a_rank_that_is_alone_has_the_module_of_one_device(ring, twin, sharding):
    module, alone = ring(), twin()
    assert type(module) is type(alone)
    assert module.config == alone.config.model_copy(update={"sharding": sharding})
    q, k, v = qkv(100)
    assert torch.equal(module(q, k, v, is_causal=True), alone(q, k, v, is_causal=True))
    assert torch.equal(module.shard(q), q)
    assert torch.equal(module.gather(q), q)
    assert torch.equal(module.positions(5), torch.arange(5))


@pytest.mark.parametrize("variant", ["adaptive", "multihead"])
def test_any_variant_takes_sharding(variant):
    sizes = {"embed_dim": 32} if variant == "multihead" else {"head_dim": 8}
    options = {"num_heads": 4, "segment_lengths": [128], "dilation_rates": [1], **sizes}
    module = create_block_sparse_attention(variant, **options, sharding=ShardingConfig())
    assert type(module) is type(create_block_sparse_attention(variant, **options))
    assert torch.equal(module.positions(5), torch.arange(5))


def test_options_in_any_sequence_type():
    first = create_dilated_attention(segment_lengths=(8, 16), dilation_rates=(1, 2)).config
    for lengths, rates in (([8, 16], [1, 2]), (range(8, 17, 8), range(1, 3))):
        assert create_dilated_attention(segment_lengths=lengths, dilation_rates=rates).config == first
