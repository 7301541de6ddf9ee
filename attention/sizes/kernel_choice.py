"""Which kernel an attention runs on, and why, for who asks before a call. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from attention.config import AttentionConfig, Backend, PatternType, Variant
from attention.sizes.arrays import up
from attention.sizes.list_calls import forward_cut_of, list_calls
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import (
    CHANNELS,
    CUDNN_CAPABILITIES,
    CUDNN_CHANNELS,
    FLASH_CHANNELS,
    WholeCall,
    by_cudnn,
    forward_cut,
    has_cudnn,
    has_flash,
    whole_calls,
)

ChosenKernel = Literal["cpu", "flash", "flash 3", "flash 4", "cudnn", "efficient", "plain", "flex"]
CALLED = {
    "cpu": "torch's fused attention for CPUs",
    "flash": "flash attention",
    "flash 3": "FlashAttention 3, activated in torch",
    "flash 4": "FlashAttention 4, activated in torch",
    "cudnn": "cuDNN's attention",
    "efficient": "memory-efficient attention",
    "plain": "plain matrix products",
    "flex": "compiled FlexAttention",
}
ON_CUDA_ONLY = "it runs on CUDA only"
ONE_KERNEL = ("flash", "cudnn")
"""Backends that are one kernel."""
ACTIVATED: dict[str, ChosenKernel] = {"FA3": "flash 3", "FA4": "flash 4"}
"""What `torch.nn.attention.activate_flash_attention_impl` calls them."""


class KernelChoice(NamedTuple):
    """What runs an attention."""

    kernel: ChosenKernel
    why: str
    calls: int | None
    """Kernel calls of a forward pass over one batch item, at most where lists are cut; None where a program
    of tiles says as it goes."""

    def __str__(self) -> str:
        how = "tile by tile" if self.calls is None else f"{self.calls:,} call{'s' * (self.calls != 1)}"
        return f"{CALLED[self.kernel]}, {how}: {self.why}"


def kernel_choice(
    config: AttentionConfig,
    shape: Shape,
    capability: tuple[int, int] | None,
    *,
    flex: bool,
    flash_is_built: bool = True,
    activated: str | None = None,
) -> KernelChoice:
    """The choice for a call of this shape. `capability` is the card's, None on a CPU; `flex`: whether
    compiled FlexAttention runs it; `activated`: what torch was told to take for flash attention."""
    if flex:
        asked = config.backend == "flex"
        why = "backend='flex'" if asked else "backend='auto', and its lists of blocks are short"
        return KernelChoice("flex", why, 1)
    kernel, why = _kernel(shape, capability, flash_is_built)
    calls = whole_calls(config, shape)
    if kernel == "flash" and activated is not None:
        kernel, why = ACTIVATED.get(activated, kernel), f"{activated} is active; {why}"
    if calls is not None and shape.cudnn_from:
        kernel, why = _of_calls([call for call in calls if call.exists], kernel, why, shape)
    return KernelChoice(kernel, why, _calls(config, shape, calls))


def unfit_kernel(
    config: AttentionConfig, head_dim: int, itemsize: int, capability: tuple[int, int] | None
) -> str | None:
    """Why an attention cannot run on the one kernel that `config.backend` asks for; None if it can, or if
    none is asked for. `capability` is the card's, None on a CPU."""
    kind = config.pattern.pattern_type if config.pattern else None
    return unfit_attention(config.backend, config.variant, kind) or unfit_card(
        config.backend, head_dim, itemsize, capability
    )


def unfit_attention(backend: Backend, variant: Variant, kind: PatternType | None) -> str | None:
    """Why the one kernel of a backend computes no such attention on any card; None if it does."""
    if backend not in ONE_KERNEL:
        return None
    if variant == "adaptive" or kind == "dilated_sparse":
        return "it takes no lists of blocks, of which adaptive and dilated_sparse are made"
    if backend == "cudnn" and kind is not None:
        return "it has no windows; those are flash attention's"
    return None


def unfit_card(
    backend: Backend, head_dim: int, itemsize: int, capability: tuple[int, int] | None
) -> str | None:
    """Why the one kernel of a backend does not run on a card, or not with such numbers; None if it does."""
    if backend not in ONE_KERNEL:
        return None
    if capability is None:
        return ON_CUDA_ONLY
    if itemsize != 2:
        return "it takes float16 and bfloat16 alone"
    card = f"{capability[0]}.{capability[1]}"
    if backend == "cudnn":
        if capability[0] not in CUDNN_CAPABILITIES:
            return f"it is for compute capability 9.0 and 10.x, and this is {card}"
        fits = has_cudnn(capability, head_dim, itemsize)
        return None if fits else f"it is given up to {CUDNN_CHANNELS} channels, not {head_dim}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and this is {card}"
    if not has_flash(capability, head_dim, itemsize):
        return f"it does not take {head_dim} channels with compute capability {card}"
    return None


def _of_calls(
    calls: list[WholeCall], kernel: ChosenKernel, why: str, shape: Shape
) -> tuple[ChosenKernel, str]:
    """The kernel of the call with most queries and keys, where cuDNN's takes some of the calls."""
    largest = max(calls, key=lambda call: call.queries * call.keys)
    if not by_cudnn(largest, shape):
        return kernel, why
    why += ", where torch takes it before flash attention"
    if not all(by_cudnn(call, shape) for call in calls):
        why += f"; {CALLED[kernel]} for short calls and windows"
    return "cudnn", why


def _kernel(
    shape: Shape, capability: tuple[int, int] | None, flash_is_built: bool
) -> tuple[ChosenKernel, str]:
    """See `attention.ops.kernels.choose`."""
    if capability is None:
        return "cpu", "the tensors are on a CPU"
    card = f"compute capability {capability[0]}.{capability[1]}"
    if shape.itemsize == 8:
        return "plain", "no fused kernel takes float64"
    if shape.itemsize == 4:
        return "efficient", "flash attention does not take float32"
    if capability < (8, 0):
        return "efficient", f"flash attention needs compute capability 8.0, this is {card}"
    padded = up(shape.head_dim, CHANNELS)
    if padded > FLASH_CHANNELS:
        return "efficient", f"flash attention takes up to {FLASH_CHANNELS} channels, not {shape.head_dim}"
    if not has_flash(capability, shape.head_dim, shape.itemsize):
        return "efficient", f"flash attention does not train {shape.head_dim} channels on {card}"
    if not flash_is_built:
        return "efficient", "this torch was built without flash attention"
    return "flash", f"16 bits and {shape.head_dim} channels on {card}"


def _calls(config: AttentionConfig, shape: Shape, calls: tuple[WholeCall, ...] | None) -> int | None:
    lists = list_calls(config, shape)
    if lists is not None:
        over_lists = (
            forward_cut_of(lists, group, shape).number(group, lists.lanes) for group in lists.groups
        )
        return _parts(lists.own, shape) + sum(over_lists)
    if calls is None:
        if shape.causal and shape.origin:
            return None  # a triangle and what comes before it
        branches = ((shape.seq, 1),) if config.variant == "dense" else shape.within(config.branches)
        return 1 if config.pattern is None and shape.is_whole(branches) else None
    return _parts(calls, shape)


def _parts(calls: tuple[WholeCall, ...], shape: Shape) -> int:
    """Kernel calls that whole calls are."""
    total = 0
    for call in calls:
        if call.exists:
            cut = forward_cut(call, shape)
            for queries, keys in call.spans(shape):
                slices = -(-queries.length // min(cut.queries, queries.length))
                total += -(-queries.batch // cut.views) * -(-keys.heads // cut.kv_heads) * slices
    return total
