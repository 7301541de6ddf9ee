"""Attention modules: dense, dilated and block-sparse; the base of the adaptive one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from attention import block_sparse, dilated, token_window
from attention.config import AttentionConfig
from attention.inputs import check, shape_of
from attention.layout import Layout, build_layout
from attention.ops import flex
from attention.ops.execute import Problem, attend
from attention.ops.kernels import activated_flash, flash_is_built, steady_heap
from attention.ops.list_calls import shared_lists
from attention.ops.program import Tile
from attention.ops.weights import AttentionWeights, attention_weights, check_room
from attention.out_of_memory import with_emergency_release
from attention.pool import buffers_for
from attention.sizes.kernel_choice import KernelChoice, kernel_choice
from attention.sizes.list_calls import list_calls
from attention.sizes.row_bounds import rows_of
from attention.sizes.shape import Shape
from attention.sizes.tiles import Extent, dilated_extent, sparse_extent
from attention.sizes.token_tiles import token_extent, token_window_of
from attention.sizes.whole_calls import WholeCall, whole_calls

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
    """`module(q, k, v, is_causal=False, return_attention_weights=False)`.

    q is [batch, seq, heads, head_dim]; k and v are [batch, seq, kv_heads, head_dim] with `kv_heads`
    dividing `heads` (query head h reads kv head h // (heads / kv_heads)). Gives out like q, or
    (out, AttentionWeights) on request. Weights carry no gradient.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.scratch = buffers_for(config)
        steady_heap()

    def extra_repr(self) -> str:
        return self.config.to_json()

    @eager
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, return_attention_weights: bool = False
    ) -> Tensor | tuple[Tensor, AttentionWeights]:
        check(q, k, v, self.config, is_causal, return_attention_weights)
        return with_emergency_release(
            lambda: self._attend(q, k, v, is_causal, return_attention_weights), self.scratch, q.device
        )

    def kernels(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> KernelChoice:
        """Which kernel a call over these tensors runs on, in how many calls, and why; str() says it."""
        check(q, k, v, self.config, is_causal)
        capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None
        return kernel_choice(
            self.config,
            shape_of(q, k, self.config, is_causal),
            capability,
            flex=flex.resolve(self.config, q, k, is_causal) == "flex",
            flash_is_built=flash_is_built(),
            activated=activated_flash(),
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, return_attention_weights: bool
    ) -> Tensor | tuple[Tensor, AttentionWeights]:
        """`forward`, of checked inputs; may be run again."""
        backend = flex.resolve(self.config, q, k, is_causal)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        shape = shape_of(q, k, self.config, is_causal)
        if return_attention_weights:
            check_room(self.config, shape, q)
        if backend == "flex" and not return_attention_weights:
            return self._by_flex(q, k, v, shape)
        calls = whole_calls(self.config, shape)
        layout = None
        by_layout = calls is None and not self.config.token_edges
        if self.config.variant == "block_sparse" and (by_layout or return_attention_weights):
            layout = self._layout(shape)
        problem = self._problem(shape, layout, calls)
        out, lse = attend(q, k, v, problem, keeps_lse=return_attention_weights)
        if not return_attention_weights:
            return out
        assert lse is not None
        if layout is None:
            layout = build_layout(self.config, shape.seq, is_causal)
        return out, attention_weights(
            q.detach(), k.detach(), lse, layout, self.config, shape, self._scale(shape)
        )

    def _by_flex(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
        layout = self._layout(shape)
        key = (self.config.pattern, self.config.branches, shape.seq, shape.causal, q.device)
        lists = self.scratch.indices.get(key, lambda: flex.block_lists(layout, shape.causal, q.device))
        mask = flex.block_mask(layout, shape.causal, lists)
        return flex.attend(q, k, v, mask, layout.block_size, self._scale(shape))

    def _layout(self, shape: Shape) -> Layout:
        layout: Layout = self.scratch.layouts.get(
            (self.config.pattern, self.config.branches, shape.seq, shape.causal),
            lambda: build_layout(self.config, shape.seq, shape.causal),
        )
        return layout

    def _scale(self, shape: Shape) -> float:
        return self.config.scale or 1.0 / math.sqrt(shape.head_dim)

    def _problem(
        self, shape: Shape, layout: Layout | None, calls: tuple[WholeCall, ...] | None = None
    ) -> Problem:
        branches = shape.within(self.config.branches)
        if self.config.variant == "dense":
            branches = ((shape.seq, 1),)

        rows = None if layout is None else rows_of(self.config, shape.seq, shape.causal)
        window = token_window_of(self.config, shape.causal) if self.config.token_edges else None

        def program(_: int, shape: Shape) -> Iterable[Tile]:
            if window is not None:
                return token_window.tiles(window, shape)
            if layout is not None and rows is not None:
                return block_sparse.tiles(layout, rows, shape)
            return dilated.tiles(branches, shape)

        def extent(shape: Shape) -> Extent:
            if window is not None:
                return token_extent(window, shape)
            return dilated_extent(by_rate, shape) if rows is None else sparse_extent(rows, shape)

        by_rate = sorted(branches, key=lambda branch: branch[1])
        listed = list_calls(self.config, shape)
        return Problem(
            shape=shape,
            tiles=program,
            extent=extent,
            scale=self._scale(shape),
            covers=self.config.variant == "block_sparse" or any(rate == 1 for _, rate in branches),
            whole=self.config.variant != "block_sparse" and bool(shape.is_whole(branches)),
            buffers=self.scratch,
            calls=calls,
            lists=None if listed is None or layout is None else shared_lists(layout, listed),
            hides=window is not None,
        )
