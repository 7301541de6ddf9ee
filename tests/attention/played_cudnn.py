"""What cuDNN's attention computes, as torch's own operators on a CPU, by its definition and with what it asks
of its operands: the way to run it on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import flash
import torch
from torch import Tensor

from attention.ops import cudnn


def lies_well(x: Tensor) -> bool:
    """Whether cuDNN reads x [N, H, T, D] as it lies: rows begin at multiples of 16 bytes, and none twice."""
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    apart = all(step > 0 and step * x.element_size() % 16 == 0 for step in steps)
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and apart and x.shape[-1] % 8 == 0


def steps(x: Tensor) -> list[int]:
    return [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | int, ...]:
    assert compute_log_sumexp
    assert attn_bias is None
    assert key.shape[2] > 1
    assert not is_causal or query.shape[2] == key.shape[2]
    assert all(map(lies_well, (query, key, value)))
    assert scale is not None
    out, lse = flash.windowed(query, key, value, scale=scale, left=None, right=0 if is_causal else None)
    nothing = torch.empty(0)
    laid = torch.empty_like(query).copy_(out)
    return laid, lse[..., None], nothing, nothing, query.shape[2], key.shape[2], nothing, nothing, nothing


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert all(map(lies_well, (query, key, value, out, grad_out)))
    # torch keeps plans by q, k and v alone.
    assert steps(out) == steps(grad_out) == steps(torch.empty_like(query))
    assert logsumexp.shape == (*query.shape[:3], 1)
    assert logsumexp.is_contiguous()
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert not is_causal or max_q == max_k
    assert scale is not None
    right = 0 if is_causal else None
    grads = flash.windowed_backward(
        grad_out, query, key, value, out, logsumexp[..., 0], scale=scale, left=None, right=right
    )
    dq, dk, dv = (torch.empty_like(x).copy_(y) for x, y in zip((query, key, value), grads, strict=True))
    return dq, dk, dv


@contextmanager
def cudnn_operators() -> Iterator[dict[str, int]]:
    """Plays the operators alone, and counts their calls."""
    library = torch.library.Library("aten", "IMPL")
    counts = {"forward": 0, "backward": 0}

    def counted(name: str, function):
        def run(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        return run

    library.impl("_scaled_dot_product_cudnn_attention", counted("forward", forward), "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", counted("backward", backward), "CPU")
    try:
        yield counts
    finally:
        library._destroy()


@contextmanager
def cudnn_attention(least: int = 2) -> Iterator[dict[str, int]]:
    """Plays a GPU on which whole calls of so many queries and keys go to cuDNN's attention, and others to
    flash attention, for every dtype."""
    with (
        flash.flash_attention(),
        mock.patch.object(cudnn, "takes_from", return_value=least),
        cudnn_operators() as counts,
    ):
        yield counts
