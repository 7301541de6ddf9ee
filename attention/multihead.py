"""Multihead attention: projections around any attention of this library.

Stands where `torch.nn.MultiheadAttention(batch_first=True)` stands: the same parameter names, so that
its state dict loads, the same call, and (out, weights) as the result. Two differences: weights come
only when asked for, and as active blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention.config import AttentionConfig
from attention.documents import document_lengths
from attention.errors import AttentionPlannerError, InputError, OutOfMemoryError
from attention.features import Feature
from attention.inputs import check_features, refuse_transforms
from attention.module import eager
from attention.ops.backward import Gradients, once
from attention.ops.weights import AttentionWeights
from attention.out_of_memory import with_emergency_release
from attention.pool import Buffers


class MultiheadAttention(nn.Module):
    """`module(query, key, value, is_causal=False, need_weights=False, documents=None, sinks=None) ->
    (out, AttentionWeights | None)`.

    query, key and value are [batch, seq, embed_dim], or [seq, embed_dim]. `documents`: whole numbers
    [batch, seq], or [seq], equal ones in runs; tokens see none but those of their own number (packed
    sequences, padding). `sinks`: [num_heads], a logit each, which joins the softmax of every query without a
    value. Where ranks share a sequence, query, key and value are a rank's own tokens, and the gradient of the
    parameters is the sum over the ring of what each rank gets.
    """

    batch_first = True
    dropout = 0.0
    # torch's encoder layer has a fast path that reads the weights and computes dense attention by
    # itself; it stays out where this is false.
    _qkv_same_embed_dim = False

    def __init__(self, config: AttentionConfig, attention: nn.Module) -> None:
        """`attention`: what `config` says without its projections."""
        super().__init__()
        assert config.multihead is not None
        sizes = config.multihead
        self.config = config
        self.embed_dim, self.num_heads, self.head_dim = sizes.embed_dim, sizes.num_heads, sizes.head_dim
        self.kv_heads = sizes.kv_heads or sizes.num_heads
        self.attention: Any = attention
        rows = self.embed_dim + 2 * self.kv_heads * self.head_dim
        self.in_proj_weight = nn.Parameter(torch.empty(rows, self.embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(rows)) if sizes.bias else None
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=sizes.bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if sizes.bias:
            nn.init.zeros_(self.out_proj.bias)

    @eager
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = False,
        is_causal: bool = False,
        return_attention_weights: bool = False,
        documents: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, AttentionWeights | None]:
        """`attn_mask` is taken only with `is_causal=True`, as torch's hint that it is the causal one."""
        wanted = need_weights or return_attention_weights
        refuse: Callable[[Exception], NoReturn] = self.attention.refuse
        try:
            if key_padding_mask is not None or (attn_mask is not None and not is_causal):
                raise InputError(
                    "masks are given by the config's pattern and is_causal; got a "
                    f"{'key_padding_mask' if key_padding_mask is not None else 'attn_mask'}: drop it, and "
                    "give padding as documents of its own: documents="
                )
            self._check(query, key, value)
            if isinstance(documents, Tensor) and query.dim() == 2:
                documents = documents[None]
            if not self.attention.shares:  # which checks its own, for all ranks
                self._check_features(query, documents, sinks, wanted)
        except AttentionPlannerError as error:
            refuse(error)
        extras = (documents, sinks)

        def run() -> tuple[Tensor, AttentionWeights | None]:
            return self._whole(query, key, value, is_causal, wanted, average_attn_weights, extras)

        if self.attention.shares:  # what was exchanged is not done again
            return run()
        return with_emergency_release(run, self.attention.scratch, query.device)

    def shard(self, x: Tensor) -> Tensor:
        """The tokens of x [batch, seq, ...] that this rank holds."""
        tokens: Tensor = self.attention.shard(x)
        return tokens

    def gather(self, x: Tensor) -> Tensor:
        """The whole of x [batch, own tokens, ...], on all ranks, without its gradient."""
        whole: Tensor = self.attention.gather(x)
        return whole

    def positions(self, seq: int) -> Tensor:
        """The places in a sequence of so many tokens that this rank's have."""
        places: Tensor = self.attention.positions(seq)
        return places

    def _whole(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        wanted: bool,
        averaged: bool,
        extras: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, AttentionWeights | None]:
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        if (
            self.config.multihead
            and self.config.multihead.checkpoint
            and torch.is_grad_enabled()
            and not wanted
        ):
            # Nothing in it is random.
            out = checkpoint(
                self._attend,
                query,
                key,
                value,
                is_causal,
                False,
                *extras,
                use_reentrant=False,
                preserve_rng_state=False,
            )[0]
            weights = None
        else:
            out, weights = self._attend(query, key, value, is_causal, wanted, *extras)
        if weights is not None and averaged:
            weights = _averaged(weights)
        return (out if batched else out[0]), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Raises InputError unless the streams go together and with the parameters."""
        refuse_transforms()
        weight = self.in_proj_weight
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, Tensor):
                raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.dim() not in (2, 3) or x.shape[-1] != self.embed_dim:
                raise InputError(f"{name} must be [batch, seq, {self.embed_dim}], got shape {tuple(x.shape)}")
            if 0 in (x.shape[:-2] if self.attention.shares else x.shape):
                raise InputError(
                    f"{name} must not be empty, got shape {tuple(x.shape)}; pass at least 1 token"
                )
            if x.shape != query.shape:
                raise InputError(
                    f"query, key and value must agree in batch and seq, got {tuple(query.shape)} and "
                    f"{name} {tuple(x.shape)}; fewer queries than keys, as with a cache, are for the "
                    "attention without projections"
                )
            if x.device != weight.device:
                raise InputError(f"{name} is on {x.device}, the module on {weight.device}; move one of them")
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise InputError(
                    f"{name} is {x.dtype}, the module {weight.dtype}; convert one of them or use autocast"
                )

    def _check_features(
        self, query: Tensor, documents: Tensor | None, sinks: Tensor | None, wanted: bool
    ) -> None:
        """Raises an error unless documents and sinks fit the streams and the attention, before those are
        projected."""
        several = False
        if documents is not None:
            batch = query.shape[0] if query.dim() == 3 else 1
            lengths = document_lengths(documents, batch, query.shape[-2])
            several = any(len(item) > 1 for item in lengths)
        given: dict[Feature, bool] = {"documents": several, "sinks": sinks is not None, "weights": wanted}
        check_features(self.config, given, sinks, self.num_heads, query.device)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        wanted: bool,
        documents: Tensor | None,
        sinks: Tensor | None,
    ) -> tuple[Tensor, AttentionWeights | None]:
        q, k, v = self._locally(lambda: self._project(query, key, value), query.device)
        result = self.attention(q, k, v, is_causal, wanted, documents, sinks)
        del q, k, v  # unless autograd saved them, before the output is projected
        out, weights = result if isinstance(result, tuple) else (result, None)
        return self.out_proj(out.flatten(2)), weights

    def _locally(self, run: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, ...]:
        """`run()`, before anything is exchanged; other ranks are told where memory runs out."""
        if not self.attention.shares:
            return run()
        try:
            return with_emergency_release(run, self.attention.scratch, device)
        except OutOfMemoryError as error:
            refuse: Callable[[Exception], NoReturn] = self.attention.refuse
            refuse(error)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, [batch, seq, heads or kv_heads, head_dim]."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        widths = [self.embed_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        tensors = (query, key, value, weight, *(() if bias is None else (bias,)))
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        # Autocast sees into operators and not into a function of one's own.
        if trains and not torch.is_autocast_enabled(query.device.type):
            projected: tuple[Tensor, ...] = _Projections.apply(  # type: ignore[no-untyped-call]
                query, key, value, weight, bias, widths, self.attention.scratch
            )
        else:
            projected = _projected((query, key, value), weight, bias, widths)
        return tuple(x.unflatten(-1, (-1, self.head_dim)) for x in projected)


def _projected(
    streams: Sequence[Tensor], weight: Tensor, bias: Tensor | None, widths: Sequence[int]
) -> tuple[Tensor, ...]:
    """Each stream by its rows of the weight and of the bias."""
    biases = [None] * len(widths) if bias is None else bias.split(list(widths))
    parts = zip(streams, weight.split(list(widths)), biases, strict=True)
    return tuple(nn.functional.linear(x, rows, added) for x, rows, added in parts)


class _Projections(torch.autograd.Function):
    """`_projected`, with a backward that holds one gradient of the weight and one of each stream.

    Autograd's own pads the gradient of each stream's rows to the whole weight and adds those up, and keeps
    a gradient for every use of a stream that is query, key and value at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        widths: Sequence[int],
        buffers: Buffers,
    ) -> tuple[Tensor, ...]:
        streams = (query, key, value)
        ctx.save_for_backward(*streams, weight)
        ctx.widths, ctx.buffers = widths, buffers
        # Which stream a gradient is handed to: the first of those that are one tensor.
        ctx.firsts = [next(n for n, other in enumerate(streams) if other is x) for x in streams]
        return _projected(streams, weight, bias, widths)

    @staticmethod
    @once
    def backward(ctx: Any, saved: Sequence[Tensor], *grads: Tensor) -> Gradients:
        *streams, weight = saved
        ofs = [grad.flatten(0, -2) for grad in grads]
        of_streams: list[Tensor | None] = [None] * 3
        for first, of, rows in zip(ctx.firsts, ofs, weight.split(ctx.widths), strict=True):
            if not ctx.needs_input_grad[first]:
                continue
            total = of_streams[first]
            of_streams[first] = of @ rows if total is None else total.addmm_(of, rows)
        of_weight = of_bias = None
        if ctx.needs_input_grad[3]:
            of_weight = torch.empty_like(weight)
            for x, of, rows in zip(streams, ofs, of_weight.split(ctx.widths), strict=True):
                torch.mm(of.t(), x.flatten(0, -2), out=rows)
        if ctx.needs_input_grad[4]:
            of_bias = weight.new_empty(weight.shape[0])
            for of, rows in zip(ofs, of_bias.split(ctx.widths), strict=True):
                torch.sum(of, 0, out=rows)
        shaped = [None if of is None else of.view(x.shape) for of, x in zip(of_streams, streams, strict=True)]
        return *shaped, of_weight, of_bias, None, None


def _averaged(weights: AttentionWeights) -> AttentionWeights:
    """Mean over heads, as one head."""
    if weights.block_indices.dim() == 4:
        raise InputError(
            "average_attn_weights=True needs heads that share their blocks; an adaptive attention's do not"
        )
    batch, _, seq, _ = weights.shape
    values = weights.block_values.mean(1, keepdim=True)
    return AttentionWeights(weights.block_indices, values, (batch, 1, seq, seq), weights.block_size)
