"""What torch's flash attention on CUDA computes, by its definition: the way to run whole calls on a machine
without a GPU. Sums are in single precision at least, results in the type of q."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attention.ops import kernels
from attention.sizes.shape import Windows


def hidden(queries: int, keys: int, left: int | None, right: int | None) -> Tensor:
    """[T, K], whether a query sees a key not: aligned to the end."""
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    hides = torch.zeros(queries, keys, dtype=torch.bool)
    if left is not None:
        hides |= key < place - left
    if right is not None:
        hides |= key > place + right
    return hides


def scores(q: Tensor, k: Tensor, scale: float, left: int | None, right: int | None) -> Tensor:
    wide = kernels.lse_dtype(q.dtype)
    x = q.to(wide) @ repeated(k, q).to(wide).transpose(-1, -2) * scale
    return x.masked_fill(hidden(q.shape[2], k.shape[2], left, right), -math.inf)


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """x [N, G, K, D] for each query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def tokens_first(x: Tensor, like: Tensor) -> Tensor:
    """In the type of `like`, and in memory as [N, T, H, D]."""
    return x.to(like.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def windowed(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    x = scores(q, k, scale, left, right)
    lse = x.logsumexp(-1)
    return tokens_first((x - lse[..., None]).exp() @ repeated(v, q).to(x.dtype), q), lse


def windowed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    left: int | None,
    right: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (scores(q, k, scale, left, right) - lse[..., None]).exp()
    wide_q, wide_grad = q.to(weights.dtype), grad.to(weights.dtype)
    delta = (wide_grad * out.to(weights.dtype)).sum(-1, keepdim=True)
    by_score = weights * (wide_grad @ repeated(v, q).to(weights.dtype).transpose(-1, -2) - delta) * scale

    def of_groups(x: Tensor) -> Tensor:
        return x.unflatten(1, (k.shape[1], -1)).sum(2)

    gradients = (
        by_score @ repeated(k, q).to(weights.dtype),
        of_groups(by_score.transpose(-1, -2) @ wide_q),
        of_groups(weights.transpose(-1, -2) @ wide_grad),
    )
    dq, dk, dv = (tokens_first(x, q) for x in gradients)
    return dq, dk, dv


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: kernels.Sequences,
    *,
    scale: float,
    left: int | None = None,
    right: int | None = None,
) -> tuple[Tensor, Tensor]:
    # Else torch takes every sequence to have one query.
    assert sequences.most_queries > 1 or q.shape[1] == k.shape[1]
    parts = []
    for queries, keys in ranges(sequences):
        if queries.start < queries.stop:
            inputs = (x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys]))
            out, lse = windowed(*inputs, scale=scale, left=left, right=right)
            parts.append((out[0].transpose(0, 1), lse[0]))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses, 1)


def ragged_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: kernels.Sequences,
    *,
    scale: float,
    left: int | None = None,
    right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert lse.is_contiguous()
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))  # what no sequence has is not set
    for queries, keys in ranges(sequences):
        dk[keys], dv[keys] = 0, 0
        if queries.start < queries.stop:
            sources = (grad[queries], q[queries], k[keys], v[keys], out[queries])
            inputs = [x.transpose(0, 1)[None] for x in sources]
            masks = {"scale": scale, "left": left, "right": right}
            parts = windowed_backward(*inputs, lse[None, :, queries], **masks)
            for whole, places, part in zip((dq, dk, dv), (queries, keys, keys), parts, strict=True):
                whole[places] = part[0].transpose(0, 1)
    return dq, dk, dv


def ranges(sequences: kernels.Sequences) -> list[tuple[slice, slice]]:
    """The places of each sequence's queries and keys."""
    both = [[slice(*pair) for pair in pairwise(x.tolist())] for x in (sequences.queries, sequences.keys)]
    for places, most in zip(both, (sequences.most_queries, sequences.most_keys), strict=True):
        assert max(x.stop - x.start for x in places) <= most
    places = list(zip(*both, strict=True))
    assert all(keys.start < keys.stop for queries, keys in places if queries.start < queries.stop)
    return places


PLAYED: dict[str, Any] = {
    "windowed": windowed,
    "windowed_backward": windowed_backward,
    "ragged": ragged,
    "ragged_backward": ragged_backward,
}


def flash_kernels() -> AbstractContextManager[Any]:
    """Plays the kernels alone, for who is about to ask what they take."""
    return mock.patch.multiple(kernels, **PLAYED)


@contextmanager
def flash_attention(windows: Windows = "any") -> Iterator[None]:
    """Plays a GPU whose kernel takes such windows, for every dtype."""
    takes = {"windows_of": lambda x: windows, "cut_windows_of": lambda x: windows}
    with mock.patch.multiple(kernels, **takes, **PLAYED):
        yield
