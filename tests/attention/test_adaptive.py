"""The adaptive scorer chooses legally, learns from its own loss and from the task's, and its gradient is
that of a bias on the logits of a chosen block.

Planted data: each query block has far key blocks whose values it needs. Tokens carry two halves. The
*content* half decides attention: queries of a block align with the keys of their planted blocks, with
signs that alternate from token to token, so that nothing of it is left in a block's mean. The *label*
half is what the means show: queries carry the planted blocks' labels through a fixed random rotation
that an untrained scorer does not know.
"""

from __future__ import annotations

import math

import pytest
import torch
from conformance import HEADS, IMPLEMENTATIONS, adaptive, in_little_room, module_of, output_gradient, qkv

from attention import AttentionConfig, build
from attention.adaptive import AdaptiveAttention

BLOCK, BLOCKS, PLANTED_HEADS, HALF = 8, 16, 2, 16
DIM = 2 * HALF
KEPT = 4
CHANCE = (KEPT - 1) / (BLOCKS - 1)
UNSEEN = 10**6


def frames(generator, *lead):
    """Random orthonormal rows [*lead, BLOCKS, HALF]."""
    return torch.linalg.qr(torch.randn(*lead, BLOCKS, HALF, generator=generator)).Q


ROTATION = frames(torch.Generator().manual_seed(3), PLANTED_HEADS)


