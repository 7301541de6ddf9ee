"""The exchange of heads: each rank gets some heads of the whole sequence, and its tokens of all heads
back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention.ops.backward import Gradients, final
from attention.out_of_memory import with_emergency_release
from attention.pool import Buffers
from attention.sharding.shards import Shards
from attention.sharding.transport import Message, Transport


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
        """For each part a rank's heads of all tokens. Batch items are messages of their own, which are
        received where they stay. Parts are sent one after the other, so that no two are packed at a time."""
        return [self._retried(self._to_heads, part, step) for part in parts]

    def to_tokens(self, wholes: Sequence[Tensor], step: str) -> list[Tensor]:
        """`to_heads`, back."""
        return [self._retried(self._to_tokens, whole, step) for whole in wholes]

    def _retried(self, run: Callable[[Tensor, str], Tensor], x: Tensor, step: str) -> Tensor:
        return with_emergency_release(lambda: run(x, step), self.buffers, x.device)

    def _to_heads(self, x: Tensor, step: str) -> Tensor:
        transport = self.transport
        batch, _, heads, dim = x.shape
        whole = x.new_empty(batch, int(self.shards.seq), heads // transport.world, dim)
        sends: list[Message] = []
        for (start, stop), piece in self._pieces(x):
            whole[:, start:stop].copy_(piece[:, :, self.heads(transport.rank, heads)])
            for peer in transport.peers:
                sends += [(peer, item) for item in piece[:, :, self.heads(peer, heads)].contiguous()]
        receives = [(peer, item) for peer, tokens in self._peers_tokens() for item in whole[:, tokens]]
        transport.exchange(sends, receives, step).wait()
        return whole

    def _to_tokens(self, whole: Tensor, step: str) -> Tensor:
        transport = self.transport
        batch, _, share, dim = whole.shape
        heads = share * transport.world
        part = whole.new_empty(batch, int(self.shards.tokens(transport.rank)), heads, dim)
        whole = whole.contiguous()
        sends = [(peer, item) for peer, tokens in self._peers_tokens() for item in whole[:, tokens]]
        receives: list[Message] = []
        arriving: list[tuple[Tensor, Tensor]] = []
        for (start, stop), piece in self._pieces(part):
            piece[:, :, self.heads(transport.rank, heads)].copy_(whole[:, start:stop])
            for peer in transport.peers:
                place = piece[:, :, self.heads(peer, heads)]
                arriving.append((place, whole.new_empty(place.shape)))
                receives += [(peer, item) for item in arriving[-1][1]]
        transport.exchange(sends, receives, step).wait()
        for place, x in arriving:
            place.copy_(x)
        return part

    def _pieces(self, x: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """The (begin, end) of own pieces in the sequence, and what of x [B, own tokens, ...] they are."""
        begin = 0
        for start, stop in self.shards.pieces(self.transport.rank):
            yield (start, stop), x[:, begin : begin + stop - start]
            begin += stop - start

    def _peers_tokens(self) -> Iterator[tuple[int, slice]]:
        """Of each peer the tokens of its pieces."""
        for peer in self.transport.peers:
            yield from ((peer, slice(*piece)) for piece in self.shards.pieces(peer))


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
