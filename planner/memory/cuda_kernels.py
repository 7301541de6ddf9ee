"""What kernels allocate on a GPU beside what they return. Imports no torch.

Checked against dry runs: torch 2.13's own host code over kernels that do nothing, on cards from Pascal to
Blackwell (planner/standin). Sizes may be ints or NumPy int64 arrays, but for `head_dim`, which is an int.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, Literal, NamedTuple

from attention.errors import ConfigError
from attention.sizes.arrays import Count, ceil_div, each, maximum, minimum, up, where
from planner.memory.cuda_process import FLOAT32, MIB, DeviceLine

KernelName = Literal["flash", "efficient", "flex"]
Stage = tuple[DeviceLine, ...]
"""What is alive together."""

_FLASH = "flash_api.cpp of PyTorch's flash attention 2"
_FLEX = "Inductor's flex_attention lowering, torch 2.13"
_EFFICIENT = "attention_backward.cu and kernel_backward.h of PyTorch's memory-efficient attention"
_PLAIN = "attention/ops/kernels.py"
_COPIED = "matmul copies views of several batches and heads"
_RNG = "what dropout would read"


def forward_lines(
    kernel: KernelName,
    *,
    batch: Count,
    heads: Count,
    queries: Count,
    keys: Count,
    head_dim: int,
    itemsize: int,
    multiprocessors: int = 108,
    fewer: Count = 0,
    kv_heads: Count | None = None,
) -> Stage:
    """What one forward call of a kernel allocates beside its output; the first is the log-sum-exp. `fewer`:
    keys by which one such call after the other has fewer, where flash attention may take more for that.
    `kv_heads`: given where a single query has no mask, of which flash attention takes the heads for queries.

    Omitted: copies of operands whose D is not a multiple of 8.
    """
    rows = batch * heads * queries
    if kernel == "flash":
        tiles = query_tiles(batch, heads, queries, kv_heads)
        parts = splits(tiles, keys, head_dim, multiprocessors, fewer)
        parts = parts * (parts > 1)
        wide = parts * FLOAT32 * rows
        return (
            _scratch("log-sum-exp", FLOAT32 * rows, f"float32 B H Q; {_FLASH}"),
            _scratch("sums of parts of the keys", wide * _flash_channels(head_dim), f"see splits; {_FLASH}"),
            _scratch("log-sum-exp of parts of the keys", wide, f"see splits; {_FLASH}"),
            _scratch("random state", 16 + 0 * rows, _RNG),
            _scratch("random offset", 8 + 0 * rows, _RNG),
        )
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
    raise ConfigError(f"kernel must be 'flash', 'efficient' or 'flex', got {kernel!r}")


def backward_stages(
    kernel: KernelName,
    *,
    batch: Count,
    heads: Count,
    queries: Count,
    keys: Count,
    head_dim: int,
    itemsize: int,
    capability: tuple[int, int] = (8, 0),
    dense: Count = 1,
    whole: Count = 1,
    deterministic_sms: int | None = None,
    kv_heads: Count | None = None,
) -> tuple[Stage, ...]:
    """What one backward call of a kernel allocates beside dq, dk and dv, one stage after another: first what
    comes before those and stays, then what comes after them.

    `dense`: 1 if the gradient of out lies in memory as [B, Q, H, D], else 0. `whole`: 1 if the log-sum-exp
    is as the kernel returned it, else 0. `kv_heads`: None for as many as heads. `deterministic_sms` is the
    card's number of multiprocessors where deterministic algorithms are asked for, which makes flash attention
    keep several sums of dq; None where they are not.
    """
    rows = batch * heads * queries
    operand = rows * head_dim * itemsize
    dense = dense | (rows == 1) * 1  # a single row lies as any does
    if kernel == "flash":
        several: Count = 1
        if deterministic_sms is not None:
            several = ceil_div(deterministic_sms, batch * heads)
        blocked = FLOAT32 * batch * heads * up(queries, 128)
        strided = (1 - dense * (heads == 1)) * (rows > 1) * (1 - whole)
        apart: Count = 0
        if kv_heads is not None:
            apart = batch * heads * keys * head_dim * itemsize * (kv_heads < heads)
        return (
            (
                _scratch("random state", 16 + 0 * rows, _RNG),
                _scratch("log-sum-exp in one piece", FLOAT32 * rows * strided, f"float32 B H Q; {_PLAIN}"),
                _scratch("gradient of out in one piece", operand * (1 - dense), f"B Q H D; {_FLASH}"),
                _scratch("out in one piece", operand * (1 - dense), f"B Q H D; {_FLASH}"),
            ),
            (
                _scratch("softmax_d", blocked, f"float32 B H Q, Q rounded up to 128; {_FLASH}"),
                _scratch(
                    "dq_accum",
                    blocked * _flash_channels(head_dim) * several,
                    f"float32 B H Q D, Q rounded up to 128, D to 32 or above 128 to 64; {_FLASH}",
                ),
                _scratch("dk of each query head", apart, f"B H K D; {_FLASH}"),
                _scratch("dv of each query head", apart, f"B H K D; {_FLASH}"),
            ),
        )
    if kernel == "efficient":
        ahead = (
            _scratch("random state", 8 + 0 * rows, _RNG),
            _scratch(
                "log-sum-exp, padded",
                FLOAT32 * batch * heads * up(queries, 32),
                f"float32 B H Q, Q rounded up to 32; {_PLAIN}",
            ),
            _scratch("gradient of out in one piece", operand * (1 - dense), f"B Q H D; {_EFFICIENT}"),
        )
        return (ahead, *_efficient_backward(batch, heads, queries, keys, head_dim, itemsize, capability))
    if kernel == "flex":
        return (), (_scratch("delta", FLOAT32 * rows, f"float32 B H Q; {_FLEX}"),)
    raise ConfigError(f"kernel must be 'flash', 'efficient' or 'flex', got {kernel!r}")


def ragged_forward(queries: Count) -> Stage:
    """What flash attention's forward takes beside out for sequences that lie one behind the other, of so many
    queries and one head."""
    return (
        _scratch("log-sum-exp", FLOAT32 * queries, f"float32 Q; {_FLASH}"),
        _scratch("random state", 16 + 0 * queries, _RNG),
        _scratch("random offset", 8 + 0 * queries, _RNG),
    )


def ragged_backward(queries: Count, sequences: Count, head_dim: int) -> Stage:
    """As `ragged_forward`, of its backward beside dq, dk and dv."""
    rows = FLOAT32 * (queries + 128 * sequences)
    return (
        _scratch("random state", 16 + 0 * queries, _RNG),
        _scratch("softmax_d", rows, f"float32 Q, 128 more a sequence; {_FLASH}"),
        _scratch("dq_accum", rows * _flash_channels(head_dim), f"the same for each D; {_FLASH}"),
    )


class KernelStep(NamedTuple):
    """What is freed, and what is allocated then."""

    frees: tuple[str, ...]
    line: DeviceLine
    multiplies: bool = False
    """Whether it is a product's result, after which cuBLAS takes its workspace."""


