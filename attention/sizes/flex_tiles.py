"""The tiles in which FlexAttention's kernels work, by card, dtype, head_dim and block size. Imports no torch.

torch picks tiles by card, dtype and head_dim, whatever the mask's blocks are, and then refuses blocks that it
cannot divide into tiles; some tiles need more shared memory than the card has. Here are torch's tiles, made
smaller where block or card ask for it, and the options that give them to torch.
"""

from __future__ import annotations

from typing import Final, NamedTuple

FLEX_CAPABILITY: Final = (8, 0)
"""Compute capability from which compiled FlexAttention runs."""
SMALLEST: Final = 16
"""Tokens of the smallest tile: what Triton's matrix product takes at least, of channels too."""
MOST_CHANNELS: Final = 256
"""Channels a head up to which torch has tiles tuned for a card."""
LARGEST: Final = 128
"""Tokens of torch's largest tile: blocks that are multiples of it suit all of them."""


class FlexTile(NamedTuple):
    """What a program of a kernel works on. Going forward it holds queries and walks over keys; backward, half
    of the programs do so too, and the others hold keys and walk over queries."""

    held: int
    """Tokens."""
    walked: int
    """Tokens of a step."""
    stages: int
    """Steps in flight, each but one with operands in shared memory."""
    warps: int


_A100: Final = {
    (4, 64): FlexTile(128, 32, 3, 4),
    (4, 128): FlexTile(128, 32, 3, 4),
    (4, 256): FlexTile(64, 16, 3, 4),
    (2, 64): FlexTile(128, 64, 3, 4),
    (2, 128): FlexTile(128, 64, 3, 8),
    (2, 192): FlexTile(128, 32, 2, 8),
    (2, 256): FlexTile(32, 64, 3, 4),
}
_H100: Final = {
    (4, 64): FlexTile(128, 32, 3, 4),
    (4, 128): FlexTile(32, 64, 3, 4),
    (4, 192): FlexTile(32, 64, 1, 8),
    (4, 256): FlexTile(32, 32, 3, 4),
    (2, 64): FlexTile(128, 128, 3, 4),
    (2, 128): FlexTile(128, 64, 3, 8),
    (2, 256): FlexTile(64, 32, 3, 4),
}
_B200: Final = _H100 | {(4, 192): FlexTile(32, 64, 2, 4), (2, 192): FlexTile(128, 128, 1, 8)}
_RTX_50: Final = {
    (4, 64): FlexTile(128, 32, 2, 4),
    (4, 128): FlexTile(128, 32, 2, 4),
    (4, 256): FlexTile(64, 16, 2, 4),
    (2, 64): FlexTile(128, 64, 2, 4),
    (2, 128): FlexTile(128, 64, 2, 8),
    (2, 256): FlexTile(32, 64, 2, 4),
}


SMALL_BACKWARD: Final = FlexTile(32, 32, 2, 4)
"""Going backward over more than 128 channels in 16 bits on cards with 99 KiB of shared memory: torch's takes
112 or more. Of 64 tokens held the gradients alone would fill the registers."""


def torch_forward(head_dim: int, itemsize: int, capability: tuple[int, int]) -> FlexTile:
    """torch's tile going forward: queries held, keys walked (torch 2.13, CUDAConfigHeuristic)."""
    return _tuned(capability).get((itemsize, head_dim), FlexTile(64, 64, 3, 4))


def _tuned(capability: tuple[int, int]) -> dict[tuple[int, int], FlexTile]:
    """torch's tiles by bytes a number and head_dim."""
    if capability >= (11, 0):
        return _RTX_50
    if capability >= (10, 0):
        return _B200
    return _H100 if capability == (9, 0) else _A100


def torch_backward(head_dim: int, itemsize: int, capability: tuple[int, int]) -> FlexTile:
    """torch's tile going backward (torch 2.13, CUDAConfigHeuristic)."""
    major, minor = capability
    if itemsize == 4:
        return FlexTile(16, 16, 1, 4)
    if capability == (9, 0):
        if head_dim < 64:
            return FlexTile(64, 64, 3, 4)
        return FlexTile(128, 64, 3, 8) if head_dim <= 128 else FlexTile(64, 64, 2, 4)
    if major == 10:
        if head_dim <= 128:
            return FlexTile(128, 64, 3, 4)
        return FlexTile(64, 64, 1, 8 if head_dim <= 192 else 4)
    if head_dim < 64:
        return FlexTile(128, 32, 3, 4)
    if major >= 11:
        return FlexTile(64, 64, 1 if head_dim >= 128 else 2, 4)
    return FlexTile(64, 64, 3 if minor == 6 and head_dim == 128 else 2, 4)


def unfit_sizes(head_dim: int, itemsize: int, capability: tuple[int, int]) -> str | None:
    """Why FlexAttention runs on no such card with such numbers, whatever the blocks; None if it does."""
    if capability < FLEX_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (capability, FLEX_CAPABILITY))
        return f"it needs compute capability {need}, this GPU has {have}"
    if itemsize == 8:
        return "it has no float64 kernels"
    if not SMALLEST <= head_dim <= MOST_CHANNELS:
        return f"its kernels are for {SMALLEST} to {MOST_CHANNELS} channels a head, head_dim is {head_dim}"
    return None


