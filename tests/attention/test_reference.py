"""The oracle equals torch's dense attention, the branch-wise LongNet formula and the layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from attention.config import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.errors import ConfigError, InputError
from attention.layout import build_layout
from attention.reference import multiplicity, reference_attention

DENSE = AttentionConfig(variant="dense")


def dilated(branches, **fields):
    return AttentionConfig(
        variant="dilated",
        segment_lengths=[s for s, _ in branches],
        dilation_rates=[r for _, r in branches],
        **fields,
    )


def adaptive(block_size):
    return AttentionConfig(
        variant="adaptive",
        pattern=SparsePatternConfig(block_size=block_size),
        adaptive=AdaptiveConfig(num_heads=2, head_dim=8),
    )


def random_qkv(seq, heads=2, kv_heads=None, batch=2, head_dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, seq, h, head_dim) for h in (heads, kv_heads or heads, kv_heads or heads)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def sdpa(q, k, v, **options):
    """torch's own attention over tensors [batch, seq, heads, head_dim]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq", [1, 2, 7, 33])
def test_dense_equals_torch(seq, causal):
    q, k, v = random_qkv(seq)
    torch.testing.assert_close(
        reference_attention(q, k, v, DENSE, causal), sdpa(q, k, v, is_causal=causal), rtol=1e-12, atol=1e-12
    )


def test_gradients_equal_torch():
    inputs = [x.requires_grad_() for x in random_qkv(9)]
    grad = torch.randn(2, 9, 2, 8, dtype=torch.float64)
    ours = torch.autograd.grad(reference_attention(*inputs, DENSE, True), inputs, grad)
    theirs = torch.autograd.grad(sdpa(*inputs, is_causal=True), inputs, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_scale_of_the_config_is_used():
    q, k, v = random_qkv(6)
    config = AttentionConfig(variant="dense", scale=0.5)
    torch.testing.assert_close(reference_attention(q, k, v, config), sdpa(q, k, v, scale=0.5))


def test_large_scores_stay_finite():
    q, k, v = random_qkv(6)
    out = reference_attention(1e4 * q, k, v, dilated([(3, 1), (6, 2)]))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_result_is_float64_of_the_inputs_as_they_are(dtype):
    q, k, v = random_qkv(5, dtype=dtype)
    out = reference_attention(q, k, v, DENSE)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, sdpa(q.double(), k.double(), v.double()))


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_query_heads_share_key_heads_in_order(kv_heads):
    q, k, v = random_qkv(10, heads=6, kv_heads=kv_heads)
    config = dilated([(5, 1), (10, 2)])
    spread = [h // (6 // kv_heads) for h in range(6)]
    torch.testing.assert_close(
        reference_attention(q, k, v, config), reference_attention(q, k[:, :, spread], v[:, :, spread], config)
    )


def branchwise(q, k, v, branches, causal):
    """LongNet as the paper has it: a softmax per branch, mixed by the softmax denominators."""
    batch, seq, heads, dim = q.shape
    out, total = torch.zeros_like(q), torch.zeros(batch, seq, heads, 1, dtype=q.dtype)
    for s, r in branches:
        for h in range(heads):
            for begin in range(0, seq, s):
                at = slice(begin + h % r, min(begin + s, seq), r)
                if at.start >= at.stop:
                    continue
                weights = torch.exp(q[:, at, h] @ k[:, at, h].mT / math.sqrt(dim))
                weights = weights.tril() if causal else weights
                denominator = weights.sum(-1, keepdim=True)
                out[:, at, h] += denominator * (weights / denominator @ v[:, at, h])
                total[:, at, h] += denominator
    return torch.where(total > 0, out / total, 0.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq", [1, 5, 24, 31])
@pytest.mark.parametrize(
    "branches", [[(8, 1)], [(8, 1), (16, 2)], [(5, 1), (10, 3), (40, 7)], [(6, 2), (9, 4)]]
)
def test_dilated_equals_branches_mixed_by_denominator(branches, seq, causal):
    q, k, v = random_qkv(seq, heads=5)
    config = dilated(branches, uncovered="zero")
    torch.testing.assert_close(
        reference_attention(q, k, v, config, causal),
        branchwise(q, k, v, branches, causal),
        rtol=1e-12,
        atol=1e-12,
    )


def test_multiplicity_counts_branches_by_hand():
    # (2, 1) pairs 01 and 23; (4, 2) pairs 0 and 2 for head 0, 1 and 3 for head 1.
    m = multiplicity(dilated([(2, 1), (4, 2)]), 4, 2, False)
    assert m[0].tolist() == [[2, 1, 1, 0], [1, 1, 0, 0], [1, 0, 2, 1], [0, 0, 1, 1]]
    assert m[1].tolist() == [[1, 1, 0, 0], [1, 2, 0, 1], [0, 0, 1, 1], [0, 1, 1, 2]]
    assert multiplicity(dilated([(2, 1), (4, 2)]), 4, 2, True).tolist() == m.tril().tolist()


@pytest.mark.parametrize("causal", [False, True])
def test_uncovered_rows_are_zero_with_zero_gradient(causal):
    inputs = [x.requires_grad_() for x in random_qkv(7)]
    out = reference_attention(*inputs, dilated([(4, 2)], uncovered="zero"), causal)
    uncovered = torch.tensor([[(p % 4) % 2 != h for h in range(2)] for p in range(7)])
    assert (out[:, uncovered] == 0).all()
    assert (out[:, ~uncovered] != 0).all()
    for grad in torch.autograd.grad(out.square().sum(), inputs):
        assert grad.isfinite().all()
        assert (grad[:, uncovered] == 0).all()


def test_gradients_are_those_of_the_function():
    inputs = [x.requires_grad_() for x in random_qkv(5, batch=1, head_dim=2)]
    config = dilated([(3, 2), (5, 2)], uncovered="zero")
    assert torch.autograd.gradcheck(lambda q, k, v: reference_attention(q, k, v, config, True), inputs)


@st.composite
def block_sparse_configs(draw):
    size = draw(st.integers(1, 4))
    branches = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=4))
    return AttentionConfig(
        variant="block_sparse",
        segment_lengths=[n * size for n, _ in branches],
        dilation_rates=[r for _, r in branches],
        pattern=SparsePatternConfig(
            pattern_type=draw(st.sampled_from(["local_window", "global_local", "dilated_sparse"])),
            sparsity_ratio=draw(st.floats(0.01, 1.0)),
            block_size=size,
            local_window_size=draw(st.integers(1, 40)),
            global_tokens=draw(st.integers(1, 20)),
        ),
    )


