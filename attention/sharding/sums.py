"""Sums over what comes in parts: outputs that meet by their log-sum-exp, and gradients. What is added is
widened a slab at a time, so that little is held beside the sums."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attention.ops.kernels import lse_dtype
from attention.sharding.needs import Source
from attention.sharding.parts import lanes_per_head, source_placement
from attention.sizes.shape import Shape


def packed(x: Tensor, source: Source, start: int, shape: Shape) -> Tensor:
    """The rows [B, rows, lanes, D] of a source at a rate above 1 of its owner's x [B, S, G, D], in which its
    first token is the `start`-th; `shape`: of the whole sequence."""
    rows = source_placement(source)
    sent = x.new_empty(len(x), rows.total, rows.lanes(shape), x.shape[3])
    for lane, (tokens, head) in enumerate(_lanes(source, start, shape)):
        count = len(range(tokens.start, tokens.stop, tokens.step))
        sent[:, :count, lane].copy_(x[:, tokens, head])
        sent[:, count:, lane].zero_()
    return sent


def _lanes(source: Source, start: int, shape: Shape) -> Iterator[tuple[slice, int]]:
    """(tokens, kv head) of the owner's x that each lane of a source has. No two have the same."""
    begin, end, rate = source[1:]
    repeat = int(shape.heads // shape.kv_heads)
    each = lanes_per_head(rate, repeat)
    for lane in range(int(shape.kv_heads) * each):
        remainder = lane % rate if each == repeat else lane % each
        first = start + (remainder - begin) % rate
        yield slice(first, max(start + end - begin, first), rate), lane // each


class Output:
    """The output of queries, and its log-sum-exp, over keys that come in parts."""

    def __init__(self, q: Tensor, wide: bool, slab_tokens: int) -> None:
        """`wide`: whether it is kept in single precision until it ends; `slab_tokens`: how many are widened
        at a time."""
        self._q, self._slab_tokens = q, slab_tokens
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._dtype = lse_dtype(q.dtype) if wide else q.dtype

    def add(self, queries: slice, out: Tensor, lse: Tensor) -> None:
        """Adds the output [B, n, H, D] of some queries over further keys, and its log-sum-exp [B, n, H]. They
        are the sum's from then on."""
        if self._out is None and out.dtype == self._dtype and out.shape == self._q.shape:
            self._out, self._lse = out, lse
            return
        total, total_lse = self._sums()
        for b, part in _slabs(out, self._slab_tokens):
            _merge(total[b, queries][part], total_lse[b, queries][part], out[b, part], lse[b, part])

    def ended(self) -> tuple[Tensor, Tensor]:
        """(out, lse), once."""
        out, lse = self._sums()
        self._out = None  # the sum is gone when it is converted
        return _converted(out, self._q.dtype), lse.contiguous()

    def _sums(self) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            self._out = torch.zeros(self._q.shape, dtype=self._dtype, device=self._q.device)
            size, dtype = self._q.shape[:3], lse_dtype(self._q.dtype)
            self._lse = torch.full(size, -torch.inf, dtype=dtype, device=self._q.device)
        return self._out, self._lse


class Sum:
    """A gradient that comes in parts."""

    def __init__(self, like: Tensor, wide: bool, slab_tokens: int) -> None:
        """`like`: what it is the gradient of; `wide` and `slab_tokens`: as those of an output."""
        self._slab_tokens = slab_tokens
        self._shape, self._device, self._own_dtype = like.shape, like.device, like.dtype
        self._total: Tensor | None = None
        self._dtype = lse_dtype(like.dtype) if wide else like.dtype

    def add(self, tokens: slice, part: Tensor) -> None:
        """Adds to the gradient of some tokens. A part of all may be the sum's from then on."""
        alone = part.untyped_storage().nbytes() == part.nbytes
        if self._total is None and alone and part.dtype == self._dtype and part.shape == self._shape:
            self._total = part
            return
        total = self._sum()[:, tokens]
        for b, some in _slabs(part, self._slab_tokens):
            _add(total[b, some], part[b, some])

    def add_lanes(self, source: Source, start: int, shape: Shape, part: Tensor) -> None:
        """Adds a part [B, rows, lanes, D] of a source at a rate above 1, as it is `packed`."""
        total = self._sum()
        for lane, (tokens, head) in enumerate(_lanes(source, start, shape)):
            some = total[:, tokens, head]
            _add(some, part[:, : some.shape[1], lane])

    def ended(self, dtype: torch.dtype | None = None) -> Tensor:
        """The gradient, in its own type or another, once."""
        total, self._total = self._sum(), None  # the sum is gone when it is converted
        return _converted(total, dtype or self._own_dtype).contiguous()

    def _sum(self) -> Tensor:
        if self._total is None:
            self._total = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        return self._total


def _slabs(part: Tensor, tokens: int) -> Iterator[tuple[int, slice]]:
    for b in range(len(part)):
        for begin in range(0, part.shape[1], tokens):
            yield b, slice(begin, begin + tokens)


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _add(total: Tensor, part: Tensor) -> None:
    if total.dtype == part.dtype:
        total.add_(part)
        return
    wide = lse_dtype(total.dtype)
    total.copy_(total.to(wide).add_(part.to(wide)))


def _merge(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """total <- the attention over both sets of keys, in place; [n, H, D] and [n, H]."""
    wide = total_lse.dtype
    share = torch.sub(part_lse, total_lse).nan_to_num_(0.0, torch.inf, -torch.inf)  # nothing met nothing
    total_lse.copy_(torch.logaddexp(total_lse, part_lse))
    sum_ = total.to(wide).mul_(share.neg().sigmoid_()[..., None])
    total.copy_(sum_.addcmul_(part.to(wide), share.sigmoid_()[..., None]))