def forward_tile(block_size: int, head_dim: int, itemsize: int, capability: tuple[int, int]) -> FlexTile:
    """The tile going forward over blocks of a power of two tokens, from `SMALLEST`: torch's, no larger than a
    block and as the card's shared memory has room for it."""
    sizes = (itemsize, capability)
    tile = _within(torch_forward(head_dim, *sizes), block_size)
    if _fits(tile, head_dim, *sizes):
        return tile
    # Of a head_dim that torch has no tile for, the next one's: the kernel rounds channels up.
    tuned = min(dim for size, dim in _tuned(capability) if size == itemsize and dim >= head_dim)
    tile = _within(torch_forward(tuned, *sizes), block_size)
    if not _fits(tile, head_dim, *sizes):
        tile = tile._replace(stages=min(tile.stages, 2))
    while not _fits(tile, head_dim, *sizes):
        tile = _holding(tile, tile.held // 2)
    return tile


def backward_tile(block_size: int, head_dim: int, itemsize: int, capability: tuple[int, int]) -> FlexTile:
    """As `forward_tile`, going backward."""
    tile = torch_backward(head_dim, itemsize, capability)
    if itemsize == 2 and head_dim > 128 and shared_bytes(capability) < 112 << 10:
        tile = SMALL_BACKWARD
    return _within(tile, block_size)


def _within(tile: FlexTile, block_size: int) -> FlexTile:
    return _holding(tile, min(tile.held, block_size))._replace(walked=min(tile.walked, block_size))


def _holding(tile: FlexTile, held: int) -> FlexTile:
    """With fewer tokens held: torch's tiles of up to 64 have 4 warps."""
    return tile if held == tile.held else tile._replace(held=held, warps=4)


def _fits(tile: FlexTile, head_dim: int, itemsize: int, capability: tuple[int, int]) -> bool:
    return forward_shared(tile, head_dim, itemsize, capability) <= shared_bytes(capability)


def shared_bytes(capability: tuple[int, int]) -> int:
    """Shared memory that a program may have at most (CUDA's programming guide)."""
    if capability in ((8, 0), (8, 7)):
        return 163 << 10
    return 227 << 10 if 9 <= capability[0] <= 11 else 99 << 10


def forward_shared(tile: FlexTile, head_dim: int, itemsize: int, capability: tuple[int, int]) -> int:
    """Bytes of shared memory that the kernel going forward takes, at most; exact before 10.0 and from 12.0 on
    (Triton 3.7)."""
    channels = 1 << (head_dim - 1).bit_length()
    asynchronous = 9 <= capability[0] <= 11 and itemsize == 2 and tile.held >= 64
    walked = 2 * tile.stages if asynchronous else max(2 * tile.stages - 2, 1)  # tiles of keys and of values
    operands = channels * itemsize * (tile.held + tile.walked * walked)
    if asynchronous:
        return operands + 1024 * (capability[0] > 9)  # barriers
    # The probabilities change places between threads, unless each warp has whole rows of the output.
    moved = tile.held * tile.walked * itemsize * (itemsize == 4 or channels > tile.held)
    return operands + moved + 4 * tile.held * (itemsize == 4 and tile.stages > 1)


def kernel_options(
    block_size: int, seq: int, head_dim: int, itemsize: int, capability: tuple[int, int]
) -> dict[str, int | bool]:
    """FlexAttention's `kernel_options` for a mask of such blocks whose BLOCK_SIZE is `declared_block`; empty
    where torch's own choice serves. The sizes are fit: see `unfit_sizes`."""
    options: dict[str, int | bool] = {}
    if seq < LARGEST:
        # Short queries have a kernel of their own, with other demands on blocks and buffers of its own.
        options["FORCE_USE_FLEX_ATTENTION"] = True
    if seq % block_size:
        # By default it follows from 128 tokens alone, and what is beyond the end of a larger block is read.
        options["IS_DIVISIBLE"] = False
    if declared_block(block_size) != block_size:
        options |= {"SPARSE_Q_BLOCK_SIZE": block_size, "SPARSE_KV_BLOCK_SIZE": block_size}
    sizes = (head_dim, itemsize, capability)
    fitted = forward_tile(block_size, *sizes)
    if fitted != torch_forward(*sizes) or block_size < LARGEST:
        options |= {"BLOCK_M": fitted.held, "BLOCK_N": fitted.walked}
        options |= {"fwd_num_stages": fitted.stages, "fwd_num_warps": fitted.warps}
    fitted = backward_tile(block_size, *sizes)
    if fitted != torch_backward(*sizes) or block_size < LARGEST:
        options |= {"BLOCK_M1": fitted.walked, "BLOCK_N1": fitted.held}
        options |= {"BLOCK_M2": fitted.held, "BLOCK_N2": fitted.walked}
        options |= {"bwd_num_stages": fitted.stages, "bwd_num_warps": fitted.warps}
    return options


def declared_block(block_size: int) -> int:
    """The block size that a mask has to name. torch holds it against its own tiles before it reads the
    options, in which the true size then is."""
    return max(block_size, LARGEST)
