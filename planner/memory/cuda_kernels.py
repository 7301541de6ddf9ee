"""Memory that kernels allocate on a GPU beside their output. Imports no torch."""

from __future__ import annotations

from typing import Literal

from attention.errors import ConfigError
from attention.sizes.arrays import Count, ceil_div, maximum, minimum, up
from planner.memory.cuda_process import FLOAT32, DeviceLine

KernelName = Literal["flash", "efficient", "flex", "plain"]

_FLASH = "flash_api.cpp of PyTorch's flash attention 2"
_FLEX = "Inductor's flex_attention lowering, torch 2.13"
_EFFICIENT = "attention_backward.cu and kernel_backward.h of PyTorch's memory-efficient attention"


def forward_lines(
    kernel: KernelName,
    *,
    batch: Count,
    heads: Count,
    queries: Count,
    keys: Count,
    head_dim: Count,
    itemsize: int,
) -> tuple[DeviceLine, ...]:
    """Memory that one forward call of a kernel allocates beside its output.

    Omitted: flash attention's split-key accumulators, which it uses only where B x H x Q / 64 leaves most
    multiprocessors idle, and copies of operands whose last stride is not 1 or whose D is not a multiple
    of 8.
    """
    rows = batch * heads * queries
    if kernel == "flash":
        return (_scratch("log-sum-exp", FLOAT32 * rows, f"float32 B H Q; {_FLASH}"),)
    if kernel == "efficient":
        padded = FLOAT32 * batch * heads * up(queries, 32)
        sums = FLOAT32 * rows * head_dim * (head_dim > 128) if itemsize == 2 else 0 * rows
        return (
            _scratch("log-sum-exp", padded, "float32 B H Q, Q rounded up to 32; kernel_forward.h kAlignLSE"),
            _scratch("output sums", sums, "float32 B H Q D in 16 bits where D > 128; kernel_forward.h"),
        )
    if kernel == "flex":
        return (
            _scratch("log-sum-exp", FLOAT32 * rows, f"float32 B H Q; {_FLEX}"),
            _scratch("row maxima", FLOAT32 * rows, f"float32 B H Q, whether asked for or not; {_FLEX}"),
        )
    _check_plain(kernel)
    scores = 2 * itemsize * rows * keys
    return (
        _scratch("log-sum-exp", itemsize * rows, "B H Q; attention/ops/kernels.py"),
        _scratch("scores", scores, "B H Q K, twice; attention/ops/kernels.py"),
    )


def backward_lines(
    kernel: KernelName,
    *,
    batch: Count,
    heads: Count,
    kv_heads: Count,
    queries: Count,
    keys: Count,
    head_dim: Count,
    itemsize: int,
    capability: tuple[int, int] = (8, 0),
    deterministic_sms: int | None = None,
) -> tuple[DeviceLine, ...]:
    """Memory that one backward call of a kernel allocates beside dq, dk and dv.

    `deterministic_sms` is the card's number of multiprocessors where deterministic algorithms are asked
    for, which makes flash attention keep several sums of dq; None where they are not.
    """
    rows = batch * heads * queries
    if kernel == "flash":
        splits: Count = 1
        if deterministic_sms is not None:
            splits = ceil_div(deterministic_sms, batch * heads)
        blocked = FLOAT32 * batch * heads * up(queries, 128)
        expanded = 2 * itemsize * batch * keys * heads * head_dim * (kv_heads < heads)
        return (
            _scratch("softmax_d", blocked, f"float32 B H Q, Q rounded up to 128; {_FLASH}"),
            _scratch(
                "dq_accum",
                blocked * up(head_dim, 32) * splits,
                f"float32 B H Q D, Q rounded up to 128 and D to 32, times the splits; {_FLASH}",
            ),
            _scratch(
                "dk and dv expanded", expanded, f"to all query heads where kv_heads are fewer; {_FLASH}"
            ),
        )
    if kernel == "efficient":
        return _efficient_backward(batch, heads, queries, keys, head_dim, itemsize, capability)
    if kernel == "flex":
        return (_scratch("delta", FLOAT32 * rows, f"float32 B H Q; {_FLEX}"),)
    _check_plain(kernel)
    return (
        _scratch("delta", itemsize * rows, "B H Q; attention/ops/kernels.py"),
        _scratch("scores", 3 * itemsize * rows * keys, "B H Q K, three times; attention/ops/kernels.py"),
    )


def _efficient_backward(
    batch: Count,
    heads: Count,
    queries: Count,
    keys: Count,
    head_dim: Count,
    itemsize: int,
    capability: tuple[int, int],
) -> tuple[DeviceLine, ...]:
    """Delta, and accumulators that depend on the tile (rows x columns) of the kernel that is chosen.

    The tile is 64 x 64 up to D = 64. Above, 16-bit kernels have 128 x 128, 128 x 64 or 64 x 64, by shared
    memory; the sizes here hold for each of these.
    """
    group = batch * heads
    wide = head_dim > 64
    tile = 64 + 64 * wide
    sums = up(queries, tile) * up(head_dim, tile)
    locks = 4 * ceil_div(queries, 64) * ceil_div(head_dim, 64)
    accumulators = 0 * queries
    if itemsize == 2:
        blocks = ceil_div(keys, 64)
        splits = minimum(blocks, maximum(200 // group, 1))
        accumulators = 2 * splits * 64 * up(head_dim, 128) * wide
    product = 0 * group * queries * head_dim
    if itemsize == 2 and capability == (7, 0):
        product = 3 * FLOAT32 * group * queries * head_dim * wide
    return (
        _scratch("delta", 2 * FLOAT32 * group * queries, f"float32 B H Q, and a copy of it; {_EFFICIENT}"),
        _scratch(
            "dq accumulator",
            FLOAT32 * group * (sums + locks),
            "float32 B H Q D, both rounded up to the tile, and 16 bytes a tile; counted for float32 below "
            f"7.0 too, where grad x out takes its place; {_EFFICIENT}",
        ),
        _scratch(
            "dk and dv accumulators",
            FLOAT32 * group * accumulators,
            "assumption: as the kernel without room for them in registers has them, 16 bits and D > 64, "
            f"64 keys x D a split and at most 200 / (B H) splits; {_EFFICIENT}",
        ),
        _scratch(
            "grad x out",
            product,
            f"assumption: V100 in 16 bits with D > 64 computes delta in three float32 B H Q D; {_EFFICIENT}",
        ),
    )


def _scratch(name: str, count: Count, source: str) -> DeviceLine:
    return DeviceLine(name, "workspace", count, source, True)


def _check_plain(kernel: str) -> None:
    if kernel != "plain":
        raise ConfigError(f"kernel must be 'flash', 'efficient', 'flex' or 'plain', got {kernel!r}")
