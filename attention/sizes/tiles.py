"""How large the calls of a program get, and what a pass over it reserves: closed forms. No torch.

The executor takes its scratch from here and the planner its predictions, so that they cannot differ.
Sizes are ints, or NumPy arrays for many configs at once (`attention/sizes/arrays.py`). A *row* is a vector of
`head_dim` numbers: one token of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

from attention.sizes.arrays import Count, any_of, ceil_div, each, lcm, maximum, minimum, up, where
from attention.sizes.row_bounds import Rows
from attention.sizes.shape import Shape

SUM_BYTES = 4 << 20
"""Largest sum of dk or of dv that 16-bit types are given in single precision over all tiles."""


class Kind(NamedTuple):
    """The largest of a program's calls of one kind: N views of T queries and K keys for some heads."""

    name: str
    heads: Count
    views: Count
    queries: Count
    keys: Count
    unit: Count = 1
    """Keys are cut at multiples of this."""
    gathers: bool = False
    step: Count | None = None
    """Tokens from one view's keys to the next where views may overlap."""
    whole: bool = False
    """Whether the kernel's own causal mask ties keys to queries, so that they cannot be cut."""
    exists: Count = 1
    dense: Count = 0
    """1 if the queries of all views and heads together lie in memory as [N, T, H, D], else 0."""
    masked: Count = 0
    """Rows of the additive mask that its calls may have, 0 for none."""
    own: bool = False
    """Whether every head has lists of its own, where the kind gathers."""
    moves: bool = False
    """Whether the lists of consecutive views differ by one block only, where the kind gathers."""
    later: Count = 0
    """Most queries of a head in a call that is merged into what came before."""
    largest: tuple[Count, Count] = (1, 1)
    """(views, keys of a view) of the program's largest gather, by which backward cuts all of them."""
    sizes: tuple[tuple[Count, Count, Count], ...] = ()
    """(views, queries, keys) of calls that differ, where that matters to a kernel: one that takes more for
    fewer, or no call has most of all three. Empty where one does."""
    fewer: Count = 0
    """Keys by which one of its calls after the other has fewer; 0 if all have as many."""
    groups: Count | None = None
    """Key and value heads; None for as many as heads."""

    @property
    def kv_heads(self) -> Count:
        return self.heads if self.groups is None else self.groups


class Extent(NamedTuple):
    """The largest sizes of a program's calls."""

    tokens: Count
    """Tokens of a tile."""
    kinds: tuple[Kind, ...]
    merges: Count
    """1 if some tile merges parts, else 0."""
    mask: tuple[Count, Count]
    """(queries, keys) of the mask that is added to scores; (0, 0) if none is."""
    band: bool = False
    """Whether that is of a window that ends at the token: query t sees keys t.. of it, and so on up to
    t + keys - queries, as under a causal one."""


class _Sparse(NamedTuple):
    """Sizes that the calls of a block-sparse program share. A row is what one query block sees."""

    rows: Rows
    shape: Shape
    together: Count
    """Rows that a call takes at most."""
    queries: Count
    """Tokens of a row's queries."""
    tile: Count
    """Tokens of the queries of `together` rows."""
    wide: Count
    """1 if sliding rows are cut by what they share (`Shape.goes_wide`), else 0."""
    short: Count
    """Tokens of the last block where it is shorter than the others, else 0."""
    masked: Count
    """Blocks of keys that a call has under an additive causal mask; 0 where none is added: not causal, or
    the row's own block is a call by itself."""
    cut: Count
    """1 if causal and a row has blocks before those under the mask, which are further calls, else 0."""
    keys: Count
    """Keys of the widest adjacent row."""
    views: Count
    """Rows of a call over overlapping views."""
    longest: Count
    """Keys of the longest call of such rows, before the kernel's limit."""
    few: Count
    """Keys a view that the kernel may copy where it is given `views` of them."""
    split: Count
    """1 if an adjacent row takes several calls, which are merged: because of the mask, or of what the kernel
    may copy; else 0."""
    listed: Count
    """Blocks of a list that a call gathers."""
    list_split: Count
    """1 if the longest list is longer than that, so that its parts are merged, else 0."""

    @property
    def adjacent(self) -> Count:
        """Whether some row's blocks are adjacent."""
        return self.rows.span > 0

    @property
    def dense(self) -> Count:
        """1 if a call's query heads are all heads, else 0."""
        return (self.shape.heads == self.shape.call_heads) * 1

    @property
    def masks(self) -> Count:
        """Rows of the additive causal mask of a call over one row: its queries, or 0."""
        return self.queries * (self.masked > 0)


