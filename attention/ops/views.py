"""Spans and gathers applied to tensors [S, heads, D]: views where an affine view exists, copies
into lent buffers where not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attention.ops.program import Call, Gather
from attention.ops.scratch import Scratch
from attention.sizes.shape import Span


def view(span: Span, x: Tensor, origin: int = 0) -> Tensor:
    """[N, H, T, D] view of x [S, heads, D], whose first row is token `origin`."""
    token, head, channel = x.stride()
    return x.as_strided(
        (span.batch, span.heads, span.length, x.shape[2]),
        (span.batch_step * token + span.batch_head * head, span.head_step * head, span.step * token, channel),
        x.storage_offset() + (span.start - origin) * token + span.head * head,
    )


def rows(span: Span, x: Tensor, origin: int = 0) -> Tensor:
    """[N, H, T] view of x [S, heads], whose first row is token `origin`."""
    return view(span, x[..., None], origin)[..., 0]


class Fetched(NamedTuple):
    """Keys and values of a call, [N, H, K, D]. `hidden` [N, 1 or H, 1, K] is minus infinity where a
    gathered position lies past the end of the sequence, else 0; None where none does. Past the end keys
    and values are zero."""

    k: Tensor
    v: Tensor
    hidden: Tensor | None


class Listed(NamedTuple):
    """The copy that a gather makes: flat `rows` of k and v; and which positions are past the end, if any."""

    rows: Tensor
    hidden: npt.NDArray[np.bool_] | None


def listed(keys: Gather, k: Tensor) -> Listed:
    """The rows that a gather from k [S, heads, D] copies."""
    index, hidden = gather_index(keys, k.shape[0], k.shape[1])
    return Listed(torch.from_numpy(index).to(k.device, non_blocking=True), hidden)


def fetch(
    keys: Span | Gather,
    k: Tensor,
    v: Tensor,
    scratch: Scratch,
    listing: Listed | None = None,
    dtype: torch.dtype | None = None,
) -> Fetched:
    """The call's keys and values; good until the next gather is fetched into the same scratch. `listing`:
    what a gather lists, where that is known. `dtype`: of the mask, if not theirs."""
    if isinstance(keys, Span):
        return Fetched(view(keys, k), view(keys, v), None)
    wanted, hidden = listing or listed(keys, k)
    heads, dim = k.shape[1:]
    copies = []
    for name, x in (("k", k), ("v", v)):
        if keys.blocks.ndim == 2:
            copied = scratch.get(name, (wanted.numel(), heads, dim), x.dtype)
            torch.index_select(x, 0, wanted, out=copied)
            copies.append(copied.view(-1, keys.length, heads, dim).transpose(1, 2))
        else:
            copied = scratch.get(name, (wanted.numel(), dim), x.dtype)
            torch.index_select(x.view(-1, dim), 0, wanted, out=copied)
            copies.append(copied.view(-1, keys.heads, keys.length, dim))
    if hidden is None:
        return Fetched(copies[0], copies[1], None)
    bias = torch.zeros(hidden.shape, dtype=dtype or k.dtype, device=k.device)
    past = torch.from_numpy(hidden).to(k.device)
    bias.masked_fill_(past, -torch.inf)
    for x in copies:  # not what the last token holds: infinity is not hidden by adding to it
        x.masked_fill_(past[:, :, 0, :, None], 0.0)
    return Fetched(copies[0], copies[1], bias)


def gather_index(
    keys: Gather, seq: int, kv_heads: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_] | None]:
    """(rows to copy, flat; which positions are past the end, [N, 1 or H, 1, K], or None).

    Rows are tokens for shared lists, `token * kv_heads + kv head` for lists of each head. Positions
    past the end list the last token.
    """
    shared = keys.blocks.ndim == 2
    step = 1 if shared else kv_heads
    head = 0 if shared else (np.arange(keys.heads) * kv_heads // keys.heads)[:, None]
    # In one pass over the positions: blocks are few, and this is done anew for every call.
    first = keys.blocks * (keys.size * step) + head
    index = first[..., None] + np.arange(0, keys.size * step, step)
    index = index.reshape(*keys.blocks.shape[:-1], keys.length)
    hidden = None
    if (int(keys.blocks[..., -1].max()) + 1) * keys.size > seq:
        past = index >= seq * step
        hidden = past[:, None, None] if shared else past[:, :, None]
        index = np.minimum(index, (seq - 1) * step + head)
    return index.reshape(-1), hidden


def widened(keys: Span, x: Tensor, dtype: torch.dtype, name: str, scratch: Scratch) -> Tensor:
    """`view(keys, x)` in another dtype, its tokens copied once however many views share them."""
    copied = scratch.get(name, (keys.stop - keys.start, *x.shape[1:]), dtype)
    return view(keys, copied.copy_(x[keys.start : keys.stop]), keys.start)


def causal_mask(queries: int, keys: int, band: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[queries, keys]: added to scores, query t sees keys up to the last `queries` and t of those; those of a
    `band` are from t on. All `diagonal` masks of a program are views of one, and all `band` masks."""
    full = torch.full((queries, keys), -torch.inf, dtype=dtype, device=device)
    if not band:
        return full.triu_(keys - queries + 1)
    for t in range(queries):
        full[t, t : t + keys - queries + 1] = 0
    return full


def mask_bias(call: Call, span: Span, keys: Fetched, mask: Tensor | None, begin: int = 0) -> Tensor | None:
    """The additive mask of a `diagonal`, `band` or `tail` call from its key `begin` on, broadcastable to
    [N, H, T, K]; None where nothing is hidden. `mask`: the program's `causal_mask`."""
    if call.mask == "band":
        assert mask is not None
        first = call.column + begin
        return mask[: span.length, first : first + keys.k.shape[2]]
    count, edge = keys.k.shape[2], call.edge - begin
    if call.mask == "tail":
        if keys.hidden is None:
            return None
        return keys.hidden.expand(*keys.hidden.shape[:2], span.length, count)
    if edge >= count - 1:
        return None
    assert mask is not None
    first = mask.shape[1] - mask.shape[0] - edge
    return mask[: span.length, first : first + count]
