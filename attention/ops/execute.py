"""Runs a program of tiles over tensors, forward and backward, behind one autograd function.

Saved for backward: q, k, v, out and the log-sum-exp. Nothing of size queries x keys is ever held
beyond one chunk. Sums over parts are kept in single precision (double for float64) while a tile
is worked on. Besides what the kernels return, nothing is allocated but the pass's arena: torch's CPU
operators copy operands of mixed precision, so those are converted into the arena first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention.ops import document_calls, kernels, list_calls, whole_calls
from attention.ops.backward import Gradients, once
from attention.ops.document_calls import Documents
from attention.ops.extent import cut_of
from attention.ops.learned_sinks import add_sinks, sinks_gradient
from attention.ops.list_calls import BlockLists
from attention.ops.maskless import maskless
from attention.ops.program import Call, Gather, Tile
from attention.ops.scratch import FreshScratch, Scratch
from attention.ops.sinks import GatherSink, Part, Sink, SpanSink
from attention.ops.views import Fetched, Listed, causal_mask, fetch, listed, mask_bias, rows, view, widened
from attention.pool import Buffers
from attention.sizes.arena import arena_bytes
from attention.sizes.shape import Shape, Span
from attention.sizes.tiles import Cut, Extent, backward_sizes, cut, forward_sizes, sums_in_full
from attention.sizes.whole_calls import WholeCall

TILES_AHEAD, BYTES_AHEAD = 32, 512 << 10
"""Tiles, and bytes of what they list, that a CPU makes before it runs them."""
VIEWS_AT_ONCE = 1024
"""Queries that backward without masks takes together at least; it has many views of few."""


class Reserve(NamedTuple):
    """What a pass over a program holds beside its results, and how it cuts the program's calls."""

    shape: Shape
    mask: tuple[int, int]
    """(queries, keys) of the mask that is added to scores, (0, 0) for none; see `Extent`."""
    band: bool
    sizes: Mapping[str, int]
    """Bytes of each buffer."""
    other: int
    """Bytes that the training step's other pass reserves, 0 for none."""
    cuts: Mapping[str, Cut] | None
    """How backward cuts the calls of each kind; None where it cuts each by its own sizes."""


class Reserves:
    """The reserves of a program's passes, each worked out once."""

    def __init__(
        self, shape: Shape, extent: Callable[[Shape], Extent], whole: bool = False, kinds: bool = True
    ) -> None:
        """`extent`: the largest sizes of the program's calls, cut for a shape; `whole`: see `Problem`;
        `kinds`: whether backward cuts a call as the largest of its kind."""
        self._shape, self.extent, self._whole, self._kinds = shape, extent, whole, kinds
        self._forward: dict[tuple[bool, bool], Reserve] = {}
        self._backward: Reserve | None = None

    def forward(self, keeps_lse: bool, trains: bool) -> Reserve:
        """That of a forward pass; `trains`: whether a backward pass follows."""
        reserve = self._forward.get((keeps_lse, trains))
        if reserve is None:
            shape, extent = self._shape, self.extent(self._shape)
            other = arena_bytes(self.backward().sizes) if trains else 0
            sizes = forward_sizes(extent, shape, keeps_lse)
            reserve = Reserve(shape, extent.mask, extent.band, sizes, other, None)
            self._forward[keeps_lse, trains] = reserve
        return reserve

    def backward(self) -> Reserve:
        """That of a backward pass."""
        if self._backward is None:
            shape = self._shape.backward()
            extent = self.extent(shape)
            other = 0
            if not self._whole:
                ahead = forward_sizes(self.extent(self._shape), self._shape, keeps_lse=True)
                other = arena_bytes(ahead)
            cuts = {kind.name: cut(kind, shape) for kind in extent.kinds} if self._kinds else None
            sizes = backward_sizes(extent, shape)
            self._backward = Reserve(shape, extent.mask, extent.band, sizes, other, cuts)
        return self._backward


class Problem(NamedTuple):
    """One attention over one set of sizes: its program and what running it needs."""

    shape: Shape
    tiles: Callable[[int, Shape], Iterable[Tile]]
    """The tiles of batch item b, cut for a shape: this one or its `backward()`."""
    reserves: Reserves
    """Of passes over those tiles."""
    scale: float
    covers: bool
    """Whether every (token, head) is in some call; otherwise out is zero and lse -inf there."""
    whole: bool
    """Whether a single kernel call over all tokens does it (dense, as many kv heads as the kernel takes; with
    fewer queries than keys, not causal)."""
    buffers: Buffers
    calls: tuple[WholeCall, ...] | None = None
    """Its calls where whole ones do it instead of tiles."""
    lists: BlockLists | None = None
    """Its lists where calls over those do it."""
    hides: bool = False
    """Whether masks hide keys from queries though it is not causal."""
    documents: Documents | None = None
    """Its documents where one call over those does it."""


