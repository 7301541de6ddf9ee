"""Windows that end at the token, as tiles: how they are cut, and how large their calls get. Imports no torch.

Behind the global tokens, query rows of `unit` tokens follow each other; the row that begins at token a sees
tokens a - left to a + unit - 1 + right. A query at place t of it sees a band: those at places t to
t + left + right. Rows whose keys are few are one call under a mask, a band over [unit, unit + left + right].
Of longer rows the first and the last `unit` keys are calls by themselves, two triangles, and what is between
is seen by all of the row's queries. One of the triangles is the kernel's own causal mask; the other takes a
mask of [unit, 2 unit]. Rows at even distances are views of one call; where they share most of what they see,
that is a call of all of them (`attention.block_sparse.shared_calls`). Global columns are a long view of a
tile's queries over the first tokens, and global rows are tiles of their own.

Sizes are ints, or NumPy arrays for many configs at once.
"""

from __future__ import annotations

from typing import NamedTuple

from attention.config import AttentionConfig, PatternType
from attention.sizes.arrays import Count, ceil_div, floor_root, maximum, minimum, where
from attention.sizes.shape import WIDE, Shape
from attention.sizes.tiles import Extent, Kind
from attention.sizes.window import token_side

MASK_SHARE = 16
"""An additive mask takes at most one part in so many of the workspace."""


class TokenWindow(NamedTuple):
    """A window that ends at the token, and global tokens."""

    size: Count
    """Tokens a row at most: of a block."""
    side: Count
    """Tokens that a query sees before itself, and after itself if not causal."""
    shared: Count
    """Global tokens."""


def token_window(
    kind: PatternType | None, causal: bool, *, size: Count, window: Count, global_tokens: Count
) -> TokenWindow:
    """The window of a pattern from its fields."""
    return TokenWindow(
        size, token_side(window, causal), global_tokens if kind == "global_local" else 0 * global_tokens
    )


def token_window_of(config: AttentionConfig, causal: bool) -> TokenWindow:
    """The window of a config with `token_edges`."""
    pattern = config.pattern
    assert pattern is not None
    return token_window(
        pattern.pattern_type,
        causal,
        size=pattern.block_size,
        window=pattern.local_window_size,
        global_tokens=pattern.global_tokens,
    )


class TokenRow(NamedTuple):
    """A row of queries and the keys that it sees, as tokens behind the global ones."""

    start: Count
    queries: Count
    first: Count
    """First token that some query sees."""
    full: Count
    """First of the tokens that are seen by all if the row is cut, else by some."""
    full_stop: Count
    """One past the last of those."""
    stop: Count
    """One past the last token that some query sees."""

    @property
    def before(self) -> Count:
        """Keys that some do not see because they are too far before."""
        return self.full - self.first

    @property
    def behind(self) -> Count:
        """Keys that some do not see because they are too far behind, after one that all see."""
        return self.stop - self.full_stop

    @property
    def edge(self) -> Count:
        """Most keys of its calls under a mask, if it is cut."""
        return maximum(self.before, where(self.behind < self.queries, self.behind, 0))


class TokenRows(NamedTuple):
    """How the rows of a window are cut for a shape."""

    begin: Count
    """Global tokens: where the rows begin."""
    offset: Count
    """Tokens behind the global ones before the first query."""
    tokens: Count
    """Tokens behind the global ones."""
    unit: Count
    """Tokens a row; the last row may have fewer."""
    left: Count
    right: Count
    cut: Count
    """1 if rows are cut into what all see and triangles, 0 if they are one call each."""
    slide: Count
    """First of the rows that see as many keys as any and so slide."""
    slide_stop: Count
    """One past the last of those."""
    together: Count
    """Rows that slide in a call."""
    wide: Count
    """1 if such rows are cut by what they share, else 0."""
    global_unit: Count
    """Tokens a row of causal global rows; of others, tokens of a tile."""
    causal: bool

    @property
    def columns(self) -> Count:
        """Of the mask: a row's keys, or those of two triangles."""
        return self.unit + where(self.cut, self.unit, self.left + self.right)

    @property
    def band(self) -> Count:
        """Columns of the mask from the first to the last that a query sees."""
        return self.columns - self.unit

    @property
    def masks(self) -> Count:
        """1 if some call is under an additive mask."""
        hides = (self.tokens - 1 > self.left) * 1
        return maximum(hides, (1 - self.cut) * (self.tokens > 1)) if self.causal else hides

    @property
    def rows(self) -> Count:
        return ceil_div(self.tokens - self.offset, self.unit)

    def row(self, number: Count) -> TokenRow:
        """A row by its number, from 0."""
        start = self.offset + number * self.unit
        queries = minimum(self.unit, self.tokens - start)
        first = maximum(start - self.left, 0)
        stop = minimum(start + queries + self.right, self.tokens)
        # One key that only some may not see is seen by all.
        full = start + queries - self.left
        full = where(self.cut * (full > 1), full, first)
        behind = self.cut * (start + self.right + 1 < self.tokens)
        return TokenRow(start, queries, first, full, where(behind, start + self.right, stop), stop)


