"""Where the gradients of a call's keys and values go. Views of one call may share keys, so their
parts are added up in single precision before they are rounded into dk and dv, and always in the
same order."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
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
        overlap = span.batch > 1 and span.batch_step <= (span.length - 1) * span.step
        self.origin, self.targets = 0, (dk, dv)
        if wide != dk.dtype and overlap:
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
    place in single precision, [U, G, size, D]; a block may be in the lists of several views and heads."""

    def __init__(self, keys: Gather, dk: Tensor, dv: Tensor, scratch: Scratch) -> None:
        self.keys, self.dk, self.dv = keys, dk, dv
        self.unique, inverse = np.unique(keys.blocks, return_inverse=True)
        kv_heads = dk.shape[1]
        places = inverse.reshape(keys.blocks.shape)
        if places.ndim == 2:  # [N, A] -> [N, G, A]
            places = places[:, None] * kv_heads + np.arange(kv_heads)[None, :, None]
            self.repeat = 1
        else:  # [N, H, A]
            self.repeat = keys.heads // kv_heads
            places = places * kv_heads + (np.arange(keys.heads) // self.repeat)[None, :, None]
        self.places = torch.from_numpy(places).to(dk.device)
        size = (len(self.unique) * kv_heads, keys.size, dk.shape[2])
        self.targets = _zeros(size, lse_dtype(dk.dtype), scratch)

    def add(self, part: Part) -> None:
        first, last = (edge // self.keys.size for edge in part.k.indices(self.keys.keys)[:2])
        places = self.places[part.n, part.h, first:last]
        for target, grad in zip(self.targets, (part.dk, part.dv), strict=True):
            blocks = grad.view(*grad.shape[:2], last - first, self.keys.size, -1)
            for index, source in self._unique_groups(places, blocks):
                target.index_add_(0, index.flatten(), source.flatten(0, 2).to(target.dtype))

    def _unique_groups(self, places: Tensor, blocks: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Groups to add one after another. The CPU adds in order; elsewhere every group has distinct
        places, so that no two additions race and the result is the same each time."""
        if places.device.type == "cpu":
            return [(places, blocks)]
        return [
            (places[n : n + 1, head :: self.repeat], blocks[n : n + 1, head :: self.repeat])
            for n in range(places.shape[0])
            for head in range(self.repeat)
        ]

    def finish(self) -> None:
        seq, kv_heads, dim = self.dk.shape
        full = seq // self.keys.size
        inside = int((self.unique < full).sum())
        for final, target in zip((self.dk, self.dv), self.targets, strict=True):
            blocks = target.view(-1, kv_heads, self.keys.size, dim).transpose(1, 2)
            whole = final[: full * self.keys.size].view(full, self.keys.size, kv_heads, dim)
            _add_rows(whole, self.unique[:inside], blocks)
            if inside < len(self.unique):
                final[full * self.keys.size :].add_(blocks[-1, : seq - full * self.keys.size])


def _zeros(size: tuple[int, ...], dtype: torch.dtype, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Zeros for dk and for dv; one call's sink is done before the next one's begins."""
    return scratch.get("dk", size, dtype).zero_(), scratch.get("dv", size, dtype).zero_()


def _add_rows(target: Tensor, rows: npt.NDArray[np.int64], source: Tensor) -> None:
    """target[rows[i]] += source[i], for distinct rows."""
    if target.device.type == "cpu":  # index_add_ takes milliseconds a row for mixed types or strided rows
        for row, addend in zip(rows.tolist(), source.unbind(), strict=False):
            target[row].add_(addend)
    else:
        index = torch.from_numpy(rows).to(target.device)
        target.index_add_(0, index, source[: len(rows)].to(target.dtype))
