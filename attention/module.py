"""Attention modules: dense, dilated and block-sparse; the base of the adaptive one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from attention import block_sparse, dilated, token_window
from attention.config import AttentionConfig
from attention.decided import Decided, Decisions
from attention.documents import Lengths, document_lengths
from attention.inputs import check, refuse_transforms, refuse_unknown, shape_of, signature
from attention.layout import Layout, build_layout
from attention.ops import flex, kernels
from attention.ops.document_calls import Documents
from attention.ops.execute import Problem, Reserves, attend
from attention.ops.kernels import activated_flash, flash_is_built, steady_heap
from attention.ops.list_calls import shared_lists
from attention.ops.program import Tiles
from attention.ops.weights import AttentionWeights, attention_weights, check_room
from attention.out_of_memory import with_emergency_release
from attention.pool import Buffers, buffers_for
from attention.programs import tiles_of
from attention.sections import CutProgram
from attention.sharding.traffic import Traffic
from attention.sizes.kernel_choice import KernelChoice, kernel_choice
from attention.sizes.list_calls import calls_of_rows
from attention.sizes.row_bounds import Rows, rows_of
from attention.sizes.shape import Shape
from attention.sizes.tiles import Extent, dilated_extent, sparse_extent
from attention.sizes.token_tiles import token_extent, token_window_of
from attention.sizes.whole_calls import document_call, whole_calls

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """Under torch.compile it runs as it is, between the compiled parts: a program is Python over views, and
    compiling it would unroll every call. What it compiles itself (FlexAttention) is compiled."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            # Not before: it imports the compiler, which takes as long as torch does and megabytes.
            return torch.compiler.disable(function)(*args, **options)
        return function(*args, **options)

    return cast(F, run)


