"""Where the gradients of a call's keys and values go. Views of one call may share keys, so their
parts are added up in single precision before they are rounded into dk and dv, and always in the
same order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from attention.ops.kernels import lse_dtype
from attention.ops.program import Gather
from attention.ops.scratch import Scratch
from attention.ops.views import view
from attention.sizes.shape import Shape, Span
from attention.sizes.tiles import slab_rows


class Part(NamedTuple):
    """Gradients for views n, heads h and keys k (slices) of a call: dk and dv, [n, h, k, D]."""

    n: slice
    h: slice
    k: slice
    dk: Tensor
    dv: Tensor


class Sink(Protocol):
    def add(self, part: Part) -> None: ...
    def finish(self) -> None: ...


class SpanSink:
    """Adds parts of spans into dk and dv [S, G, D], by way of single precision where views overlap."""

    def __init__(self, span: Span, dk: Tensor, dv: Tensor, shape: Shape, scratch: Scratch) -> None:
        self.span, self.dk, self.dv, self.shape, self.scratch = span, dk, dv, shape, scratch
        wide = lse_dtype(dk.dtype)
        self.origin, self.targets = 0, (dk, dv)
        if wide != dk.dtype and span.overlaps:
            self.origin = span.start
            self.targets = _zeros((span.stop - span.start, *dk.shape[1:]), wide, scratch)

    def add(self, part: Part) -> None:
        views = range(self.span.batch)[part.n]
        span = self.span.cut(*part.k.indices(self.span.length)[:2]).pick(views.start, views.stop)
        for places, group in span.disjoint():
            for target, grad in zip(self.targets, (part.dk, part.dv), strict=True):
                into, share = view(group, target, self.origin)[:, part.h], grad[places]
                if into.dtype != share.dtype and into.device.type == "cpu" and into.dtype.itemsize < 4:
                    # Torch's CPU operators would copy both operands to add them.
                    wide = self.scratch.get("share", share.shape, share.dtype)
                    into.copy_(share.add_(wide.copy_(into)))
                else:
                    into.add_(share)

    def finish(self) -> None:
        if self.targets[0] is self.dk:
            return
        for final, target in zip((self.dk, self.dv), self.targets, strict=True):
            rows = final[self.origin : self.origin + target.shape[0]]
            for part in _slabs(len(target), slab_rows(self.shape) // target.shape[1]):
                wide = self.scratch.get("wide slab", target[part].shape, target.dtype)
                rows[part].copy_(wide.copy_(rows[part]).add_(target[part]))


class GatherSink:
    """Adds parts of gathered blocks into dk and dv [S, G, D]. Each distinct block of the call has a
    place in single precision: of all heads [U, size, G, D], or, where heads have lists of their own, for
    each kv head that lists it [U, size, 1, D]. A block may be in the lists of several views and heads."""

    def __init__(self, keys: Gather, dk: Tensor, dv: Tensor, shape: Shape, scratch: Scratch) -> None:
        self.keys, self.dk, self.dv, self.shape, self.scratch = keys, dk, dv, shape, scratch
        kv_heads = dk.shape[1]
        self.shared = keys.blocks.ndim == 2
        # A lane is what a place holds of a block: all heads, or one of them.
        self.lanes, self.repeat = (1, 1) if self.shared else (kv_heads, keys.heads // kv_heads)
        wanted = keys.blocks * self.lanes
        if not self.shared:
            wanted = wanted + (np.arange(keys.heads) // self.repeat)[None, :, None]
        self.unique, places = np.unique(wanted, return_inverse=True)
        self.places = torch.from_numpy(places.reshape(wanted.shape)).to(dk.device)
        size = (len(self.unique), keys.size, kv_heads // self.lanes, dk.shape[2])
        self.targets = _zeros(size, lse_dtype(dk.dtype), scratch)

    def add(self, part: Part) -> None:
        size = self.keys.size
        first, last = (edge // size for edge in part.k.indices(self.keys.length)[:2])
        for target, grad in zip(self.targets, (part.dk, part.dv), strict=True):
            blocks = grad.unflatten(2, (last - first, size))  # [n, h, a, size, D]
            if self.shared:
                target = target[:, :, part.h]
                for places, source in zip(self.places[part.n, first:last], blocks, strict=True):
                    # The blocks of a row are distinct: no two additions meet.
                    target.index_add_(0, places, source.permute(1, 2, 0, 3).to(target.dtype))
                continue
            for places, source in self._apart(self.places[part.n, part.h, first:last], blocks):
                target[:, :, 0].index_add_(0, places.flatten(), source.flatten(0, 2).to(target.dtype))

    def _apart(self, places: Tensor, blocks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Groups to add one after another. On a CPU each is one list, which need not be copied to lie in one
        piece; elsewhere every group has distinct places, so that no two additions race and the result is
        the same each time."""
        if places.device.type == "cpu":
            lists = [(slice(n, n + 1), slice(h, h + 1)) for n, h in np.ndindex(*places.shape[:2])]
            return [(places[one], blocks[one]) for one in lists]
        views = [(places[n : n + 1], blocks[n : n + 1]) for n in range(places.shape[0])]
        return [
            (p[:, r :: self.repeat], b[:, r :: self.repeat]) for p, b in views for r in range(self.repeat)
        ]

    def finish(self) -> None:
        seq, device = self.dk.shape[0], self.dk.device
        tokens = (self.unique // self.lanes * self.keys.size)[:, None] + np.arange(self.keys.size)
        wanted = (tokens * self.lanes + (self.unique % self.lanes)[:, None]).ravel()
        # The last block may go beyond the end: its lanes are the last in order, their tails padding.
        inside = np.flatnonzero(tokens.ravel() < seq)
        whole = len(inside) == len(wanted)
        for final, target in zip((self.dk, self.dv), self.targets, strict=True):
            rows = final.view(seq * self.lanes, -1)  # token, or token and kv head
            sums = target.view(len(wanted), rows.shape[1])
            for part in _slabs(len(inside), slab_rows(self.shape) * self.lanes // self.dk.shape[1]):
                index = torch.from_numpy(wanted[inside[part]]).to(device)
                size = (len(index), rows.shape[1])
                current = torch.index_select(rows, 0, index, out=self.scratch.get("slab", size, rows.dtype))
                added = sums[part] if whole else sums[torch.from_numpy(inside[part]).to(device)]
                if current.dtype == added.dtype:
                    current += added
                else:
                    current.copy_(self.scratch.get("wide slab", size, added.dtype).copy_(current).add_(added))
                rows.index_copy_(0, index, current)


def _slabs(total: int, size: int) -> Iterator[slice]:
    """Slices that cover `total` rows, `size` at a time or fewer."""
    for begin in range(0, total, max(size, 1)):
        yield slice(begin, min(begin + max(size, 1), total))


def _zeros(size: tuple[int, ...], dtype: torch.dtype, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Zeros for dk and for dv; one call's sink is done before the next one's begins."""
    return (
        scratch.get("dk of a call", size, dtype).zero_(),
        scratch.get("dv of a call", size, dtype).zero_(),
    )