def _sparse(rows: Rows, shape: Shape) -> _Sparse:
    """The common part of the program of these rows."""
    size, together, views = rows.size, shape.chunk_rows(rows), shape.span_rows(rows)
    keys = minimum(maximum(rows.span, 1) * size, shape.seq)
    masked: Count = 0
    cut, longest = 0 * keys, keys
    if shape.causal:
        masked = shape.mask_blocks(rows)
        cut = (maximum(rows.span, rows.lists) > maximum(masked, 1)) * 1
        longest = _longest(minimum(rows.span, shape.full_blocks(size)), masked, shape.seq, size)
    few, listed = shape.pack_tokens(views), shape.list_blocks(rows)
    return _Sparse(
        rows=rows,
        shape=shape,
        together=together,
        queries=minimum(size, shape.seq),
        tile=minimum(together * size, shape.seq),
        wide=shape.goes_wide(rows),
        short=shape.seq % size,
        masked=masked,
        cut=cut,
        keys=keys,
        views=views,
        longest=longest,
        few=few,
        split=maximum(cut, (few < longest) * 1),
        listed=listed,
        list_split=(listed < rows.lists) * 1,
    )


def sparse_extent(rows: Rows, shape: Shape) -> Extent:
    """The extent of a block-sparse program, which `attention/block_sparse.py` makes of rows no wider than
    `rows`."""
    common = _sparse(rows, shape)
    single, lists = _single(common), _lists(common)
    kinds = (
        single,
        _last_single(common, single),
        _overlapping(common, single),
        _long(common),
        lists,
        _last_lists(common, lists),
        _own_blocks(common),
    )
    too_long = (common.few < common.longest) * common.adjacent
    merges = maximum(common.wide, common.cut, common.list_split, too_long)
    tokens = maximum(*(kind.views * kind.queries * kind.exists for kind in kinds))
    mask = (rows.size * (common.masked > 0), common.masked * rows.size) if shape.causal else (0, 0)
    return Extent(minimum(tokens, shape.seq), kinds, merges, mask)


def _single(common: _Sparse) -> Kind:
    """One row's queries over adjacent blocks. Exists where a row's blocks are adjacent. It is merged into
    what came before where that row takes several calls."""
    shape = common.shape
    return Kind(
        "view", heads=shape.call_heads, groups=shape.kv_heads, views=1, queries=common.queries,
        keys=minimum(common.longest, shape.pack_tokens(1)), exists=common.adjacent, dense=common.dense,
        masked=common.masks, later=common.queries * common.split,
    )  # a row for each kind  # fmt: skip


def _last_single(common: _Sparse, single: Kind) -> Kind:
    """The last row over adjacent blocks, where its block is short: under a causal mask, and only there, it
    may be the widest, and is a kind of its own."""
    rows, shape, short = common.rows, common.shape, common.short
    keys = common.keys
    if shape.causal:
        keys = _longest(rows.span, common.masked, shape.seq, rows.size)
    return single._replace(
        name="last view",
        queries=maximum(short, 1),
        keys=minimum(keys, shape.pack_tokens(1)),
        exists=common.adjacent * (short > 0) * shape.causal,
        masked=minimum(single.masked, short),
        later=short * common.split,
    )


def _overlapping(common: _Sparse, single: Kind) -> Kind:
    """Several rows, whose adjacent blocks move on by one a row, as views that overlap. Exists where a call
    may take more than one of them (`Shape.span_rows`)."""
    views = common.views
    return single._replace(
        name="views",
        views=views,
        keys=minimum(common.longest, common.few),
        step=common.rows.size,
        exists=common.adjacent * (views > 1),
        later=views * common.queries * common.split,
    )


