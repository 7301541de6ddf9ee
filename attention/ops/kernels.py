"""The platform's fused SDPA on 4-D views [N, H, T, D], forward and backward, with log-sum-exp.

    device, dtype                                 kernel
    cpu                                           flash_attention_for_cpu
    cuda, 16 bit, capability >= 8.0, no bias      flash_attention
    cuda, 16 or 32 bit                            efficient_attention (capability >= 5.0)
    cuda, 64 bit                                  plain matrix products

Every kernel takes views as they are (last stride 1), an optional additive `bias` that broadcasts to
[N, H, T, K], and gives `lse` [N, H, T] in float32 (float64 for float64). `is_causal` is only used
where T == K, so that kernels which align it differently agree. Backward takes the *merged* out and
lse of the whole row, which makes each part's gradient exact.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from attention.errors import UnavailableError
from attention.sizes.shape import Windows
from attention.sizes.whole_calls import CHANNELS, has_flash

aten = torch.ops.aten
EFFICIENT_ALIGNMENT = 32
"""The efficient kernel's lse rows are padded to a multiple of this."""
BIAS_ALIGNMENT = 8
"""The efficient kernel wants bias rows that begin at multiples of this many elements."""

ALIGNED = ("flash", "efficient")
TRUST = "ATTENTION_TRUST_KERNELS"
"""The environment variable that, where set, leaves out holding a kernel against its definition."""
TOLERANCE = 0.1
"""How far 16-bit results over 16 channels and 33 tokens may be off; a window off by one is off by more."""


@cache
def steady_heap() -> None:
    """Lets glibc keep freed blocks of up to 32 MiB for the next call instead of handing them back to
    the system, whose fresh pages cost more than the kernels that fill them (docs/explanation/speed.md).
    Freeing one block of that size is the documented way (mallopt(3), dynamic mmap threshold); it is never
    touched, so it takes no memory. Elsewhere this does nothing."""
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def matrix_unit(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies 16-bit matrices of this type in a unit of its own (AMX).
    There the forward kernel copies keys and values into that unit's order."""
    test = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}.get(dtype)
    return test is not None and bool(getattr(torch.cpu, test, lambda: False)())


def choose(x: Tensor, biased: bool) -> str:
    """Name of the kernel for tensors like `x`."""
    if x.device.type == "cpu":
        return "cpu"
    if x.device.type != "cuda":
        raise UnavailableError(
            f"no attention kernel for device {x.device}; this library runs on 'cpu' and 'cuda'"
        )
    if x.dtype == torch.float64:
        return "plain"
    capability = torch.cuda.get_device_capability(x.device)
    if not biased and has_flash(capability, x.shape[-1], x.dtype.itemsize) and flash_is_built():
        return "flash"
    if capability < (8, 0) and x.dtype == torch.bfloat16:
        raise UnavailableError(
            f"no bfloat16 attention kernel on {torch.cuda.get_device_name(x.device)}: it needs compute "
            "capability 8.0; use float16 or float32"
        )
    return "efficient"


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale + bias) v as (out [N, H, T, D], lse [N, H, T])."""
    kernel, dim = choose(q, bias is not None), q.shape[-1]
    if kernel in ALIGNED:
        q, k, v = (_aligned_channels(x) for x in (q, k, v))
    match kernel:
        case "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
                q, k, v, 0.0, causal, attn_mask=bias, scale=scale
            )
        case "flash":
            out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
        case "efficient":
            bias = None if bias is None else aligned_bias(bias, q, k)
            out, lse = aten._scaled_dot_product_efficient_attention(
                q, k, v, bias, True, 0.0, causal, scale=scale
            )[:2]
        case _:
            out, lse = _plain(q, k, v, scale, causal, bias)
    return out[..., :dim], lse[..., : q.shape[2]]


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the part that attends q to k, for out and lse of the whole row."""
    kernel, dim = choose(q, bias is not None), q.shape[-1]
    if kernel in ALIGNED and dim % CHANNELS:
        grad, q, k, v, out = (_aligned_channels(x) for x in (grad, q, k, v, out))
        grads = backward(grad, q, k, v, out, lse, scale=scale, causal=causal, bias=bias)
        dq, dk, dv = (x[..., :dim] for x in grads)
        return dq, dk, dv
    match kernel:
        case "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
                grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
            )
        case "flash":
            rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
            return aten._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
                grad,
                q,
                k,
                v,
                out,
                lse.contiguous(),
                None,
                None,
                q.shape[2],
                k.shape[2],
                0.0,
                causal,
                rng,
                rng[:0],
                scale=scale,
            )
        case "efficient":
            rng = torch.zeros((), dtype=torch.int64, device=q.device)
            return aten._scaled_dot_product_efficient_attention_backward(  # type: ignore[no-any-return]
                grad,
                q,
                k,
                v,
                None if bias is None else aligned_bias(bias, q, k),
                out,
                _padded(lse),
                rng,
                rng,
                0.0,
                [True, True, True, False],
                causal,
                scale=scale,
            )[:3]
        case _:
            return _plain_backward(grad, q, k, v, out, lse, scale, causal, bias)


