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
from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.attention
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
        q, k, v = (aligned_channels(x) for x in (q, k, v))
    match kernel:
        case "cpu":
            # The same operator as in `aten`, in less of the host's time.
            return torch._scaled_dot_product_flash_attention_for_cpu(
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
        grad, q, k, v, out = (aligned_channels(x) for x in (grad, q, k, v, out))
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
        return windows if _windows_are_right(x.device, x.dtype, windows, activated_flash()) else "none"


def cut_windows_of(x: Tensor) -> Windows:
    """`windows_of`, where there are fewer queries than keys, or sequences one behind the other."""
    windows = windows_of(x)
    if windows == "none" or os.environ.get(TRUST) or torch.cuda.is_current_stream_capturing():
        return windows
    with torch.device("cpu"):
        return windows if _few_queries_are_right(x.device, x.dtype, windows, activated_flash()) else "none"


@cache
def flash_is_built() -> bool:
    """Whether this torch has flash attention: some builds for Windows do not."""
    return torch.backends.cuda.is_flash_attention_available()


def activated_flash() -> str | None:
    """The flash attention that torch was told to take in place of its own, `FA3` or `FA4`; None for its own,
    and where torch is too old to have a choice."""
    chosen = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return None if chosen is None else chosen()


@cache
def _windows_are_right(
    device: torch.device, dtype: torch.dtype, windows: Windows, activated: str | None = None
) -> bool:
    """Whether `windowed` and its backward do as they say: a small call of each is held against the
    definition, once for a device, a type and a flash attention that torch was told to take. TRUST leaves
    that out."""
    heads, right = (4, 2) if windows == "any" else (2, 0)
    agree = is_right(
        windowed, windowed_backward, device, dtype, heads=heads, queries=33, channels=16, left=7, right=right
    )
    return agree and (windows != "any" or _sequences_are_right(device, dtype))


@cache
def _few_queries_are_right(
    device: torch.device, dtype: torch.dtype, windows: Windows, activated: str | None = None
) -> bool:
    """`_windows_are_right` of fewer queries than keys, of a single one, and of sequences under a mask."""
    heads = 4 if windows == "any" else 2
    return all(
        is_right(
            windowed,
            windowed_backward,
            device,
            dtype,
            heads=heads,
            queries=queries,
            channels=16,
            left=None,
            right=right,
        )
        for queries, right in ((33, 0), (1, None))
    ) and (
        windows != "any" or all(_sequences_are_right(device, dtype, *sides) for sides in ((None, 0), (4, 2)))
    )


def is_right(
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    heads: int,
    queries: int,
    channels: int,
    left: int | None,
    right: int | None,
) -> bool:
    """Whether functions like `windowed` and `windowed_backward` do as they say on a device: one small call of
    each, with 40 keys of two kv heads, is held against the definition."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, queries), (2, 40), (2, 40), (heads, queries))  # of q, k, v and the gradient of out
    q, k, v, grad = (torch.randn(1, h, t, channels, generator=generator).to(dtype).double() for h, t in sizes)
    scale = channels**-0.5
    bias = _hidden(queries, 40, left, right)
    wide_k, wide_v = (x.repeat_interleave(heads // 2, 1) for x in (k, v))
    out, lse = _plain(q, wide_k, wide_v, scale, False, bias)
    dq, dk, dv = _plain_backward(grad, q, wide_k, wide_v, out, lse, scale, False, bias)
    expected = (out, lse, dq, *(x.unflatten(1, (2, heads // 2)).sum(2) for x in (dk, dv)))
    q, k, v, grad = (x.to(device, dtype) for x in (q, k, v, grad))
    given_out, given_lse = out.to(device, dtype), lse.float().to(device)
    options = {"scale": scale, "left": left, "right": right}
    try:
        results = forward(q, k, v, **options)
        gradients = backward(grad, q, k, v, given_out, given_lse, **options)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError):  # this build or card has no such kernel; FlashAttention 4 asserts
        return False
    pairs = zip((*results, *gradients), expected, strict=True)
    return all(bool((x.double().cpu() - y).abs().max() < TOLERANCE) for x, y in pairs)


def _hidden(queries: int, keys: int, left: int | None, right: int | None) -> Tensor:
    """[queries, keys], minus infinity where a mask as those of `windowed` hides a key, else 0."""
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    bias = torch.zeros(queries, keys, dtype=torch.float64)
    if left is not None:
        bias.masked_fill_(key < place - left, -torch.inf)
    if right is not None:
        bias.masked_fill_(key > place + right, -torch.inf)
    return bias


def _sequences_are_right(
    device: torch.device, dtype: torch.dtype, left: int | None = None, right: int | None = None
) -> bool:
    """`_windows_are_right` of `ragged` and its backward, for sequences some of which have no queries."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, scale = (9, 0, 5, 0), (20, 3, 33, 0), 0.25
    sizes = (sum(queries), sum(keys), sum(keys), sum(queries))
    q, k, v, grad = (torch.randn(t, 1, 16, generator=generator).to(dtype).double() for t in sizes)
    outs: list[list[Tensor]] = []
    for (t, t_end), (c, c_end) in zip(_ranges(queries), _ranges(keys), strict=True):
        qs, ks, vs, grads = (
            x[first:last].transpose(0, 1)[None]
            for x, first, last in ((q, t, t_end), (k, c, c_end), (v, c, c_end), (grad, t, t_end))
        )
        bias = _hidden(qs.shape[2], ks.shape[2], left, right)
        out, lse = _plain(qs, ks, vs, scale, False, bias)
        parts = (out, lse[..., None], *_plain_backward(grads, qs, ks, vs, out, lse, scale, False, bias))
        outs.append([x[0].transpose(0, 1) for x in parts])
    out, lse, dq, dk, dv = (torch.cat(parts) for parts in zip(*outs, strict=True))
    q, k, v, grad = (x.to(device, dtype) for x in (q, k, v, grad))
    begins = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys)]
    sequences = Sequences(begins[0].to(device), begins[1].to(device), max(queries), max(keys))
    given_out, given_lse = out.to(device, dtype), lse[..., 0].t().float().to(device)
    try:
        forward = ragged(q, k, v, sequences, scale=scale, left=left, right=right)
        gradients = ragged_backward(
            grad, q, k, v, given_out, given_lse, sequences, scale=scale, left=left, right=right
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError):
        return False
    pairs = zip((*forward, *gradients), (out, lse[..., 0].t(), dq, dk, dv), strict=True)
    return all(bool((x.double().cpu() - y).abs().max() < TOLERANCE) for x, y in pairs)


