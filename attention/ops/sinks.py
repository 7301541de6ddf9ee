"""Where the gradients of a call's keys and values go. Views of one call may share keys, so their
parts are added up in single precision before they are rounded into dk and dv, and always in the
same order."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from attention.ops.kernels import lse_dtype
from attention.ops.program import Gather, Span
from attention.ops.scratch import Scratch
from attention.ops.views import view


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

    def __init__(self, span: Span, dk: Tensor, dv: Tensor, scratch: Scratch) -> None:
        self.span, self.dk, self.dv = span, dk, dv
        wide = lse_dtype(dk.dtype)
        self.origin, self.targets = 0, (dk, dv)
        if wide != dk.dtype and span.overlaps:
            self.origin = span.start
            tokens = span.stop - span.start
            self.targets = _zeros((tokens, *dk.shape[1:]), wide, scratch)

    def add(self, part: Part) -> None:
        views = range(self.span.batch)[part.n]
        span = self.span.cut(*part.k.indices(self.span.length)[:2]).pick(views.start, views.stop)
        for places, group in span.disjoint():
            for target, grad in zip(self.targets, (part.dk, part.dv), strict=True):
                view(group, target, self.origin)[:, part.h].add_(grad[places])

    def finish(self) -> None:
        if self.targets[0] is self.dk:
            return
        for final, target in zip((self.dk, self.dv), self.targets, strict=True):
            final[self.origin : self.origin + target.shape[0]].add_(target)


class GatherSink:
    """Adds parts of gathered blocks into dk and dv [S, G, D]. Each distinct block of the call has a
    place in single precision: of all heads [U, size, G, D], or, where heads have lists of their own, for
    each kv head that lists it [U, size, 1, D]. A block may be in the lists of several views and heads."""

    def __init__(self, keys: Gather, dk: Tensor, dv: Tensor, scratch: Scratch) -> None:
        self.keys, self.dk, self.dv = keys, dk, dv
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
            blocks = grad.transpose(1, 2).unflatten(1, (last - first, size))  # [n, a, size, h, D]
            if self.shared:
                target, places = target[:, :, part.h], self.places[part.n, first:last]
                for index, source in self._apart(places, blocks):
                    target.index_add_(0, index.flatten(), source.flatten(0, 1).to(target.dtype))
                continue
            places = self.places[part.n, part.h, first:last]
            blocks = blocks.permute(0, 3, 1, 2, 4)  # [n, h, a, size, D]
            for index, source in self._apart(places, blocks):
                target[:, :, 0].index_add_(0, index.flatten(), source.flatten(0, 2).to(target.dtype))

    def _apart(self, places: Tensor, blocks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Groups to add one after another. The CPU adds in order; elsewhere every group has distinct
        places, so that no two additions race and the result is the same each time."""
        if places.device.type == "cpu":
            return [(places, blocks)]
        views = [(places[n : n + 1], blocks[n : n + 1]) for n in range(places.shape[0])]
        if self.shared:
            return views
        return [
            (p[:, r :: self.repeat], b[:, r :: self.repeat]) for p, b in views for r in range(self.repeat)
        ]

    def finish(self) -> None:
        seq = self.dk.shape[0]
        tokens = (self.unique // self.lanes * self.keys.size)[:, None] + np.arange(self.keys.size)
        wanted = (tokens * self.lanes + (self.unique % self.lanes)[:, None]).ravel()
        inside = tokens.ravel() < seq
        index = torch.from_numpy(wanted[inside]).to(self.dk.device)
        for final, target in zip((self.dk, self.dv), self.targets, strict=True):
            rows = final.view(seq * self.lanes, -1)  # token, or token and kv head
            sums = target.view(inside.size, rows.shape[1])
            if not inside.all():
                sums = sums[torch.from_numpy(inside).to(sums.device)]
            sums += rows.index_select(0, index)
            rows.index_copy_(0, index, sums.to(rows.dtype))


def _zeros(size: tuple[int, ...], dtype: torch.dtype, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Zeros for dk and for dv; one call's sink is done before the next one's begins."""
    return scratch.get("dk", size, dtype).zero_(), scratch.get("dv", size, dtype).zero_()
