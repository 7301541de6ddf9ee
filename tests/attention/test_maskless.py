"""What a query may not see does not reach it, whatever it holds: zero times NaN is NaN, and a mask that
is added does not hide infinity."""

from __future__ import annotations

import math
import random

import pytest
import torch
from conformance import (
    HEADS,
    IMPLEMENTATIONS,
    adaptive,
    cases,
    changed,
    counts,
    in_little_room,
    module_of,
    oracle,
    output_gradient,
    qkv,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tolerance import forward_and_gradients

from attention import AttentionConfig, MultiheadConfig, build, reference_attention

every = pytest.mark.parametrize("config", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
SEQ, WILD = 45, (14, 30, 44)
"""The last token too: positions past the end of the last block were once copies of it."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def spoilt(x, values=(math.nan, math.inf, None), tokens=WILD):
    """x [B, S, H, D] with each token's value in some channels of some heads; None is a number so large that
    its products are infinite."""
    x = x.clone()
    for n, (token, value) in enumerate(zip(tokens, values, strict=True)):
        x[0, token, n % x.shape[2], n::5] = torch.finfo(x.dtype).max / 4 if value is None else value
    return x


def reached(module, q, k, causal, tokens=WILD):
    """(queries [B, S, H] that see one of the tokens, keys [B, S, kv_heads] that such a query sees)."""
    sees = counts(module, q, k, causal) > 0
    sees = sees.expand(q.shape[0], *sees.shape[-3:])
    queries = sees[..., list(tokens)].any(-1)
    queries[1:] = False
    return queries.transpose(1, 2), seen_by(sees, queries, k.shape[2])


def seen_by(sees, queries, kv_heads):
    """Keys [B, S, kv_heads] that one of the queries [B, H, S] sees; `sees`: [B, H, S, S]."""
    return (sees & queries[..., None]).any(-2).unflatten(1, (kv_heads, -1)).any(2).transpose(1, 2)


def assert_untouched(found, expected, touched):
    """Where nothing wild may reach, (out, (dq, dk, dv)) is what it is without."""
    names, flat = ("out", "dq", "dk", "dv"), [(x[0], *x[1]) for x in (found, expected)]
    for name, ours, exact, mask in zip(names, *flat, touched, strict=True):
        bar = TOLERANCE[ours.dtype] * max(1.0, float(exact.abs().max()))
        error = (ours.double() - exact)[~mask].abs()
        if not error.numel():  # a last query that sees something wild and everything else
            assert name in ("dk", "dv"), "nothing is compared"
            continue
        assert error.max() <= bar, f"{name}: {error.max()} of {bar} allowed"  # NaN fails too


def check_hidden(module, clean, causal, values=(math.nan, math.inf, None), tokens=WILD):
    q = clean[0]
    k, v = (spoilt(x, values, tokens) for x in clean[1:])
    ours = forward_and_gradients(lambda *x: module(*x, is_causal=causal), (q, k, v), output_gradient(q))
    # Of the blocks that an adaptive attention chooses for the wild keys.
    exact = oracle(module, q, k, causal)
    expected = forward_and_gradients(exact, [x.double() for x in clean], output_gradient(q).double())
    queries, keys = reached(module, q, k, causal, tokens)
    assert_untouched(ours, expected, (queries, queries, keys, keys))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@every
def test_what_a_query_may_not_see_does_not_reach_it(config, dtype):
    check_hidden(module_of(config), qkv(SEQ, kv_heads=2, dtype=dtype), causal=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dense", "dilated-3-odd", "global_local", "dilated_sparse-3", "adaptive"])
def test_nothing_comes_through_where_tiles_are_small_and_parts_are_merged(name, dtype):
    module = module_of(in_little_room(IMPLEMENTATIONS[name]))
    check_hidden(module, qkv(SEQ, batch=2, kv_heads=1, dtype=dtype), causal=True)


@pytest.mark.parametrize("name", ["dilated-2", "local_window", "dilated_sparse", "adaptive-own-block"])
def test_what_is_outside_the_layout_does_not_reach_a_query_either(name):
    check_hidden(module_of(IMPLEMENTATIONS[name]), qkv(SEQ, kv_heads=2), causal=False, tokens=(2, 3, 6))


@pytest.mark.parametrize("name", ["dense", "dilated-2", "local_window", "global_local", "adaptive"])
def test_what_sees_nan_is_nan_where_the_oracle_says_so(name):
    module, (q, k, v) = module_of(IMPLEMENTATIONS[name]), qkv(SEQ, kv_heads=2)
    k, v = k.clone(), v.clone()
    k[0, 13], v[0, 30, 1, 3] = math.nan, math.nan
    found = forward_and_gradients(lambda *x: module(*x, is_causal=True), (q, k, v), output_gradient(q))
    exact = forward_and_gradients(oracle(module, q, k, True), (q, k, v), output_gradient(q))
    for ours, expected in zip((found[0], *found[1]), (exact[0], *exact[1]), strict=True):
        assert expected.isnan().any()
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10, equal_nan=True)


def test_a_key_that_scores_minus_infinity_has_no_weight_and_infinity_as_a_value_stays():
    """Seen, and not the same as NaN: such rows come out of the calls without masks with these values."""
    module, (q, k, v) = module_of(AttentionConfig(variant="dense")), qkv(SEQ, kv_heads=HEADS)
    q, k, v = q.abs() + 0.1, k.clone(), v.clone()
    k[0, 12:14, :, 0] = -math.inf
    v[0, 20, 2, 3] = math.inf
    exact = reference_attention(q, k, v, module.config, True)
    torch.testing.assert_close(module(q, k, v, is_causal=True), exact, rtol=0, atol=1e-10, equal_nan=True)
    k[0, 0, :, 0] = -math.inf  # the first query sees nothing but this
    exact = reference_attention(q, k, v, module.config, True)
    torch.testing.assert_close(module(q, k, v, is_causal=True), exact, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", ["dense", "dilated-2", "local_window", "global_local", "adaptive"])
def test_a_query_or_gradient_reaches_no_key_that_it_may_not_see(name):
    module, (q, k, v) = module_of(IMPLEMENTATIONS[name]), qkv(SEQ, kv_heads=2)
    wild, grad = q.clone(), output_gradient(q)
    of_output = grad.clone()
    of_output[0, 30, 1] = math.nan
    if name != "adaptive":  # whose choice of blocks is by the mean of their queries
        wild[0, 9, 3, 2] = math.inf
    found = forward_and_gradients(lambda *x: module(*x, is_causal=True), (wild, k, v), of_output)
    expected = forward_and_gradients(oracle(module, q, k, True), (q, k, v), grad)
    out_of = torch.zeros(q.shape[:3], dtype=torch.bool)
    out_of[0, 9, 3] = name != "adaptive"
    queries = out_of.clone()
    queries[0, 30, 1] = True
    sees = (counts(module, q, k, True) > 0).expand(1, HEADS, SEQ, SEQ)
    keys = seen_by(sees, queries.transpose(1, 2), 2)
    assert_untouched(found, expected, (out_of, queries, keys, keys))


@every
def test_weights_of_what_sees_nothing_wild_are_clean(config):
    module, (q, k, v) = module_of(config), qkv(SEQ, kv_heads=2)
    wild = spoilt(k, (math.nan, math.inf, math.nan))
    weights = module(q, wild, v, is_causal=True, return_attention_weights=True)[1].to_dense()
    m = counts(module, q, wild, True)
    assert (weights[(m == 0).expand_as(weights)] == 0).all()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(HEADS // 2, 2))
    scores = scores * (config.scale or q.shape[3] ** -0.5) + m.log()
    clean = scores.softmax(-1).nan_to_num(0.0)  # a row without keys
    touched = reached(module, q, wild, True)[0].transpose(1, 2)
    torch.testing.assert_close(weights[~touched], clean.expand_as(weights)[~touched], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["dense", "local_window"])
def test_a_multihead_attention_keeps_its_past_clean(name):
    config = changed(IMPLEMENTATIONS[name], multihead=MultiheadConfig(embed_dim=32, num_heads=4))
    module = build(config).double()
    x = torch.randn(1, SEQ, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wild = x.clone()
    wild[0, 30] = math.nan
    found, clean = (module(y, y, y, is_causal=True)[0] for y in (wild, x))
    torch.testing.assert_close(found[:, :30], clean[:, :30], rtol=0, atol=1e-12)
    assert found[:, 30].isnan().all()


def test_a_scorer_chooses_a_rows_own_block_whatever_the_others_hold():
    """Enough blocks of NaN to fill every list: were NaN the best score, own blocks would not be in them."""
    module, (q, k, _) = module_of(adaptive(0.4)), qkv(80)
    k = k.clone()
    k[0, :48] = math.nan
    for causal in (False, True):
        found = module.select(q, k, causal)
        assert (found == torch.arange(found.shape[2])[:, None]).any(-1).all()


def test_clean_inputs_are_computed_once(monkeypatch):
    from attention.ops import execute

    def never(*_):
        raise AssertionError("computed without masks")

    monkeypatch.setattr(execute, "maskless", never)
    for config in IMPLEMENTATIONS.values():
        module, inputs = module_of(config), qkv(SEQ, kv_heads=2)
        forward_and_gradients(lambda *x, m=module: m(*x, is_causal=True), inputs, output_gradient(inputs[0]))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(case=cases(), seed=st.integers(0, 1 << 30), dtype=st.sampled_from(list(TOLERANCE)))
def test_random_configs_let_nothing_through(case, seed, dtype):
    config, causal, seq = case.pop("config"), case.pop("causal"), case["seq"]
    generator = random.Random(seed)
    tokens = [generator.randrange(seq) for _ in range(3)]
    values = generator.choices([math.nan, math.inf, -math.inf, None], k=3)
    module, clean = module_of(config), qkv(**case, dtype=dtype)
    queries, keys = reached(module, clean[0], spoilt(clean[1], values, tokens), causal, tokens)
    assume(not queries.all() and not keys.all())
    check_hidden(module, clean, causal, values, tokens)
