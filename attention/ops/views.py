"""Spans and gathers applied to tensors [S, heads, D]: views where an affine view exists, copies
into lent buffers where not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attention.cache import BoundedCache
from attention.ops.program import Call, Gather, Span
from attention.ops.scratch import Scratch


def view(span: Span, x: Tensor, origin: int = 0) -> Tensor:
    """[N, H, T, D] view of x [S, heads, D], whose first row is token `origin`."""
    token, head, channel = x.stride()
    return x.as_strided(
        (span.batch, span.heads, span.length, x.shape[2]),
        (span.batch_step * token, span.head_step * head, span.step * token, channel),
        x.storage_offset() + (span.start - origin) * token + span.head * head,
    )


def rows(span: Span, x: Tensor) -> Tensor:
    """[N, H, T] view of x [S, heads]."""
    return view(span, x[..., None])[..., 0]


@dataclass(frozen=True, slots=True)
class Fetched:
    """Keys and values of a call, [N, H, K, D]. `hidden` [N, 1 or H, 1, K] is 1 where a gathered
    position lies past the end of the sequence; None where none does."""

    k: Tensor
    v: Tensor
    hidden: Tensor | None


def fetch(keys: Span | Gather, k: Tensor, v: Tensor, scratch: Scratch) -> Fetched:
    """The call's keys and values; good until the next gather is fetched into the same scratch."""
    if isinstance(keys, Span):
        return Fetched(view(keys, k), view(keys, v), None)
    seq, heads, dim = k.shape
    index, hidden = gather_index(keys, seq, heads)
    wanted = torch.from_numpy(index).to(k.device, non_blocking=True)
    found = []
    for name, x in (("k", k), ("v", v)):
        if keys.blocks.ndim == 2:
            copied = scratch.get(name, (index.size, heads, dim), x.dtype)
            torch.index_select(x, 0, wanted, out=copied)
            found.append(copied.view(-1, keys.length, heads, dim).transpose(1, 2))
        else:
            copied = scratch.get(name, (index.size, dim), x.dtype)
            torch.index_select(x.view(seq * heads, dim), 0, wanted, out=copied)
            found.append(copied.view(-1, keys.heads, keys.length, dim))
    mask = None if hidden is None else torch.from_numpy(hidden).to(k.device, torch.float32)
    return Fetched(found[0], found[1], mask)


def gather_index(
    keys: Gather, seq: int, kv_heads: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_] | None]:
    """(rows to copy, flat; which positions are past the end, [N, 1 or H, 1, K], or None).

    Rows are tokens for shared lists, `token * kv_heads + kv head` for lists of each head. Positions
    past the end copy the last token and are hidden by the mask.
    """
    tokens = keys.blocks[..., None] * keys.size + np.arange(keys.size)
    tokens = tokens.reshape(*keys.blocks.shape[:-1], keys.length)
    shared = tokens.ndim == 2
    hidden = None
    if (int(keys.blocks[..., -1].max()) + 1) * keys.size > seq:
        hidden = (tokens >= seq)[:, None, None] if shared else (tokens >= seq)[:, :, None]
        tokens = np.minimum(tokens, seq - 1)
    if not shared:
        tokens = tokens * kv_heads + (np.arange(keys.heads) * kv_heads // keys.heads)[None, :, None]
    return tokens.reshape(-1), hidden


def widened(keys: Span, x: Tensor, dtype: torch.dtype, name: str, scratch: Scratch) -> Tensor:
    """`view(keys, x)` in another dtype, its tokens copied once however many views share them."""
    copied = scratch.get(name, (keys.stop - keys.start, *x.shape[1:]), dtype)
    return view(keys, copied.copy_(x[keys.start : keys.stop]), keys.start)


def mask_bias(
    call: Call,
    span: Span,
    keys: Fetched,
    q: Tensor,
    masks: BoundedCache[tuple[object, ...], Tensor],
    begin: int = 0,
) -> Tensor | None:
    """The additive mask of a `diagonal` or `tail` call from its key `begin` on, broadcastable to
    [N, H, T, K]; None where nothing is hidden."""
    count, edge = keys.k.shape[2], call.edge - begin
    if call.mask == "tail":
        if keys.hidden is None:
            return None
        bias = torch.zeros_like(keys.hidden, dtype=q.dtype).masked_fill_(keys.hidden > 0, -torch.inf)
        return bias.expand(*keys.hidden.shape[:2], span.length, count)
    if edge >= count - 1:
        return None

    def build() -> Tensor:
        full = torch.full((span.length, count), -torch.inf, dtype=q.dtype, device=q.device)
        return full.triu_(edge + 1)

    return masks.get((span.length, count, edge, q.dtype, q.device), build)
