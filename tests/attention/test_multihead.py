"""Multihead attention stands where torch's does: parameters, call, results, layers around it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conformance import BLOCK
from tolerance import relative_error
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from attention import (
    AdaptiveConfig,
    AttentionConfig,
    InputError,
    MultiheadConfig,
    SparsePatternConfig,
    build,
    reference_attention,
)

WIDTH, HEADS = 32, 4
PATTERN = SparsePatternConfig(block_size=BLOCK, pattern_type="local_window", local_window_size=16)


def multihead(variant="dense", dtype=torch.float64, seed=0, **options):
    """A multihead module, biases included at random (they begin at zero)."""
    parts = {
        "dense": {},
        "dilated": {"segment_lengths": [8, 16], "dilation_rates": [1, 2]},
        "block_sparse": {"pattern": PATTERN},
        "adaptive": {"pattern": PATTERN, "adaptive": AdaptiveConfig(num_heads=HEADS, head_dim=8)},
    }
    sizes = MultiheadConfig(embed_dim=WIDTH, num_heads=HEADS, **options)
    torch.manual_seed(seed)
    module = build(AttentionConfig(variant=variant, multihead=sizes, **parts[variant]))
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return module.to(dtype)


def torchs(module, bias=True):
    """torch's own multihead attention with the module's parameters."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True).to(module.in_proj_weight.dtype)
    theirs.load_state_dict(module.state_dict())
    return theirs


def streams(seq=21, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, seq, WIDTH, generator=generator, dtype=dtype) for _ in range(3)]


def future(seq, dtype=torch.float64):
    return nn.Transformer.generate_square_subsequent_mask(seq, dtype=dtype)


every_variant = pytest.mark.parametrize("variant", ["dense", "dilated", "block_sparse", "adaptive"])


# Equal to torch's


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torchs_with_its_parameters_forward_and_backward(bias, causal):
    theirs = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True, dtype=torch.float64)
    ours = multihead(bias=bias)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for module in (ours, theirs):
        leaves = [x.requires_grad_() for x in streams()]
        mask = {"attn_mask": future(21), "is_causal": True} if causal else {}
        out, weights = module(*leaves, need_weights=False, **mask)
        assert weights is None
        grad = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
        results.append([out, *torch.autograd.grad(out, [*leaves, *module.parameters()], grad)])
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) <= 1e-10


def test_state_dict_loads_in_both_directions():
    ours = multihead()
    theirs = torchs(ours)
    again = multihead(seed=5)
    again.load_state_dict(theirs.state_dict(), strict=True)
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_equal_torchs(averaged):
    ours = multihead()
    inputs = streams()
    _, expected = torchs(ours)(*inputs, need_weights=True, average_attn_weights=averaged)
    out, weights = ours(*inputs, need_weights=True, average_attn_weights=averaged)
    dense = weights.to_dense()
    assert dense.shape == (2, 1 if averaged else HEADS, 21, 21)
    torch.testing.assert_close(dense[:, 0] if averaged else dense, expected)
    assert torch.equal(out, ours(*inputs)[0])


def test_averaging_is_refused_where_heads_have_blocks_of_their_own():
    with pytest.raises(InputError, match="heads that share their blocks"):
        multihead("adaptive")(*streams(), need_weights=True, average_attn_weights=True)


def test_unbatched_input_is_one_batch_item():
    module, inputs = multihead(), streams(batch=1)
    out, weights = module(*(x[0] for x in inputs), need_weights=True)
    assert out.shape == (21, WIDTH)
    assert torch.equal(out, module(*inputs)[0][0])
    assert weights.shape == (1, HEADS, 21, 21)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_fewer_kv_heads_equal_torchs_with_repeated_projections(kv_heads):
    ours = multihead(kv_heads=kv_heads)
    assert ours.in_proj_weight.shape == (WIDTH + 2 * kv_heads * 8, WIDTH)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64)
    spread = torch.arange(kv_heads * 8).view(kv_heads, 8).repeat_interleave(HEADS // kv_heads, 0).flatten()
    rows = torch.cat([torch.arange(WIDTH), WIDTH + spread, WIDTH + kv_heads * 8 + spread])
    theirs.load_state_dict(
        {
            **ours.state_dict(),
            "in_proj_weight": ours.in_proj_weight.detach()[rows],
            "in_proj_bias": ours.in_proj_bias.detach()[rows],
        }
    )
    inputs = streams()
    assert relative_error(ours(*inputs)[0], theirs(*inputs, need_weights=False)[0]) <= 1e-10


# Documents and sinks


def packed(batch=2):
    return torch.tensor([[4] * 5 + [9] * 16, [1] * 20 + [0]])[:batch]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("variant", ["dense", "dilated", "block_sparse"])
def test_documents_and_sinks_are_those_of_the_attention(variant, checkpoint, causal):
    """With gradients of the streams, the parameters and the sinks."""
    module = multihead(variant, checkpoint=checkpoint)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64).requires_grad_()
    leaves, documents = [x.requires_grad_() for x in streams()], packed()
    found = module(*leaves, is_causal=causal, documents=documents, sinks=sinks)[0]
    q, k, v = module._project(*leaves)
    heads = reference_attention(q, k, v, module.config, causal, documents=documents, sinks=sinks)
    expected = module.out_proj(heads.flatten(2))
    assert relative_error(found, expected) <= 1e-12
    wanted = [*leaves, sinks, *module.parameters()]
    grads = (torch.autograd.grad(out.square().sum(), wanted) for out in (found, expected))
    for x, y in zip(*grads, strict=True):
        assert relative_error(x, y) <= 1e-10


