"""Everything that cannot be right is refused by an error of the project's tree, before any allocation."""

from __future__ import annotations

import pytest
import torch
from conformance import adaptive, dilated, patterned, qkv
from torch.profiler import ProfilerActivity, profile

from attention import (
    AdaptiveConfig,
    AttentionConfig,
    AttentionPlannerError,
    ConfigError,
    InputError,
    MultiheadConfig,
    ShardingConfig,
    SparsePatternConfig,
    UnavailableError,
    build,
    create_block_sparse_attention,
    create_dilated_attention,
    create_multihead_block_sparse,
)

DENSE = AttentionConfig(variant="dense")
MODULES = {
    "dense": DENSE,
    "dilated": dilated([(16, 1), (32, 2)]),
    "block_sparse": patterned("local_window", local_window_size=16),
    "adaptive": adaptive(0.5),
}
each = pytest.mark.parametrize("config", MODULES.values(), ids=MODULES.keys())


def allocated_by(call):
    """(the exception that `call` ended in, bytes that torch allocated in it)."""
    caught = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the test looks at whatever it is
            caught = error
    return caught, sum(max(event.self_cpu_memory_usage, 0) for event in record.key_averages())


def assert_refused(call, error, message):
    caught, allocated = allocated_by(call)
    assert isinstance(caught, error), repr(caught)
    assert isinstance(caught, AttentionPlannerError)
    assert message in str(caught)
    assert allocated <= 256


def test_allocations_are_seen():
    caught, allocated = allocated_by(lambda: torch.zeros(1000) + 1)
    assert caught is None
    assert allocated >= 8000


def replaced(position, value):
    inputs = list(qkv(20, batch=2, kv_heads=2, dtype=torch.float32))
    inputs[position] = value
    return inputs


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


# (position replaced, with what, part of the message) against q [2, 20, 4, 16] and k, v [2, 20, 2, 16].
BAD_TENSORS = {
    "a list": (0, [1.0], "q must be a tensor, got list"),
    "None": (2, None, "v must be a tensor, got NoneType"),
    "rank 3": (0, zeros(2, 20, 64), "q must be [batch, seq, heads, head_dim], got 3 dimensions (2, 20, 64)"),
    "rank 5": (1, zeros(1, 2, 20, 2, 16), "k must be [batch, seq, heads, head_dim], got 5 dimensions"),
    "a scalar": (2, zeros(), "v must be [batch, seq, heads, head_dim], got 0 dimensions ()"),
    "no tokens": (0, zeros(2, 0, 4, 16), "pass at least 1 token"),
    "no batch": (0, zeros(0, 20, 4, 16), "q must not be empty"),
    "no heads": (1, zeros(2, 20, 0, 16), "k must not be empty"),
    "no channels": (2, zeros(2, 20, 2, 0), "v must not be empty"),
    "integers": (0, zeros(2, 20, 4, 16, dtype=torch.int64), "float32, float64, got int64"),
    "complex": (1, zeros(2, 20, 2, 16, dtype=torch.complex64), "got complex64"),
    "eight bits": (2, zeros(2, 20, 2, 16, dtype=torch.float8_e4m3fn), "got float8_e4m3fn"),
    "another dtype": (1, zeros(2, 20, 2, 16, dtype=torch.float64), "agree in dtype"),
    "another device": (2, zeros(2, 20, 2, 16, device="meta"), "agree in device"),
    "another batch": (1, zeros(1, 20, 2, 16), "agree in batch, got 2, 1, 2"),
    "another length": (2, zeros(2, 21, 2, 16), "equally many tokens, got 20 and 21"),
    "more queries than keys": (0, zeros(2, 21, 4, 16), "q has more tokens than k and v, 21 and 20"),
    "another head_dim": (1, zeros(2, 20, 2, 8), "q and k must agree in head_dim, got 16 and 8"),
    "k of other heads than v": (1, zeros(2, 20, 4, 16), "k and v must have equally many heads, got 4 and 2"),
}


