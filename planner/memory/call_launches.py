"""How many kernels an attention of whole calls launches on a GPU, in closed form: ints, or arrays of many
candidates. No torch.

Every kernel is counted: those that multiply queries and keys, and what stands beside them in
`attention/ops/whole_calls.py` and `attention/ops/kernels.py`. Copies of what lies in one piece are none: the
card's copy engine does them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from attention.sizes.arrays import Count, any_of, ceil_div, floor_power_of_two, maximum, minimum, up, where
from attention.sizes.learned_sinks import slab_tokens
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import CHANNELS, CallPart, WholeCall, backward_cut, forward_cut, has_flash
from planner.memory import cuda_kernels
from planner.memory.machines import Cuda
from planner.memory.plans.whole_calls import CutOf

ROWS: Final = 32
"""The efficient kernel pads rows of the log-sum-exp to multiples of this."""
INDEXED: Final = 1 << 31
"""Bytes that one kernel of torch's pointwise ones reaches; it halves what is more."""


class Pass(NamedTuple):
    """Kernels of a pass."""

    kernels: Count
    attention: Count
    """Those that multiply queries and keys."""


def whole_calls(
    calls: Sequence[WholeCall], shape: Shape, batch: int, card: Cuda, cut_of: CutOf = backward_cut
) -> tuple[Pass, Pass]:
    """Forward and backward; see `attention/ops/whole_calls.py`. `cut_of`: how calls are cut in backward."""
    covered, keys_covered, one = (
        sum((holds(call, shape) * call.exists for call in calls), 0)
        for holds in (_covers, WholeCall.covers_keys, partial(_is_one, cut_of=cut_of))
    )
    gaps = (calls[0].step > 1) * 1  # what no call has is zero, in out and in dq
    item = shape.queries * shape.token_bytes
    whole, keys = pieces(batch * item), pieces(batch * shape.seq * shape.kv_token_bytes)
    ahead, behind = (
        Pass(gaps * (whole + 1), 0),
        Pass((1 - one) * (gaps * whole + 2 * keys * (1 - keys_covered)), 0),
    )
    # The log-sum-exp of an efficient call over all tokens comes in padded rows.
    padded = covered * (not _has_flash(shape, card))
    lse_row = where(padded > 0, up(shape.queries, ROWS), shape.queries)
    for call in calls:
        if not any_of(call.exists):
            continue
        ahead = summed(ahead, _forward(call, shape, batch, card), call.exists)
        behind = summed(behind, _backward(call, shape, batch, card, lse_row, cut_of), call.exists)
    return ahead, behind


