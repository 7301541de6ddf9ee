"""Tensors against configuration, checked before anything is allocated."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.documents import Lengths
from attention.errors import InputError, UnavailableError
from attention.features import NAMES, UNKNOWN, Feature, together, unfit_feature
from attention.ops import cudnn, kernels
from attention.sizes.kernel_choice import ONE_KERNEL, unfit_kernel
from attention.sizes.release import cpu_takes_groups
from attention.sizes.shape import Shape, Windows, chunk_tokens
from attention.sizes.whole_calls import windows_of_cut

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse_transforms() -> None:
    """Raises UnavailableError inside of what would have to trace a program of views, or map over it."""
    if torch._C._are_functorch_transforms_active():
        raise UnavailableError(
            "this attention cannot run under torch.func (vmap, grad, jvp and so on): give a batch as the "
            "first dimension of q, k and v, and take gradients by torch.autograd"
        )
    if torch.compiler.is_compiling():
        raise UnavailableError(
            "this attention cannot be exported: its program depends on sizes and values; keep it out of "
            "torch.export (under torch.compile it runs as it is, between the compiled parts)"
        )


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raises an error for arguments that no call here has: by name for what other attentions know."""
    for name in options:
        if name in UNKNOWN:
            raise UnavailableError(f"this attention does not take {name}=: {UNKNOWN[name]}")
    if options:
        raise TypeError(f"this attention got an unexpected argument {next(iter(options))!r}")


def check_features(
    config: AttentionConfig, given: Mapping[Feature, bool], sinks: Any, heads: int, device: torch.device
) -> None:
    """Raises InputError unless sinks, if there are any, are a logit for each head, and UnavailableError for
    features that the attention does not take, or not together. `given`: which of them a call has."""
    if sinks is not None:
        _check_sinks(sinks, heads, device)
    features: list[Feature] = [feature for feature, there in given.items() if there]
    for feature in features:
        if why := unfit_feature(config, feature):
            raise UnavailableError(f"{NAMES[feature]}: not taken by this attention: {why}")
    for one, other in combinations(features, 2):
        if why := together(one, other):
            raise UnavailableError(f"{NAMES[one]} and {NAMES[other]} do not go together: {why}")


def _check_sinks(sinks: Any, heads: int, device: torch.device) -> None:
    """Raises InputError unless sinks are a logit for each head."""
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        what = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
        raise InputError(f"sinks must be a tensor of floating-point numbers, one a head; got {what}")
    if tuple(sinks.shape) != (heads,):
        raise InputError(f"sinks must be [heads], a logit for each of {heads}, got {list(sinks.shape)}")
    if sinks.device != device:
        raise InputError(f"sinks are on {sinks.device}, q on {device}; move one of them")


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: AttentionConfig,
    is_causal: Any = False,
    weights: Any = False,
    documents: bool = False,
    sinks: Any = None,
) -> None:
    """Raises InputError unless q [B, Q, H, D] and k, v [B, S, G, D], Q <= S, go together and fit `config`,
    and UnavailableError for what it does not take. `documents`: whether there are any."""
    refuse_transforms()
    if not isinstance(is_causal, bool):
        what = "a tensor" if isinstance(is_causal, Tensor) else repr(is_causal)
        raise InputError(f"is_causal must be True or False, got {what}; masks are given by the config")
    if not isinstance(weights, bool):
        raise InputError(f"return_attention_weights must be True or False, got {weights!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise InputError(
                f"{name} must be [batch, seq, heads, head_dim], got {x.dim()} dimensions {tuple(x.shape)}"
            )
        if 0 in x.shape:
            raise InputError(f"{name} must not be empty, got shape {tuple(x.shape)}; pass at least 1 token")
        if x.dtype not in DTYPES:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise InputError(f"{name} must be one of {wanted}, got {str(x.dtype).removeprefix('torch.')}")
    for what, values in (
        ("dtype", [x.dtype for x in (q, k, v)]),
        ("device", [x.device for x in (q, k, v)]),
        ("batch", [x.shape[0] for x in (q, k, v)]),
    ):
        if len(set(values)) > 1:
            raise InputError(f"q, k and v must agree in {what}, got {', '.join(map(str, values))}")
    if q.shape[3] != k.shape[3]:
        raise InputError(f"q and k must agree in head_dim, got {q.shape[3]} and {k.shape[3]}")
    if v.shape[3] != q.shape[3]:
        raise InputError(
            f"v must have the head_dim of q and k, {q.shape[3]}, got {v.shape[3]}: values of another size, "
            "as latent attention (MLA) has them, are not taken; pad the narrower with zeros (where that is q "
            "and k, give the config its scale)"
        )
    if k.shape[1] != v.shape[1]:
        raise InputError(f"k and v must have equally many tokens, got {k.shape[1]} and {v.shape[1]}")
    if q.shape[1] > k.shape[1]:
        raise InputError(
            f"q has more tokens than k and v, {q.shape[1]} and {k.shape[1]}: queries are the last tokens of "
            "the sequence, whose keys and values are all in k and v (those of a cache before the new ones)"
        )
    if k.shape[2] != v.shape[2]:
        raise InputError(f"k and v must have equally many heads, got {k.shape[2]} and {v.shape[2]}")
    if q.shape[2] % k.shape[2]:
        raise InputError(
            f"kv heads must divide query heads, got {k.shape[2]} kv heads for {q.shape[2]} query heads"
        )
    kernels.choose(q, biased=False)  # a device without a kernel is refused here, not half way through
    _refuse_kernel(q, k, config, is_causal)
    if config.adaptive and (q.shape[2], q.shape[3]) != (config.adaptive.num_heads, config.adaptive.head_dim):
        raise InputError(
            f"this adaptive attention was built for (heads, head_dim) = "
            f"{(config.adaptive.num_heads, config.adaptive.head_dim)}, got {(q.shape[2], q.shape[3])}"
        )
    given: dict[Feature, bool] = {
        "queries": q.shape[1] < k.shape[1],
        "documents": documents,
        "sinks": sinks is not None,
        "weights": weights,
    }
    check_features(config, given, sinks, q.shape[2], q.device)


