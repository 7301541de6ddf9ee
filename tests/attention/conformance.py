"""What every implementation is checked against, and the implementations: one table, one set of checks.

`IMPLEMENTATIONS` names configs for HEADS heads of HEAD_DIM channels; `in_little_room` gives the same
config with the least workspace, so that chunks split and parts are merged at test lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from tolerance import (
    assert_as_exact_as_naive,
    assert_exact,
    forward_and_gradients,
    largest_score,
    naive_attention,
)
from torch import Tensor, nn

from attention import AdaptiveConfig, AttentionConfig, SparsePatternConfig, build
from attention.ops import kernels
from attention.reference import multiplicity, reference_attention

HEADS, HEAD_DIM, BLOCK = 4, 16, 8
KV_HEADS = (1, 2, 4)
LEAST_WORKSPACE = 64 * 1024


def dilated(branches: list[tuple[int, int]], **fields: Any) -> AttentionConfig:
    lengths, rates = zip(*branches, strict=True)
    return AttentionConfig(variant="dilated", segment_lengths=lengths, dilation_rates=rates, **fields)


def patterned(
    pattern_type: Any, branches: list[tuple[int, int]] | None = None, **fields: Any
) -> AttentionConfig:
    """A block_sparse config; `branches` in blocks."""
    pattern = SparsePatternConfig(pattern_type=pattern_type, block_size=BLOCK, **fields)
    return AttentionConfig(
        variant="block_sparse",
        pattern=pattern,
        segment_lengths=[n * BLOCK for n, _ in branches or []],
        dilation_rates=[r for _, r in branches or []],
    )


def adaptive(
    ratio: float, heads: int = HEADS, head_dim: int = HEAD_DIM, block: int = BLOCK
) -> AttentionConfig:
    return AttentionConfig(
        variant="adaptive",
        pattern=SparsePatternConfig(block_size=block, sparsity_ratio=ratio),
        adaptive=AdaptiveConfig(num_heads=heads, head_dim=head_dim),
    )


IMPLEMENTATIONS: dict[str, AttentionConfig] = {
    "dense": AttentionConfig(variant="dense"),
    "dense-scaled": AttentionConfig(variant="dense", scale=0.7),
    "dilated-1": dilated([(16, 1)]),
    "dilated-2": dilated([(16, 1), (32, 2)]),
    "dilated-3-odd": dilated([(7, 1), (30, 3), (45, 5)]),
    "dilated-4-beyond-heads": dilated([(4, 1), (16, 3), (64, 6), (100, 9)]),
    "dilated-repeated": dilated([(20, 1), (20, 1), (10, 1)]),
    "dilated-uncovered": dilated([(12, 3), (40, 7)], uncovered="zero"),
    "local_window": patterned("local_window", local_window_size=32),
    "local_window-below-a-block": patterned("local_window", local_window_size=3),
    "global_local": patterned("global_local", local_window_size=16, global_tokens=9),
    "local_window-token": patterned("local_window", local_window_size=27, edges="token"),
    "local_window-token-narrow": patterned("local_window", local_window_size=1, edges="token"),
    "global_local-token": patterned("global_local", local_window_size=13, global_tokens=14, edges="token"),
    "dilated_sparse": patterned("dilated_sparse", [(16, 1)], sparsity_ratio=0.3),
    "dilated_sparse-3": patterned("dilated_sparse", [(4, 1), (8, 2), (16, 3)], sparsity_ratio=0.6),
    "dilated_sparse-far": patterned("dilated_sparse", [(16, 5), (16, 2)], sparsity_ratio=1.0),
    "adaptive": adaptive(0.4),
    "adaptive-own-block": adaptive(0.01),
}


def in_little_room(config: AttentionConfig, **changes: Any) -> AttentionConfig:
    """The config with the least workspace that one may have."""
    return changed(config, workspace_bytes=LEAST_WORKSPACE, **changes)


def changed(config: AttentionConfig, **changes: Any) -> AttentionConfig:
    return type(config)(**{**{name: getattr(config, name) for name in type(config).model_fields}, **changes})


def module_of(config: AttentionConfig, device: str = "cpu") -> nn.Module:
    """The config's module, its scorer (if any) always the same."""
    module = build(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.to(device)


def qkv(
    seq: int,
    *,
    batch: int = 1,
    heads: int = HEADS,
    kv_heads: int | None = None,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, seq, h, head_dim) for h in (heads, kv_heads or heads, kv_heads or heads)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes)
    return q, k, v


