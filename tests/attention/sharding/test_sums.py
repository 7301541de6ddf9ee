"""Sums over parts, some of whose tokens are in single precision."""

from __future__ import annotations

import random

import pytest
import torch

from attention.ops.views import view
from attention.sharding.sums import Output, Sum, _inside
from attention.sizes.shape import Span

TOKENS, HEADS, DIM = 60, 4, 8
WIDE = ((0, 7), (20, 33))


def random_span(rng: random.Random) -> Span:
    """Views that share no token, of every step and of some heads."""
    step, length, batch = rng.choice((1, 1, 2, 5)), rng.randint(1, 6), rng.randint(1, 4)
    batch_step = (length - 1) * step + rng.randint(1, 3) if batch > 1 else 0
    span = Span(0, length, step, batch, batch_step, head=rng.randrange(2), heads=2, head_step=2)
    return (
        span._replace(start=rng.randint(0, TOKENS - span.stop)) if span.stop <= TOKENS else random_span(rng)
    )


def tokens_of(span: Span) -> list[list[int]]:
    starts = (span.start + n * span.batch_step for n in range(span.batch))
    return [[start + t * span.step for t in range(span.length)] for start in starts]


def test_spans_are_cut_to_the_tokens_that_something_holds():
    rng = random.Random(0)
    for _ in range(300):
        span, (begin, end) = random_span(rng), sorted(rng.sample(range(TOKENS + 1), 2))
        tokens, got = torch.tensor(tokens_of(span)), []
        for views, places, some in _inside(span, begin, end):
            assert tokens_of(some) == tokens[views, places].tolist()
            got += tokens[views, places].flatten().tolist()
        assert sorted(got) == sorted(t for t in tokens.flatten().tolist() if begin <= t < end)


def test_gradients_are_added_where_they_belong():
    rng, exact = random.Random(1), torch.zeros(1, TOKENS, HEADS, DIM, dtype=torch.float64)
    total = Sum(exact.bfloat16(), WIDE, 4)
    for number in range(40):
        if number % 8 == 0:  # tiles, from some tokens on
            part = torch.randn(1, 40, HEADS, DIM).bfloat16()
            total.add(slice(10, 50), part)
            exact[:, 10:50] += part
            continue
        span = random_span(rng)
        part = torch.randn(span.batch, span.heads, span.length, DIM).bfloat16()
        total.join(0, span, part)
        view(span, exact[0]).add_(part)
    error = (total.ended().double() - exact).abs()[0].flatten(1).amax(1) / exact.abs().max()
    for begin, end in WIDE:
        assert error[begin:end].max() <= 2**-8, "rounded once"
    assert 2**-9 < error.max() < 2**-4


@pytest.mark.parametrize("begins", [False, True])
def test_outputs_meet_where_they_belong(begins):
    """By the scores of one key after the other, whose weights are all of a softmax."""
    rng = random.Random(2)
    torch.manual_seed(2)
    q = torch.zeros(1, TOKENS, HEADS, DIM, dtype=torch.bfloat16)
    total, weights = Output(q, WIDE, 4), torch.zeros(TOKENS, HEADS, dtype=torch.float64)
    exact = torch.zeros(TOKENS, HEADS, DIM, dtype=torch.float64)
    parts = [(Span(0, TOKENS, heads=HEADS), begins)] + [(random_span(rng), False) for _ in range(30)]
    for span, alone in parts:
        out = torch.randn(span.batch, span.heads, span.length, DIM).bfloat16()
        lse = torch.randn(span.batch, span.heads, span.length)
        share = lse.double().exp()
        view(span, weights[..., None])[..., 0].add_(share)
        view(span, exact).add_(share[..., None] * out)
        if alone:
            total.add(slice(0, TOKENS), out.transpose(1, 2).contiguous(), lse.transpose(1, 2))
        else:
            total.join(0, span, out, lse)
    out, lse = total.ended()
    error = (out[0] - exact / weights[..., None]).abs().flatten(1).amax(1)
    torch.testing.assert_close(lse[0].double(), weights.log(), rtol=0, atol=1e-5)
    for begin, end in WIDE:
        assert error[begin:end].max() <= 2**-8 * 4
    assert error.max() <= 2**-5


def test_nothing_that_nobody_adds_to_is_zero():
    total = Output(torch.ones(1, 3, HEADS, DIM, dtype=torch.bfloat16), ((0, 3),), 4)
    out, lse = total.ended()
    assert not out.any()
    assert (lse == -torch.inf).all()