def _refuse_kernel(q: Tensor, k: Tensor, config: AttentionConfig, is_causal: bool) -> None:
    """Raises UnavailableError where the one kernel that the backend asks for cannot run."""
    if config.backend not in ONE_KERNEL:
        return
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None
    why = unfit_kernel(config, q.shape[3], q.element_size(), capability)
    if why is None and not kernels.flash_is_built():
        why = "this torch was built without flash attention"
    if why is None and kernels.windows_of(q) != "any":
        why = "a small call of flash attention on this device did not agree with its definition"
    if why is None and config.backend == "cudnn":
        why = cudnn.unavailable(q, k, is_causal)
    if why is not None:
        raise UnavailableError(f"backend={config.backend!r} cannot serve this: {why}; use backend='auto'")


def signature(
    q: Any, k: Any, v: Any, is_causal: Any, weights: Any, lengths: Lengths | None = None, sinks: Any = None
) -> Hashable | None:
    """All of its arguments that `check` and `shape_of` read, but for the device's kernels; None for what is
    no call. Calls of one signature are refused alike or not at all. `lengths`: of the call's documents."""
    if not (isinstance(is_causal, bool) and isinstance(weights, bool)):
        return None  # numbers are equal to bools
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return None
    types = (q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
    if sinks is None and lengths is None:
        return (q.shape, k.shape, v.shape, *types, is_causal, weights)
    if not (sinks is None or isinstance(sinks, Tensor)):
        return None
    of_sinks = None if sinks is None else (sinks.dtype, sinks.shape, sinks.device)
    return (q.shape, k.shape, v.shape, *types, is_causal, weights, lengths, of_sinks)


def _windows(q: Tensor, config: AttentionConfig, *, cut: bool, documents: bool) -> Windows:
    if not cut:
        return kernels.windows_of(q)
    pattern = config.pattern
    fields: dict[str, Any] = {"kind": pattern.pattern_type, "edges": pattern.edges} if pattern else {}
    return windows_of_cut(kernels.cut_windows_of(q), config.variant, **fields, documents=documents)


def shape_of(
    q: Tensor,
    k: Tensor,
    config: AttentionConfig,
    is_causal: bool,
    *,
    documents: bool = False,
    first_head: int = 0,
) -> Shape:
    """The sizes that a program depends on. `documents`: whether there are several; `first_head`: see `Shape`.
    A single query, the last, is past nothing."""
    cpu = q.device.type == "cpu"
    cut = documents or q.shape[1] < k.shape[1]
    if cut and q.shape[1] == 1 and config.variant in ("dense", "dilated"):
        is_causal = False
    sixteen = cpu and q.element_size() == 2
    packs = sixteen and kernels.matrix_unit(q.dtype)
    sizes = {
        "seq": k.shape[1],
        "origin": k.shape[1] - q.shape[1],
        "heads": q.shape[2],
        "kv_heads": k.shape[2],
        "head_dim": q.shape[3],
        "itemsize": q.element_size(),
        "workspace": config.workspace_bytes,
    }
    return Shape(
        **sizes,
        causal=is_causal,
        chunk=chunk_tokens(cpu=cpu, **sizes),
        packs=packs,
        widens=sixteen,
        windows=_windows(q, config, cut=cut, documents=documents),
        groups=cpu and not packs and cpu_takes_groups(),
        cudnn_from=0 if cut else cudnn.takes_from(q, k, is_causal, config.backend),
        first_head=first_head,
    )