@given(config=block_sparse_configs(), seq=st.integers(1, 70), causal=st.booleans())
@settings(max_examples=60)
def test_block_sparse_masks_equal_the_layouts(config, seq, causal):
    layout = build_layout(config, seq, causal)
    kept = torch.zeros(layout.blocks, layout.blocks, dtype=torch.float64)
    for i in range(layout.blocks):
        kept[i, layout.row(i).tolist()] = 1
    tokens = torch.arange(seq) // layout.block_size
    expected = kept[tokens][:, tokens]
    m = multiplicity(config, seq, 2, causal)
    assert torch.equal(m, (expected.tril() if causal else expected).expand(2, seq, seq))


@pytest.mark.parametrize("causal", [False, True])
def test_block_sparse_equals_torch_under_its_mask(causal):
    q, k, v = random_qkv(22)
    config = AttentionConfig(
        variant="block_sparse",
        pattern=SparsePatternConfig(pattern_type="local_window", block_size=4, local_window_size=8),
    )
    mask = multiplicity(config, 22, 2, causal) > 0
    torch.testing.assert_close(
        reference_attention(q, k, v, config, causal), sdpa(q, k, v, attn_mask=mask), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("causal", [False, True])
def test_adaptive_attends_to_the_blocks_it_is_given(causal):
    q, k, v = random_qkv(10)
    layout = torch.randint(-1, 3, (2, 2, 3, 2), generator=torch.Generator().manual_seed(1))
    layout[..., 0] = torch.arange(3)  # the own block
    layout[0, 1, 1] = torch.tensor([1, 1])  # repeated blocks count once
    mask = torch.zeros(2, 2, 10, 10, dtype=torch.bool)
    for n, h, p, key in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        mask[n, h, p, key] = key // 4 in layout[n, h, p // 4] and (not causal or key <= p)
    torch.testing.assert_close(
        reference_attention(q, k, v, adaptive(4), causal, layout=layout), sdpa(q, k, v, attn_mask=mask)
    )


def test_adaptive_rows_of_padding_alone_are_zero():
    q, k, v = random_qkv(8)
    layout = torch.full((2, 2, 2, 1), -1)
    assert (reference_attention(q, k, v, adaptive(4), layout=layout) == 0).all()


def test_what_inference_mode_cached_serves_a_backward():
    multiplicity.cache_clear()
    inputs = random_qkv(4)
    with torch.inference_mode():
        reference_attention(*inputs, DENSE)
    q = inputs[0].clone().requires_grad_()
    reference_attention(q, *inputs[1:], DENSE).sum().backward()
    assert q.grad is not None


def test_adaptive_needs_the_layout_and_the_others_refuse_it():
    q, k, v = random_qkv(8)
    needs = r"pass layout=module\.select\(q, k\)"
    with pytest.raises(ConfigError, match=needs):
        reference_attention(q, k, v, adaptive(4))
    with pytest.raises(ConfigError, match=needs):
        multiplicity(adaptive(4), 8, 2, False)
    with pytest.raises(ConfigError, match="pass no layout"):
        reference_attention(q, k, v, DENSE, layout=torch.zeros(2, 2, 2, 1, dtype=torch.long))


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = random_qkv(8, heads=4)
    for bad in (
        (q, k[:, :7], v[:, :7]),
        (q, k[:, :, :3], v[:, :, :3]),
        (q, k, v[:, :, :2]),
        (q[..., :4], k, v),
    ):
        with pytest.raises(InputError, match=r"kv_heads.*got q \["):
            reference_attention(*bad, DENSE)


# The last queries of a sequence, documents and sinks


def plainly(q, k, v, m, sinks=None):
    """Masked softmax by torch alone; `m` [B, 1 or H, Q, S], how often each pair counts. A sink is a further
    column."""
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    key, value = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (key, value))
    scores = query @ key.mT / math.sqrt(q.shape[3]) + m.log()
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : k.shape[1]] @ value).transpose(1, 2)