def _long(common: _Sparse) -> Kind:
    """Several rows as one long view over the same adjacent blocks. Exists where consecutive rows see the
    same, or where a tile is wide: then it takes what the tile's rows share. It is merged into what came
    before in a wide tile, whose first call has all its rows and the others at most half of them, and where
    the keys are more than the kernel may copy."""
    rows, shape, tile, wide = common.rows, common.shape, common.tile, common.wide
    limit = shape.pack_tokens(1)
    queries = minimum(maximum(rows.alike * rows.size, tile * wide), tile)
    together = minimum(common.together, ceil_div(shape.seq, rows.size))
    half = ceil_div(together, 2)
    halves = where(wide, minimum(half * rows.size, tile), 0)
    # In a wide tile all rows see few blocks less than one does; the last tile may have fewer rows.
    width = rows.span - shape.causal
    slides = maximum(ceil_div(shape.seq, rows.size) - rows.span + 1, 1)
    left = where(slides % together, slides % together, together)
    keys = where(wide, minimum(maximum(width - together + 1, 1) * rows.size, shape.seq), common.keys)
    rest = where(wide, minimum(maximum(width - left + 1, 1) * rows.size, shape.seq), common.keys)
    too_long = (limit < common.keys) * queries
    return Kind(
        "long view",
        heads=shape.call_heads,
        groups=shape.kv_heads,
        views=1,
        queries=queries,
        keys=minimum(common.keys, limit),
        exists=common.adjacent * ((rows.alike > 1) | (wide > 0)),
        dense=common.dense,
        later=maximum(halves, too_long),
        sizes=(
            (1, queries, minimum(keys, limit)),
            (1, where(wide, left * rows.size, queries), minimum(rest, limit)),
            (1, where(wide, half * rows.size, queries), where(wide, half * rows.size, minimum(keys, limit))),
        ),
    )


def _lists(common: _Sparse) -> Kind:
    """Rows of equally long lists over gathered blocks. Exists where rows are lists; but where, under a
    causal mask, none is added, a list of the row's own block alone is that block's own call. It is merged
    into what came before where rows have blocks before those under the mask, or lists are cut."""
    rows, shape, listed, masked = common.rows, common.shape, common.listed, common.masked
    full = shape.full_blocks(rows.size)
    wanted = rows.full_lists
    if shape.causal:
        wanted = _split(minimum(wanted, full), masked)
    views = minimum(common.together, maximum(rows.many, 1))
    # Rows of an adaptive attention keep equally many blocks, but for the first of a causal one; the last
    # row is by itself.
    many = rows.many
    if rows.own:
        many = ceil_div(shape.seq, rows.size) - where(shape.causal, rows.lists, 1)
    left = where(maximum(many, 0) % views, maximum(many, 0) % views, views)
    keys = minimum(listed, maximum(wanted, 1), full) * rows.size
    # Without a causal mask what is added hides the end of the sequence, for each view in one row.
    hidden = views * (shape.heads if rows.own else 1) * (common.short > 0)
    return Kind(
        "lists",
        heads=shape.heads if rows.own else shape.call_heads,
        groups=None if rows.own else shape.kv_heads,
        views=views,
        queries=common.queries,
        keys=keys,
        unit=rows.size,
        gathers=True,
        exists=(rows.lists > 0) * maximum((masked > 0) * 1, (rows.lists > 1) * 1, 1 - shape.causal),
        dense=1 if rows.own else common.dense,
        masked=common.masks if shape.causal else hidden,
        own=rows.own,
        moves=rows.moves,
        largest=(common.together, minimum(listed, full) * rows.size),
        later=views * common.queries * maximum(common.cut, common.list_split),
        sizes=tuple((some, common.queries, keys) for some in (views, left, 1)),
    )


def _last_lists(common: _Sparse, lists: Kind) -> Kind:
    """The last row over gathered blocks, where its block is short: as in `_last_single`, under a causal
    mask."""
    rows, shape, short = common.rows, common.shape, common.short
    wanted = _split(rows.lists, common.masked) if shape.causal else rows.lists
    return lists._replace(
        name="last list",
        views=1,
        queries=maximum(short, 1),
        keys=minimum(common.listed, maximum(wanted, 1)) * rows.size,
        exists=lists.exists * (short > 0) * shape.causal,
        masked=minimum(lists.masked, short),
        sizes=(),
    )


