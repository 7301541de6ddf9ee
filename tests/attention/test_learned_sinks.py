"""Learned sinks join the softmax of every query, in place and in slabs, and get their gradient."""

from __future__ import annotations

import math

import pytest
import torch
from conformance import IMPLEMENTATIONS, in_little_room, module_of, output_gradient
from featured import call_of, run
from torch.autograd.graph import saved_tensors_hooks

from attention import AttentionConfig, build, inputs, reference_attention
from attention.ops.learned_sinks import add_sinks, sinks_gradient
from attention.sizes import learned_sinks as sizes
from attention.sizes.learned_sinks import slab_tokens

DENSE = AttentionConfig(variant="dense")


def with_key(q, k, v, sinks, causal):
    """Attention with one more key whose score is the sink and whose value is zero, by torch alone."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        scores = scores.masked_fill(hidden, -math.inf)
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)
    values = torch.cat([v, torch.zeros_like(v[:, :1])], 1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 30])
def test_a_sink_is_one_more_key_without_a_value(queries, causal):
    call = call_of(30, queries, batch=2, causal=causal, sinks=True)
    grad, leaves = output_gradient(call.q), [x.clone().requires_grad_() for x in call.leaves]
    expected = with_key(*leaves, causal)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    for attention in (build(DENSE), lambda *x, **given: reference_attention(*x[:3], DENSE, causal, **given)):
        found = attention(*leaves[:3], causal, sinks=leaves[3])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        for x, y in zip(torch.autograd.grad(found, leaves, grad), expected_grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["dense", "dilated-uncovered", "global_local", "adaptive"])
def test_gradcheck_with_sinks(name):
    call = call_of(17, kv_heads=2, causal=True, sinks=True)
    attention = module_of(IMPLEMENTATIONS[name]).requires_grad_(False)
    leaves = [x.requires_grad_() for x in call.leaves]
    assert torch.autograd.gradcheck(
        lambda q, k, v, sinks: attention(q, k, v, True, sinks=sinks), leaves, fast_mode=True
    )


@pytest.mark.parametrize("wanted", [(True, False, False, False), (False, False, False, True)])
def test_gradients_of_sinks_alone_or_of_all_but_sinks_are_the_same(wanted):
    call = call_of(30, batch=2, sinks=True)
    attention, grad = build(DENSE), output_gradient(call.q)
    expected = run(attention, call, grad)[1]
    leaves = [x.clone().requires_grad_(want) for x, want in zip(call.leaves, wanted, strict=True)]
    attention(*leaves[:3], sinks=leaves[3]).backward(grad)
    for leaf, exact, want in zip(leaves, expected, wanted, strict=True):
        assert torch.equal(leaf.grad, exact) if want else leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_slabs_change_nothing(tokens, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    out, grad = (torch.randn(2, 30, 4, 8, generator=generator).to(dtype) for _ in range(2))
    lse = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64).to(
        torch.promote_types(dtype, torch.float32)
    )
    lse[0, 3], out[0, 3] = -math.inf, 0.0
    sinks = torch.tensor([0.3, -math.inf, 5.0, -40.0])
    shape = inputs.shape_of(out, out, DENSE, False)
    expected = (lse.double() - sinks).nan_to_num(0.0).sigmoid()[..., None] * out
    monkeypatch.setattr(sizes, "SHARE", shape.workspace // (tokens * 4 * 8 * shape.wide))
    assert slab_tokens(shape) == tokens
    both = torch.logaddexp(lse, sinks.to(lse.dtype))
    weight = (sinks - both).nan_to_num(-math.inf).exp().double()
    add_sinks(out, lse, sinks, shape)
    assert torch.equal(lse, both)
    torch.testing.assert_close(out, expected.to(dtype))
    found = sinks_gradient(grad, out, lse, sinks, shape)
    wanted = -(weight * (grad.double() * out.double()).sum(-1)).sum((0, 1))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "value, expected", [(math.inf, 0.0), (-math.inf, 1.0), (1e30, 0.0), (-1e30, 1.0), (math.nan, math.nan)]
)
def test_extreme_sinks_take_all_or_nothing(value, expected):
    """And a sink that is no number leaves no number, rather than half of what there was."""
    call = call_of(30, sinks=True)
    sinks = call.sinks.clone()
    sinks[1] = value
    plain = build(DENSE)(*call[:3])
    out, grads = run(build(DENSE), call._replace(sinks=sinks))
    torch.testing.assert_close(out[:, :, 1], plain[:, :, 1] * expected, equal_nan=True)
    torch.testing.assert_close(
        out, reference_attention(*call[:3], DENSE, sinks=sinks), equal_nan=True
    ) if math.isfinite(value) else None
    others = [0, 2, 3]
    assert all(bool(x[:, :, others].isfinite().all()) for x in (out, *grads[:3]))
    assert bool(grads[3][others].isfinite().all())
    assert math.isnan(grads[3][1]) == math.isnan(value)


def test_sinks_may_be_of_another_type_and_stored_in_any_way():
    call = call_of(30, sinks=True, dtype=torch.bfloat16)
    expected = build(DENSE)(*call[:3], sinks=call.sinks)
    for sinks in (call.sinks.double(), call.sinks.repeat_interleave(2)[::2], torch.nn.Parameter(call.sinks)):
        assert torch.equal(build(DENSE)(*call[:3], sinks=sinks), expected)
    short = call.sinks.bfloat16().requires_grad_()
    build(DENSE)(*call[:3], sinks=short).sum().backward()
    assert short.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["dense", "dilated-2", "global_local", "dilated_sparse-3"])
def test_what_is_saved_is_the_inputs_the_output_and_its_log_sum_exp(name):
    """Whatever the features are: no mask, no documents, no copy."""
    call = call_of(
        150, 100, batch=2, causal=True, sinks=True, lengths=((50, 100), (149, 1)), dtype=torch.float32
    )
    leaves, saved = [x.clone().requires_grad_() for x in call.leaves], {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = module_of(in_little_room(IMPLEMENTATIONS[name]))(
            *leaves[:3], True, documents=call.documents, sinks=leaves[3]
        )
    lse_bytes = out[..., 0].numel() * 4
    assert sum(saved.values()) == sum(x.numel() * 4 for x in (*leaves, out)) + lse_bytes


def test_weights_with_sinks_sum_to_less_than_one():
    """By the sink's share; they are what the output is made of."""
    call = call_of(30, causal=True, sinks=True)
    for name in ("dense", "global_local", "local_window-token", "adaptive"):
        attention = module_of(IMPLEMENTATIONS[name])
        out, weights = attention(*call[:3], True, True, sinks=call.sinks)
        dense = weights.to_dense()
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", dense, call.v), out.detach())
        assert (dense.sum(-1) < 1).all()
        assert torch.equal(out, attention(*call[:3], True, sinks=call.sinks))
