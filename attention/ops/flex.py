"""Compiled FlexAttention over a layout, and the choice between it and fused SDPA.

The BlockMask is built from the layout's rows, and for training from its columns, in memory linear in
rows x longest row; `create_block_mask` would go through something of size queries x keys.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.errors import UnavailableError
from attention.layout import Layout
from attention.ops.kernels import windows_of
from attention.sizes.flex import auto_leaves_flex, flex_is_lean, unfit_config
from attention.sizes.flex_tiles import declared_block, kernel_options, unfit_sizes
from attention.sizes.row_bounds import rows_of


def resolve(config: AttentionConfig, q: Tensor, k: Tensor, is_causal: bool) -> str:
    """'sdpa' or 'flex' for these tensors. A backend that was asked for is given or refused; `auto` takes
    FlexAttention where it can serve and its lists are short beside q, k, v and out."""
    if config.backend not in ("auto", "flex"):
        return "sdpa"
    why = unfit(config, q)
    if config.backend == "auto":
        kind = config.pattern.pattern_type if config.pattern else None
        if why or auto_leaves_flex(kind, windows_of(q)) or not _lean(config, q, k, is_causal):
            return "sdpa"
        return "flex"
    if why:
        raise UnavailableError(f"backend='flex' cannot serve this: {why}; use backend='auto' or 'sdpa'")
    return "flex"


def unfit(config: AttentionConfig, q: Tensor) -> str | None:
    """Why FlexAttention cannot run this; None if it can."""
    if why := unfit_config(config):
        return why
    if q.device.type != "cuda":
        return f"compiled FlexAttention trains on CUDA only, the tensors are on {q.device}"
    return unfit_sizes(q.shape[3], q.dtype.itemsize, torch.cuda.get_device_capability(q.device))


def _lean(config: AttentionConfig, q: Tensor, k: Tensor, is_causal: bool) -> bool:
    seq, floor = q.shape[1], 2 * (q.nbytes + k.nbytes)
    return bool(flex_is_lean(rows_of(config, seq, is_causal), seq, floor))


@cache
def compiled() -> Any:
    """torch's FlexAttention, compiled; a new layout or size compiles anew."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, block_size: int, scale: float) -> Tensor:
    """out [B, S, H, D]; differentiable by FlexAttention's own backward. `mask` is a `block_mask` of blocks of
    so many tokens."""
    out = compiled()(
        *(_swapped(x) for x in (q, k, v)),
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        kernel_options=options(q, block_size),
    )
    return _swapped(out)


def _swapped(x: Tensor) -> Tensor:
    """A view with tokens and heads in each other's place. A single head gets the strides of a new tensor:
    where they are others, which nothing reads, torch copies the gradient of out."""
    for one, other in ((1, 2), (2, 1)):
        if x.shape[one] == 1:
            return x.squeeze(one).unsqueeze(other)
    return x.transpose(1, 2)


def options(q: Tensor, block_size: int) -> dict[str, int | bool] | None:
    """What torch has to be told of a `block_mask` of such blocks, for q [B, S, H, D]."""
    if q.device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(q.device)
    return kernel_options(block_size, q.shape[1], q.shape[3], q.dtype.itemsize, capability)


def block_lists(layout: Layout, causal: bool, device: torch.device) -> tuple[Tensor, ...]:
    """What a BlockMask is made of, int32: counts [1, 1, rows] and indices [1, 1, rows, longest] of
    partial and of full blocks, by query rows and then by key rows. Under `causal` a row's own block is
    partial; otherwise none is."""
    query = np.repeat(np.arange(layout.blocks), layout.counts)
    key = layout.cols.astype(np.int64)
    own = query == key if causal else np.zeros(len(key), bool)
    parts: list[Tensor] = []
    for row, column in ((query, key), (key, query)):
        order = np.lexsort((column, row))
        r, c, partial = row[order], column[order], own[order]
        parts += _padded_rows(r[partial], c[partial], layout.blocks, device)
        parts += _padded_rows(r[~partial], c[~partial], layout.blocks, device)
    return tuple(parts)


def block_mask(layout: Layout, causal: bool, lists: tuple[Tensor, ...]) -> Any:
    """The BlockMask of a layout and its `block_lists`. On a GPU its block size may be one that torch accepts
    instead of the layout's, which is then among `options`."""
    from torch.nn.attention.flex_attention import BlockMask

    block = layout.block_size if lists[0].device.type == "cpu" else declared_block(layout.block_size)
    size = (block, block)
    mask_mod = _past if causal else _everything
    return BlockMask((layout.seq, layout.seq), *lists, BLOCK_SIZE=size, mask_mod=mask_mod)  # type: ignore[arg-type,misc]


def _past(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _everything(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= 0


def _padded_rows(
    row: npt.NDArray[np.int64], column: npt.NDArray[np.int64], rows: int, device: torch.device
) -> list[Tensor]:
    """[counts [1, 1, rows], indices [1, 1, rows, longest]] in int32, from sorted (row, column) pairs.
    The CPU's lowering insists on rows as wide as the matrix; it is only ever a peer in studies here."""
    counts = np.bincount(row, minlength=rows)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = rows if device.type == "cpu" else max(int(counts.max(initial=0)), 1)
    indices = np.zeros((rows, width), np.int32)
    indices[row, place] = column
    return [torch.from_numpy(x.astype(np.int32)).to(device)[None, None] for x in (counts, indices)]
