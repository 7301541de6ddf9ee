"""The exchange of heads: each rank gets some heads of the whole sequence, and its tokens of all heads
back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention.ops.backward import Gradients, final
from attention.out_of_memory import with_emergency_release
from attention.pool import Buffers
from attention.sharding.shards import Shards
from attention.sharding.transport import Transport


class HeadExchange(NamedTuple):
    """Between a rank's tokens of all heads, [B, own tokens, H, D], and its heads of all tokens,
    [B, seq, H / world, D]. Rank r has the r-th H / world heads."""

    transport: Transport
    shards: Shards
    buffers: Buffers
    """What is freed where memory runs out. All of a part is allocated before anything of it is sent."""

    def heads(self, rank: int, count: int) -> slice:
        """The heads of a rank, of so many in all."""
        share = count // self.transport.world
        return slice(rank * share, (rank + 1) * share)

    def to_heads(self, parts: Sequence[Tensor], step: str) -> list[Tensor]:
        """For each part a rank's heads of all tokens. Tokens of a rank lie together in memory, those of
        several batch items too, so that they are received where they stay. Parts are sent one after the
        other, so that no two are packed at a time."""
        return [self._retried(self._to_heads, part, step) for part in parts]

    def to_tokens(self, wholes: Sequence[Tensor], step: str) -> list[Tensor]:
        """`to_heads`, back."""
        return [self._retried(self._to_tokens, whole, step) for whole in wholes]

    def _retried(self, run: Callable[[Tensor, str], Tensor], x: Tensor, step: str) -> Tensor:
        return with_emergency_release(lambda: run(x, step), self.buffers, x.device)

    def _to_heads(self, x: Tensor, step: str) -> Tensor:
        transport, own = self.transport, self.shards.pieces(self.transport.rank)
        batch, _, heads, dim = x.shape
        whole = x.new_empty(int(self.shards.seq), batch, heads // transport.world, dim)
        sends, begin = [], 0
        for start, stop in own:
            piece = x[:, begin : begin + stop - start].transpose(0, 1)
            begin += stop - start
            whole[start:stop].copy_(piece[:, :, self.heads(transport.rank, heads)])
            sends += [(peer, piece[:, :, self.heads(peer, heads)].contiguous()) for peer in transport.peers]
        receives = [
            (peer, whole[start:stop]) for peer in transport.peers for start, stop in self.shards.pieces(peer)
        ]
        transport.exchange(sends, receives, step).wait()
        return whole.transpose(0, 1)

    def _to_tokens(self, whole: Tensor, step: str) -> Tensor:
        transport, own = self.transport, self.shards.pieces(self.transport.rank)
        batch, _, share, dim = whole.shape
        heads = share * transport.world
        part = whole.new_empty(batch, int(self.shards.tokens(transport.rank)), heads, dim)
        sends = [
            (peer, whole[:, start:stop].transpose(0, 1).contiguous())
            for peer in transport.peers
            for start, stop in self.shards.pieces(peer)
        ]
        receives, places, begin = [], [], 0
        for start, stop in own:
            piece = part[:, begin : begin + stop - start]
            begin += stop - start
            piece[:, :, self.heads(transport.rank, heads)].copy_(whole[:, start:stop])
            for peer in transport.peers:
                places.append(piece[:, :, self.heads(peer, heads)].transpose(0, 1))
                receives.append((peer, whole.new_empty(places[-1].shape)))
        transport.exchange(sends, receives, step).wait()
        for place, (_, x) in zip(places, receives, strict=True):
            place.copy_(x)
        return part


class ToHeads(torch.autograd.Function):
    """`HeadExchange.to_heads` of q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchange: HeadExchange) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange.to_heads((q, k, v), "exchanging heads of q, k and v"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        wanted = [grad for grad, need in zip(grads, ctx.needs_input_grad, strict=False) if need]
        with torch.no_grad():
            back = iter(ctx.exchange.to_tokens(wanted, "exchanging gradients of heads of q, k and v"))
        gradients = [next(back) if need else None for need in ctx.needs_input_grad[:3]]
        return final((*gradients, None), grads)


class ToTokens(torch.autograd.Function):
    """`HeadExchange.to_tokens` of out."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, exchange: HeadExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.to_tokens([out], "exchanging heads of the output")[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        with torch.no_grad():
            whole = ctx.exchange.to_heads([grad], "exchanging heads of the output's gradient")[0]
        return final((whole, None), [grad])