def output_gradient(q: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(q.shape, generator=generator, dtype=torch.float64).to(q.device, q.dtype)


def chosen(module: nn.Module, q: Tensor, k: Tensor, causal: bool) -> Tensor | None:
    """The blocks that an adaptive module chooses, for the oracle; None for all others."""
    return module.select(q, k, causal) if module.config.variant == "adaptive" else None


def oracle(module: nn.Module, q: Tensor, k: Tensor, causal: bool) -> Callable[..., Tensor]:
    layout = chosen(module, q, k, causal)
    layout = None if layout is None else layout.cpu()
    return lambda *inputs: reference_attention(*inputs, module.config, causal, layout)


def counts(module: nn.Module, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """M of the module's config at these inputs: [H, S, S], or [B, H, S, S] for adaptive."""
    config, seq = module.config, q.shape[1]
    layout = chosen(module, q, k, causal)
    if layout is None:
        return multiplicity(config, seq, q.shape[2], causal).to(q.device)
    size, blocks = config.pattern.block_size, layout.shape[2]
    kept = torch.zeros(*layout.shape[:3], blocks + 1, dtype=torch.float64, device=q.device)
    kept.scatter_(-1, layout.masked_fill(layout < 0, blocks), 1.0)
    m = kept[..., :blocks].repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :seq, :seq]
    return m.tril() if causal else m


def check_float64(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Forward and gradients equal the oracle to the float64 bars."""
    grad = output_gradient(q)
    ours = forward_and_gradients(lambda *x: module(*x, is_causal=causal), (q, k, v), grad)
    assert_exact(ours, forward_and_gradients(oracle(module, q, k, causal), (q, k, v), grad))


def check_low_precision(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, causal: bool, grad: Tensor | None = None
) -> None:
    """Forward and gradients are as near the oracle as the rule for their dtype asks; 16-bit types on the
    CPU both as on a machine with a matrix unit for them and as on one without."""
    grad = output_gradient(q) if grad is None else grad
    m = counts(module, q, k, causal)
    scale = module.config.scale or 1 / math.sqrt(q.shape[3])
    naive = forward_and_gradients(lambda *x: naive_attention(*x, m, scale), (q, k, v), grad)
    exact = oracle(module, q, k, causal)
    reference = forward_and_gradients(exact, [x.double() for x in (q, k, v)], grad.double())
    both = q.device.type == "cpu" and q.element_size() == 2
    for unit in (False, True) if both else (None,):
        with machine_with(unit):
            ours = forward_and_gradients(lambda *x: module(*x, is_causal=causal), (q, k, v), grad)
        assert ours[0].dtype == q.dtype
        assert_as_exact_as_naive(ours, naive, reference, largest_score(q, k, scale))


@contextmanager
def machine_with(unit: bool | None) -> Iterator[None]:
    """Plays a CPU with or without a matrix unit for 16-bit types; None: the one there is."""
    if unit is None:
        yield
        return
    with mock.patch.object(kernels, "matrix_unit", lambda dtype: unit and dtype.itemsize == 2):
        yield


# Random cases


@st.composite
def branch_lists(draw: st.DrawFn, most: int, longest: int) -> list[tuple[int, int]]:
    return draw(
        st.lists(
            st.integers(1, longest).flatmap(lambda s: st.tuples(st.just(s), st.integers(1, min(s, 11)))),
            min_size=1,
            max_size=most,
        )
    )


@st.composite
def configs(draw: st.DrawFn, heads: int | None = None, head_dim: int | None = None) -> AttentionConfig:
    """Any config; with heads and head_dim None, any but adaptive, which needs both."""
    variants = ["dense", "dilated", "block_sparse"] + (["adaptive"] if heads else [])
    variant = draw(st.sampled_from(variants))
    common: dict[str, Any] = {
        "variant": variant,
        "workspace_bytes": draw(st.sampled_from([LEAST_WORKSPACE, 100_000, 1 << 24])),
        "pool": draw(st.sampled_from(["auto", "on", "off"])),
        "cache_entries": draw(st.sampled_from([0, 100])),
        "scale": draw(st.sampled_from([None, 0.1, 1.0])),
    }
    if variant == "dense":
        return AttentionConfig(**common)
    if variant == "dilated":
        branches = draw(branch_lists(most=4, longest=250))
        covered = any(r == 1 for _, r in branches)
        return AttentionConfig(
            **common,
            segment_lengths=[s for s, _ in branches],
            dilation_rates=[r for _, r in branches],
            uncovered="refuse" if covered else "zero",
        )
    pattern = SparsePatternConfig(
        pattern_type=draw(st.sampled_from(["local_window", "global_local", "dilated_sparse"])),
        sparsity_ratio=draw(st.floats(0.01, 1.0)),
        block_size=draw(st.integers(1, 40)),
        local_window_size=draw(st.integers(1, 150)),
        global_tokens=draw(st.integers(1, 60)),
        edges=draw(st.sampled_from(["block", "token"])),
    )
    if variant == "adaptive":
        sizes = AdaptiveConfig(num_heads=heads, head_dim=head_dim, score_dim=draw(st.sampled_from([None, 3])))
        return AttentionConfig(**common, pattern=pattern, adaptive=sizes)
    branches = draw(branch_lists(most=3, longest=12))
    return AttentionConfig(
        **common,
        pattern=pattern,
        segment_lengths=[n * pattern.block_size for n, _ in branches],
        dilation_rates=[r for _, r in branches],
    )


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A config and the sizes to run it at."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([1, 3, 8, 16]))
    return {
        "config": draw(configs(heads, head_dim)),
        "seq": draw(st.integers(1, 200)),
        "batch": draw(st.sampled_from([1, 2])),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "causal": draw(st.booleans()),
    }