def planted(seed, batch, count, content):
    """q, k, v [batch, S, H, DIM] and the planted blocks of each query block, [batch, H, BLOCKS, count]."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.arange(BLOCKS)
    near = (at[:, None] - at).abs() < 2
    lottery = torch.rand(batch, PLANTED_HEADS, BLOCKS, BLOCKS, generator=generator)
    where = lottery.masked_fill(near, -1.0).topk(count).indices
    wanted = torch.zeros_like(lottery).scatter_(-1, where, 1.0)
    contents = content * frames(generator, batch, PLANTED_HEADS)
    labels = 4.0 * frames(generator, batch, PLANTED_HEADS)
    signs = torch.ones(BLOCK, DIM)
    signs[1::2, :HALF] = -1

    def tokens(block):
        x = block[:, :, :, None] * signs
        x = x + 0.3 * torch.randn(x.shape, generator=generator)
        return x.flatten(2, 3).transpose(1, 2)

    q = tokens(torch.cat([wanted @ contents, wanted @ labels @ ROTATION], dim=-1))
    k = tokens(torch.cat([contents, labels], dim=-1))
    return q, k, torch.randn(q.shape, generator=generator), where


def found_fraction(module, count, content):
    """Planted blocks that the module chooses, on data no training sees."""
    q, k, _, where = planted(UNSEEN, 32, count, content)
    return float((module.select(q, k)[..., None] == where[..., None, :]).any(-2).float().mean())


def fresh_module(seed):
    torch.manual_seed(seed)
    return build(adaptive(KEPT / BLOCKS, PLANTED_HEADS, DIM, BLOCK))


def train(module, loss_of, steps, seed, count, content):
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(*planted(10_000 * seed + step, 4, count, content)[:3]).backward()
        optimizer.step()


# Learning


seeds = pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])


@seeds
def test_scorer_loss_teaches_where_the_mass_is(seed):
    module, data = fresh_module(seed), {"count": 2, "content": 7.0}
    assert found_fraction(module, **data) < 1.5 * CHANCE
    train(module, lambda q, k, v: module.scorer_loss(q, k), 60, seed, **data)
    assert found_fraction(module, **data) >= 0.95


@seeds
def test_the_tasks_loss_alone_teaches_the_scorer(seed):
    """The target attends four times as sharply as the module, so it needs the planted block, and a
    block that is chosen and right asks for more. Measured: 100% over four seeds and two step sizes."""
    module, data = fresh_module(seed), {"count": 1, "content": 3.5}
    target = build(AttentionConfig(variant="dense", scale=4 / math.sqrt(DIM)))
    assert found_fraction(module, **data) < 1.5 * CHANCE
    train(module, lambda q, k, v: (module(q, k, v) - target(q, k, v)).square().mean(), 60, seed, **data)
    assert found_fraction(module, **data) >= 0.9


def test_scorer_loss_of_an_ignorant_scorer_is_that_of_a_guess():
    module = module_of(adaptive(0.5)).double()
    torch.nn.init.zeros_(module.query_weight)
    q, k, _ = qkv(61, batch=2)
    assert module.scorer_loss(q, k).item() == pytest.approx(math.log(8), rel=1e-9)
    guesses = [math.log(i + 1) for i in range(8)]
    assert module.scorer_loss(q, k, is_causal=True).item() == pytest.approx(sum(guesses) / 8, rel=1e-9)


@pytest.mark.parametrize("causal", [False, True])
def test_scorer_loss_is_cross_entropy_with_dense_block_mass(causal):
    module = module_of(adaptive(0.5)).double()
    q, k, v = qkv(61, batch=2, kv_heads=2)
    _, weights = build(AttentionConfig(variant="dense"))(q, k, v, causal, return_attention_weights=True)
    dense = torch.nn.functional.pad(weights.to_dense(), (0, 3, 0, 3))
    mass = dense.unflatten(-1, (8, 8)).unflatten(-3, (8, 8)).sum(dim=(-3, -1))
    mass = mass / mass.sum(-1, keepdim=True)
    means = [torch.stack([x[:, i : i + 8].mean(1) for i in range(0, 61, 8)], dim=2) for x in (q, k)]
    means[1] = means[1].repeat_interleave(2, dim=1)
    scores = (means[0] @ module.query_weight) @ (means[1] @ module.key_weight).mT / math.sqrt(16)
    if causal:
        scores = scores.masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -1e30)
    expected = -(mass * scores.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(module.scorer_loss(q, k, causal), expected)


def test_scorer_loss_does_not_depend_on_the_workspace():
    roomy, tight = (module_of(config) for config in (adaptive(0.5), in_little_room(adaptive(0.5))))
    q, k, _ = qkv(300, batch=2, dtype=torch.float32)
    expected = torch.autograd.grad(roomy.scorer_loss(q, k, True), list(roomy.parameters()))
    found = torch.autograd.grad(tight.scorer_loss(q, k, True), list(tight.parameters()))
    torch.testing.assert_close(found, expected)


# The gate's gradient


def gate_gradient(module, inputs, grad, causal, monkeypatch):
    """(the chosen blocks, the gradient that their scores receive), each [B, H, blocks, kept]."""
    caught = []
    scores_of = AdaptiveAttention._chosen_scores

    def catch(self, q, k, blocks):
        scores = scores_of(self, q, k, blocks)
        scores.retain_grad()
        caught.append((blocks, scores))
        return scores

    monkeypatch.setattr(AdaptiveAttention, "_chosen_scores", catch)
    module(*inputs, is_causal=causal).backward(grad)
    ((blocks, scores),) = caught
    return blocks, scores.grad


def biased(q, k, v, kept, bias, causal):
    """Dense attention over the blocks `kept` [B, H, n, n] with `bias` [B, H, n, n] on their logits."""
    seq = q.shape[1]

    def spread(x):
        return x.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[..., :seq, :seq]

    seen = spread(kept)
    seen = seen.tril() if causal else seen
    query, key, value = (x.transpose(1, 2).repeat_interleave(HEADS // x.shape[2], 1) for x in (q, k, v))
    scores = query @ key.mT / math.sqrt(q.shape[3]) + spread(bias)
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("seq", [5, 61, 64])
def test_gate_gradient_is_that_of_a_bias_on_the_blocks_logits(seq, kv_heads, causal, monkeypatch):
    module = module_of(in_little_room(adaptive(0.5))).double()
    q, k, v = qkv(seq, batch=2, kv_heads=kv_heads)
    grad = output_gradient(q)
    blocks, found = gate_gradient(module, (q, k, v), grad, causal, monkeypatch)
    n = blocks.shape[2]
    kept = torch.zeros(2, HEADS, n, n + 1, dtype=torch.bool)
    kept.scatter_(-1, blocks.masked_fill(blocks < 0, n), True)
    bias = torch.zeros(2, HEADS, n, n, dtype=torch.float64, requires_grad=True)
    out = biased(q, k, v, kept[..., :n], bias, causal)
    (of_all,) = torch.autograd.grad(out, bias, grad)
    expected = of_all.gather(-1, blocks.clamp_min(0)).masked_fill(blocks < 0, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_gate_gradient_equals_finite_differences(causal, monkeypatch):
    module = module_of(adaptive(0.5)).double()
    q, k, v = qkv(61)
    grad = output_gradient(q)
    blocks, found = gate_gradient(module, (q, k, v), grad, causal, monkeypatch)
    kept = torch.zeros(1, HEADS, 8, 8, dtype=torch.bool)
    for h in range(HEADS):
        for i in range(8):
            kept[0, h, i, [c for c in blocks[0, h, i].tolist() if c >= 0]] = True
    for h, i, place in [(0, 7, 1), (1, 3, 0), (3, 5, 2)]:
        step = torch.zeros(1, HEADS, 8, 8, dtype=torch.float64)
        step[0, h, i, blocks[0, h, i, place]] = 1e-5
        up, down = ((biased(q, k, v, kept, b, causal) * grad).sum() for b in (step, -step))
        assert found[0, h, i, place].item() == pytest.approx((up - down).item() / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_changes_neither_output_nor_gradients_of_the_inputs(dtype):
    learning, fixed = module_of(adaptive(0.4)), module_of(adaptive(0.4)).requires_grad_(False)
    grad = output_gradient(qkv(61, dtype=dtype)[0])
    results = []
    for module in (learning, fixed):
        leaves = [x.requires_grad_() for x in qkv(61, dtype=dtype)]
        out = module(*leaves, is_causal=True)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scorer_gradients_are_finite_in_the_parameters_dtype(dtype):
    module = module_of(adaptive(0.4))
    module(*qkv(61, dtype=dtype)).sum().backward()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


# Choosing


def choice(config=None, seq=99, batch=2, kv_heads=2, causal=False, **options):
    q, k, _ = qkv(seq, batch=batch, kv_heads=kv_heads, **options)
    return module_of(config or adaptive(0.3)).select(q, k, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq, kept", [(1, 1), (8, 1), (9, 1), (99, 4), (160, 6)])
def test_choices_are_ascending_own_block_included_and_as_many_as_the_ratio_says(seq, kept, causal):
    blocks = choice(seq=seq, causal=causal)
    rows = -(-seq // 8)
    assert blocks.dtype == torch.int64
    assert blocks.shape == (2, HEADS, rows, kept)
    for i in range(rows):
        there = min(kept, i + 1) if causal else kept
        chosen = blocks[:, :, i]
        assert (chosen[..., there:] == -1).all()
        assert (chosen[..., :there] >= 0).all()
        assert (chosen[..., :there].diff(dim=-1) > 0).all()
        assert (chosen == i).any(-1).all()
        assert (chosen <= (i if causal else rows - 1)).all()


def test_every_head_and_batch_item_chooses_for_itself():
    blocks = choice(seq=160)
    assert not torch.equal(blocks[0], blocks[1])
    assert not torch.equal(blocks[:, 0], blocks[:, 1])


def test_the_best_scores_are_chosen():
    module = module_of(adaptive(0.3)).double()
    q, k, _ = qkv(96, kv_heads=4)
    means = [x.unflatten(1, (12, 8)).mean(2).transpose(1, 2) for x in (q, k)]
    scores = (means[0] @ module.query_weight) @ (means[1] @ module.key_weight).mT
    scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    assert torch.equal(module.select(q, k), scores.topk(4).indices.sort().values)


@pytest.mark.parametrize("causal", [False, True])
def test_choices_do_not_depend_on_the_workspace_or_the_batch(causal):
    sizes = {"seq": 2000, "causal": causal, "dtype": torch.float32}
    blocks = choice(**sizes)
    assert torch.equal(choice(in_little_room(adaptive(0.3)), **sizes), blocks)
    q, k, _ = qkv(2000, batch=2, kv_heads=2, dtype=torch.float32)
    assert torch.equal(module_of(adaptive(0.3)).select(q[1:], k[1:], causal), blocks[1:])


def test_causal_choices_read_no_later_block_and_no_later_key():
    module = module_of(IMPLEMENTATIONS["adaptive"])
    q, k, _ = qkv(96)
    before = module.select(q, k, is_causal=True)
    q[:, 40:], k[:, 33:] = 5.0, -7.0  # queries from block 5 on, keys from within block 4 on
    assert torch.equal(module.select(q, k, is_causal=True)[:, :, :5], before[:, :, :5])


def test_an_untrained_scorer_compares_the_means_themselves():
    torch.manual_seed(0)
    module = build(adaptive(0.3)).double()
    q, k, _ = qkv(96)
    means = [x.unflatten(1, (12, 8)).mean(2).transpose(1, 2) for x in (q, k)]
    scores = means[0] @ means[1].mT
    scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    torch.testing.assert_close(module.select(q, k), scores.topk(4).indices.sort().values)
