"""Memory that one call of torch's fused CPU attention allocates, forward and backward, to the byte.

    sizes = dict(views=3, heads=4, queries=200, keys=600, head_dim=24, itemsize=2)
    result, scratch = forward_bytes(**sizes, threads=2)

`result` is what the call leaves (out and lse, or dq, dk and dv); `result + scratch` is its peak above what
was allocated before. Scratch is freed when the call returns. Nothing depends on the strides of q, k, v and
out, nor on D being a multiple of anything.

Counted is what torch's CPU allocator gives the calling thread, as `planner.measuring.footprint` sees it, for
sizes of at least 1; fewer kv heads than heads where nothing is packed. Not counted: what MKL and oneDNN
allocate for products of 16-bit matrices (in backward oneDNN takes some of it from torch, where it makes
them), and each further thread's row sums in backward, `accumulated` x min(T, 256) bytes.

Follows aten/src/ATen/native/cpu/FlashAttentionKernel.cpp of PyTorch, whose names and lines (at 27a4844d)
stand beside the terms, and aten/src/ATen/native/transformers/attention.cpp, which allocates the results.
Checked against torch 2.13.0 on an AMD EPYC without a matrix unit and on an Intel Xeon with one for bfloat16;
what `packs` adds in float16 is from the source only.

Letters: N views, H heads, T queries, K keys, D head_dim. Sizes may be ints or NumPy int64 arrays that
broadcast, so there is no branch on a size. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from attention.sizes.arrays import Count, ceil_div, minimum

KEY_BLOCK: Final = 512
"""Keys that are worked on together (kv_split_size in every case of lines 1168-1200 and 1225-1264)."""
MEDIUM_QUERIES: Final = 192
LONG_QUERIES: Final = 768
"""Numbers of queries from which on blocks of queries are larger (lines 1170, 1174)."""


def forward_bytes(
    *,
    views: Count,
    heads: Count,
    queries: Count,
    keys: Count,
    head_dim: Count,
    itemsize: int,
    threads: int,
    causal: bool = False,
    packs: bool = False,
    float16: bool = False,
) -> tuple[Count, Count]:
    """(bytes of out and lse, bytes of scratch) of one forward call.

    `threads` is torch.get_num_threads(). A mask changes nothing: the kernel reads it in place (lines
    226-252), expanded or not, in q's dtype or float32, as long as its last stride is 0 or 1 (another one is
    copied, with its queries and keys expanded, which is not counted here).

    `packs` says that the CPU has a matrix unit for this 16-bit dtype (torch.cpu._is_amx_tile_supported()
    for bfloat16, _is_amx_fp16_supported() for float16): the kernel may then copy keys and values into that
    unit's order. The rule differs for `float16` and is the only thing that `causal` matters to; without
    `packs` neither of the two changes anything.
    """
    accumulated, rows = _accumulated(itemsize), views * heads * queries
    tall, wide = _blocks(queries, keys)
    packed: Count = 0 * rows
    # Blocks of an odd number of keys are packed with one more (ekvSplitSize, line 452).
    wide_even = wide
    if packs and itemsize == 2:
        chosen = _packed(views, heads, queries, keys, threads, causal, float16)
        dim_even, wide_even = head_dim + chosen * (head_dim % 2), wide + chosen * (wide % 2)
        tail = (keys - 1) % wide + 1  # kvTail, line 425
        padded = (keys - 1) // wide * wide_even + tail + tail % 2  # kv_padding_size, line 485
        packed = chosen * (
            views * heads * keys * dim_even  # key_t_reorder, line 490
            + views * heads * padded * head_dim  # value_t_reorder, line 493
            + (head_dim % 2) * threads * tall * dim_even  # qeury_t_padding, line 501
            # tranpose_t_reorder, line 509; gone before the products, but nothing is allocated after it.
            + threads * wide * head_dim
        )
    # size_per_thread, line 456: scores, maximum and sum of each row, output.
    buffer = threads * tall * (wide + 2 + head_dim)
    reduced = threads * tall * wide_even * (itemsize == 2)  # buf_reduced, line 463
    result = rows * head_dim * itemsize + rows * accumulated
    return result, buffer * accumulated + (reduced + packed) * itemsize


def backward_bytes(
    *,
    views: Count,
    heads: Count,
    kv_heads: Count,
    queries: Count,
    keys: Count,
    head_dim: Count,
    itemsize: int,
    threads: int,
    dense_grad: Count = False,
) -> tuple[Count, Count]:
    """(bytes of dq, dk and dv, bytes of scratch) of one backward call.

    `dense_grad` says that the gradient's memory is that of a contiguous [N, T, H, D], see `dense`; any other
    gradient is copied, a contiguous [N, H, T, D] too. `threads` is that of `forward_bytes`. Masks and
    causality change nothing, because blocks are skipped without changing the buffers, and backward never
    packs.
    """
    accumulated, rows = _accumulated(itemsize), views * heads * queries
    tall, wide = _blocks(queries, keys)
    channels: Count = rows * head_dim
    copied: Count = channels - channels * dense_grad  # grad_out_contig, line 1222
    block = threads * 2 * tall * wide  # weights and their gradient: size_per_thread, line 889
    reduced = block * (itemsize == 2)  # buf_reduced, line 901
    # dsum, line 929: one a thread, of which the calling thread's is seen.
    scratch = (block + tall) * accumulated + (reduced + copied) * itemsize
    result: Count = channels + 2 * (views * kv_heads * keys * head_dim)
    return result * itemsize, scratch


def dense(sizes: Sequence[Count], strides: Sequence[Count]) -> Count:
    """Whether a view [N, H, T, D] with these strides is contiguous when read as [N, T, H, D].

    As torch's is_contiguous has it: the stride of a dimension of size 1 does not matter.
    """
    expected: Count = 1
    contiguous: Count = True
    for dimension in (3, 1, 2, 0):
        contiguous = contiguous & ((sizes[dimension] == 1) | (strides[dimension] == expected))
        expected = expected * sizes[dimension]
    return contiguous


def _accumulated(itemsize: int) -> int:
    """Bytes of a number in the type that sums are kept in: float64 for itself, float32 for all others."""
    return 8 if itemsize == 8 else 4


def _blocks(queries: Count, keys: Count) -> tuple[Count, Count]:
    """(queries, keys) of a block of scores: qSplitSize and kvSplitSize, lines 421 and 881."""
    tall = 32 + 32 * (queries >= MEDIUM_QUERIES) + 192 * (queries >= LONG_QUERIES)
    return minimum(queries, tall), minimum(keys, KEY_BLOCK)


def _packed(
    views: Count, heads: Count, queries: Count, keys: Count, threads: int, causal: bool, float16: bool
) -> Count:
    """Whether the kernel packs keys and values: need_pack, lines 432-447.

    There has to be enough of both, and each thread has to work through several times what is packed. Head
    dimension and, but for the rounding to whole blocks, views and heads cancel out of that ratio.
    """
    enough, ratio = (16, 1) if float16 else (64, 4)
    tall, _ = _blocks(queries, keys)
    blocks = ceil_div(views * heads * ceil_div(queries, tall), threads)
    worked = blocks * tall * (minimum(queries, keys) if causal else keys)
    return (keys >= enough) & (queries >= enough) & (worked >= ratio * views * heads * keys)