def token_rows(window: TokenWindow, shape: Shape) -> TokenRows:
    """The rows of a window, so short that a mask of two triangles fits its share of the workspace."""
    begin = minimum(window.shared, shape.seq)
    tokens = shape.seq - begin
    offset = minimum(maximum(shape.origin - begin, 0), tokens)
    room = shape.workspace // (MASK_SHARE * shape.wide)
    longest = maximum(floor_root(room // 2), 1)
    longest = ceil_div(window.size, ceil_div(window.size, longest))  # a block in even parts
    unit = minimum(longest, maximum(tokens - offset, 1))
    left = minimum(window.side, maximum(tokens - 1, 0))
    right = 0 * left if shape.causal else left
    keys = span = unit + left + right
    cut = (keys > 2 * unit) * ((keys * unit > room) | (keys > shape.pack_tokens(1))) * 1
    slide = ceil_div(maximum(left - offset, 0), unit)
    slide_stop = maximum((tokens - right - offset) // unit, slide)
    keys = where(cut, maximum(keys - 2 * unit, unit), keys)
    together = minimum(shape.chunk_views(unit), slide_stop - slide)
    wide = cut * (together > 1) * (span >= WIDE * together * unit)
    together = where(wide, together, minimum(together, shape.pack_tokens(1) // keys))
    per_tile = longest if shape.causal else maximum(shape.chunk, 1)
    return TokenRows(
        begin,
        offset,
        tokens,
        unit,
        left,
        right,
        cut,
        slide,
        slide_stop,
        maximum(together, 1),
        wide,
        maximum(minimum(per_tile, begin), 1),
        shape.causal,
    )


def token_extent(window: TokenWindow, shape: Shape) -> Extent:
    """The extent of the program of `attention/token_window.py`."""
    rows = token_rows(window, shape)
    kinds = (*_window_kinds(rows, shape), *_global_kinds(rows, shape))
    merges = maximum(*((kind.later > 0) * kind.exists for kind in kinds))
    tokens = maximum(*(kind.views * kind.queries * kind.exists for kind in kinds))
    return Extent(tokens, kinds, merges, (rows.unit * rows.masks, rows.columns * rows.masks), band=True)


def _window_kinds(rows: TokenRows, shape: Shape) -> tuple[Kind, ...]:
    unit, cut, some = rows.unit, rows.cut, rows.tokens > 0
    limit = where(cut, shape.pack_tokens(1), shape.seq)
    whole = (rows.tokens - rows.offset) // unit  # rows that are not short
    short = (rows.tokens - rows.offset) % unit
    # Keys grow by a row's tokens or stay, until they stay or shrink: the most are at one of these rows.
    turns = (
        rows.left // unit - 1,
        rows.left // unit,
        rows.slide,
        rows.slide_stop - 1,
        rows.slide_stop,
        (rows.tokens - rows.right - 1) // unit,
        whole - 1,
    )
    middle, edges = 0 * unit, 0 * unit
    for number in turns:
        row = rows.row(minimum(maximum(number, 0), maximum(whole - 1, 0)))
        middle, edges = maximum(middle, row.full_stop - row.full), maximum(edges, row.edge)
    last = rows.row(whole)
    dense = (shape.heads == shape.call_heads) * 1
    masked = unit * (1 - cut) * rows.masks
    view = Kind(
        "view",
        shape.call_heads,
        1,
        unit,
        maximum(minimum(middle, limit), 1),
        dense=dense,
        masked=masked,
        groups=shape.kv_heads,
        later=unit * cut,
        exists=(whole > 0) * some * 1,
    )
    last_view = view._replace(
        name="last view",
        queries=maximum(short, 1),
        exists=(short > 0) * 1,
        masked=minimum(masked, short),
        keys=maximum(minimum(last.full_stop - last.full, limit), 1),
        later=short * cut,
    )
    views = view._replace(
        name="views",
        views=rows.together,
        step=unit,
        later=rows.together * unit * cut,
        keys=maximum(minimum(unit * (1 - 2 * cut) + rows.left + rows.right, limit), 1),
        exists=(rows.together > 1) * (1 - rows.wide),
    )
    edge = Kind(
        "edge",
        shape.call_heads,
        rows.together,
        unit,
        maximum(edges, 1),
        dense=dense,
        masked=unit,
        groups=shape.kv_heads,
        later=rows.together * unit,
        exists=(whole > 0) * (edges > 0) * 1,
    )
    last_edge = edge._replace(
        name="last edge",
        views=1,
        queries=maximum(short, 1),
        keys=maximum(last.edge, 1),
        masked=short,
        later=short,
        exists=(short > 0) * (last.edge > 0) * 1,
    )
    triangle = edge._replace(
        name="triangle",
        keys=unit,
        whole=True,
        masked=0,
        later=0,
        exists=cut * (unit + rows.right <= rows.tokens) * some * 1,
    )
    return view, last_view, views, edge, last_edge, triangle, _shared(rows, view, limit)


def _shared(rows: TokenRows, view: Kind, limit: Count) -> Kind:
    """What sliding rows share, and halves of them. The last tile may have fewer rows, which share more; one
    row alone is a view."""
    unit, together = rows.unit, rows.together
    middle = rows.left + rows.right - unit + (unit == 1)
    left = maximum(rows.slide_stop - rows.slide, 0) % together
    left = where(left > 1, left, together)
    half = ceil_div(together, 2) * unit
    keys, rest = (minimum(maximum(middle - (some - 1) * unit, 1), limit) for some in (together, left))
    return view._replace(
        name="long view",
        queries=together * unit,
        keys=maximum(rest, minimum(half, limit)),
        later=together * unit,
        exists=rows.wide,
        sizes=((1, together * unit, keys), (1, left * unit, rest), (1, half, minimum(half, limit))),
    )


def _global_kinds(rows: TokenRows, shape: Shape) -> tuple[Kind, ...]:
    begin, unit = rows.begin, rows.global_unit
    limit, dense = shape.pack_tokens(1), (shape.heads == shape.call_heads) * 1
    queries = rows.together * rows.unit
    columns = Kind(
        "global columns",
        shape.call_heads,
        1,
        queries,
        maximum(minimum(begin, limit), 1),
        dense=dense,
        groups=shape.kv_heads,
        later=queries,
        exists=(begin > 0) * (rows.tokens > 0) * 1,
    )
    keys = minimum(shape.seq, limit)
    there = columns._replace(
        name="global rows", queries=unit, keys=keys, later=unit * (keys < shape.seq), exists=(begin > 0) * 1
    )
    if not shape.causal:
        return columns, there
    whole, short = begin // unit, begin % unit
    own = there._replace(name="global triangle", keys=unit, whole=True, later=0)
    before = maximum(whole - 1, 0) * unit
    there = there._replace(keys=maximum(minimum(before, limit), 1), later=unit, exists=(before > 0) * 1)
    end = there._replace(
        name="last global row",
        queries=maximum(short, 1),
        later=short,
        exists=(short > 0) * (whole > 0) * 1,
        keys=maximum(minimum(whole * unit, limit), 1),
    )
    return columns, own, there, end