def document_calls(call: WholeCall, shape: Shape, batch: int) -> tuple[Pass, Pass]:
    """Forward and backward of documents in one call; see `attention/ops/document_calls.py`."""
    every = _all_tokens(call, shape, batch)
    ahead = Pass(1 + _padding(every, shape, queries=1, keys=2), 1)
    cut, behind = backward_cut(call, shape), Pass(0, 0)
    one = (cut.kv_heads >= shape.kv_heads) * 1
    for times, some in _cuts(shape.kv_heads, cut.kv_heads):
        heads = some * (shape.heads // shape.kv_heads)
        part = every._replace(heads=heads, kv_heads=some)
        # Of some heads, operands are views that are copied, and results are put in their place.
        views = (batch * shape.queries > 1) * 1
        copied = 2 * (1 - pads_channels(shape)) * views + 2 + maximum(views, is_padded(part.rows, shape))
        copied = copied * (1 - one)
        kernels = 3 + 2 * (heads > some) + _padding(part, shape, queries=3, keys=2) + copied
        behind = summed(behind, Pass(kernels, 1), times)
    return ahead, behind


def lse_has_gaps(calls: Sequence[WholeCall], shape: Shape, card: Cuda) -> Count:
    """1 if the log-sum-exp that one of these calls returned has padded rows, else 0."""
    covers = sum((_covers(call, shape) * (call.views == 1) for call in calls), 0)
    return covers * (not _has_flash(shape, card)) * (shape.queries % ROWS > 0)


def sinks(shape: Shape, batch: int, gaps: Count) -> tuple[Pass, Pass]:
    """Forward and backward of learned sinks beside an attention; see `attention/ops/learned_sinks.py`.
    `gaps`: 1 if a batch item's log-sum-exp does not lie in one piece."""
    slabs = batch * ceil_div(shape.queries, slab_tokens(shape))
    narrow = (shape.itemsize < shape.wide) * 1
    # A log-sum-exp that lies in one piece is copied in one.
    whole = (slab_tokens(shape) >= shape.queries) * (1 - gaps)
    copied = 1 - maximum(whole, (shape.heads == 1) * 1)
    ahead = slabs * (5 + 2 * narrow + copied) + narrow
    behind = slabs * (8 + 2 * narrow) + 1 + narrow
    return Pass(ahead, 0 * ahead), Pass(behind, 0 * behind)


def _forward(call: WholeCall, shape: Shape, batch: int, card: Cuda) -> Pass:
    covers = _covers(call, shape)
    all_tokens = _all_tokens(call, shape, batch)
    reordered = (call.views > 1) * ((shape.heads > 1) | (_lseis_padded(all_tokens, shape, card) > 0)) * 1
    together = _kernel_forward(call, all_tokens, shape, card)
    total = Pass(covers * (together.kernels + reordered), covers * together.attention)
    for part in _parts(call, shape, forward_cut(call, shape), batch):
        own = _kernel_forward(call, part, shape, card)
        merging = 3 + 2 * pieces(_stretch(call, part) * shape.token_bytes)
        if call.first:
            in_one_piece = _is_dense(call, part, shape) * (1 - is_padded(part.rows, shape))
            lse = _rows_in_one_piece(call, part, shape.queries) * (1 - _lseis_padded(part, shape, card))
            merging = 2 - in_one_piece - lse
        number = part.number * (1 - covers)
        turned = call.reverses(shape) * _flips(call, part, shape).forward
        total = summed(total, Pass(own.kernels + merging + turned, own.attention), number)
    return total


def _backward(call: WholeCall, shape: Shape, batch: int, card: Cuda, lse_row: Count, cut_of: CutOf) -> Pass:
    """`lse_row`: numbers of a row of the log-sum-exp."""
    one, pads = _is_one(call, shape, cut_of), pads_channels(shape)
    covers = call.covers_keys(shape) * call.exists
    windowed = call.left is not None and not call.reverses(shape)
    all_tokens = _all_tokens(call, shape, batch)
    # Forward has put that of several views into one piece, whose segments are copied again: here those of
    # several batch items, and else by the kernel's own code.
    apart = (call.views > 1) * (shape.heads > 1) * 1
    reordered = apart * (batch > 1)
    kept = (1 - apart + reordered) * (
        (call.views > 1) | (lse_row == shape.queries) | (batch * shape.heads == 1)
    )
    total = Pass(
        one
        * (_kernel_backward(all_tokens, shape, card, dense=1, whole=kept * 1, windowed=windowed) + reordered),
        one,
    )
    for part in _parts(call, shape, cut_of(call, shape), batch):
        dense, whole = _is_dense(call, part, shape), _rows_in_one_piece(call, part, lse_row)
        if call.reverses(shape):  # what is turned round lies as its result does, heads before views
            dense, whole = 1, ((part.views == 1) | (part.heads == 1)) * 1
        kernels = _kernel_backward(
            part, shape, card, dense=maximum(dense, pads), whole=whole, windowed=windowed
        )
        handed = 1 - call.first * dense * (1 - is_padded(part.rows, shape))
        own_keys = covers * _keys_are_dense(call, part, shape) * (1 - is_padded(part.key_rows, shape))
        handed = handed + 2 * (1 - own_keys)
        turned = call.reverses(shape) * _flips(call, part, shape).backward
        total = summed(total, Pass(kernels + handed + turned, 1), part.number * (1 - one))
    return total


class _Flips(NamedTuple):
    """Kernels that turn round what a part reads and returns; see `WholeCall.reverses`."""

    forward: Count
    backward: Count


def _flips(call: WholeCall, part: _Part, shape: Shape) -> _Flips:
    """A single token is copied, and nothing else."""
    single, several = part.queries == 1, (part.views * part.heads > 1) * 1
    queries = where(single, 1 - _is_dense(call, part, shape), 1)
    keys = where(single, 1 - _keys_are_dense(call, part, shape), 1)
    lse = where(single, several, 1)
    results = where(single, is_padded(part.rows, shape), 1)
    grown = where(single, is_padded(part.key_rows, shape), 1)
    return _Flips(queries + 2 * keys + lse + results, 3 * queries + 2 * keys + lse + results + 2 * grown)


class _Part(NamedTuple):
    """Kernel calls of equal sizes, over all batch items."""

    number: Count
    views: Count
    heads: Count
    kv_heads: Count
    queries: Count
    keys: Count

    @property
    def rows(self) -> Count:
        return self.views * self.heads * self.queries

    @property
    def key_rows(self) -> Count:
        return self.views * self.kv_heads * self.keys


def _all_tokens(call: WholeCall, shape: Shape, batch: int) -> _Part:
    """All batch items at once."""
    views = batch * maximum(call.views, 1)
    return _Part(1, views, shape.heads, shape.kv_heads, maximum(call.queries, 1), maximum(call.keys, 1))


def _parts(call: WholeCall, shape: Shape, cut: CallPart, batch: int) -> Iterator[_Part]:
    """The parts of a call by their sizes: those of some offsets have a head or a token fewer, and the last
    ones fewer views or kv heads."""
    more_heads = where(shape.heads % call.period > 0, shape.heads % call.period, call.offsets)
    more_tokens = where(call.length % call.step > 0, call.length % call.step, call.step)

    def with_more_tokens(offsets: Count) -> Count:
        """How many of the first offsets have as many tokens as the very first."""
        return offsets // call.step * more_tokens + minimum(offsets % call.step, more_tokens)

    both, longer = with_more_tokens(more_heads), with_more_tokens(call.offsets)
    shared = (shape.heads // shape.kv_heads) % call.period == 0
    for number, heads, fewer in (
        (both, ceil_div(shape.heads, call.period), 0),
        (longer - both, shape.heads // call.period, 0),
        (more_heads - both, ceil_div(shape.heads, call.period), 1),
        (call.offsets - more_heads - longer + both, shape.heads // call.period, 1),
    ):
        heads = maximum(heads, 1)
        queries, keys = (
            length // call.step if fewer else ceil_div(length, call.step)
            for length in (call.length, call.key_length)
        )
        kv_heads = where(shared, shape.kv_heads, heads)
        there = number * (queries > 0) * (keys > 0) * batch
        if not any_of(there):
            continue
        for times, views in _cuts(maximum(call.views, 1), cut.views):
            for again, some in _cuts(kv_heads, minimum(cut.kv_heads, kv_heads)):
                if not any_of(times * again):
                    continue
                lanes = maximum(some, 1) * (heads // kv_heads)
                several, left_over = _cuts(queries, maximum(minimum(cut.queries, queries), 1))
                for begin, (slices, length) in ((queries - several[1], several), (0, left_over)):
                    if not any_of(slices):
                        continue
                    first, stop = call.seen(begin, begin + length, queries, keys)
                    seen = where(length < queries, stop - first, keys)
                    sizes = (maximum(views, 1), lanes, maximum(some, 1), maximum(length, 1), maximum(seen, 1))
                    yield _Part(there * times * again * slices, *sizes)


def _cuts(total: Count, size: Count) -> tuple[tuple[Count, Count], tuple[Count, Count]]:
    """(how many, of what size) of the parts of a total: the full ones, and what is left."""
    rest = total % size
    return (total // size, size), ((rest > 0) * 1, rest)


def _kernel_forward(call: WholeCall, part: _Part, shape: Shape, card: Cuda) -> Pass:
    """See `attention.ops.kernels.windowed`."""
    splits: Count = 0
    if _has_flash(shape, card):
        kv_heads = part.kv_heads if call.left is None and call.right is None else None
        blocks = cuda_kernels.query_tiles(part.views, part.heads, part.queries, kv_heads)
        padded: Any = up(shape.head_dim, CHANNELS)
        splits = (cuda_kernels.splits(blocks, part.keys, padded, card.multiprocessors) > 1) * 1
    return Pass(1 + splits + _padding(part, shape, queries=1, keys=2), 1 + 0 * splits)


def _kernel_backward(
    part: _Part, shape: Shape, card: Cuda, *, dense: Count, whole: Count, windowed: bool
) -> Count:
    """See `attention.ops.kernels.windowed_backward`; `dense` and `whole` as
    `planner.memory.cuda_kernels.backward_stages` has them."""
    padding = _padding(part, shape, queries=3, keys=2)
    several = (part.rows > 1) * 1
    copied = (1 - dense) * several
    if _has_flash(shape, card):
        lse = several * (1 - whole)
        return padding + 3 + 2 * (part.heads > part.kv_heads) + 2 * copied + lse
    full = (part.queries % ROWS == 0) | (part.views * part.heads == 1)
    rows = 2 - whole * full
    dim: Any = up(shape.head_dim, CHANNELS)
    tile = cuda_kernels.efficient_tile(dim, shape.itemsize, card.capability)
    # What is summed in memory begins at zero where several share it: parts of the keys, or a window's rows.
    group, modern = part.views * part.heads, card.capability >= (7, 0)
    shares = where((group >= 256) & (part.keys <= 2 * tile.keys), 1, ceil_div(part.keys, tile.keys)) * modern
    if tile.keeps:
        shares = minimum(shares, 200 // group)
    zeros = (modern or shape.itemsize == 2) * ((shares > 1) | windowed) * 1
    delta: Count = 0
    if not tile.delta:
        delta = 2 + 2 * (shape.itemsize == 2) + (part.heads > 1) * (part.queries > 1)
    return padding + 1 + rows + copied + zeros + delta


def _covers(call: WholeCall, shape: Shape) -> Count:
    return call.covers(shape) * call.exists


def _is_one(call: WholeCall, shape: Shape, cut_of: CutOf) -> Count:
    """1 if backward is one kernel call over all batch items, whose results are dq, dk and dv."""
    cut = cut_of(call, shape)
    fits = (call.views <= cut.views) * (call.kv_heads(shape) <= cut.kv_heads)
    return call.covers_keys(shape) * call.exists * fits * 1


def _is_dense(call: WholeCall, part: _Part, shape: Shape) -> Count:
    """1 if the part's queries lie in memory as [N, T, H, D], as what a kernel returns does."""
    return _in_one_piece(call, part, part.queries, part.heads, shape.heads, call.period)


def _keys_are_dense(call: WholeCall, part: _Part, shape: Shape) -> Count:
    repeat = shape.heads // shape.kv_heads
    step = where(repeat % call.period == 0, 1, maximum(call.period // repeat, 1))
    return _in_one_piece(call, part, part.keys, part.kv_heads, shape.kv_heads, step)


def _in_one_piece(
    call: WholeCall, part: _Part, tokens: Count, heads: Count, of: Count, head_step: Count
) -> Count:
    piece = ((heads == 1) | (head_step == 1)) * ((tokens == 1) | (call.step * of == heads))
    return piece * ((part.views == 1) | (call.view_step * of == tokens * heads)) * 1


def _rows_in_one_piece(call: WholeCall, part: _Part, row: Count) -> Count:
    """1 if the part's log-sum-exp, in rows of so many numbers, lies as [N, H, T]."""
    piece = ((part.queries == 1) | (call.step == 1)) * (
        (part.heads == 1) | (call.period * row == part.queries)
    )
    return piece * ((part.views == 1) | (call.view_step == part.heads * part.queries)) * 1


def _lseis_padded(part: _Part, shape: Shape, card: Cuda) -> Count:
    """1 if the kernel returns rows that are no multiple of what it pads them to."""
    if _has_flash(shape, card):
        return 0
    return (part.queries % ROWS > 0) * (part.views * part.heads > 1) * 1


def _has_flash(shape: Shape, card: Cuda) -> bool:
    dim: Any = shape.head_dim
    return has_flash(card.capability, dim, shape.itemsize)


def pads_channels(shape: Shape) -> Count:
    return (shape.head_dim % CHANNELS > 0) * 1


def is_padded(rows: Count, shape: Shape) -> Count:
    """1 if a kernel's result of so many rows has channels between them that are no one's."""
    return pads_channels(shape) * (rows > 1)


def _padding(part: _Part, shape: Shape, *, queries: Count, keys: Count) -> Count:
    """Kernels that pad the channels of so many operands: zeros, and a copy, of a single row by itself."""
    pads = pads_channels(shape)
    return queries * (pads + is_padded(part.rows, shape)) + keys * (pads + is_padded(part.key_rows, shape))


def _stretch(call: WholeCall, part: _Part) -> Count:
    """Tokens from the part's first query to its last."""
    return (part.views - 1) * call.view_step + (part.queries - 1) * call.step + 1


def pieces(nbytes: Count) -> Count:
    """Kernels over so many bytes, which torch halves until one reaches all of a half."""
    return where(nbytes > INDEXED, 2 * floor_power_of_two(maximum((nbytes - 1) // INDEXED, 1)), 1)


def summed(total: Pass, more: Pass, times: Count) -> Pass:
    return Pass(total.kernels + more.kernels * times, total.attention + more.attention * times)
