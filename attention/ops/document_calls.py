"""Runs an attention of documents as one call of flash attention, which takes sequences of different lengths
that lie one behind the other: those of all batch items."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from attention.documents import MOST_KEPT, Lengths
from attention.ops import kernels
from attention.sections import sections_of
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import WholeCall, backward_cut

LEAST_QUERIES = 2
"""Said of the longest sequence at least: of sequences of one query torch takes all to have one."""


class Documents(NamedTuple):
    """The documents of a batch, and the call that each of them is."""

    lengths: Lengths
    call: WholeCall
    """Over all tokens; see `attention.sizes.whole_calls.document_call`."""

    def sequences(self, shape: Shape, device: torch.device) -> kernels.Sequences:
        return _sequences(self.lengths, int(shape.origin), device)


@lru_cache(maxsize=MOST_KEPT)
def _sequences(lengths: Lengths, origin: int, device: torch.device) -> kernels.Sequences:
    """Where the documents' queries and keys begin. Layers ask for the same: the host waits for the device
    once."""
    keys = [length for item in lengths for length in item]
    queries = []
    for item in lengths:
        asking = [section.stop - section.start for section in sections_of(item, origin)]
        queries += [0] * (len(item) - len(asking)) + asking
    with torch.inference_mode(False):
        of_queries, of_keys = (
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device="cpu").to(device)
            for counts in (queries, keys)
        )
    return kernels.Sequences(of_queries, of_keys, max(LEAST_QUERIES, *queries), max(keys))


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, shape: Shape, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, Q, H, D], lse [B, Q, H])."""
    call, sequences = documents.call, documents.sequences(shape, q.device)
    out, lse = kernels.ragged(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        sequences,
        scale=scale,
        left=call.left,
        right=call.right,
    )
    items = q.shape[:2]
    return out.unflatten(0, items), lse.t().unflatten(0, items)


def backward(
    grad: Tensor, saved: Sequence[Tensor], documents: Documents, shape: Shape, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from the gradient of out and what forward saved: q, k, v, out and lse."""
    q, k, v, out, lse = saved
    call, sequences = documents.call, documents.sequences(shape, q.device)
    flat_grad, flat_q, flat_k, flat_v, flat_out = (x.flatten(0, 1) for x in (grad, q, k, v, out))
    flat_lse = lse.flatten(0, 1).t()

    def gradients(of_keys: slice, heads: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of some kv heads and the query heads that read them."""
        return kernels.ragged_backward(
            flat_grad[:, heads],
            flat_q[:, heads],
            flat_k[:, of_keys],
            flat_v[:, of_keys],
            flat_out[:, heads],
            flat_lse[heads].contiguous(),
            sequences,
            scale=scale,
            left=call.left,
            right=call.right,
        )

    some = backward_cut(call, shape).kv_heads
    if some >= shape.kv_heads:
        parts = zip(gradients(slice(None), slice(None)), (q, k, v), strict=True)
        dq, dk, dv = (part.unflatten(0, x.shape[:2]) for part, x in parts)
        return dq, dk, dv
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    repeat = shape.heads // shape.kv_heads
    for first in range(0, shape.kv_heads, some):
        of_keys = slice(first, min(first + some, shape.kv_heads))
        heads = slice(of_keys.start * repeat, of_keys.stop * repeat)
        part_dq, part_dk, part_dv = gradients(of_keys, heads)
        dq.flatten(0, 1)[:, heads].copy_(part_dq)
        dk.flatten(0, 1)[:, of_keys].copy_(part_dk)
        dv.flatten(0, 1)[:, of_keys].copy_(part_dv)
        del part_dq, part_dk, part_dv  # before the next ones are made
    return dq, dk, dv