def test_padding_as_a_document_equals_torchs_padding_mask():
    ours, inputs = multihead(), streams()
    padded = torch.tensor([[False] * 21, [False] * 16 + [True] * 5])
    expected = torchs(ours)(*inputs, key_padding_mask=padded, need_weights=False)[0]
    found = ours(*inputs, documents=padded.int())[0]
    assert relative_error(found[~padded], expected[~padded]) <= 1e-10


def test_documents_of_an_unbatched_input_are_a_row():
    module, inputs = multihead("block_sparse"), streams(batch=1)
    expected = module(*inputs, documents=packed(1))[0][0]
    assert torch.equal(module(*(x[0] for x in inputs), documents=packed(1)[0])[0], expected)


def test_adaptive_takes_sinks_and_checkpoints_them():
    sinks = torch.zeros(HEADS, dtype=torch.float64)
    plain, recomputing = multihead("adaptive"), multihead("adaptive", checkpoint=True)
    results = []
    for module in (plain, recomputing):
        leaf = sinks.clone().requires_grad_()
        out = module(*streams(), sinks=leaf)[0]
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert results[0][1].all()
    assert not torch.equal(results[0][0], plain(*streams())[0])


# Inside torch's layers


def layers(module, **options):
    """A pair of equal encoder layers, one with `module` for its attention."""
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True, **options).double()
    theirs.self_attn.load_state_dict(module.state_dict())
    ours = copy.deepcopy(theirs)
    ours.self_attn = module
    return ours, theirs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_encoder_layer_with_it_equals_torchs(training, norm_first, causal):
    ours, theirs = layers(multihead(), norm_first=norm_first)
    x = streams()[0]
    mask = {"src_mask": future(21), "is_causal": True} if causal else {}
    with torch.set_grad_enabled(training):
        found, expected = (layer.train(training)(x, **mask) for layer in (ours, theirs))
    assert relative_error(found, expected) <= 1e-10


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
@every_variant
def test_encoders_fast_path_does_not_bypass_it(variant, no_grad, monkeypatch):
    module = multihead(variant)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True).double()
    layer.self_attn = module
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    calls = []
    forward = type(module).forward
    monkeypatch.setattr(type(module), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    with no_grad():
        encoder(streams()[0])
    assert len(calls) == 2


def test_encoder_is_causal_by_hint():
    layer, _ = layers(multihead("block_sparse"))
    encoder = nn.TransformerEncoder(layer.eval(), 2, enable_nested_tensor=False)
    x = streams()[0]
    before = encoder(x, mask=future(21), is_causal=True)
    x[:, 13:] += 1
    after = encoder(x, mask=future(21), is_causal=True)
    torch.testing.assert_close(after[:, :13], before[:, :13], rtol=0, atol=0)


def test_padding_masks_are_refused_by_the_layer_too():
    layer, _ = layers(multihead())
    with pytest.raises(InputError, match="key_padding_mask"):
        layer(streams()[0], src_key_padding_mask=torch.zeros(2, 21, dtype=torch.bool))


# Checkpointing


def saved_bytes(module, inputs):
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out, _ = module(*inputs)
    del out
    return sum(saved.values())


@every_variant
def test_checkpoint_gives_equal_gradients_and_saves_less(variant):
    plain, recomputing = multihead(variant), multihead(variant, checkpoint=True)
    recomputing.load_state_dict(plain.state_dict())
    results = []
    for module in (plain, recomputing):
        leaves = [x.requires_grad_() for x in streams(99)]
        out = module(*leaves, is_causal=True)[0]
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()])])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    inputs = [x.requires_grad_() for x in streams(99)]
    assert saved_bytes(recomputing, inputs) < saved_bytes(plain, inputs) / 1.5


def test_checkpoint_steps_aside_without_gradients_and_for_weights():
    module = multihead(checkpoint=True)
    inputs = streams()
    with torch.no_grad():
        assert torch.equal(module(*inputs)[0], multihead()(*inputs)[0])
    out, weights = module(*inputs, need_weights=True)
    assert weights is not None
    out.sum().backward()
    assert module.in_proj_weight.grad.any()


# As a module


@every_variant
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_and_share_no_parameters(copied, variant):
    module = multihead(variant)
    twin, inputs = copied(module), streams()
    expected = module(*inputs)[0]
    assert torch.equal(twin(*inputs)[0], expected)
    assert twin.config == module.config
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(module(*inputs)[0], expected)


@every_variant
def test_state_dict_holds_parameters_alone_and_makes_the_same_module(variant):
    module, twin = multihead(variant), multihead(variant, seed=9)
    state = module.state_dict()
    assert set(state) == {name for name, _ in module.named_parameters()}
    twin.load_state_dict(state)
    inputs = streams()
    assert torch.equal(twin(*inputs)[0], module(*inputs)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_variant
def test_runs_and_trains_in_any_dtype(variant, dtype):
    module = multihead(variant).to(dtype)
    out = module(*streams(dtype=dtype))[0]
    out.float().square().mean().backward()
    assert out.dtype == dtype
    for parameter in module.parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all()


@every_variant
def test_runs_and_trains_under_autocast(variant):
    module = multihead(variant, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(*streams(dtype=torch.float32))[0]
        loss = out.float().square().mean()
    loss.backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())
    expected = module(*streams(dtype=torch.float32))[0]
    assert relative_error(out, expected) < 0.05
