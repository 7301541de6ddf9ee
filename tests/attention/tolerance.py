"""How close is close enough: the one place where tests say so.

Errors are relative to the largest value of the float64 oracle. Gradients share one scale, the largest
value of dq, dk and dv together, because some of them may vanish (at one token dq and dk are zero).

float64 is held to fixed bars. Lower precisions are held to what a naive attention in the same dtype
achieves: at most twice its error forward and three times in gradients. Two errors are always allowed:
a few ulps of the dtype, because the naive one may be lucky; and the rounding of the log-sum-exp, which
is kept in single precision by design and tells a weight exp(s - lse) no better than to an ulp of s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORWARD_BAR = 1e-12
GRADIENT_BAR = 1e-10
FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
FLOOR_ULPS = 1.0
LSE_EPS = torch.finfo(torch.float32).eps


def relative_error(x: Tensor, reference: Tensor, scale: float | None = None) -> float:
    """Largest |x - reference| over `scale`, by default the largest |reference|. NaN counts as infinite."""
    scale = largest(reference) if scale is None else scale
    error = float((x.detach().double() - reference.detach().double()).abs().max())
    return math.inf if math.isnan(error) else error / max(scale, torch.finfo(torch.float64).tiny)


def gradient_errors(grads: Sequence[Tensor], reference: Sequence[Tensor]) -> list[float]:
    """Relative error of each gradient, all on the scale of the largest."""
    scale = max(largest(x) for x in reference)
    return [relative_error(x, ref, scale) for x, ref in zip(grads, reference, strict=True)]


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def allowed(naive_error: float, factor: float, dtype: torch.dtype, largest_score: float) -> float:
    """The relative error that the low-precision rule allows."""
    return factor * naive_error + FLOOR_ULPS * torch.finfo(dtype).eps + LSE_EPS * largest_score


def largest_score(q: Tensor, k: Tensor, scale: float) -> float:
    """Largest |q k^T| scale over all pairs of q [B, S, H, D] and k [B, S, G, D]."""
    keys = k.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return largest(torch.einsum("bqhd,bkhd->bhqk", q.double(), keys)) * scale


def naive_attention(q: Tensor, k: Tensor, v: Tensor, multiplicity: Tensor, scale: float) -> Tensor:
    """Masked softmax((q k^T) scale + log M) v, every step in the dtype of q [B, S, H, D].

    `multiplicity` is [H, S, S] or [B, H, S, S]; a row of it that is zero everywhere gives zero.
    """
    repeat = q.shape[2] // k.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    empty = (multiplicity == 0).all(dim=-1, keepdim=True)
    bias = multiplicity.log().masked_fill(empty, 0.0).to(q.dtype)
    weights = ((query @ key.transpose(-1, -2)) * scale + bias).softmax(dim=-1)
    return (weights.masked_fill(empty, 0.0) @ value).transpose(1, 2)


def forward_and_gradients(
    attention: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output of `attention` at `inputs` and the inputs' gradients for `grad` of the output."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad.to(out.dtype))


def assert_as_exact_as_naive(
    ours: tuple[Tensor, Sequence[Tensor]],
    naive: tuple[Tensor, Sequence[Tensor]],
    reference: tuple[Tensor, Sequence[Tensor]],
    largest_score: float,
) -> None:
    """The rule, over (out, (dq, dk, dv)) of each."""
    dtype = ours[0].dtype
    errors, bars = (
        [relative_error(x[0], reference[0]), *gradient_errors(x[1], reference[1])] for x in (ours, naive)
    )
    factors = (FORWARD_FACTOR, *[GRADIENT_FACTOR] * 3)
    for name, error, bar, factor in zip(("out", "dq", "dk", "dv"), errors, bars, factors, strict=True):
        limit = allowed(bar, factor, dtype, largest_score)
        assert error <= limit, f"{name}: error {error:.2e} of {limit:.2e} allowed, naive {bar:.2e}"


def assert_exact(ours: tuple[Tensor, Sequence[Tensor]], reference: tuple[Tensor, Sequence[Tensor]]) -> None:
    """The float64 bars, over (out, (dq, dk, dv)) of each."""
    error = relative_error(ours[0], reference[0])
    assert error <= FORWARD_BAR, f"out: error {error:.2e}"
    for name, error in zip(("dq", "dk", "dv"), gradient_errors(ours[1], reference[1]), strict=True):
        assert error <= GRADIENT_BAR, f"{name}: error {error:.2e}"