class _Pass(NamedTuple):
    """One pass over a program: its scratch and its causal mask."""

    problem: Problem
    shape: Shape
    scratch: Scratch
    dtype: torch.dtype
    """The type of the mask, and of what the kernels are given."""
    mask: Tensor | None
    cuts: Mapping[str, Cut] | None
    """How backward cuts the calls of each kind; None where it cuts each by its own sizes."""

    @property
    def fresh(self) -> bool:
        """Whether this pass does again, without masks, what came out with NaN or infinity in it."""
        return isinstance(self.scratch, FreshScratch)

    @property
    def origin(self) -> int:
        """Token of the first query."""
        return int(self.shape.origin)

    def bias(self, call: Call, span: Span, keys: Fetched, begin: int = 0) -> dict[str, Any]:
        """The kernel's `causal` and `bias` for a call from its key `begin` on."""
        if call.mask in ("none", "causal"):
            return {"causal": call.mask == "causal"}
        return {"bias": mask_bias(call, span, keys, self.mask, begin)}


class _Item(NamedTuple):
    """One batch item of a forward pass. H query heads, G heads of keys and values."""

    q: Tensor
    """[S, H, D]."""
    k: Tensor
    """[S, G, D], like v."""
    v: Tensor
    out: Tensor
    """[S, H, D]."""
    lse: Tensor | None
    """[S, H]; None where nobody asks for it."""


class _BackwardItem(NamedTuple):
    """One batch item of a backward pass: gradients have the shapes of what they belong to."""

    grad: Tensor
    """The gradient of out."""
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    """Sums over tiles, like dv: in the gradient's own type, or in single precision (`sums_in_full`)."""
    dv: Tensor


class _Column(NamedTuple):
    """Some of a call's keys, from its key `begin` on, and the sink that takes their gradients."""

    call: Call
    begin: int
    keys: Fetched
    sink: Sink


def _begun(problem: Problem, reserve: Reserve, dtype: torch.dtype, device: torch.device) -> _Pass:
    """A pass in numbers of a type."""
    mask = None
    if reserve.mask[1]:
        key = (*reserve.mask, reserve.band, dtype, device)
        mask = problem.buffers.masks.get(key, lambda: causal_mask(*key))
    scratch = Scratch(problem.buffers.pool_for(reserve.shape.seq), device, reserve.sizes, reserve.other)
    return _Pass(problem, reserve.shape, scratch, dtype, mask, reserve.cuts)


