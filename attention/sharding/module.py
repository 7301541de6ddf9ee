"""The attention of one rank, whose tokens are some of a sequence that the ranks of its ring share."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attention.adaptive import AdaptiveAttention
from attention.config import AttentionConfig, ShardingConfig
from attention.decided import MOST
from attention.documents import Lengths, document_lengths
from attention.errors import AttentionPlannerError, InputError, UnavailableError
from attention.features import NAMES
from attention.inputs import check, refuse_unknown, shape_of
from attention.module import Attention, eager, kept_layout
from attention.ops import cudnn, flex, kernels
from attention.pool import buffers_for
from attention.programs import tiles_of
from attention.sharding.agreement import PASSES, agree, check_tokens, number_of, refuse, terms_of_call
from attention.sharding.heads import HeadExchange, ToHeads, ToTokens
from attention.sharding.keys import KeysProblem, keys_attention, keys_problem
from attention.sharding.plan import keys_plan
from attention.sharding.shards import Shards, shards_of
from attention.sharding.traffic import Traffic, fewer_bytes, traffic
from attention.sharding.transport import Transport
from attention.sizes.kernel_choice import KernelChoice

WEIGHTS = ("query_weight", "key_weight")
"""The parameters of an adaptive attention, [H, D, E]."""


class ShardedAttention(nn.Module):
    """`module(q, k, v, is_causal=False, documents=None, sinks=None)` on every rank of a ring, each with its
    own tokens: q [batch, own tokens, heads, head_dim], k and v with kv_heads; out is like q.

    It computes what `Attention` computes of the whole sequence. Which tokens are a rank's, `shard`, `gather`
    and `positions` say; a rank may have none, and takes part all the same. `documents` [batch, seq] are those
    of the whole sequence, on every rank, and `sinks` [heads] those of all heads. Parameters, sinks among
    them, are equal on all ranks; their gradient is the sum over the ring of what each rank gets.

    All ranks call it, and all run its backward pass: an output that is in no loss, on one rank, is a
    DistributedError on the others after `timeout_s`. What one rank refuses all refuse, before anything is
    exchanged. After a DistributedError the ring is closed.
    """

    shares = True

    def __init__(self, config: AttentionConfig, transport: Transport) -> None:
        super().__init__()
        self.config, self.transport = config, transport
        self.scratch = buffers_for(config)
        if config.adaptive:
            twin = AdaptiveAttention(config)
            self.query_weight, self.key_weight = twin.query_weight, twin.key_weight
        self._parts: dict[tuple[int, int], Attention] = {}
        self._problems: dict[Hashable, KeysProblem] = {}
        kernels.steady_heap()

    def extra_repr(self) -> str:
        return self.config.to_json()

    @property
    def sharding(self) -> ShardingConfig:
        return self.config.sharding or ShardingConfig()

    @eager
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        return_attention_weights: bool = False,
        documents: Tensor | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        transport = self.transport
        try:
            refuse_unknown(others)
            lengths = self._checked(q, k, v, is_causal, return_attention_weights, documents, sinks)
        except (AttentionPlannerError, TypeError) as error:
            self.refuse(error)
        scorer = self.query_weight if self.config.adaptive else None
        terms = terms_of_call(self.config, q, k, v, is_causal, lengths, sinks, scorer)
        shards = self._dealt(agree(transport, {**terms, "number of the call": transport.calls}, q.shape[1]))
        if lengths is not None and sum(lengths[0]) != shards.seq:
            raise InputError(
                f"documents must be those of the whole sequence, {[q.shape[0], shards.seq]} on every rank, "
                f"got {[len(lengths), sum(lengths[0])]}"
            )
        exchange = self._exchange(q, k, shards, is_causal)
        transport.calls += 1
        begin = partial(_begin_backward, transport, transport.calls)
        with transport.whole("the forward pass"):
            transport.warm_up(q.device)
            if exchange == "keys":
                packing = lengths if lengths and any(len(item) > 1 for item in lengths) else None
                out = self._by_keys(q, k, v, shards, is_causal, packing, sinks)
            else:
                out = self._by_heads(q, k, v, shards, is_causal, documents, sinks)
        result: Tensor = BeforeBackward.apply(out, begin)  # type: ignore[no-untyped-call]
        return result

    def refuse(self, error: Exception) -> NoReturn:
        """Raises the error of this rank's call, and lets the other ranks know, who refuse theirs."""
        refuse(self.transport, error)

    def kernels(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> KernelChoice:
        """Which kernel a call over these tensors runs on, if they are whole; see `Attention.kernels`."""
        return self._part(slice(0, q.shape[2]), q.shape[2]).kernels(q, k, v, is_causal)

    def traffic(self, q: Tensor, k: Tensor, is_causal: bool = False) -> Traffic:
        """What this rank and its peers send each other in a call over own tokens such as these, which may be
        on the meta device, and in its backward pass. All ranks call it, since each knows its tokens alone."""
        try:
            if q.dim() != 4 or k.dim() != 4:
                shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
                raise InputError(f"q and k must be [batch, own tokens, heads, head_dim], got {shapes}")
            if self._by_heads_alone:
                self._check_heads(q.shape[2], k.shape[2])
        except InputError as error:
            self.refuse(error)
        shape = number_of(f"{q.dtype} {q.shape[0]} {tuple(q.shape[2:])} {tuple(k.shape[2:])} {is_causal}")
        terms = {"pass": PASSES.index("traffic"), "dtype and shape beside the tokens": shape}
        shards = self._dealt(agree(self.transport, terms, q.shape[1]))
        return traffic(
            self.config,
            shards,
            self.transport.rank,
            is_causal,
            batch=q.shape[0],
            heads=q.shape[2],
            kv_heads=k.shape[2],
            head_dim=q.shape[3],
            itemsize=q.element_size(),
            training=True,
            exchange=self._exchange(q, k, shards, is_causal),
        )

    def shard(self, x: Tensor) -> Tensor:
        """This rank's tokens of x [batch, seq, ...], a copy."""
        _refuse_flat(x, "shard")
        pieces = self._shards(x.shape[1]).pieces(self.transport.rank)
        return torch.cat([x[:, :0], *(x[:, begin:end] for begin, end in pieces)], 1)

    @torch.no_grad()
    def gather(self, x: Tensor) -> Tensor:
        """The whole [batch, seq, ...] of x [batch, own tokens, ...], on every rank; all ranks call it. It
        carries no gradient."""
        transport = self.transport
        try:
            _refuse_flat(x, "gather")
            if why := transport.unfit(x.device):
                raise InputError(why)
        except InputError as error:
            self.refuse(error)
        shape = number_of(f"{x.dtype} {x.device.type} {x.shape[0]} {tuple(x.shape[2:])}")
        terms = {"pass": PASSES.index("gather"), "dtype and shape beside the tokens": shape}
        shards = self._dealt(agree(transport, terms, x.shape[1]))
        with transport.whole("gathering"):
            transport.warm_up(x.device)
            whole = x.new_empty(int(shards.seq), x.shape[0], *x.shape[2:])
            own = shards.pieces(transport.rank)
            parts = x.transpose(0, 1).contiguous().split([end - begin for begin, end in own])
            for (begin, end), part in zip(own, parts, strict=True):
                whole[begin:end].copy_(part)
            sends = [(peer, part) for peer in transport.peers for part in parts]
            receives = [
                (peer, whole[begin:end]) for peer in transport.peers for begin, end in shards.pieces(peer)
            ]
            transport.exchange(sends, receives, "gathering").wait()
        return whole.transpose(0, 1)

    def positions(self, seq: int) -> Tensor:
        """The places in a sequence of so many tokens that this rank's have: for rotary embeddings and the
        like."""
        return torch.from_numpy(self._shards(seq).positions(self.transport.rank))

    def _shards(self, seq: int) -> Shards:
        return shards_of(self.config, seq, self.transport.world)

    def _dealt(self, tokens: list[int]) -> Shards:
        """The shards of a sequence of which ranks hold so many tokens; InputError if they should not."""
        shards = self._shards(sum(tokens))
        check_tokens(tokens, [int(shards.tokens(rank)) for rank in range(shards.world)])
        return shards

    def _checked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool,
        return_attention_weights: bool,
        documents: Tensor | None,
        sinks: Tensor | None,
    ) -> Lengths | None:
        """Lengths of the documents; raises an error for what this rank cannot serve."""
        if return_attention_weights is not False:
            raise UnavailableError(
                f"{NAMES['weights']}: not taken by a sharded attention, of whose weights each rank would "
                "have some; ask for them on one device"
            )
        q1, k1, v1 = (_with_tokens(x) for x in (q, k, v))
        lengths, several = None, False
        if documents is not None and isinstance(k, Tensor) and k.dim() == 4:
            whole = isinstance(documents, Tensor) and documents.dim() == 2
            lengths = document_lengths(documents, k.shape[0], documents.shape[1] if whole else k.shape[1])
            several = any(len(item) > 1 for item in lengths)
        check(q1, k1, v1, self.config, is_causal, False, several, sinks)
        if q.shape[1] != k.shape[1]:
            raise UnavailableError(
                f"{NAMES['queries']}: not taken by a sharded attention, where a rank's queries and keys are "
                f"the same tokens; got {q.shape[1]} and {k.shape[1]}"
            )
        if why := self.transport.unfit(q.device):
            raise InputError(why)
        if self.config.backend == "flex":
            flex.resolve(self.config, q1, k1, is_causal)
        if self._by_heads_alone:
            self._check_heads(q.shape[2], k.shape[2])
        return lengths

    @property
    def _by_heads_alone(self) -> bool:
        """Whether keys cannot move, those of chosen blocks or to kernels of whole sequences, or shall not."""
        whole = self.config.variant == "adaptive" or self.config.backend not in ("auto", "sdpa")
        return whole or self.sharding.exchange == "heads"

    def _check_heads(self, heads: int, kv_heads: int) -> None:
        """Raises InputError unless the ranks can share heads."""
        world = self.transport.world
        if kv_heads % world == 0:
            return
        size = max(size for size in range(1, world + 1) if world % size == 0 and kv_heads % size == 0)
        instead = ", or exchange='keys'" if self.sharding.exchange == "heads" else ""
        raise InputError(
            f"an exchange of heads needs kv_heads that are a multiple of the ranks, got kv_heads={kv_heads} "
            f"(of {heads} heads) and {world} ranks; use ring_size={size}{instead}"
        )

    def _exchange(self, q: Tensor, k: Tensor, shards: Shards, is_causal: bool) -> Literal["keys", "heads"]:
        """What this call exchanges."""
        if self._by_heads_alone:
            return "heads"
        if self.sharding.exchange == "keys":
            return "keys"
        return fewer_bytes(
            self.config,
            shards,
            is_causal,
            heads=q.shape[2],
            kv_heads=k.shape[2],
            head_dim=q.shape[3],
            itemsize=q.element_size(),
        )

    def _by_keys(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shards: Shards,
        is_causal: bool,
        lengths: Lengths | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Each rank computes its tokens over its own keys and over those that it fetches."""
        config, transport = self.config, self.transport
        one, other = _with_tokens(q), _with_tokens(k)
        takes = kernels.cut_windows_of(one), cudnn.takes_from(one, other, is_causal, config.backend)
        size = (q.shape, k.shape, q.dtype, q.device, is_causal, lengths, shards, takes)
        problem = self._problems.get(size)
        if problem is None:
            shape = shape_of(one, other, config, is_causal)
            whole = shape._replace(seq=int(shards.seq), origin=0, causal=is_causal, windows=takes[0])
            layout = partial(kept_layout, config, self.scratch, whole)
            make = tiles_of(config, whole._replace(windows="none"), layout)
            plan = keys_plan(config, whole, shards, transport.rank, make, lengths)
            scale = config.scale or 1.0 / math.sqrt(q.shape[3])
            problem = keys_problem(plan, config, layout, scale, self.scratch)
            while len(self._problems) >= MOST:
                self._problems.pop(next(iter(self._problems)))
            self._problems[size] = problem
        return keys_attention(q, k, v, sinks, problem, transport)

    def _by_heads(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shards: Shards,
        is_causal: bool,
        documents: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Each rank computes some heads of the whole sequence, as one device would."""
        exchange = HeadExchange(self.transport, shards, self.scratch)
        own = exchange.heads(self.transport.rank, q.shape[2])
        part = self._part(own, q.shape[2])
        extras = {"documents": documents, "sinks": None if sinks is None else sinks[own]}
        weights = {name: getattr(self, name)[own] for name in WEIGHTS if self.config.adaptive}
        inputs = (*ToHeads.apply(q, k, v, exchange), is_causal)  # type: ignore[no-untyped-call]
        out = functional_call(part, weights, inputs, extras) if weights else part(*inputs, **extras)
        del inputs  # unless autograd saved them, before the output is exchanged
        result: Tensor = ToTokens.apply(out, exchange)  # type: ignore[no-untyped-call]
        return result

    def _part(self, own: slice, heads: int) -> Attention:
        """The attention of some of so many heads on one device, without parameters of its own."""
        key = (own.start, heads)
        if key not in self._parts:
            config = self.config.model_copy(update={"sharding": None, "multihead": None})
            if config.adaptive is None:
                self._parts[key] = Attention(config, own.start)
            else:
                share = config.adaptive.model_copy(update={"num_heads": own.stop - own.start})
                with torch.random.fork_rng(devices=()):
                    part = AdaptiveAttention(config.model_copy(update={"adaptive": share}))
                self._parts[key] = part.to("meta")  # its parameters are never read
        return self._parts[key]


class BeforeBackward(torch.autograd.Function):
    """A tensor as it is, before whose gradient is passed on something is called."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, begin: Callable[[], None]) -> Tensor:
        ctx.begin = begin
        # A checkpoint ends when the last tensor is saved that was: not before all is exchanged.
        ctx.save_for_backward(out.new_empty(0))
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.begin()
        return grad, None


def _begin_backward(transport: Transport, call: int) -> None:
    """Lets a backward pass begin if all ranks are in that of the same call."""
    agree(transport, {"pass": PASSES.index("backward"), "number of the call": call})


def _refuse_flat(x: Any, what: str) -> None:
    """Raises InputError unless x is [batch, tokens, ...]."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        shape = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{what} takes a tensor [batch, tokens, ...], got {shape}")


def _with_tokens(x: Any) -> Any:
    """The tensor; with one token if it has none, which a rank may have."""
    if isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == 0:
        return x.new_empty(x.shape[0], 1, *x.shape[2:])
    return x