class Attention(nn.Module):
    """`module(q, k, v, is_causal=False, return_attention_weights=False, documents=None, sinks=None)`.

    q is [batch, queries, heads, head_dim]; k and v are [batch, seq, kv_heads, head_dim] with `kv_heads`
    dividing `heads` (query head h reads kv head h // (heads / kv_heads)). Gives out like q, or
    (out, AttentionWeights) on request. Weights carry no gradient.

    Queries may be fewer than keys: they are the last tokens of the sequence, as in decoding and in prefill
    by chunks, and `is_causal` is aligned to its end. `documents`: whole numbers [batch, seq], equal ones in
    runs; tokens see none but those of their own number, as far as the config lets them (packed sequences,
    padding). `sinks`: [heads], a logit each, which joins every query's softmax as one more key without a
    value.
    """

    shares = False
    """Whether its tokens are some of a sequence, of which other ranks have the rest."""

    def __init__(self, config: AttentionConfig, first_head: int = 0) -> None:
        """`first_head`: which of the attention's query heads the first one of its calls is, if they have some
        of them alone."""
        super().__init__()
        self.config, self.first_head = config, first_head
        self.scratch = buffers_for(config)
        self.decisions = Decisions()
        steady_heap()

    def extra_repr(self) -> str:
        return self.config.to_json()

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
    ) -> Tensor | tuple[Tensor, AttentionWeights]:
        refuse_transforms()
        if others:
            refuse_unknown(others)
        lengths = None if documents is None else self._lengths(documents, k)
        sizes = signature(q, k, v, is_causal, return_attention_weights, lengths, sinks)
        decided = self.decisions.get(sizes, self.config, self.scratch, q, k)
        if decided is None:
            given = lengths is not None
            check(q, k, v, self.config, is_causal, return_attention_weights, given, sinks)

        def run() -> Tensor | tuple[Tensor, AttentionWeights]:
            settled = decided or self._decide(q, k, is_causal, sizes, lengths)
            return self._attend(q, k, v, settled, return_attention_weights, sinks)

        return with_emergency_release(run, self.scratch, q.device)

    def kernels(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> KernelChoice:
        """Which kernel a call over these tensors runs on, in how many calls, and why; str() says it."""
        check(q, k, v, self.config, is_causal)
        capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None
        return kernel_choice(
            self.config,
            shape_of(q, k, self.config, is_causal, first_head=self.first_head),
            capability,
            flex=flex.resolve(self.config, q, k, is_causal) == "flex",
            flash_is_built=flash_is_built(),
            activated=activated_flash(),
        )

    def refuse(self, error: Exception) -> NoReturn:
        """Raises the error of a call."""
        raise error

    def shard(self, x: Tensor) -> Tensor:
        """The tokens of x [batch, seq, ...] that this rank holds: all, where it shares no sequence."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The whole of x [batch, own tokens, ...], without its gradient."""
        return x.detach()

    def positions(self, seq: int) -> Tensor:
        """The places in a sequence of so many tokens that this rank's have."""
        return torch.arange(seq)

    def traffic(self, q: Tensor, k: Tensor, is_causal: bool = False) -> Traffic:
        """What this rank and others send each other in a call: nothing."""
        return Traffic({}, {})

    @staticmethod
    def _lengths(documents: Tensor, k: Any) -> Lengths | None:
        """Lengths of the documents; None where each batch item is one."""
        if not isinstance(k, Tensor) or k.dim() != 4:
            return None  # which `check` refuses
        lengths = document_lengths(documents, k.shape[0], k.shape[1])
        return None if all(len(item) == 1 for item in lengths) else lengths

    def _decide(
        self, q: Tensor, k: Tensor, is_causal: bool, sizes: Hashable | None, lengths: Lengths | None = None
    ) -> Decided:
        """What checked inputs decide, kept by their signature."""
        cut = lengths is not None or q.shape[1] < k.shape[1]
        backend = "sdpa" if cut else flex.resolve(self.config, q, k, is_causal)
        shape = shape_of(
            q, k, self.config, is_causal, documents=lengths is not None, first_head=self.first_head
        )
        tiled = cut and shape.windows == "none"
        made = self._cut_problem(shape, lengths) if tiled else self._problem(shape, lengths)
        decided = Decided(self.config, self.scratch, backend, shape, *made, kernels.windows_of(q), cut=cut)
        self.decisions.keep(sizes, decided)
        return decided

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decided: Decided,
        return_attention_weights: bool,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, AttentionWeights]:
        """`forward`, of checked inputs; may be run again."""
        shape, problem, rows = decided.shape, decided.problem, decided.rows
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if return_attention_weights:
            check_room(self.config, shape, q)
        elif decided.backend == "flex" and sinks is None:
            return self._by_flex(q, k, v, shape)
        assert problem is not None
        if rows is not None:
            problem = self._of_layout(problem, rows)
        out, lse = attend(q, k, v, problem, sinks=sinks, keeps_lse=return_attention_weights)
        if not return_attention_weights:
            return out
        assert lse is not None
        shown = (
            self._layout(shape)
            if self.config.variant == "block_sparse"
            else build_layout(self.config, shape.seq, shape.causal)
        )
        return out, attention_weights(
            q.detach(), k.detach(), lse, shown, self.config, shape, self._scale(shape)
        )

    def _by_flex(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
        layout = self._layout(shape)
        key = (self.config.pattern, self.config.branches, shape.seq, shape.causal, q.device)
        lists = self.scratch.indices.get(key, lambda: flex.block_lists(layout, shape.causal, q.device))
        mask = flex.block_mask(layout, shape.causal, lists)
        return flex.attend(q, k, v, mask, layout.block_size, self._scale(shape))

    def _layout(self, shape: Shape) -> Layout:
        return kept_layout(self.config, self.scratch, shape)

    def _of_layout(self, problem: Problem, rows: Rows) -> Problem:
        """The problem with what comes from its layout, whose rows these are: lists of calls, or tiles."""
        shape, program = problem.shape, problem.tiles
        if shape.windows == "any":
            return problem._replace(lists=shared_lists(self._layout(shape), calls_of_rows(rows, shape)))
        if not isinstance(program, Tiles) or shape in program:
            return problem
        layout = functools.cache(lambda: self._layout(shape))  # built where it is wanted, then held
        return problem._replace(
            tiles=program.made_by(lambda shape: block_sparse.tiles(layout(), rows, shape))
        )

    def _scale(self, shape: Shape) -> float:
        return self.config.scale or 1.0 / math.sqrt(shape.head_dim)

    def _cut_problem(self, shape: Shape, lengths: Lengths | None) -> tuple[Problem | None, Rows | None]:
        """`_problem` of the last queries of a sequence, and of documents."""
        config = self.config
        branches = shape.within(config.branches) if config.variant != "dense" else ((shape.seq, 1),)
        make = tiles_of(config, shape, partial(kept_layout, config, self.scratch, shape))
        program = CutProgram(make, lengths or ((shape.seq,),), shape.origin)
        sparse = config.variant == "block_sparse"
        aligned = lengths is None and not shape.causal
        whole = aligned and not sparse and bool(shape.is_whole(branches))
        problem = Problem(
            shape=shape,
            tiles=program.tiles,
            reserves=Reserves(shape, program.extent, whole, kinds=False),
            scale=self._scale(shape),
            covers=sparse or any(rate == 1 for _, rate in branches),
            whole=whole,
            buffers=self.scratch,
            hides=config.token_edges,
        )
        return problem, None

    def _problem(self, shape: Shape, lengths: Lengths | None = None) -> tuple[Problem | None, Rows | None]:
        """(what is computed, the rows of the layout by which each call makes its tiles, if they come from
        one); no problem where it depends on values."""
        config = self.config
        calls = whole_calls(config, shape)
        branches = shape.within(config.branches) if config.variant != "dense" else ((shape.seq, 1),)
        sparse = config.variant == "block_sparse"
        rows = None
        if config.token_edges:
            window = token_window_of(config, shape.causal)
            program = Tiles(partial(token_window.tiles, window))
            extent: Callable[[Shape], Extent] = partial(token_extent, window)
        elif sparse:
            rows = rows_of(config, shape.seq, shape.causal)
            program, extent = Tiles(), partial(sparse_extent, rows)
        else:
            by_rate = sorted(branches, key=lambda branch: branch[1])
            program, extent = Tiles(partial(dilated.tiles, branches)), partial(dilated_extent, by_rate)
        whole = not sparse and bool(shape.is_whole(branches))
        documents = None
        if lengths is not None:
            every = whole_calls(config, shape._replace(origin=0))
            assert every is not None
            documents = Documents(lengths, document_call(every, shape))
        problem = Problem(
            shape=shape,
            tiles=program,
            reserves=Reserves(shape, extent, whole),
            scale=self._scale(shape),
            covers=sparse or any(rate == 1 for _, rate in branches),
            whole=whole,
            buffers=self.scratch,
            calls=calls,
            hides=config.token_edges,
            documents=documents,
        )
        return problem, rows if calls is None else None


def kept_layout(config: AttentionConfig, buffers: Buffers, shape: Shape) -> Layout:
    """The layout of a config for a shape, from its cache."""
    layout: Layout = buffers.layouts.get(
        (config.pattern, config.branches, shape.seq, shape.causal),
        lambda: build_layout(config, shape.seq, shape.causal),
    )
    return layout
