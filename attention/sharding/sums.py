"""Sums over what comes in parts: outputs that meet by their log-sum-exp, and gradients. They are kept in
single precision where many parts meet, and in the tensors' own type elsewhere. What is added is widened a
slab at a time, or within an operator, so that little is held beside the sums."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attention.ops import whole_calls
from attention.ops.kernels import lse_dtype
from attention.ops.views import rows, view
from attention.sharding.needs import Source
from attention.sharding.parts import lanes_per_head, source_placement
from attention.sharding.plan import Ranges
from attention.sizes.arrays import ceil_div
from attention.sizes.shape import Shape, Span


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

    def __init__(self, q: Tensor, wide: Ranges, slab_tokens: int) -> None:
        """`wide`: queries whose output is kept in single precision until it ends; `slab_tokens`: how many are
        widened at a time."""
        self._slab_tokens = slab_tokens
        self._out = _Numbers(q, wide)
        self._lse: Tensor | None = None

    def takes(self, queries: slice) -> bool:
        """Whether an output of these queries may be the sum's from then on."""
        return self._out.takes(queries)

    def begin(self) -> None:
        """Makes what holds the sum, where nothing does, with the log-sum-exp as kernels of whole calls have
        it, heads before tokens."""
        self._out.held_by()
        if self._lse is None:
            self._lse = self._no_lse((0, 2, 1)).transpose(1, 2)

    def add(self, queries: slice, out: Tensor, lse: Tensor) -> None:
        """Adds the output [B, n, H, D] of some queries over further keys, and its log-sum-exp [B, n, H]. They
        are the sum's from then on."""
        if self.takes(queries) and out.dtype == self._out.dtype:
            self._out.begin(out)
            self._lse = lse
            return
        total_lse = self._sum_lse()[:, queries]
        for held, place in self._out.held(queries):
            for b, some in _slabs(place, self._slab_tokens, len(out)):
                _merge(held[b, some], total_lse[b, place][some], out[b, place][some], lse[b, place][some])

    def join(self, item: int, queries: Span, out: Tensor, lse: Tensor) -> None:
        """Adds the output [N, H, T, D] of some queries of a batch item over further keys, and its log-sum-exp
        [N, H, T]: every query sees some key."""
        total_lse = self._sum_lse()[item]
        for piece in self._out.pieces(queries):
            whole_calls.merge(
                view(piece.span, piece.held[item], piece.begin),
                rows(piece.span, total_lse),
                out[piece.views, :, piece.places],
                lse[piece.views, :, piece.places],
            )

    def ended(self) -> tuple[Tensor, Tensor]:
        """(out, lse), once."""
        lse, self._lse = self._sum_lse(), None
        return self._out.ended(self._out.dtype), lse

    def _sum_lse(self) -> Tensor:
        if self._lse is None:
            self._lse = self._no_lse((0, 1, 2))
        return self._lse

    def _no_lse(self, order: tuple[int, int, int]) -> Tensor:
        size, dtype = [self._out.shape[n] for n in order], lse_dtype(self._out.dtype)
        return torch.full(size, -torch.inf, dtype=dtype, device=self._out.device)


class Sum:
    """A gradient that comes in parts."""

    def __init__(self, like: Tensor, wide: Ranges, slab_tokens: int) -> None:
        """`like`: what it is the gradient of; `wide` and `slab_tokens`: as those of an output."""
        self._slab_tokens = slab_tokens
        self._numbers = _Numbers(like, wide)

    def takes(self, tokens: slice) -> bool:
        """Whether a gradient of these tokens may be the sum's from then on."""
        return self._numbers.takes(tokens)

    def begin(self) -> None:
        """Makes what holds the sum, where nothing does."""
        self._numbers.held_by()

    def add(self, tokens: slice, part: Tensor) -> None:
        """Adds to the gradient of some tokens. A part of all may be the sum's from then on."""
        alone = part.untyped_storage().nbytes() == part.nbytes
        if self._numbers.takes(tokens, part.dtype) and alone:
            self._numbers.begin(part)
            return
        for held, place in self._numbers.held(tokens):
            for b, some in _slabs(place, self._slab_tokens, len(part)):
                _add(held[b, some], part[b, place][some])

    def join(self, item: int, tokens: Span, part: Tensor) -> None:
        """Adds the gradient [N, H, T, D] of some tokens of a batch item."""
        for piece in self._numbers.pieces(tokens):
            view(piece.span, piece.held[item], piece.begin).add_(part[piece.views, :, piece.places])

    def add_lanes(self, source: Source, start: int, shape: Shape, part: Tensor) -> None:
        """Adds a part [B, rows, lanes, D] of a source at a rate above 1, as it is `packed`."""
        for lane, (tokens, head) in enumerate(_lanes(source, start, shape)):
            count = len(range(tokens.start, tokens.stop, tokens.step))
            if not count:
                continue
            span = Span(tokens.start, count, tokens.step, head=head)
            for piece in self._numbers.pieces(span):
                for b in range(len(part)):
                    some = view(piece.span, piece.held[b], piece.begin)[0, 0]
                    _add(some, part[b, :count, lane][piece.places])

    def ended(self, dtype: torch.dtype | None = None) -> Tensor:
        """The gradient, in its own type or another, once."""
        return self._numbers.ended(dtype or self._numbers.dtype).contiguous()