def windows_of(x: Tensor) -> Windows:
    """The windows that `windowed` takes for tensors like `x`."""
    kernel = choose(x, biased=False)
    if kernel not in ALIGNED:
        return "none"
    windows: Windows = "any" if kernel == "flash" else "causal"
    if os.environ.get(TRUST) or torch.cuda.is_current_stream_capturing():
        return windows
    with torch.device("cpu"):  # whatever tensors are made on by default
        return windows if _windows_are_right(x.device, x.dtype, windows) else "none"


@cache
def flash_is_built() -> bool:
    """Whether this torch has flash attention: some builds for Windows do not."""
    return torch.backends.cuda.is_flash_attention_available()


@cache
def _windows_are_right(device: torch.device, dtype: torch.dtype, windows: Windows) -> bool:
    """Whether `windowed` and its backward do as they say: a small call of each is held against the
    definition, once for a device and type. TRUST leaves that out."""
    generator = torch.Generator().manual_seed(0)
    heads = 4 if windows == "any" else 2
    sizes = ((heads, 33), (2, 40), (2, 40), (heads, 33))  # heads, tokens of q, k, v and the gradient of out
    q, k, v, grad = (torch.randn(1, h, t, 16, generator=generator).to(dtype).double() for h, t in sizes)
    left, right, scale = 7, 2 if windows == "any" else 0, 0.25
    place = torch.arange(33)[:, None] + 7
    key = torch.arange(40)
    bias = torch.zeros(33, 40, dtype=torch.float64)
    bias.masked_fill_((key < place - left) | (key > place + right), -torch.inf)
    wide_k, wide_v = (x.repeat_interleave(heads // 2, 1) for x in (k, v))
    out, lse = _plain(q, wide_k, wide_v, scale, False, bias)
    dq, dk, dv = _plain_backward(grad, q, wide_k, wide_v, out, lse, scale, False, bias)
    expected = (out, lse, dq, *(x.unflatten(1, (2, heads // 2)).sum(2) for x in (dk, dv)))
    q, k, v, grad = (x.to(device, dtype) for x in (q, k, v, grad))
    given_out, given_lse = out.to(device, dtype), lse.float().to(device)
    try:
        forward = windowed(q, k, v, scale=scale, left=left, right=right)
        gradients = windowed_backward(
            grad, q, k, v, given_out, given_lse, scale=scale, left=left, right=right
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # this build or card has no such kernel
        return False
    pairs = zip((*forward, *gradients), expected, strict=True)
    return all(bool((x.double().cpu() - y).abs().max() < TOLERANCE) for x, y in pairs)


def windowed(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [N, H, T, D] over k and v [N, G, K, D], G dividing H, as (out, lse): a query at place t
    sees keys from t + K - T - `left` to t + K - T + `right`, from the first or to the last for None. What a
    kernel takes of that says `windows_of`."""
    dim, queries = q.shape[-1], q.shape[2]
    kernel = choose(q, biased=False)
    q, k, v = (_aligned_channels(x.transpose(1, 2)) for x in (q, k, v))
    if kernel == "flash":
        out, lse = aten._flash_attention_forward(
            q,
            k,
            v,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            left is None and right == 0,
            False,
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )[:2]
    else:
        mask, window = _efficient_window(left, right)
        out, lse = aten._efficient_attention_forward(
            q, k, v, None, None, None, None, None, 0.0, mask, True, scale=scale, window_size=window
        )[:2]
    return out.transpose(1, 2)[..., :dim], lse[..., :queries]


def windowed_backward(
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
    """(dq, dk, dv) of `windowed`, for out and lse of the whole row."""
    dim = q.shape[-1]
    kernel = choose(q, biased=False)
    grad, q, k, v, out = (_aligned_channels(x.transpose(1, 2)) for x in (grad, q, k, v, out))
    if kernel == "flash":
        rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: nothing reads it
        grads = aten._flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            left is None and right == 0,
            rng,
            rng[:0],
            scale=scale,
            window_size_left=left,
            window_size_right=right,
        )
    else:
        rng = torch.empty((), dtype=torch.int64, device=q.device)
        mask, window = _efficient_window(left, right)
        grads = aten._efficient_attention_backward(
            grad,
            q,
            k,
            v,
            None,
            out,
            None,
            None,
            q.shape[1],
            k.shape[1],
            _padded(lse),
            0.0,
            rng,
            rng,
            mask,
            False,
            scale=scale,
            window_size=window,
        )[:3]
    dq, dk, dv = (x.transpose(1, 2)[..., :dim] for x in grads)
    return dq, dk, dv


def _efficient_window(left: int | None, right: int | None) -> tuple[int, int | None]:
    """(mask, window) as the efficient kernel has them: 2 for a causal mask aligned to the end, and how many
    keys a query sees, itself among them."""
    return (0 if right is None else 2), (None if left is None else left + 1)


def _aligned_channels(x: Tensor) -> Tensor:
    """x [N, H, T, D] with zeros up to a multiple of CHANNELS, which change no score and no output."""
    missing = -x.shape[-1] % CHANNELS
    return x if not missing else torch.nn.functional.pad(x, (0, missing))


def aligned_bias(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The bias as the efficient kernel wants it: expanded, in q's dtype, rows aligned. What is one row for
    many is written once."""
    keys = k.shape[2]
    for dim, stride in enumerate(bias.stride()[:-1]):
        if not stride:
            bias = bias.narrow(dim, 0, 1)
    room = -(-keys // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    padded = bias.new_zeros(*bias.shape[:-1], room, dtype=q.dtype)
    padded[..., :keys] = bias
    return padded[..., :keys].expand(*q.shape[:3], keys)


def _padded(lse: Tensor) -> Tensor:
    """lse with rows padded as the efficient kernel wants them; +inf there makes weights zero."""
    queries = lse.shape[-1]
    room = -(-queries // EFFICIENT_ALIGNMENT) * EFFICIENT_ALIGNMENT
    padded = lse.new_full((*lse.shape[:-1], room), torch.inf)
    padded[..., :queries] = lse
    return padded


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, bias: Tensor | None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    if bias is not None:
        scores += bias
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(future, -torch.inf)
    return scores


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, scale, causal, bias)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp_() @ v, lse


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (_scores(q, k, scale, causal, bias) - lse[..., None]).exp_()
    delta = (grad * out).sum(-1, keepdim=True)
    scores = weights * (grad @ v.transpose(-1, -2) - delta) * scale
    return scores @ k, scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad
