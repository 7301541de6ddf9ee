"""cuDNN's attention on CUDA, forward and backward, for whole calls without windows. Nobody has run it here on
a GPU: it is taken where torch itself would take it, after a small call has agreed with its definition.

Its log-sum-exp is what flash attention gives, so that a backward may run on either. torch keeps cuDNN's plans
by sizes and by the strides of q, k and v alone, for each thread: out and its gradient must therefore lie as
torch's own out does, and the log-sum-exp in one piece (cuDNN below 9.26 does not read its strides). A plan
that failed must not be asked for again: torch keeps an empty one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from attention.ops.kernels import TRUST, activated_flash, aligned_channels, choose, is_right
from attention.sizes.arrays import up
from attention.sizes.whole_calls import CHANNELS, CUDNN_TOKENS, LEAST_KEYS, has_cudnn

aten = torch.ops.aten
ALIGNMENT: Final = 16
"""Bytes at whose multiples cuDNN's operands begin, and lie apart."""

_RIGHT: dict[tuple[torch.device, torch.dtype, int], bool] = {}
"""Whether it agreed with its definition, by device, type and channels."""


def takes_from(q: Tensor, k: Tensor, is_causal: bool, backend: str) -> int:
    """Queries, and keys, from which whole calls over q [B, S, H, D] and k [B, S, G, D] go to cuDNN's
    attention; 0 for none. `backend` as a config has it."""
    if backend == "flash" or q.device.type != "cuda" or choose(q, biased=False) != "flash":
        return 0
    if not has_cudnn(torch.cuda.get_device_capability(q.device), q.shape[-1], q.dtype.itemsize):
        return 0
    if backend == "cudnn":
        return LEAST_KEYS if unavailable(q, k, is_causal) is None else 0
    # Who activated another flash attention wants that one.
    first = activated_flash() is None and _is_first(q, k, is_causal)
    return CUDNN_TOKENS if first and _agrees(q) else 0


def unavailable(q: Tensor, k: Tensor, is_causal: bool) -> str | None:
    """Why cuDNN's attention cannot run on a card that it is for; None if it can."""
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "it is switched off in torch; torch.backends.cuda.enable_cudnn_sdp(True) switches it on"
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if torch.are_deterministic_algorithms_enabled() and not warns:
        return "it is not deterministic, and torch.use_deterministic_algorithms(True) asks for that"
    query, key = (_heads_first(x) for x in (q, k))
    params = torch.backends.cuda.SDPAParams(query, key, key, None, 0.0, is_causal, q.shape[2] != k.shape[2])
    if not torch.backends.cuda.can_use_cudnn_attention(params):
        return f"torch {torch.__version__} does not take it here, with cuDNN {torch.backends.cudnn.version()}"
    if not _agrees(q):
        return (
            "a small call of it on this device did not agree with its definition, or none has run yet: none "
            "does under the capture of a CUDA graph"
        )
    return None


def _is_first(q: Tensor, k: Tensor, is_causal: bool) -> bool:
    """Whether torch's own attention would be cuDNN's: by version, by what is switched off, by what the
    program prefers, and where nothing must be deterministic."""
    query, key = (_heads_first(x) for x in (q, k))
    grouped = q.shape[2] != k.shape[2]
    chosen = torch._fused_sdp_choice(query, key, key, None, 0.0, is_causal, enable_gqa=grouped)
    return bool(chosen == SDPBackend.CUDNN_ATTENTION.value)


def _heads_first(x: Tensor) -> Tensor:
    """x as torch's choice looks at it: it would refuse channels that are padded here."""
    return x.transpose(1, 2)[..., : max(x.shape[-1] // CHANNELS, 1) * CHANNELS]


def _agrees(x: Tensor) -> bool:
    """Whether it does as it says for tensors like `x`: once for each device, type and number of channels a
    small call of each kind, forward and backward, is held against the definition. TRUST leaves that out;
    under the capture of a CUDA graph none runs."""
    if os.environ.get(TRUST):
        return True
    device, dtype, channels = key = (x.device, x.dtype, up(x.shape[-1], CHANNELS))
    if key not in _RIGHT:
        if torch.cuda.is_current_stream_capturing():
            return False
        with torch.device("cpu"):  # whatever tensors are made on by default
            _RIGHT[key] = all(
                is_right(
                    forward,
                    backward,
                    device,
                    dtype,
                    heads=4,
                    queries=queries,
                    channels=channels,
                    left=None,
                    right=right,
                )
                for queries, right in ((40, 0), (33, None))
            )
    return _RIGHT[key]


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    """`attention.ops.kernels.windowed` without a window: `left` is None, and `right` is None, or 0 with as
    many keys as queries."""
    dim, size = q.shape[-1], q.shape[:3]
    _refuse_windows(q, k, left, right)
    q, k, v = (_operand(x) for x in (q, k, v))
    with _advice():
        out, lse = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, right is not None, scale=scale
        )[:2]
    return out[..., :dim], lse.reshape(size)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    left: int | None,
    right: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `forward`, for out and lse of the whole row."""
    dim = q.shape[-1]
    _refuse_windows(q, k, left, right)
    q, k, v = (_operand(x) for x in (q, k, v))
    grad, out = (_laid_as(q, _padded(x)) for x in (grad, out))
    rng = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout: nothing reads it
    with _advice():
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse.contiguous()[..., None],
            rng,
            rng,
            None,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            right is not None,
            scale=scale,
        )
    dq, dk, dv = (x[..., :dim] for x in grads)
    return dq, dk, dv


@contextmanager
def _advice() -> Iterator[None]:
    """Adds to what cuDNN says of a call that it does not take what leaves cuDNN out."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        error.add_note("This was cuDNN's attention; backend='flash' leaves it out.")
        raise


def _refuse_windows(q: Tensor, k: Tensor, left: int | None, right: int | None) -> None:
    if left is not None or (right is not None and (right != 0 or q.shape[2] != k.shape[2])):
        raise ValueError(
            f"cuDNN's attention has no windows, and is causal from the first key: got left={left} and "
            f"right={right} for {q.shape[2]} queries and {k.shape[2]} keys"
        )


def _padded(x: Tensor) -> Tensor:
    return aligned_channels(x.transpose(1, 2)).transpose(1, 2)


def _operand(x: Tensor) -> Tensor:
    """x [N, H, T, D], copied where cuDNN does not read it as it lies."""
    x = _padded(x)
    steps = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    apart = all(step and step * x.element_size() % ALIGNMENT == 0 for step in steps)
    if apart and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _laid_as(q: Tensor, x: Tensor) -> Tensor:
    """x as torch's out of cuDNN's attention over q lies, copied where it does not."""
    steps = torch.empty_like(q, device="meta").stride()
    same = all(size == 1 or a == b for size, a, b in zip(q.shape, x.stride(), steps, strict=True))
    return x if same and x.data_ptr() % ALIGNMENT == 0 else torch.empty_like(q).copy_(x)