class _Piece(NamedTuple):
    """Some of a span's tokens, which one tensor holds."""

    held: Tensor
    """[B, tokens, heads, D]."""
    begin: int
    """Its first token."""
    span: Span
    views: slice
    places: slice


class _Numbers:
    """Numbers of tokens [B, S, heads, D], zero at first, some in single precision."""

    def __init__(self, like: Tensor, wide: Ranges) -> None:
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self._wide_dtype = lse_dtype(like.dtype)
        self._wide = () if self._wide_dtype == like.dtype else wide
        self._all = self._wide == ((0, like.shape[1]),)
        self._parts: list[tuple[int, int, Tensor]] | None = None
        self._own: Tensor | None = None

    def takes(self, tokens: slice, dtype: torch.dtype | None = None) -> bool:
        """Whether they may `begin` with these tokens, in their own type or another."""
        own = self._wide_dtype if self._all else self.dtype
        fits = (tokens.start, tokens.stop) == (0, self.shape[1]) and own == (dtype or self.dtype)
        return self._parts is None and fits

    def begin(self, own: Tensor | None = None) -> None:
        """Begins, with numbers of all tokens if there are some."""
        if self._all:
            own = own if own is not None else self._zeros(0, self.shape[1], self._wide_dtype)
            self._parts = [(0, self.shape[1], own)]
            return
        started = own is not None
        own = self._own = own if own is not None else self._zeros(0, self.shape[1], self.dtype)
        self._parts, at = [], 0
        for begin, end in self._wide:
            self._parts.append((at, begin, own[:, at:begin]))
            wide = (
                own[:, begin:end].to(self._wide_dtype)
                if started
                else self._zeros(begin, end, self._wide_dtype)
            )
            self._parts.append((begin, end, wide))
            at = end
        self._parts.append((at, self.shape[1], own[:, at:]))

    def _zeros(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        size = (self.shape[0], end - begin, *self.shape[2:])
        return torch.zeros(size, dtype=dtype, device=self.device)

    def held_by(self) -> list[tuple[int, int, Tensor]]:
        """(first, one past the last, what holds them) of the tokens."""
        if self._parts is None:
            self.begin()
        assert self._parts is not None
        return self._parts

    def held(self, tokens: slice) -> Iterator[tuple[Tensor, slice]]:
        """What holds some tokens: (numbers [B, n, heads, D], which of them these are)."""
        for begin, end, numbers in self.held_by():
            low, high = max(begin, tokens.start), min(end, tokens.stop)
            if low < high:
                yield numbers[:, low - begin : high - begin], slice(low - tokens.start, high - tokens.start)

    def pieces(self, span: Span) -> Iterator[_Piece]:
        """A span by what holds its tokens."""
        for begin, end, numbers in self.held_by():
            for views, places, some in _inside(span, begin, end):
                yield _Piece(numbers, begin, some, views, places)

    def ended(self, dtype: torch.dtype) -> Tensor:
        """The numbers, once."""
        parts, own = self.held_by(), self._own
        self._parts = self._own = None
        if own is None:
            ((_, _, own),) = parts
            del parts
        else:
            for begin, end, wide in parts:
                if wide.dtype != own.dtype:
                    own[:, begin:end].copy_(wide)
        return own if own.dtype == dtype else own.to(dtype)


def _inside(span: Span, begin: int, end: int) -> Iterator[tuple[slice, slice, Span]]:
    """(views, places, their span) of a span's tokens among begin..end."""
    if begin <= span.start and span.stop <= end:
        yield slice(None), slice(None), span
        return
    if not span.batch_step:
        low, high = (
            min(max(ceil_div(token - span.start, span.step), 0), span.length) for token in (begin, end)
        )
        if low < high:
            yield slice(None), slice(low, high), span.cut(low, high)
        return
    step, reach = span.batch_step, (span.length - 1) * span.step

    def view_at(token: int) -> int:
        """The first view that begins there or behind it."""
        return min(max(ceil_div(token - span.start, step), 0), span.batch)

    some, whole = (view_at(begin - reach), view_at(end)), (view_at(begin), view_at(end - reach))
    if whole[0] >= whole[1]:
        whole = (some[1], some[1])
    for n in (*range(some[0], whole[0]), *range(whole[1], some[1])):
        start = span.start + n * span.batch_step
        low, high = (min(max(ceil_div(token - start, span.step), 0), span.length) for token in (begin, end))
        if low < high:
            yield slice(n, n + 1), slice(low, high), span.pick(n, n + 1).cut(low, high)
    if whole[0] < whole[1]:
        yield slice(*whole), slice(None), span.pick(*whole)


def _slabs(place: slice, tokens: int, batch: int) -> Iterator[tuple[int, slice]]:
    for b in range(batch):
        for begin in range(0, place.stop - place.start, tokens):
            yield b, slice(begin, begin + tokens)


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
