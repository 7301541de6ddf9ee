"""Which kernel an attention runs on, and why, for who asks before a call. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from attention.config import AttentionConfig
from attention.sizes.arrays import up
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import CHANNELS, FLASH_CHANNELS, forward_cut, has_flash, whole_calls

ChosenKernel = Literal["cpu", "flash", "efficient", "plain", "flex"]
CALLED = {
    "cpu": "torch's fused attention for CPUs",
    "flash": "flash attention",
    "efficient": "memory-efficient attention",
    "plain": "plain matrix products",
    "flex": "compiled FlexAttention",
}


class KernelChoice(NamedTuple):
    """What runs an attention."""

    kernel: ChosenKernel
    why: str
    calls: int | None
    """Kernel calls of a forward pass over one batch item; None where a program of tiles says as it goes."""

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
) -> KernelChoice:
    """The choice for a call of this shape. `capability` is the card's, None on a CPU; `flex`: whether
    compiled FlexAttention runs it."""
    if flex:
        asked = config.backend == "flex"
        why = "backend='flex'" if asked else "backend='auto', and its lists of blocks are short"
        return KernelChoice("flex", why, 1)
    kernel, why = _kernel(shape, capability, flash_is_built)
    return KernelChoice(kernel, why, _calls(config, shape))


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


def _calls(config: AttentionConfig, shape: Shape) -> int | None:
    calls = whole_calls(config, shape)
    if calls is None:
        branches = ((shape.seq, 1),) if config.variant == "dense" else shape.within(config.branches)
        return 1 if config.pattern is None and shape.is_whole(branches) else None
    total = 0
    for call in calls:
        if call.exists:
            cut = forward_cut(call, shape)
            for queries, keys in call.spans(shape):
                total += -(-queries.batch // cut.views) * -(-keys.heads // cut.kv_heads)
    return total
