"""Backward as batched matrix products, for 16-bit types on the CPU.

The fused CPU backward multiplies 16-bit matrices 5 to 11 times slower than its forward does (see
docs/speed.md); batched products are near the machine's peak. With S = q k^T scale and the lse of the
whole row, P = exp(S - lse), dS = P (do v^T - delta), where delta = rowsum(do out). Subtracting lse and
delta after rounding S to 16 bits would lose them, so they ride inside the products: q gets the
columns (lse in three 16-bit pieces, 1), k the columns (-1, -1, -1, bias), and the sum is rounded once.
Only the power of two in `scale` rides in q, where it rounds nothing; the rest multiplies the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from attention.ops.scratch import Scratch
from attention.ops.sinks import Part

PIECES = 3
"""16-bit pieces that a float32 splits into without loss that matters (3 x 8 bits for bfloat16)."""
EXTRA = 8
"""Columns added to q, k, v and do: the pieces, the bias, and zeros that keep rows aligned."""
HIDDEN = -3e4
"""Bias that hides a key: exp gives zero, and float16 can hold it."""
QUERIES, KEYS = 1024, 576
"""Largest tile of scores of one head: what stays in cache pays."""
TILE_BYTES = 4 << 20
"""Bytes of scores that are worked on together."""


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, *,
    scale: float, diagonal: int | None, bias: Tensor | None, unit: int, dq: Tensor, scratch: Scratch,
) -> Iterator[Part]:  # fmt: skip
    """Adds to `dq` (float32, [N, H, T, D], any strides) and yields dk and dv part by part.

    `diagonal`: query t sees keys 0..t + diagonal; None for all. `bias`: float32 [N, H, 1, K] or
    broadcastable, 0 or HIDDEN. Parts begin at multiples of `unit` keys.
    """
    views, heads, queries, dim = q.shape
    keys = k.shape[2]
    tall, wide = min(queries, QUERIES), min(keys, max(KEYS // unit, 1) * unit)
    together = max(TILE_BYTES // (2 * q.element_size() * tall * wide), 1)
    power = 2.0 ** round(math.log2(scale))
    rest = scale / power
    # Half way between weights near 1 and weights near 1 / keys: neither rounds badly.
    shift = 0.5 * math.log(keys)
    back = math.exp(-shift)
    if bias is not None:
        bias = bias.expand(views, heads, 1, keys)
    for n in _slices(views, max(together // heads, 1)):
        for h in _slices(heads, min(together, heads)):
            rows = [
                (
                    t,
                    _with_pieces(
                        q[n, h, t], (lse[n, h, t] - shift) / rest, power, f"left {t.start}", scratch
                    ),
                    _with_pieces(grad[n, h, t], delta[n, h, t], 1.0, f"grads {t.start}", scratch),
                )
                for t in _slices(queries, tall)
            ]
            for c in _slices(keys, wide):
                right = _with_ones(k[n, h, c], None if bias is None else bias[n, h, :, c], "right", scratch)
                values = _with_ones(v[n, h, c], None, "values", scratch)
                parts = []
                for t, left, grads in rows:
                    edge = None if diagonal is None else diagonal + t.start - c.start
                    if edge is not None and edge + t.stop - t.start <= 0:
                        continue  # every key of this tile lies in the future of every query
                    dq_part, dk, dv = _tile(left, grads, right, values, edge, dim, rest, back, scratch)
                    target = dq[n, h, t]
                    target.add_(dq_part.view(target.shape), alpha=scale * back)
                    parts.append((dk, dv))
                if parts:
                    shape = k[n, h, c].shape
                    yield Part(n, h, c, *(_total(part).view(shape) for part in zip(*parts, strict=True)))


def _total(parts: tuple[Tensor, ...]) -> Tensor:
    """Sum of 16-bit tensors, in single precision where there is more than one."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return total


def _tile(
    left: Tensor,
    grads: Tensor,
    right: Tensor,
    values: Tensor,
    edge: int | None,
    dim: int,
    rest: float,
    back: float,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq / (scale back), dk, dv) of one tile of scores, [N H, T or K, D], from widened q, do, k and v."""
    size = (left.shape[0], left.shape[1], right.shape[1])
    weights = scratch.get("weights", size, left.dtype)
    torch.baddbmm(weights, left, right.transpose(1, 2), beta=0, alpha=rest, out=weights).exp_()
    if edge is not None and edge < right.shape[1] - 1:
        weights.tril_(edge)
    dv = torch.baddbmm(weights.new_empty(()), weights.transpose(1, 2), grads[..., :dim], beta=0, alpha=back)
    scores = torch.bmm(grads, values.transpose(1, 2), out=scratch.get("scores", size, left.dtype))
    scores.mul_(weights)
    dq = torch.bmm(scores, right[..., :dim])
    turned = scores.transpose(1, 2)
    dk = torch.baddbmm(dq.new_empty(()), turned, left[..., :dim], beta=0, alpha=rest * back)
    return dq, dk, dv


def _with_pieces(x: Tensor, column: Tensor, scale: float, name: str, scratch: Scratch) -> Tensor:
    """[N H, T, D + EXTRA]: x scale, then `column` (float32 [N, H, T]) in pieces, then a one."""
    n, h, t, d = x.shape
    wide = scratch.get(name, (n, h, t, d + EXTRA), x.dtype)
    torch.mul(x, scale, out=wide[..., :d])
    rest = column
    for piece in range(PIECES):
        wide[..., d + piece] = rest
        rest = rest - wide[..., d + piece]
    wide[..., d + PIECES] = 1
    wide[..., d + PIECES + 1 :] = 0
    return wide.view(n * h, t, d + EXTRA)


def _with_ones(x: Tensor, hide: Tensor | None, name: str, scratch: Scratch) -> Tensor:
    """[N H, K, D + EXTRA]: x, then -1 against each piece, then the bias against the one."""
    n, h, t, d = x.shape
    wide = scratch.get(name, (n, h, t, d + EXTRA), x.dtype)
    wide[..., :d] = x
    wide[..., d : d + PIECES] = -1
    wide[..., d + PIECES :] = 0
    if hide is not None:
        wide[..., d + PIECES] = hide[:, :, 0]
    return wide.view(n * h, t, d + EXTRA)


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