def _ranges(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(first, one past the last) place of each of so many sequences that lie one behind the other."""
    return list(pairwise([0, *accumulate(lengths)]))


def windowed(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, left: int | None, right: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [N, H, T, D] over k and v [N, G, K, D], G dividing H, as (out, lse): a query at place t
    sees keys from t + K - T - `left` to t + K - T + `right`, from the first or to the last for None. What a
    kernel takes of that says `windows_of`; one that takes nothing behind a query takes what is from its place
    on, of equally many queries and keys, in reverse order."""
    dim, queries = q.shape[-1], q.shape[2]
    kernel = choose(q, biased=False)
    if kernel == "efficient" and right is None and left is not None:
        q, k, v = (_turned(x) for x in (q, k, v))
        out, lse = windowed(q, k, v, scale=scale, left=None, right=left)
        del q, k, v  # before the results are turned round
        return out[..., :dim].flip(2), lse.flip(2)
    q, k, v = (aligned_channels(x.transpose(1, 2)) for x in (q, k, v))
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
    if kernel == "efficient" and right is None and left is not None:
        grad, q, k, v, out = (_turned(x) for x in (grad, q, k, v, out))
        lse = lse.flip(2)
        grads = windowed_backward(grad, q, k, v, out, lse, scale=scale, left=None, right=left)
        del grad, q, k, v, out, lse
        dq, dk, dv = (x[..., :dim].flip(2) for x in grads)
        return dq, dk, dv
    grad, q, k, v, out = (aligned_channels(x.transpose(1, 2)) for x in (grad, q, k, v, out))
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


class Sequences(NamedTuple):
    """Where sequences of different lengths begin that lie one behind the other; some may have no queries,
    those with queries have keys."""

    queries: Tensor
    """int32 [N + 1], from 0 to the number of queries."""
    keys: Tensor
    most_queries: int
    """No sequence has more."""
    most_keys: int


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    *,
    scale: float,
    left: int | None = None,
    right: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence's queries to its keys: q [T, H, D] over k and v [K, G, D] as (out [T, H, D],
    lse [H, T]), where `windows_of` is "any"; masks as those of `windowed`."""
    dim = q.shape[-1]
    q, k, v = (aligned_channels(x) for x in (q, k, v))
    out, lse = aten._flash_attention_forward(
        q,
        k,
        v,
        sequences.queries,
        sequences.keys,
        sequences.most_queries,
        sequences.most_keys,
        0.0,
        left is None and right == 0,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )[:2]
    return out[..., :dim], lse


def ragged_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    *,
    scale: float,
    left: int | None = None,
    right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `ragged`, for out and lse of the whole row. Keys of a sequence without queries have
    zeros."""
    dim = q.shape[-1]
    grad, q, k, v, out = (aligned_channels(x) for x in (grad, q, k, v, out))
    rng = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: nothing reads it
    grads = aten._flash_attention_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        sequences.queries,
        sequences.keys,
        sequences.most_queries,
        sequences.most_keys,
        0.0,
        left is None and right == 0,
        rng,
        rng[:0],
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )
    dq, dk, dv = (x[..., :dim] for x in grads)
    return dq, dk, dv


def _efficient_window(left: int | None, right: int | None) -> tuple[int, int | None]:
    """(mask, window) as the efficient kernel has them: 2 for a causal mask aligned to the end, and how many
    keys a query sees, itself among them."""
    return (0 if right is None else 2), (None if left is None else left + 1)


def _turned(x: Tensor) -> Tensor:
    """x [N, H, T, D] with T in reverse order; channels are aligned first, so that one copy is left of two."""
    return aligned_channels(x.transpose(1, 2)).flip(1).transpose(1, 2)


def aligned_channels(x: Tensor) -> Tensor:
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
