"""Learned sinks: a logit a head that joins the softmax of each of its queries, as a key without a value.

With s a head's sink and l a query's log-sum-exp, the query's log-sum-exp becomes log(exp(l) + exp(s)) and its
output is multiplied by exp(l) / (exp(l) + exp(s)). The kernels' backward takes both as they then are, and is
right for q, k and v. The gradient of s is minus the sum of the sink's weight times grad . out over its
queries. Both go over the tokens in slabs, so that what is held at a time does not depend on the length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attention.ops.kernels import lse_dtype
from attention.sizes.learned_sinks import slab_tokens
from attention.sizes.shape import Shape


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor, shape: Shape) -> None:
    """Lets sinks [H] join the softmax of all queries, in out [B, S, H, D] and lse [B, S, H] themselves."""
    sinks, lowest = sinks.detach().to(lse.dtype), torch.finfo(lse.dtype).min
    for tokens in _slabs(shape):
        for part, part_lse in zip(out[:, tokens], lse[:, tokens], strict=True):
            # A query without keys has nothing to share, not even with a sink that is minus infinity.
            share = (part_lse - sinks.clamp(min=lowest)).sigmoid_()[..., None]
            part_lse.copy_(torch.logaddexp(part_lse, sinks))
            if part.dtype == share.dtype:
                part.mul_(share)
            else:
                part.copy_(part.to(share.dtype).mul_(share))
            del share


def sinks_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor, shape: Shape) -> Tensor:
    """The gradient of sinks [H], for out and lse with them."""
    wide = lse_dtype(out.dtype)
    sinks, total = sinks.detach(), torch.zeros(sinks.shape, dtype=wide, device=sinks.device)
    for tokens in _slabs(shape):
        for part, part_grad, part_lse in zip(out[:, tokens], grad[:, tokens], lse[:, tokens], strict=True):
            products = part.to(wide) if part.dtype != wide else part.clone()
            along = products.mul_(part_grad.to(wide)).sum(-1)
            del products
            along.mul_((sinks - part_lse).nan_to_num_(-torch.inf, torch.inf, -torch.inf).exp_())
            total -= along.sum(0)
            del along
    return total.to(sinks.dtype)


def _slabs(shape: Shape) -> Iterator[slice]:
    tokens = slab_tokens(shape)
    for begin in range(0, shape.queries, tokens):
        yield slice(begin, min(begin + tokens, shape.queries))