class Products(NamedTuple):
    """Sizes of attention made of plain matrix products, in bytes."""

    queries: Count
    """B H Q D numbers."""
    keys: Count
    """B H K D numbers."""
    scores: Count
    """B H Q K numbers."""
    rows: Count
    """B H Q numbers."""
    hidden: Count
    """Which keys a causal mask hides: Q K bytes, 0 without one."""
    copies: Count
    """1 if matmul copies views of queries to multiply them, for they are of several batches and heads; else
    0."""
    copies_keys: Count
    """The same of keys and values."""


def plain_forward(sizes: Products) -> tuple[KernelStep, ...]:
    """The forward pass of plain products step by step, up to its results `out` and `log-sum-exp`."""
    return (
        *_plain_scores(sizes),
        _step("row maxima", sizes.rows, "B H Q, of logsumexp", frees=("hidden by the causal mask",)),
        _step("magnitudes of the row maxima", sizes.rows, "B H Q, of logsumexp"),
        _step("infinite row maxima", sizes.rows // 8, "a byte for B H Q, of logsumexp"),
        _step(
            "scores less the row maxima",
            sizes.scores,
            "B H Q K, of logsumexp",
            frees=("infinite row maxima", "magnitudes of the row maxima"),
        ),
        _step("log-sum-exp", sizes.rows, "B H Q"),
        _step("weights", sizes.scores, "B H Q K", frees=("scores less the row maxima", "row maxima")),
        _step("copy of v", sizes.keys * sizes.copies_keys, f"B H K D: {_COPIED}"),
        _step("out", sizes.queries, "B H Q D", multiplies=True),
    )


PLAIN_FORWARD_LEFT: Final = ("scores", "weights", "copy of v")
"""What forward frees as it returns."""


def plain_backward(sizes: Products) -> tuple[KernelStep, ...]:
    """The backward pass of plain products step by step, up to its results dq, dk and dv."""
    queries, keys = sizes.queries * sizes.copies, sizes.keys * sizes.copies_keys
    copy = f"B H Q D: {_COPIED}"
    return (
        *_plain_scores(sizes),
        _step("weights", sizes.scores, "B H Q K", frees=("hidden by the causal mask",)),
        _step("gradient x out", sizes.queries, "B H Q D", frees=("scores",)),
        _step("delta", sizes.rows, "B H Q"),
        _step("copy of the gradient", queries, copy, frees=("gradient x out",)),
        _step("copy of v", keys, f"B H K D: {_COPIED}"),
        _step("gradient x v", sizes.scores, "B H Q K", multiplies=True),
        _step("less delta", sizes.scores, "B H Q K", frees=("copy of the gradient", "copy of v")),
        _step("times weights", sizes.scores, "B H Q K", frees=("gradient x v",)),
        _step("gradient of the scores", sizes.scores, "B H Q K", frees=("less delta",)),
        _step("second copy of k", keys, f"B H K D: {_COPIED}", frees=("times weights",)),
        _step("dq", sizes.queries, "B H Q D", multiplies=True),
        _step("second copy of q", queries, copy, frees=("second copy of k",)),
        _step("dk", sizes.keys, "B H K D"),
        _step("second copy of the gradient", queries, copy, frees=("second copy of q",)),
        _step("dv", sizes.keys, "B H K D"),
    )


PLAIN_BACKWARD_LEFT: Final = ("second copy of the gradient", "weights", "delta", "gradient of the scores")
"""What backward frees as it returns."""


def _plain_scores(sizes: Products) -> tuple[KernelStep, ...]:
    """Up to the scores and what the causal mask hides of them."""
    return (
        _step("copy of q", sizes.queries * sizes.copies, f"B H Q D: {_COPIED}"),
        _step("copy of k", sizes.keys * sizes.copies_keys, f"B H K D: {_COPIED}"),
        _step("scores", sizes.scores, "B H Q K", multiplies=True),
        _step("hidden by the causal mask", sizes.hidden, "a byte for Q K", frees=("copy of q", "copy of k")),
    )


def _step(
    name: str, count: Count, formula: str, *, frees: tuple[str, ...] = (), multiplies: bool = False
) -> KernelStep:
    return KernelStep(frees, _scratch(name, count, f"{formula}; {_PLAIN}"), multiplies)


def _flash_channels(head_dim: int) -> int:
    """Channels that flash attention keeps in sums."""
    return up(head_dim, 32 if head_dim <= 128 else 64)


def query_tiles(batch: Count, heads: Count, queries: Count, kv_heads: Count | None) -> Count:
    """Tiles of 64 queries of flash attention's forward; `kv_heads` as `forward_lines` has them."""
    if kv_heads is None:
        return batch * heads * ceil_div(queries, 64)
    gathered = batch * kv_heads * ceil_div(heads // kv_heads, 64)
    return where(queries == 1, gathered, batch * heads * ceil_div(queries, 64))


MOST_SPLITS = 128
"""Parts into which flash attention cuts the keys at most."""


def splits(tiles: Count, keys: Count, head_dim: int, multiprocessors: int, fewer: Count = 0) -> Count:
    """Parts into which flash attention's forward cuts the keys where its `tiles` of 64 queries leave
    multiprocessors idle; 1 where it does not. Of calls that have `fewer` keys one after the other, the most.
    See num_splits_heuristic in flash_api.cpp."""
    block = 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64
    places = 2 * multiprocessors
    idle = (10 * tiles < 8 * places) & (keys > block)

    def most(tiles: int, keys: int, fewer: int) -> tuple[int]:
        counts = {ceil_div(some, block) for some in range(keys, 0, -(fewer or keys))}
        return (max(_splits(tiles, blocks, places) for blocks in counts),)

    both = 0 * (tiles + keys + fewer)
    return each(most, idle, (1,), tiles + both, keys + both, fewer + both)[0]


@lru_cache(maxsize=65536)
def _splits(tiles: int, blocks: int, places: int) -> int:
    """Of the numbers of parts that differ in their blocks, the first whose waves are filled to 85% of the
    best."""

    def filled(parts: int) -> float:
        waves = tiles * parts / places
        return waves / -(-tiles * parts // places)

    differ = [
        parts
        for parts in range(1, min(MOST_SPLITS, places, blocks) + 1)
        if parts == 1 or -(-blocks // parts) != -(-blocks // (parts - 1))
    ]
    best = max(map(filled, differ))
    return next(parts for parts in differ if filled(parts) >= 0.85 * best)


CUDNN_WORKSPACE: Final = 32 * MIB
"""As much as cuBLAS is given on these cards."""


def cudnn_workspace(call_bytes: Count) -> DeviceLine:
    """What cuDNN's attention may take beside what is planned for flash attention. `call_bytes`: q, k, v and
    out of a call.

    What cuDNN's frontend lists for backward flash attention takes too, and no less of it: dq and the rows'
    sums in float32, dk and dv of each query head in the type of q. What the chosen engine takes besides is
    known to cuDNN alone."""
    return _scratch(
        "cuDNN workspace (allowance)",
        minimum(CUDNN_WORKSPACE, call_bytes),
        "judgement: 32 MiB, no more than q, k, v and out; what cuDNN's engines take is not published, and "
        "what its frontend lists (scaled_dot_product_flash_attention.h) is planned as flash attention's",
    )


class BackwardTile(NamedTuple):
    """How a kernel of the memory-efficient backward works."""

    queries: int
    keys: int
    keeps: bool
    """Whether dk and dv of a tile are summed in memory: there is no room for them in registers."""
    delta: bool
    """Whether it computes the rows' delta itself."""


def efficient_tile(head_dim: int, itemsize: int, capability: tuple[int, int]) -> BackwardTile:
    """The kernel that is chosen, by what fits into a multiprocessor's shared memory."""
    roomy = capability in ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0))
    if itemsize == 4:
        return BackwardTile(128 if roomy and head_dim > 64 else 64, 64, keeps=False, delta=False)
    if head_dim <= 64:
        return BackwardTile(64, 64, keeps=False, delta=True)
    if capability < (7, 0):
        return BackwardTile(64, 64, keeps=True, delta=True)
    if head_dim > 128:
        return BackwardTile(128, 64, keeps=True, delta=capability >= (7, 5))
    if roomy:
        return BackwardTile(128, 128, keeps=False, delta=True)
    if capability < (8, 0) or (capability < (12, 0) and head_dim <= 96):
        return BackwardTile(128, 64, keeps=False, delta=True)
    return BackwardTile(64, 64, keeps=True, delta=True)


def _efficient_backward(
    batch: Count,
    heads: Count,
    queries: Count,
    keys: Count,
    head_dim: int,
    itemsize: int,
    capability: tuple[int, int],
) -> tuple[Stage, ...]:
    """Delta, where that is no part of the kernel from products of its own; then what is summed in memory."""
    group = batch * heads
    rows = group * queries
    tile = efficient_tile(head_dim, itemsize, capability)
    tiles = ceil_div(queries, tile.queries) * ceil_div(head_dim, tile.keys)
    sums = FLOAT32 * tiles * tile.queries * tile.keys + 16 * tiles
    kept: Count = 0 * rows
    if tile.keeps:
        splits = 1 + 0 * rows
        if capability >= (7, 0):
            splits = minimum(ceil_div(keys, tile.keys), maximum(200 // maximum(group, 1), 1))
        kept = 2 * FLOAT32 * splits * tile.keys * up(head_dim, tile.queries)
    if itemsize == 4 and capability < (7, 0):
        sums = 0 * rows
    delta = _scratch("delta", FLOAT32 * rows, f"float32 B H Q; {_EFFICIENT}")
    summing = (
        delta,
        _scratch(
            "sums",
            group * (sums + kept),
            "float32 B H Q D, both rounded up to the tile, and 16 bytes a tile; where dk and dv are not kept "
            f"in registers, those of a tile for each of at most 200 / (B H) parts of the keys; {_EFFICIENT}",
        ),
    )
    if tile.delta:
        return (summing,)
    product = FLOAT32 * rows * head_dim
    wide = product * (itemsize == 2)
    return (
        (
            _scratch("gradient of out in float32", wide, f"B H Q D; {_EFFICIENT}"),
            _scratch("out in float32", wide, f"B H Q D; {_EFFICIENT}"),
            _scratch("grad x out", product, f"float32 B H Q D; {_EFFICIENT}"),
            delta,
            _scratch(
                "delta in one piece",
                FLOAT32 * rows * (heads > 1) * (queries > 1),
                f"float32 B H Q; {_EFFICIENT}",
            ),
        ),
        summing,
    )


def largest(stages: tuple[tuple[Count, ...], ...], unit: int = 1) -> tuple[Count, ...]:
    """The stage whose tensors, each rounded up to `unit` bytes, take most, the first of several; of arrays
    entry by entry, filled up with zeros."""

    def rounded(stage: tuple[Count, ...]) -> Count:
        return sum(up(x, unit) for x in stage)

    width = max(map(len, stages))
    best, *others = (stage + (0,) * (width - len(stage)) for stage in stages)
    for other in others:
        more = rounded(other) > rounded(best)
        best = tuple(where(more, new, old) for new, old in zip(other, best, strict=True))
    return best


FEWER_THREADS = ((8, 6), (8, 7), (8, 9), (11, 0), (12, 0), (12, 1))
"""Capabilities with 1,536 threads a multiprocessor where the others but 7.5 have 2,048; see CUDA's
programming guide."""


def column_sum(
    rows: int, columns: int, itemsize: int, capability: tuple[int, int], multiprocessors: int
) -> tuple[int, int]:
    """Scratch of a sum over the rows of [rows, columns], as a bias's gradient is: partial sums of the blocks
    of threads that share a column, each of which takes as much as its threads hold, and their counters; see
    PyTorch's Reduce.cuh."""
    wide = max(itemsize, FLOAT32)
    vector = 4 if columns % 4 == 0 and itemsize < 8 else 2 if columns % 2 == 0 and itemsize < 8 else 1
    most = 512 // vector // (2 if itemsize == 16 else 1)
    across, down = columns // vector, rows

    def power(count: int) -> int:
        return min(1 << (max(count, 1).bit_length() - 1), most)

    width = min(power(across), 32)
    height = min(power(down), most // width)
    width = min(power(across), most // height)
    each_thread = rows
    if each_thread >= height * 16 or each_thread >= 256:
        each_thread = ceil_div(rows, height)
        blocks = ceil_div(across, width)
    else:
        return 0, 0
    threads_there = 1024 if capability == (7, 5) else 1536 if capability in FEWER_THREADS else 2048
    target = multiprocessors * (threads_there // (width * height))
    if each_thread < 256 or blocks > target:
        return 0, 0
    shares = max(min(ceil_div(target, blocks), ceil_div(each_thread, 16)), ceil_div(each_thread, 256))
    return (wide * columns * shares * width * vector, 4 * blocks) if shares > 1 else (0, 0)


def best_of(slices: int, size: int, itemsize: int, multiprocessors: int) -> tuple[int, ...]:
    """Scratch of the largest numbers of each of `slices` rows of `size`, where those are so many that a row
    is shared out among blocks of threads; see PyTorch's TensorTopK.cu. Registers are those of all cards so
    far: 65,536 a multiprocessor."""
    enough = next(least for most, least in _SHARED_OUT if slices <= most)
    if size < enough:
        return (0,) * 8
    block = 256
    resident = 65_536 // (40 * block)
    each_thread = min(max(ceil_div(slices * size, multiprocessors * resident * block), 4), 64)
    blocks = slices * ceil_div(size, each_thread * block)
    return (
        slices * itemsize,  # the least number of those wanted
        slices * 8,  # how many are yet to be found, before and after
        slices * itemsize * 2,  # the digits that are settled, before and after
        blocks * 256 * 2,  # counts of digits
        slices * 256 * 4,  # and their sums
        blocks * 4,
        blocks * 4,
        1280,  # of a sum by key, about
    )


_SHARED_OUT = (
    (20, 20_000),
    (40, 10_000),
    (80, 8_000),
    (199, 5_000),
    (799, 3_000),
    (4_000, 800),
    (1 << 62, 400),
)
"""(Rows up to, numbers of a row from) which rows are shared out."""


def _scratch(name: str, count: Count, source: str) -> DeviceLine:
    return DeviceLine(name, "workspace", count, source, True)