class Attend(torch.autograd.Function):
    """(out [B, Q, H, D], lse [B, Q, H]) of a problem; lse is not differentiable."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, problem: Problem
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward_pass(q, k, v, problem, keeps_lse=True, trains=True)
        if sinks is not None:
            assert lse is not None
            add_sinks(out, lse, sinks, problem.shape)
        ctx.save_for_backward(q, k, v, out, lse, *(() if sinks is None else (sinks,)))
        ctx.problem, ctx.buffers = problem, problem.buffers
        assert lse is not None
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # or zeros would be made for lse
        return out, lse

    @staticmethod
    @once
    def backward(ctx: Any, saved: Sequence[Tensor], grad: Tensor | None, _: None) -> Gradients:
        if grad is None:
            return None, None, None, None, None
        grad = grad if grad.stride(-1) == 1 and 0 not in grad.stride() else grad.contiguous()
        of_sinks = None
        if ctx.needs_input_grad[3]:
            of_sinks = sinks_gradient(grad, saved[3], saved[4], saved[5], ctx.problem.shape)
        return *backward_pass(grad, saved[:5], ctx.problem), of_sinks, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, sinks: Tensor | None = None, keeps_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the problem, with learned sinks [H] if given, and gradients where q, k, v or those ask
    for them. lse is None unless that or the caller needs it. Where memory runs out is the caller's concern,
    who has more that can be freed."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        result: tuple[Tensor, Tensor] = Attend.apply(q, k, v, sinks, problem)  # type: ignore[no-untyped-call]
        return result
    out, lse = forward_pass(q, k, v, problem, keeps_lse or sinks is not None, trains=False)
    if sinks is not None:
        assert lse is not None
        add_sinks(out, lse, sinks, problem.shape)
    return out, lse if keeps_lse else None


def forward_pass(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, keeps_lse: bool, trains: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the problem; lse is None unless the caller needs it. `trains`: whether `backward_pass`
    follows."""
    shape = problem.shape
    if problem.documents is not None:
        packed = document_calls.forward(q, k, v, problem.documents, shape, problem.scale)
        return packed[0], packed[1] if keeps_lse else None
    if problem.calls is not None:
        whole = whole_calls.forward(q, k, v, problem.calls, shape, problem.scale, problem.covers)
        return whole[0], whole[1] if keeps_lse else None
    if problem.lists is not None:
        over_lists = list_calls.forward(q, k, v, problem.lists, shape, problem.scale)
        return over_lists[0], over_lists[1] if keeps_lse else None
    if problem.whole:
        out, whole_lse = kernels.forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=problem.scale, causal=shape.causal
        )
        out = out.transpose(1, 2)
        if not shape.causal or _is_clean(out):
            return out, whole_lse.transpose(1, 2) if keeps_lse else None
        del out, whole_lse
    out = (torch.empty if problem.covers else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    lse: Tensor | None = None
    if keeps_lse:
        lse = torch.full(q.shape[:3], -torch.inf, dtype=kernels.lse_dtype(q.dtype), device=q.device)
    begun = _begun(problem, problem.reserves.forward(keeps_lse, trains), q.dtype, q.device)
    with begun.scratch:
        for b in range(q.shape[0]):
            item = _Item(q[b], k[b], v[b], out[b], None if lse is None else lse[b])
            for tile, lists in _ahead(problem.tiles(b, shape), item.k):
                _forward_tile(tile, lists, item, begun)
                if tile.masks and not _is_clean(_rows(item.out, tile, begun.origin)):
                    _forward_again(tile, item, begun)
    return out, lse


def _is_clean(*outputs: Tensor) -> bool:
    """Whether a kernel's masks kept out all that they hide: NaN and infinity that come through show in what
    the kernel returns. True on a GPU, where asking would wait for it."""
    if outputs[0].device.type != "cpu":
        return True
    return all(math.isfinite(end) for x in outputs for end in torch.aminmax(x))


def _forward_again(tile: Tile, item: _Item, begun: _Pass) -> None:
    """`_forward_tile` without masks, in scratch of its own."""
    tile = maskless(tile, begun.shape)
    if item.lse is not None:
        _rows(item.lse, tile, begun.origin).fill_(-torch.inf)
    fresh = begun._replace(scratch=FreshScratch(item.q.device), mask=None)
    _forward_tile(tile, [None] * len(tile.calls), item, fresh)
    if item.lse is not None:
        nothing = _rows(item.lse, tile, begun.origin)
        nothing.masked_fill_(nothing == -torch.inf, 0.0)


def _rows(x: Tensor, tile: Tile, origin: int) -> Tensor:
    """The tile's tokens of x, whose first row is token `origin`."""
    return x[tile.start - origin : tile.stop - origin]


def _correct(q: Tensor, k: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
    """Puts right what torch's CPU kernel says of a query whose few scores are all minus infinity or NaN: that
    out and lse are zero. lse is minus infinity, or both are NaN."""
    places = (lse == 0).nonzero()
    for some in places.split(max((1 << 20) // (k.shape[2] * k.shape[3]), 1)):
        n, h, t = some.unbind(1)
        keys = k[n, h * k.shape[1] // q.shape[1]].to(lse.dtype)
        scores = (keys @ q[n, h, t].to(lse.dtype)[..., None])[..., 0] * scale
        highest = scores.amax(-1)  # NaN if one is
        lse[n, h, t] = highest.where(highest.isnan() | (highest == -torch.inf), 0.0)
        out[n, h, t] = out[n, h, t].masked_fill(highest.isnan()[:, None], torch.nan)


def _ahead(tiles: Iterable[Tile], k: Tensor) -> Iterator[tuple[Tile, Sequence[Listed | None]]]:
    """The tiles and what their calls list. On a CPU many are made at a time: between two kernels, whose
    data drives Python's out of the processor's cache, each would take several times as long. On a GPU a
    call's list is made when it is wanted, for it takes memory there."""
    if k.device.type != "cpu":
        yield from ((tile, [None] * len(tile.calls)) for tile in tiles)
        return
    made: list[tuple[Tile, Sequence[Listed | None]]] = []
    held = 0
    for tile in tiles:
        lists = [listed(call.keys, k) if isinstance(call.keys, Gather) else None for call in tile.calls]
        made.append((tile, lists))
        held += sum(each.rows.nbytes for each in lists if each)
        if len(made) >= TILES_AHEAD or held > BYTES_AHEAD:
            yield from made
            made, held = [], 0
    yield from made


def _forward_tile(tile: Tile, lists: Sequence[Listed | None], item: _Item, begun: _Pass) -> None:
    """Fills the item's out, and lse if there is one, for the tile's tokens."""
    q, k, v, out, lse = item
    scratch, first, lse_from = begun.scratch, begun.origin, begun.origin
    total, origin = _accumulator("total", tile, out, begun) if tile.merge else (out, first)
    if tile.merge and lse is None:
        size = (tile.stop - tile.start, out.shape[1])
        lse, lse_from = scratch.get("lse", size, kernels.lse_dtype(out.dtype)).fill_(-torch.inf), tile.start
    for call, listing in zip(tile.calls, lists, strict=True):
        keys = fetch(call.keys, k, v, scratch, listing)
        for span in call.queries:
            queries = view(span, q, first)
            part, part_lse = kernels.forward(
                queries, keys.k, keys.v, scale=begun.problem.scale, **begun.bias(call, span, keys)
            )
            if begun.fresh:
                _correct(queries, keys.k, part, part_lse, begun.problem.scale)
            target = view(span, total, origin)
            target_lse = None if lse is None else rows(span, lse, lse_from)
            if tile.merge and not call.first:
                assert target_lse is not None
                _merge(target, target_lse, part, part_lse, scratch)
            else:
                target.copy_(part)
                if target_lse is not None:
                    target_lse.copy_(part_lse)
            del part, part_lse  # before the next call's are made
    if total is not out:
        _rows(out, tile, first).copy_(total)


def _accumulator(name: str, tile: Tile, like: Tensor, begun: _Pass) -> tuple[Tensor, int]:
    """Zeros for the tile's tokens in accumulation precision, and the token they begin at."""
    dtype = kernels.lse_dtype(like.dtype)
    if dtype == like.dtype:
        _rows(like, tile, begun.origin).zero_()
        return like, begun.origin
    total = begun.scratch.get(name, (tile.stop - tile.start, *like.shape[1:]), dtype)
    return total.zero_(), tile.start


def _merge(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor, scratch: Scratch) -> None:
    """total <- the attention over both sets of keys, in place; all [N, H, T(, D)]."""
    if part.dtype != total.dtype:
        part = scratch.get("part", part.shape, total.dtype).copy_(part)
    lse = torch.logaddexp(total_lse, part_lse)
    # Shares of the difference add up to one; exp(lse of each - lse) would not where those are large.
    part_share = part_lse.sub_(total_lse).nan_to_num_(0.0, torch.inf, -torch.inf)  # nothing met nothing
    total_share = total_lse.copy_(part_share).neg_().sigmoid_()
    total.mul_(total_share[..., None]).addcmul_(part, part_share.sigmoid_()[..., None])
    total_lse.copy_(lse)


def backward_pass(
    grad: Tensor, saved: Sequence[Tensor], problem: Problem, *, wide_keys: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient of out and what forward saved: q, k, v, out and lse. They are computed
    without masks where those let something through. `wide_keys`: dk and dv of tiles in single precision."""
    if problem.documents is not None:
        return document_calls.backward(grad, saved, problem.documents, problem.shape, problem.scale)
    if problem.calls is not None:
        return whole_calls.backward(grad, saved, problem.calls, problem.shape, problem.scale, problem.covers)
    if problem.lists is not None:
        return list_calls.backward(grad, saved, problem.lists, problem.shape, problem.scale)
    gradients = _backward(grad, saved, problem, wide_keys)
    if not (problem.shape.causal or problem.hides) or _is_clean(*gradients):
        return gradients
    del gradients
    return _backward(grad, saved, problem, wide_keys, masks=False)


def _backward(
    grad: Tensor, saved: Sequence[Tensor], problem: Problem, wide_keys: bool, masks: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    if problem.whole and not problem.shape.widens and masks:  # which sums nothing
        heads_first = (x.transpose(1, 2) for x in (grad, q, k, v, out, lse))
        grads = kernels.backward(*heads_first, scale=problem.scale, causal=problem.shape.causal)
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, dk, dv
    reserve = problem.reserves.backward()
    shape = reserve.shape
    dq = (torch.empty if problem.covers else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    sums_dtype = kernels.lse_dtype(k.dtype) if wide_keys else k.dtype
    dk, dv = (torch.zeros(x.shape, dtype=sums_dtype, device=x.device) for x in (k, v))
    if wide_keys:
        reserve = reserve._replace(
            sizes={**reserve.sizes, "slab": reserve.sizes["slab"] * (sums_dtype.itemsize // k.element_size())}
        )
    # A CPU's fused backward gets single precision instead of 16 bits.
    wide = kernels.lse_dtype(q.dtype) if shape.widens else q.dtype
    if masks:
        begun = _begun(problem, reserve, wide, q.device)
    else:
        roomy = shape._replace(chunk=max(shape.chunk, VIEWS_AT_ONCE))
        begun = _Pass(problem, roomy, FreshScratch(q.device), wide, None, None)
    with begun.scratch as scratch:
        for b in range(q.shape[0]):
            sums = (dk[b], dv[b])
            in_full = sums_in_full(shape) and not wide_keys
            if in_full:
                size, dtype = dk.shape[1:], kernels.lse_dtype(dk.dtype)
                sums = (scratch.get("dk", size, dtype).zero_(), scratch.get("dv", size, dtype).zero_())
            item = _BackwardItem(grad[b], q[b], k[b], v[b], out[b], lse[b], dq[b], *sums)
            for tile in problem.tiles(b, shape):
                _backward_tile(tile if masks else maskless(tile, shape), item, begun)
            if in_full:
                dk[b].copy_(sums[0])
                dv[b].copy_(sums[1])
    return dq, dk, dv


def _backward_tile(tile: Tile, item: _BackwardItem, begun: _Pass) -> None:
    """Fills the item's dq for the tile's tokens and adds to dk and dv what those queries contribute."""
    k, v, dq, dk, dv = item.k, item.v, item.dq, item.dk, item.dv
    scratch, shape, wide = begun.scratch, begun.shape, begun.dtype
    total, origin = _accumulator("dq", tile, dq, begun)
    for call in tile.calls:
        by = cut_of(call, shape, begun.cuts)
        for begin, part in call.columns(by.width):
            keys = fetch(part, k, v, scratch, dtype=wide)
            sink: Sink
            if isinstance(part, Gather):
                sink = GatherSink(part, dk, dv, shape, scratch)
            else:
                sink = SpanSink(part, dk, dv, shape, scratch)
                if wide != k.dtype and part.overlaps:
                    wide_k = widened(part, k, wide, "wide k", scratch)
                    keys = Fetched(wide_k, widened(part, v, wide, "wide v", scratch), None)
            column = _Column(call, begin, keys, sink)
            for span in call.queries:
                _add_gradients(column, span, view(span, total, origin), item, begun)
            sink.finish()
            del column  # or its keys would outlive the next ones' being fetched
    if total is not dq:
        _rows(dq, tile, begun.origin).copy_(total)


def _add_gradients(column: _Column, span: Span, target: Tensor, item: _BackwardItem, begun: _Pass) -> None:
    """Adds the gradients of the queries `span` over a column of keys, dq to `target` [N, H, T, D] and dk and
    dv to the column's sink, by the fused backward in pieces: in single precision on a CPU, whose 16-bit
    backward takes many times its forward (docs/explanation/speed.md)."""
    call, begin, keys, sink = column
    scratch, wide, length = begun.scratch, begun.dtype, keys.k.shape[2]

    def in_wide(name: str, x: Tensor) -> Tensor:
        """Tokens before heads: the kernel would copy a gradient that lies otherwise."""
        if x.dtype == wide:
            return x
        n, h, t, d = x.shape
        return scratch.get(name, (n, t, h, d), wide).transpose(1, 2).copy_(x)

    lse_rows = rows(span, item.lse, begun.origin)
    mask = begun.bias(call, span, keys, begin)
    bias = mask.get("bias")
    if bias is not None:
        bias = bias.expand(*lse_rows.shape, length)
    by = cut_of(call, begun.shape, begun.cuts)
    width = length if call.mask == "causal" else by.keys  # that mask ties keys to queries
    for n in _slices(span.batch, by.views):
        sources = (("do", item.grad), ("q", item.q), ("out", item.out))
        args = [in_wide(name, view(span, x, begun.origin)[n]) for name, x in sources]
        for c in _slices(length, width):
            dq, dk, dv = kernels.backward(
                args[0],
                args[1],
                in_wide("wide k", keys.k[n, :, c]),
                in_wide("wide v", keys.v[n, :, c]),
                args[2],
                lse_rows[n],
                scale=begun.problem.scale,
                causal=mask.get("causal", False),
                bias=None if bias is None else bias[n, ..., c],
            )
            target[n].add_(dq)
            sink.add(Part(n, slice(None), c, dk, dv))
            del dq, dk, dv  # before the next piece's are made


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