def _own_blocks(common: _Sparse) -> Kind:
    """Rows over their own blocks alone, under the kernel's own causal mask. Exists under a causal mask where
    none is added or the tile is wide. It is merged into what came before in a wide tile."""
    shape, wide, queries = common.shape, common.wide, common.queries
    exists = maximum((common.masked == 0) * 1, wide) if shape.causal else 0 * common.keys
    return Kind(
        "own blocks",
        heads=shape.call_heads,
        groups=shape.kv_heads,
        views=where(maximum(wide, common.rows.lists > 0), common.together, common.views),
        queries=queries,
        keys=queries,
        whole=True,
        exists=exists,
        dense=common.dense,
        later=common.tile * wide,
    )


def _split(blocks: Count, masked: Count) -> Count:
    """Blocks of the larger call of a causal row of so many: those under the mask, or those before."""
    return maximum(minimum(blocks, masked), blocks - maximum(masked, 1))


def _longest(span: Count, masked: Count, seq: Count, size: Count) -> Count:
    """Most keys of a causal call of rows of `span` blocks: those under the mask, or those before."""
    return minimum(maximum(_split(span, masked), 1) * size, seq)


def branch_kind(order: int, before: bool = False) -> str:
    """Name of the kind of a branch's calls, by its place in the order of rates; `before`: over the keys of a
    segment that come before a tile, under a causal mask."""
    return f"branch {order + 1}, before" if before else f"branch {order + 1}"


def grouped_heads(rate: Count, shape: Shape) -> tuple[Count, Count]:
    """(heads from one head of a dilated branch's call to the next, kv heads of the call of the first offset).

    Heads of equal offset are every `rate`-th. Where those of a group are equally many, or the kernel takes no
    groups, their kv heads are evenly spaced: every lcm(rate, heads / kv_heads)-th has one of its own."""
    repeat = shape.heads // shape.kv_heads
    shared = shape.groups * (repeat % rate == 0)
    period = where(shared, rate, lcm(rate, repeat))
    return period, where(shared, shape.kv_heads, ceil_div(shape.heads, period))


