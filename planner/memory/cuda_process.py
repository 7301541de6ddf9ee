"""The device's share of memory: what a run holds beside the attention's own tensors. Imports no torch.

Outside the caching allocator: the CUDA context, the display, other users of the card. Inside: workspaces
of cuBLAS; the scratch of fused kernels is in `cuda_kernels.py`. Every line names its source, and says
`judgement` or `assumption` where nobody measured. Bytes are integer arithmetic, so that sizes may be ints
or NumPy int64 arrays; they are what is asked of the allocator, which rounds to 512.

Letters: B batch, H query heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from attention.errors import ConfigError
from attention.sizes.arrays import Count

Display = Literal["headless", "desktop"]

MIB: Final = 1 << 20
FLOAT32: Final = 4

CONTEXT_BYTES: Final = 644_245_095
"""0.6 GiB: the context where none was measured."""
DESKTOP_BYTES: Final = 966_367_642
"""0.9 GiB: a desktop with a browser."""
_CONTEXT_SOURCE = (
    "judgement: 0.6 GiB, no figure for this architecture; seen elsewhere are 287 MB with lazy and 667 MB "
    "with eager loading (pytorch #86509) and 0.13 GiB on the small RTX A2000"
)
_CONTEXT = {
    "Ada": (426 * MIB, "seen elsewhere: 426 MiB on an RTX 6000 Ada with torch 2.10"),
    "Blackwell": (635 * MIB, "seen elsewhere: 0.62 GiB on an RTX 5090"),
}
_DISPLAY = {
    "headless": (0, "judgement: nothing is drawn on this card"),
    "desktop": (DESKTOP_BYTES, "judgement: 0.9 GiB; a Linux desktop had 692 MiB (StackOverflow 70074789)"),
}


@dataclass(frozen=True)
class DeviceLine:
    """One named share of memory."""

    name: str
    """The holder of this memory."""
    component: str
    """The component in a breakdown: `context` or `workspace`."""
    bytes: Count
    """Bytes; an array if the sizes were arrays."""
    source: str
    """Where the figure is from; begins with `judgement` or `assumption` where it is one."""
    inside_allocator: bool
    """Whether PyTorch's caching allocator holds it."""


def total(lines: Iterable[DeviceLine]) -> Count:
    """Bytes of all lines together."""
    count: Count = 0
    for line in lines:
        count = count + line.bytes
    return count


def device_lines(
    architecture: str,
    *,
    display: Display = "headless",
    others_bytes: int = 0,
    context_bytes: int | None = None,
) -> tuple[DeviceLine, ...]:
    """The memory outside the allocator: context, display, other users of the card.

    `context_bytes` is a measured context, `others_bytes` what the user says others hold. Memory that NCCL
    takes (0.5 GB and more a group) is not here.
    """
    if display not in _DISPLAY:
        raise ConfigError(f"display must be 'headless' or 'desktop', got {display!r}")
    for what, count in (("others_bytes", others_bytes), ("context_bytes", context_bytes or 0)):
        if count < 0:
            raise ConfigError(f"{what} must not be negative, got {count}")
    context, source = _CONTEXT.get(architecture, (CONTEXT_BYTES, _CONTEXT_SOURCE))
    if context_bytes is not None:
        context, source = context_bytes, "measured on this device"
    drawn, why = _DISPLAY[display]
    return (
        DeviceLine("CUDA context", "context", context, source, False),
        DeviceLine("display", "context", drawn, why, False),
        DeviceLine("other processes", "context", others_bytes, "as given", False),
    )


def blas_workspace(capability: tuple[int, int]) -> DeviceLine:
    """cuBLAS's workspace, which a thread's first matrix product takes and which stays: backward, which runs
    in a thread of autograd's, takes one of its own. cuBLASLt works in the same.

    `CUBLAS_WORKSPACE_CONFIG` is taken to be unset.
    """
    large = capability[0] in (9, 10, 12)  # not Thor's 11, by dry runs of torch 2.13
    each = 32 * MIB if large else 4096 * 1024 * 2 + 16 * 1024 * 8
    source = "CUDABlas handle pool of PyTorch: " + (
        "32 MiB for Hopper, and for Blackwell since pytorch #175344 (8,519,680 bytes before)"
        if large
        else ":4096:2:16:8, 8,519,680 bytes"
    )
    return DeviceLine("cuBLAS workspace", "workspace", each, source, True)