@pytest.mark.parametrize("bad", BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
@each
def test_tensors_that_do_not_go_together_are_refused(config, bad):
    position, value, message = bad
    module, inputs = build(config), replaced(position, value)
    assert_refused(lambda: module(*inputs), InputError, message)


@each
def test_kv_heads_must_divide_heads(config):
    module = build(config)
    q, k, v = qkv(20, kv_heads=3, dtype=torch.float32)
    assert_refused(lambda: module(q, k, v), InputError, "got 3 kv heads for 4 query heads")


@pytest.mark.parametrize("heads, head_dim", [(2, 16), (4, 8)])
def test_adaptive_was_built_for_its_sizes(heads, head_dim):
    module = build(adaptive(0.5))
    q, k, v = qkv(20, heads=heads, head_dim=head_dim, dtype=torch.float32)
    message = f"built for (heads, head_dim) = (4, 16), got {(heads, head_dim)}"
    assert_refused(lambda: module(q, k, v), InputError, message)
    assert_refused(lambda: module.scorer_loss(q, k), InputError, message)
    assert_refused(lambda: module.select(q, k), InputError, message)


@each
def test_devices_without_a_kernel_are_unavailable(config):
    module = build(config, device="meta")
    inputs = [x.to("meta") for x in qkv(20, dtype=torch.float32)]
    assert_refused(lambda: module(*inputs), UnavailableError, "runs on 'cpu' and 'cuda'")


@pytest.mark.parametrize("variant", ["dense", "block_sparse"])
def test_flex_is_refused_on_the_cpu_and_never_replaced(variant):
    config = MODULES[variant]
    fields = {name: getattr(config, name) for name in AttentionConfig.model_fields}
    module = build(AttentionConfig(**{**fields, "backend": "flex"}))
    inputs = qkv(20, dtype=torch.float32)
    assert_refused(lambda: module(*inputs), UnavailableError, "backend='flex' cannot serve this")


# What a call may have beside


def numbers(*rows, **options):
    return torch.tensor(rows, **options)


TWO = numbers([0] * 9 + [1] * 11, [0] * 20)

# (arguments, error, part of the message) of calls over q [2, 20, 4, 16] and k, v [2, 20, 2, 16].
BAD_FEATURES = {
    "documents as a list": ({"documents": [[0] * 20] * 2}, InputError, "documents must be a tensor of whole"),
    "documents as a mask": (
        {"documents": torch.ones(2, 20, dtype=torch.bool)},
        InputError,
        "documents must be a tensor of whole numbers, one a token; got torch.bool",
    ),
    "documents in floats": ({"documents": torch.zeros(2, 20)}, InputError, "got torch.float32"),
    "documents of one item": ({"documents": TWO[:1]}, InputError, "[2, 20], a number for each token; got [1"),
    "documents too short": ({"documents": TWO[:, 1:]}, InputError, "got [2, 19]"),
    "documents of pairs": ({"documents": TWO[:, None, None]}, InputError, "got [2, 1, 1, 20]"),
    "documents not grouped": (
        {"documents": numbers([0, 1] * 10, [0] * 20)},
        InputError,
        "equal numbers of documents must follow each other, but in batch item 0 there is 0, then others, "
        "then 0 again",
    ),
    "documents without numbers": ({"documents": TWO.to("meta")}, InputError, "on the meta device"),
    "sinks as numbers": (
        {"sinks": [0.0] * 4},
        InputError,
        "sinks must be a tensor of floating-point numbers",
    ),
    "whole sinks": ({"sinks": numbers(1, 2, 3, 4)}, InputError, "one a head; got torch.int64"),
    "sinks of kv heads": ({"sinks": zeros(2)}, InputError, "[heads], a logit for each of 4, got [2]"),
    "one sink": ({"sinks": zeros()}, InputError, "[heads], a logit for each of 4, got []"),
    "sinks a batch item": ({"sinks": zeros(2, 4)}, InputError, "got [2, 4]"),
    "sinks elsewhere": ({"sinks": zeros(4, device="meta")}, InputError, "sinks are on meta, q on cpu"),
    "weights with documents": (
        {"documents": TWO, "return_attention_weights": True},
        UnavailableError,
        "documents= and return_attention_weights=True do not go together",
    ),
    "a mask": ({"attn_mask": zeros(20, 20)}, UnavailableError, "does not take attn_mask=: masks are given"),
    "dropout": ({"dropout_p": 0.1}, UnavailableError, "does not take dropout_p=: there is no dropout"),
    "a soft cap": ({"softcap": 50.0}, UnavailableError, "does not take softcap=: scores are not capped"),
    "ALiBi": ({"alibi_slopes": zeros(4)}, UnavailableError, "does not take alibi_slopes="),
    "a score function": ({"score_mod": max}, UnavailableError, "does not take score_mod="),
    "a window": (
        {"sliding_window": 8},
        UnavailableError,
        "sliding_window=: a window of W tokens is SparsePatternConfig(pattern_type='local_window', "
        "edges='token', local_window_size=W - 1)",
    ),
}


@pytest.mark.parametrize("bad", BAD_FEATURES.values(), ids=BAD_FEATURES.keys())
@each
def test_features_that_do_not_fit_are_refused(config, bad):
    arguments, error, message = bad
    if config.variant == "adaptive" and "weights" in message:
        message = "documents="
    module, inputs = build(config), qkv(20, batch=2, kv_heads=2, dtype=torch.float32)
    assert_refused(lambda: module(*inputs, **arguments), error, message)


def test_adaptive_says_why_it_takes_no_documents_and_no_fewer_queries():
    module, (q, k, v) = build(adaptive(0.5)), qkv(20, batch=2, kv_heads=2, dtype=torch.float32)
    why = "not taken by this attention: its blocks are chosen by summaries"
    assert_refused(lambda: module(q[:, 1:], k, v), UnavailableError, f"fewer queries than keys: {why}")
    assert_refused(lambda: module(q, k, v, documents=TWO), UnavailableError, f"documents=: {why}")
    last = q[:, 1:]
    for call in (lambda: module.select(last, k), lambda: module.scorer_loss(last, k)):
        assert_refused(call, UnavailableError, f"fewer queries than keys: {why}")


@pytest.mark.parametrize("name", ["dense", "dilated", "block_sparse"])
def test_weights_are_refused_where_queries_are_fewer(name):
    module, (q, k, v) = build(MODULES[name]), qkv(20, kv_heads=2, dtype=torch.float32)
    message = "fewer queries than keys and return_attention_weights=True do not go together"
    assert_refused(lambda: module(q[:, 1:], k, v, return_attention_weights=True), UnavailableError, message)


@each
def test_values_of_another_head_dim_are_refused_by_name(config):
    module, (q, k, v) = build(config), qkv(20, batch=2, kv_heads=2, dtype=torch.float32)
    message = "v must have the head_dim of q and k, 16, got 8"
    assert_refused(lambda: module(q, k, v[..., :8]), InputError, message)


@pytest.mark.parametrize("backend", ["flash", "cudnn", "flex"])
def test_backends_of_one_kernel_refuse_what_they_do_not_take(backend, monkeypatch):
    """By the features' names, before anything is asked of the device."""
    from attention import inputs as inputs_module

    monkeypatch.setattr(inputs_module, "_refuse_kernel", lambda *_: None)
    module = build(AttentionConfig(variant="dense", backend=backend))
    q, k, v = qkv(20, batch=2, kv_heads=2, dtype=torch.float32)
    hint = "use backend='auto' or 'sdpa'"
    assert_refused(lambda: module(q[:, 1:], k, v), UnavailableError, hint)
    assert_refused(lambda: module(q, k, v, documents=TWO), UnavailableError, hint)
    if backend == "flex":
        assert_refused(lambda: module(q, k, v, sinks=zeros(4)), UnavailableError, hint)


# Multihead


def multihead(kv_heads=None):
    return create_multihead_block_sparse(
        64, 4, segment_lengths=[128], dilation_rates=[1], sparsity_ratio=0.5, kv_heads=kv_heads
    )


BAD_STREAMS = {
    "a list": (0, [1.0], "query must be a tensor, got list"),
    "rank 1": (0, zeros(64), "query must be [batch, seq, 64], got shape (64,)"),
    "rank 4": (1, zeros(2, 20, 4, 16), "key must be [batch, seq, 64]"),
    "another width": (2, zeros(2, 20, 32), "value must be [batch, seq, 64], got shape (2, 20, 32)"),
    "integers": (0, zeros(2, 20, 64, dtype=torch.int64), "int64"),
    "another dtype than the module's": (0, zeros(2, 20, 64, dtype=torch.float64), "float64"),
    "another device": (1, zeros(2, 20, 64, device="meta"), "meta"),
    "unbatched among batched": (1, zeros(20, 64), "key"),
    "no tokens": (0, zeros(2, 0, 64), "at least 1 token"),
    "another length": (1, zeros(2, 21, 64), "seq"),
}


@pytest.mark.parametrize("bad", BAD_STREAMS.values(), ids=BAD_STREAMS.keys())
def test_multihead_streams_that_do_not_fit_are_refused(bad):
    position, value, message = bad
    inputs = [torch.zeros(2, 20, 64) for _ in range(3)]
    inputs[position] = value
    module = multihead()
    assert_refused(lambda: module(*inputs), InputError, message)


def test_multihead_takes_whole_sequences():
    x, module = torch.zeros(2, 20, 64), multihead()
    message = "fewer queries than keys, as with a cache, are for the attention without projections"
    assert_refused(lambda: module(x[:, 1:], x, x), InputError, message)


MULTIHEAD_FEATURES = {
    "documents of one item": ({"documents": TWO[:1]}, InputError, "[2, 20], a number for each token"),
    "documents not grouped": ({"documents": numbers([0, 1] * 10, [0] * 20)}, InputError, "follow each other"),
    "sinks of another size": ({"sinks": zeros(2)}, InputError, "a logit for each of 4, got [2]"),
    "weights with documents": (
        {"documents": TWO, "need_weights": True},
        UnavailableError,
        "documents= and return_attention_weights=True do not go together",
    ),
}


@pytest.mark.parametrize("bad", MULTIHEAD_FEATURES.values(), ids=MULTIHEAD_FEATURES.keys())
def test_multihead_refuses_features_before_it_projects(bad):
    arguments, error, message = bad
    x, module = torch.zeros(2, 20, 64), multihead()
    assert_refused(lambda: module(x, x, x, **arguments), error, message)


@pytest.mark.parametrize(
    "masks, name",
    [
        ({"key_padding_mask": torch.zeros(2, 20, dtype=torch.bool)}, "key_padding_mask"),
        ({"key_padding_mask": torch.zeros(2, 20, dtype=torch.bool), "is_causal": True}, "key_padding_mask"),
        ({"attn_mask": torch.zeros(20, 20)}, "attn_mask"),
    ],
)
def test_multihead_takes_no_masks_but_the_causal_hint(masks, name):
    x = torch.zeros(2, 20, 64)
    module = multihead()
    assert_refused(lambda: module(x, x, x, **masks), InputError, f"got a {name}")


# Configs and factories


BRANCH = {"segment_lengths": [128], "dilation_rates": [1]}
NAN = float("nan")
BAD_CONFIGS = {
    "unknown variant": (lambda: AttentionConfig(variant="sparse"), "variant"),
    "unknown option": (lambda: AttentionConfig(variant="dense", heads=8), "heads: no such option"),
    "NaN scale": (lambda: AttentionConfig(variant="dense", scale=NAN), "scale"),
    "infinite scale": (lambda: AttentionConfig(variant="dense", scale=float("inf")), "scale"),
    "NaN sparsity": (lambda: SparsePatternConfig(sparsity_ratio=NAN), "sparsity_ratio"),
    "sparsity of zero": (lambda: SparsePatternConfig(sparsity_ratio=0.0), "sparsity_ratio"),
    "sparsity above one": (lambda: SparsePatternConfig(sparsity_ratio=1.5), "sparsity_ratio"),
    "a window smaller than a token": (
        lambda: SparsePatternConfig(pattern_type="local_window", local_window_size=0, edges="token"),
        "local_window_size",
    ),
    "unknown pattern": (lambda: SparsePatternConfig(pattern_type="diagonal"), "pattern_type"),
    "too little workspace": (lambda: AttentionConfig(variant="dense", workspace_bytes=1), "workspace_bytes"),
    "segment no multiple of block": (
        lambda: create_block_sparse_attention(segment_lengths=[100], dilation_rates=[1], block_size=64),
        "segment length 100 is not a multiple of block_size 64; use 64 or 128",
    ),
    "positions without output": (lambda: dilated([(16, 2), (32, 4)]), "leave positions without output"),
    "rate above segment": (lambda: dilated([(8, 1), (4, 5)]), "dilation rate 5 exceeds its segment length 4"),
    "unpaired branches": (
        lambda: create_dilated_attention(segment_lengths=[8, 16], dilation_rates=[1]),
        "pair up",
    ),
    "no branches": (
        lambda: create_dilated_attention(segment_lengths=[], dilation_rates=[]),
        "needs at least one branch",
    ),
    "one number for lengths": (
        lambda: create_dilated_attention(segment_lengths=2048, dilation_rates=1),
        "segment_lengths",
    ),
    "one number for lengths, sparse": (
        lambda: create_block_sparse_attention(segment_lengths=2048, dilation_rates=1),
        "segment_lengths",
    ),
    "unknown kind": (
        lambda: create_dilated_attention("faster", segment_lengths=[8], dilation_rates=[1]),
        "kind must be 'improved' or 'ring', got 'faster'",
    ),
    "unknown sparse variant": (
        lambda: create_block_sparse_attention("v2", **BRANCH),
        "variant must be one of 'base'",
    ),
    "unknown option of a factory": (
        lambda: create_block_sparse_attention("base", **BRANCH, ring_size=8),
        "ring_size: no such option",
    ),
    "pattern whole and by fields": (
        lambda: create_block_sparse_attention(
            **BRANCH, sparsity_ratio=0.1, sparse_config=SparsePatternConfig()
        ),
        "given whole and by sparsity_ratio",
    ),
    "pattern twice": (
        lambda: create_block_sparse_attention(
            **BRANCH, pattern=SparsePatternConfig(), sparse_config=SparsePatternConfig()
        ),
        "pattern",
    ),
    "pattern of another type": (
        lambda: create_block_sparse_attention(**BRANCH, sparse_config={"block_size": 8}),
        "sparse_config must be a SparsePatternConfig, got dict",
    ),
    "pool twice": (
        lambda: create_dilated_attention(**BRANCH, pool="on", enable_memory_pool=True),
        "same option",
    ),
    "multihead without its width": (
        lambda: create_block_sparse_attention("multihead", **BRANCH, num_heads=8),
        "embed_dim: is required",
    ),
    "heads that do not divide the width": (
        lambda: create_multihead_block_sparse(100, 8, **BRANCH),
        "multiple of num_heads",
    ),
    "kv heads that do not divide heads": (
        lambda: MultiheadConfig(embed_dim=64, num_heads=8, kv_heads=3),
        "kv_heads must divide",
    ),
    "adaptive of no heads": (lambda: AdaptiveConfig(num_heads=0, head_dim=8), "num_heads"),
    "width of a plain attention": (
        lambda: create_block_sparse_attention("base", **BRANCH, embed_dim=64),
        "embed_dim: no such option",
    ),
    "sharding whole and by fields": (
        lambda: create_dilated_attention("ring", **BRANCH, ring_size=8, sharding=ShardingConfig()),
        "given whole and by ring_size",
    ),
    "sharding of another type": (
        lambda: create_dilated_attention("ring", **BRANCH, sharding={"ring_size": 8}),
        "sharding must be a ShardingConfig, got dict",
    ),
    "a ring of heads": (
        lambda: create_block_sparse_attention("ring", **BRANCH, exchange="heads"),
        "'ring' moves keys, got exchange='heads'",
    ),
    "a group for one device": (
        lambda: create_dilated_attention(**BRANCH, process_group="all"),
        "process_group was given for a config without sharding",
    ),
    "a group before there is one": (
        lambda: create_dilated_attention("ring", **BRANCH, process_group="all"),
        "torch.distributed is not initialised",
    ),
    "build from a dict": (lambda: build({"variant": "dense"}), "build takes an AttentionConfig, got dict"),
}


@pytest.mark.parametrize("bad", BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_configs_that_cannot_be_right_are_refused(bad):
    call, message = bad
    assert_refused(call, ConfigError, message)