def dilated_extent(branches: Sequence[tuple[Count, Count]], shape: Shape) -> Extent:
    """The extent of a dilated program, which `attention/dilated.py` makes. Its first tile has the largest
    calls. Branches come with their smallest rates first."""
    tile = minimum(shape.tile_tokens, shape.seq)
    kinds, merges = [], (len(branches) > 1) * 1
    for order, (length, rate) in enumerate(branches):
        period, groups = grouped_heads(rate, shape)
        inside = length <= tile
        views = where(inside, tile // length, 1)
        queries = ceil_div(where(inside, length, tile), rate)
        keys = ceil_div(minimum(length, shape.seq), rate)
        cut = (tile % length != 0) * (tile < shape.seq)
        kind = Kind(
            branch_kind(order),
            ceil_div(shape.heads, period),
            views,
            queries,
            keys,
            dense=(period == 1) * 1,
            later=views * queries * (order > 0),
            groups=groups,
        )
        kind = kind._replace(sizes=_last_sizes(kind, length, rate, tile, inside, shape))
        if shape.causal:
            # A segment's part in a tile, and its keys before.
            merges = maximum(merges, cut)
            own = tuple((some, count, count) for some, count, _ in kind.sizes)
            kinds.append(kind._replace(keys=queries, whole=True, sizes=own))
            # Where tiles begin at multiples of a tile in every segment, the last of them may be short.
            even = (length % tile == 0) | (length >= shape.seq)
            tiles, last = minimum(length, shape.seq) // tile, shape.seq // tile * tile % length
            before, inner = (tiles - 1) * tile, tile
            uneven = cut * (1 - even)
            if any_of(uneven):
                before, inner = each(_before, uneven, (before, inner), length, tile, shape.seq)
            behind, part = ceil_div(before, rate), minimum(queries, maximum(ceil_div(inner, rate), 1))
            kind = kind._replace(
                name=branch_kind(order, before=True),
                views=1,
                queries=part,
                keys=maximum(behind, 1),
                later=part,
                exists=cut * where(even, (tiles > 1) * 1, 1),
                sizes=(),
                fewer=ceil_div(tile, rate),
            )
            tail = kind._replace(
                name=f"branch {order + 1}, last before",
                queries=maximum(ceil_div(shape.seq % tile, rate), 1),
                keys=maximum(ceil_div(last, rate), 1),
                exists=cut * even * (shape.seq % tile > 0) * (last > 0),
                fewer=0,
            )
            kinds.append(_cut(tail._replace(later=tail.queries), shape, inside))
        merges = maximum(merges, (shape.pack_tokens(1) < kind.keys) * (1 - inside) * kind.exists)
        kinds.append(_cut(kind, shape, inside))
    return Extent(tile, tuple(kinds), merges, (0, 0))


def _last_sizes(
    kind: Kind, length: Count, rate: Count, tile: Count, inside: Count, shape: Shape
) -> tuple[tuple[Count, Count, Count], ...]:
    """(views, queries, keys) of a branch's calls: most of them, and those of the last tile and segment."""
    views, queries, keys = kind.views, kind.queries, kind.keys
    rest, short = shape.seq % tile, shape.seq % length
    fewer = where(inside, rest // length, 1)
    few = where(inside, queries, ceil_div(where(rest, rest, tile), rate))
    last = where(short * (length < shape.seq), ceil_div(short, rate), keys)
    return (
        (views, queries, keys),
        (where(fewer, fewer, views), few, where(inside, keys, last)),
        (1, where(inside, last, queries), last),
    )


@lru_cache(maxsize=4096)
def _before(length: int, tile: int, seq: int) -> tuple[int, int]:
    """(most tokens of a segment before a tile that goes on with it, most that such a tile has of it)."""
    places = length // gcd(length, tile)  # where in a segment tiles can begin
    starts = range(tile, min(seq, (places + 1) * tile), tile)
    parts = [(start % length, min(tile, length - start % length, seq - start)) for start in starts]
    parts = [both for both in parts if both[0]] or [(0, 0)]
    return max(before for before, _ in parts), max(inner for _, inner in parts)


def _cut(kind: Kind, shape: Shape, inside: Count) -> Kind:
    """The kind with its keys cut to what a kernel may copy, which whole segments are not."""
    few = shape.pack_tokens(1)
    split = (few < kind.keys) * (1 - inside)
    later = where(split, kind.views * kind.queries, kind.later)
    keys = where(split, minimum(kind.keys, few), kind.keys)
    sizes = tuple(
        (views, queries, where(split, minimum(most, few), most)) for views, queries, most in kind.sizes
    )
    return kind._replace(keys=keys, later=later, sizes=sizes)


def forward_sizes(extent: Extent, shape: Shape, keeps_lse: bool) -> dict[str, Count]:
    """Bytes of each buffer that a forward pass reserves."""
    dim, narrow = shape.head_dim, shape.itemsize < shape.wide
    part: Count = 0
    listed: Count = 0
    for kind in extent.kinds:
        part = maximum(part, kind.heads * kind.later * kind.exists)
        listed = maximum(listed, kind.kv_heads * kind.views * kind.keys * kind.exists * kind.gathers)
    return {
        "total": extent.tokens * shape.heads * dim * shape.wide * extent.merges * narrow,
        "part": part * dim * shape.wide * extent.merges * narrow,
        "lse": extent.tokens * shape.heads * shape.wide * extent.merges * (not keeps_lse),
        "k": listed * dim * shape.itemsize,
        "v": listed * dim * shape.itemsize,
    }


class Cut(NamedTuple):
    """How backward cuts the calls of a kind, decided by the largest of them: the smaller ones get no more
    views, so that none asks for more than that one."""

    width: Count
    """Keys of a column, whose sums are finished before the next one's begin."""
    views: Count
    """Views that the kernel is given at once."""
    keys: Count
    """Keys that it is given at once."""


def cut(kind: Kind, shape: Shape) -> Cut:
    """How backward cuts the calls of a kind; see `attention.ops.program.Call.columns` and `Shape.piece`."""
    heads = (kind.heads, kind.kv_heads)
    if kind.gathers:
        views, keys = kind.largest
        width = shape.gather_width(kind.kv_heads * views, kind.unit)
        return Cut(width, *shape.piece(heads, views, kind.unit, minimum(keys, width), kind.unit))
    width = kind.keys
    if kind.step is not None:
        overlaps = (kind.views > 1) * (kind.keys > kind.step)
        width = where(overlaps, minimum(width, shape.overlap_width), width)
    return Cut(width, *shape.piece(heads, kind.views, kind.queries, width, kind.unit, kind.whole))


class Piece(NamedTuple):
    """The part of the largest call of a kind that the backward kernel computes at once."""

    views: Count
    keys: Count
    column: Count
    """Keys of all views that the call's column holds, those that views share once."""


def pieces(extent: Extent, shape: Shape) -> tuple[Piece, ...]:
    """The pieces of each kind's largest call."""
    cuts = []
    for kind in extent.kinds:
        by = cut(kind, shape)
        width = minimum(kind.keys, by.width)
        column = kind.views * width
        if kind.step is not None:
            overlaps = (kind.views > 1) * (kind.keys > kind.step)
            column = where(overlaps, (kind.views - 1) * kind.step + width, column)
        cuts.append(Piece(minimum(by.views, kind.views), minimum(by.keys, width), column))
    return tuple(cuts)


def sums_in_full(shape: Shape) -> Count:
    """1 if dk and dv of 16-bit types are summed in single precision over all tiles, else 0."""
    narrow = shape.itemsize < shape.wide
    return narrow * (shape.seq * shape.kv_heads * shape.head_dim * shape.wide <= SUM_BYTES)


def slab_rows(shape: Shape) -> Count:
    """Rows of all kv heads that a sink hands over at a time."""
    return (
        maximum(shape.workspace // 64 // (shape.kv_heads * shape.head_dim * shape.wide), 1) * shape.kv_heads
    )


def backward_sizes(extent: Extent, shape: Shape) -> dict[str, Count]:
    """Bytes of each buffer that a backward pass reserves; `shape` is `Shape.backward()`."""
    dim, wide, narrow = shape.head_dim, shape.wide, shape.itemsize < shape.wide
    full = sums_in_full(shape)
    apart = narrow * (1 - full)  # sums of one call are rounded into dk and dv
    queries: Count = 0
    keys: Count = 0
    listed: Count = 0
    sums: Count = 0
    shares: Count = 0
    slabs: Count = 0
    for kind, piece in zip(extent.kinds, pieces(extent, shape), strict=True):
        rows = kind.kv_heads * piece.views * piece.keys * kind.exists
        queries = maximum(queries, kind.heads * piece.views * kind.queries * kind.exists)
        overlaps: Count = 0
        if kind.step is not None:
            overlaps = (kind.views > 1) * (kind.keys > kind.step) * kind.exists
        spread = piece.column * shape.kv_heads * overlaps
        keys = maximum(keys, spread, rows * (1 - overlaps))
        if kind.gathers:
            held = piece.column * kind.kv_heads * kind.exists
            listed, slabs = maximum(listed, held), maximum(slabs, kind.exists)
            differ = minimum(held, up(shape.seq, kind.unit) * shape.kv_heads)
            if kind.moves:
                blocks = piece.column // kind.views // kind.unit + kind.views - 1
                differ = minimum(differ, blocks * kind.unit * kind.kv_heads)
            sums = maximum(sums, differ * kind.exists)
        else:
            sums = maximum(sums, spread * apart)
            shares = maximum(shares, rows * (1 - overlaps))
            slabs = maximum(slabs, overlaps * apart)
    slab = slab_rows(shape) * slabs * dim
    total = shape.seq * shape.kv_heads * dim * wide * full
    return {
        "dq": extent.tokens * shape.heads * dim * wide * narrow,
        "dk": total,
        "dv": total,
        "do": queries * dim * wide * shape.widens,
        "q": queries * dim * wide * shape.widens,
        "out": queries * dim * wide * shape.widens,
        "k": listed * dim * shape.itemsize,
        "v": listed * dim * shape.itemsize,
        "wide k": keys * dim * wide * shape.widens,
        "wide v": keys * dim * wide * shape.widens,
        "dk of a call": sums * dim * wide,
        "dv of a call": sums * dim * wide,
        "share": shares * dim * wide * apart * shape.widens,
        "slab": slab * where(full, wide, shape.itemsize),
        "wide slab": slab * wide * apart,
    }