DOCUMENTS = torch.tensor([[5] * 9 + [2] * 1 + [8] * 23, [1] * 30 + [0] * 3])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("queries", [1, 7, 33])
@pytest.mark.parametrize("kind", ["dense", "dilated", "window"])
def test_features_equal_a_plain_masked_softmax(kind, queries, with_documents, with_sinks, causal):
    pattern = SparsePatternConfig(pattern_type="local_window", local_window_size=8, edges="token")
    config = {
        "dense": DENSE,
        "dilated": dilated([(8, 1), (24, 2)]),
        "window": AttentionConfig(variant="block_sparse", pattern=pattern),
    }[kind]
    q, k, v = random_qkv(33, heads=4, kv_heads=2)
    q = q[:, 33 - queries :]
    place = torch.arange(33)
    m = torch.ones(1, 1, 33, 33, dtype=torch.float64)
    if kind == "dilated":
        m = multiplicity(config, 33, 4, False)[None]
    elif kind == "window":
        apart = place[:, None] - place
        m = ((apart >= 0) & (apart <= 8) if causal else apart.abs() <= 4).double()[None, None]
    if causal:
        m = m.tril()
    if with_documents:
        m = m * (DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None])
    sinks = torch.tensor([0.3, -2.0, 4.0, 0.0], dtype=torch.float64) if with_sinks else None
    leaves = [x.requires_grad_() for x in (q, k, v, *([sinks] if with_sinks else []))]
    found = reference_attention(
        q, k, v, config, causal, documents=DOCUMENTS if with_documents else None, sinks=sinks
    )
    expected = plainly(q, k, v, m[:, :, 33 - queries :], sinks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    grads = (torch.autograd.grad(out, leaves, grad) for out in (found, expected))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_the_oracle_keeps_documents_apart_whatever_they_hold():
    q, k, v = random_qkv(33)
    expected = reference_attention(q, k, v, DENSE, documents=DOCUMENTS)
    k[0, :9], v[0, :9] = math.nan, math.inf
    found = reference_attention(q, k, v, DENSE, documents=DOCUMENTS)
    assert torch.equal(found[0, 9:], expected[0, 9:])
    assert found[0, :9].isnan().all()


def test_the_oracle_refuses_more_queries_than_keys_and_documents_of_another_shape():
    q, k, v = random_qkv(5)
    with pytest.raises(InputError, match="queries at most seq"):
        reference_attention(q, k[:, 1:], v[:, 1:], DENSE)
    with pytest.raises(InputError, match="documents must be"):
        reference_attention(q, k, v, DENSE, documents=DOCUMENTS)
