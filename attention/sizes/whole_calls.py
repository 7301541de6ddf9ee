"""An attention as a few kernel calls over the whole sequence, where the kernel has masks of its own.

Flash attention on CUDA takes fewer kv heads than heads, a causal mask aligned to the end, and a window of so
many tokens before and behind a query; the efficient kernel, where there is no flash attention, a window
before it, of as many kv heads as heads. What is no window of its own is put together from few of them:

* Dense attention is one call, and a dilated branch one for each offset, over views of its segments.
* A window whose edges are blocks of b tokens is one of w b tokens, and for each block a triangle: the query
  at place t of its block also sees the first t tokens of the block w before, and where nothing is causal, of
  the block w behind all but the first t + 1. The triangles of all blocks are one call over views.
* A window of s tokens before and s behind is, where a kernel takes none behind, one of 2 s before the token s
  behind: of all queries but the last s, which see each other, and a triangle of what is before them. What a
  query sees from its place on it is given in reverse order, as what it sees up to its place.
* Global blocks are a call over their columns, and one over their rows.
* Where fewer tokens ask than there are, a call's views before them are left out, and of the view that they
  begin in what is before them is cut off, with the keys that nobody else sees: what masks are aligned to, the
  end, stays where it is.

Sizes are ints, or NumPy arrays for many configs at once. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attention.config import AttentionConfig, Edges, PatternType, Variant
from attention.sizes.arrays import Count, any_of, ceil_div, lcm, maximum, minimum, up, where
from attention.sizes.shape import MOST_VIEWS, Shape, Span, Windows
from attention.sizes.window import token_side, window_blocks

CHANNELS = 8
"""Kernels read channels in vectors of up to this many 16-bit numbers."""
SINGLE = 4
"""Bytes of a number in single precision."""
REGISTER_CHANNELS = 128
"""The most whose sums the efficient kernel's forward keeps in registers; see kernel_forward.h of PyTorch."""
LEAST_SLICE = 1024
"""Queries that are cut off at least."""
REVERSED = 4
"""Times what a part returns that it takes with operands in reverse order."""
BACKWARD_WORKSPACES = 96
"""The most workspaces that the gradients of a part and its scratch take, where one kv head's do."""
PART_SHARE, PART_WORKSPACES = 32, 3
"""What a part returns takes at most one part in so many of q, k, v and out, and so many workspaces."""


FLASH_CHANNELS = 256
"""The most that flash attention takes."""
NARROW_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Capabilities whose multiprocessors have too little of it for flash attention's backward over 193 to 224
channels; see sdp_utils.cpp of PyTorch."""


def has_flash(capability: tuple[int, int], head_dim: int, itemsize: int) -> bool:
    """Whether flash attention takes such numbers on a card, forward and backward."""
    padded = up(head_dim, CHANNELS)
    trains = not (192 < padded <= 224 and capability in NARROW_SHARED_MEMORY)
    return capability >= (8, 0) and itemsize == 2 and padded <= FLASH_CHANNELS and trains


CUDNN_CAPABILITIES = (9, 10)
"""Majors of Hopper and data centre Blackwell, where PyTorch prefers cuDNN's attention (sdp_utils.cpp)."""
CUDNN_CHANNELS = 128
"""The most that cuDNN's attention is given. With newer versions it takes more."""
CUDNN_TOKENS = 512
"""Queries, and keys, from which a call goes to cuDNN's attention: it makes a plan for each shape, which takes
longer than a short call. A judgement."""
LEAST_KEYS = 2
"""cuDNN's attention does not take a single key."""


def has_cudnn(capability: tuple[int, int], head_dim: int, itemsize: int) -> bool:
    """Whether cuDNN's attention takes such numbers, forward and backward, on a card where PyTorch prefers
    it."""
    padded = up(head_dim, CHANNELS)
    return capability[0] in CUDNN_CAPABILITIES and itemsize == 2 and padded <= CUDNN_CHANNELS


class WholeCall(NamedTuple):
    """Calls that differ by their offset alone: that of offset o begins o tokens later, and has heads o,
    o + `period`, ... It begins as many more tokens later as the shape's `first_head` says, modulo `step`."""

    name: str
    start: Count
    """First token of the queries."""
    length: Count
    """Tokens over which a view's queries stretch."""
    key_start: Count
    key_length: Count
    step: Count = 1
    """Tokens from one query, or key, to the next."""
    views: Count = 1
    view_step: Count = 0
    """Tokens from one view to the next, which never overlap."""
    left: Count | None = None
    """A query at place t of T sees keys from t + K - T - left on; None: from the first on."""
    right: Count | None = None
    """It sees keys up to t + K - T + right; None: up to the last."""
    offsets: Count = 1
    period: Count = 1
    """Heads from one head of a call to the next."""
    first: bool = False
    """Whether nothing came before in these queries."""
    exists: Count = 1
    turn: Count = 0
    """Queries of offset o begin (o + `turn`) % `step` tokens after `start`, not o % `step`."""
    key_turn: Count = 0
    """Likewise keys after `key_start`."""
    rate: Count = 1
    """Keys lie in rows of so many tokens, with a lane for each remainder h % `rate` of the query heads h of a
    kv head; see `attention.sharding.parts.Placement`."""
    view_heads: Count = 0
    """Heads from one view's queries to the next's."""
    key_view: tuple[Count, Count] | None = None
    """(rows, heads) from one view's keys to the next's; None for as many tokens as of queries."""

    @property
    def queries(self) -> Count:
        """Of a view, of the first offset, which has most."""
        return ceil_div(self.length, self.step)

    @property
    def keys(self) -> Count:
        """Of a view, of the first offset."""
        return ceil_div(self.key_length, self.step)

    def heads(self, shape: Shape) -> Count:
        """Query heads of the first offset."""
        return ceil_div(shape.heads, self.period)

    def kv_heads(self, shape: Shape) -> Count:
        """Key and value heads of the first offset: all of them, or one for each query head."""
        shared = (shape.heads // shape.kv_heads) % self.period == 0
        return where(shared, shape.kv_heads, self.heads(shape))

    def reverses(self, shape: Shape) -> bool:
        """Whether the kernel, which takes no such mask, is given tokens in reverse order: then queries and
        keys are equally many, and queries see keys from their own place on."""
        return shape.windows == "causal" and self.left is not None and self.right is None

    def can_slice(self, shape: Shape) -> Count:
        """1 if its queries may be cut: on the efficient kernel those of a call without views, unless it goes
        in reverse order or `covers` all."""
        cuts = shape.windows == "causal" and not self.reverses(shape)
        return cuts * (self.views <= 1) * (self.step == 1) * (1 - self.covers(shape))

    def slices(self, queries: Span, keys: Span, most: int) -> Iterator[tuple[Span, Span]]:
        """(queries, keys) of one view in slices of `most` queries, each with the keys that some of them see:
        a mask aligned to the end is for them as it was for all. From the end on, and what is left over is the
        first tokens': so none has more queries or more keys than the one before it. If each had a few more
        keys, a caching allocator would find no room in what it holds, and hold that of all of them."""
        for end in range(queries.length, 0, -most):
            begin = max(end - most, 0)
            yield queries.cut(begin, end), keys.cut(*self.seen(begin, end, queries.length, keys.length))

    def seen(self, begin: Count, end: Count, queries: Count, keys: Count) -> tuple[Count, Count]:
        """(first, one past the last) of a view's keys that some of its queries from `begin` to `end` see."""
        behind = keys - queries
        first = 0 if self.left is None else maximum(begin + behind - self.left, 0)
        return first, keys if self.right is None else minimum(end + behind + self.right, keys)

    def covers(self, shape: Shape) -> Count:
        """1 if its queries are all queries of all heads, in order, so that what it returns is the output. The
        keys of several views are all tokens then, or those of a batch would be copied."""
        all_tokens = (self.views * self.length == shape.queries) * (self.views <= MOST_VIEWS)
        all_tokens = all_tokens * ((self.views == 1) | (self.views * self.key_length == shape.seq))
        return self.first * (self.period == 1) * (self.step == 1) * all_tokens * 1

    def covers_keys(self, shape: Shape) -> Count:
        """1 if it `covers` and its keys are all tokens, so that the gradients it returns are all of them."""
        return self.covers(shape) * (self.views * self.key_length == shape.seq) * 1

    def last(self, shape: Shape) -> tuple[WholeCall, WholeCall]:
        """The call without the queries before `shape.origin`: of the view that they end in, and of the views
        behind it."""
        reach = maximum(self.view_step, 1)
        gone = minimum(ceil_div(maximum(shape.origin - self.start - self.length + 1, 0), reach), self.views)
        shift = gone * self.view_step
        ahead = maximum(shape.origin - self.start - shift, 0) * (gone < self.views)
        cuts = (ahead > 0) * 1
        hidden: Count = 0
        if self.left is not None:
            hidden = maximum(ahead + self.key_length - self.length - self.left, 0)
        part = self._replace(
            name=f"{self.name}, of few",
            start=self.start + shift + ahead,
            length=self.length - ahead,
            key_start=self.key_start + shift + hidden,
            key_length=self.key_length - hidden,
            views=1,
            view_step=0,
            exists=self.exists * cuts,
            turn=(self.turn - ahead) % self.step,
        )
        if not any_of(shape.queries != 1):  # it sees all of the keys that are left
            part = part._replace(left=None, right=None)
        shift = shift + cuts * self.view_step
        behind = self.views - gone - cuts
        rest = self._replace(
            start=self.start + shift,
            key_start=self.key_start + shift,
            views=behind,
            exists=self.exists * (behind > 0),
        )
        return part, rest

    def spans(self, shape: Shape) -> Iterator[tuple[Span, Span]]:
        """(queries, keys) of each call; of ints."""
        repeat = shape.heads // shape.kv_heads
        shared, lanes = repeat % self.period == 0, minimum(repeat, self.rate)
        for offset in range(self.offsets):
            place = shape.first_head + offset
            shift, key_shift = (place + self.turn) % self.step, (place + self.key_turn) % self.step
            queries, keys = (
                _places(self.length - shift, self.step),
                _places(self.key_length - key_shift, self.step),
            )
            if queries < 1 or keys < 1:
                continue
            heads = len(range(offset, shape.heads, self.period))
            span = Span(
                self.start + shift,
                queries,
                self.step,
                self.views,
                self.view_step,
                offset,
                heads,
                self.period,
                self.view_heads,
            )
            rows, key_heads = self.key_view or (self.view_step // self.rate, 0)
            lane = offset // repeat * lanes + offset % lanes
            key_span = span._replace(
                start=(self.key_start + key_shift) // self.rate,
                length=keys,
                step=self.step // self.rate,
                batch_step=rows,
                head=lane,
                batch_head=key_heads,
            )
            if shared:
                yield span, key_span._replace(head=offset % lanes, heads=shape.kv_heads, head_step=lanes)
            else:
                yield span, key_span._replace(head_step=self.period // repeat * lanes)


def document_call(calls: Sequence[WholeCall], shape: Shape) -> WholeCall:
    """Of an attention that is one call, that call over a document, if the document were all tokens. `calls`:
    of the shape, if all tokens were queries."""
    call = next(call for call in calls if any_of(call.exists))
    return call._replace(start=shape.origin, length=shape.queries, key_start=0, key_length=shape.seq)


def windows_of_cut(
    windows: Windows,
    variant: Variant,
    kind: PatternType | None = None,
    edges: Edges = "block",
    *,
    documents: bool,
) -> Windows:
    """The windows with which an attention runs that is cut to the last queries, or to `documents`, of those
    that its kernel takes; `none` where it is tiles: of lists, and of documents all that is not one call of
    flash attention."""
    if variant == "adaptive" or kind == "dilated_sparse":
        return "none"
    one = variant == "dense" or (kind == "local_window" and edges == "token")
    return windows if not documents or (windows == "any" and one) else "none"


def _places(length: Count, step: Count) -> Count:
    """Places 0, step, 2 step, ... below `length`."""
    return maximum(ceil_div(length, step), 0)


def whole_calls(config: AttentionConfig, shape: Shape) -> tuple[WholeCall, ...] | None:
    """The calls of an attention in their order, where `shape.windows`; None for one that is not made of whole
    calls."""
    pattern = config.pattern
    if shape.windows == "none" or config.variant == "adaptive":
        return None
    if pattern is not None:
        return pattern_calls(
            pattern.pattern_type,
            shape,
            size=pattern.block_size,
            window=pattern.local_window_size,
            global_tokens=pattern.global_tokens,
            edges=pattern.edges,
        )
    branches = shape.within(config.branches) if config.variant == "dilated" else ((shape.seq, 1),)
    return branch_calls(sorted(branches, key=lambda branch: branch[1]), shape)


def pattern_calls(
    kind: PatternType | None,
    shape: Shape,
    *,
    size: Count,
    window: Count,
    global_tokens: Count,
    edges: Edges = "block",
) -> tuple[WholeCall, ...] | None:
    """The calls of a block_sparse pattern from its fields; None for one that is not made of whole calls."""
    if kind == "dilated_sparse":
        return None
    blocks = ceil_div(shape.seq, size)
    tokens = global_tokens if kind == "global_local" else 0
    last = any_of(shape.origin) and not any_of(shape.queries != 1)
    if edges == "token":
        reach, begin = token_side(window, shape.causal), tokens
    else:
        side, shared = window_blocks(window, tokens, size, blocks, shape.causal)
        if not last:
            return _last_queries(block_window_calls(size, side, shared, shape), shape)
        reach, begin = side * size + (shape.seq - 1) % size, shared * size
    if last:  # the last token, by itself, is past nothing, and sees from a block's first token on
        shape = shape._replace(causal=True)
    return _last_queries(token_window_calls(reach, begin, shape), shape)


def _last_queries(calls: Sequence[WholeCall], shape: Shape) -> tuple[WholeCall, ...]:
    """The calls without the queries before `shape.origin`."""
    if not any_of(shape.origin):
        return tuple(calls)
    return tuple(part for call in calls for part in call.last(shape))


def branch_calls(branches: Sequence[tuple[Count, Count]], shape: Shape) -> tuple[WholeCall, ...]:
    """Dilated attention, and dense as its branch (seq, 1). Branches come with their smallest rates first."""
    repeat = shape.heads // shape.kv_heads
    right = 0 if shape.causal else None
    calls = []
    for order, (length, rate) in enumerate(branches):
        whole, rest = shape.seq // length, shape.seq % length
        grouped = (repeat % rate == 0) * (shape.windows == "any")
        period = where(grouped, rate, lcm(rate, repeat))
        call = WholeCall(
            f"branch {order + 1}",
            start=0,
            length=length,
            key_start=0,
            key_length=length,
            step=rate,
            views=whole,
            view_step=length,
            right=right,
            offsets=minimum(period, shape.heads),
            period=period,
            first=order == 0,
        )
        begin = whole * length
        tail = call._replace(
            name=f"branch {order + 1}, the end",
            start=begin,
            length=rest,
            key_start=begin,
            key_length=rest,
            views=1,
            exists=(rest > 0) * 1,
        )
        calls += [call, tail]
    return _last_queries(calls, shape)


def block_window_calls(size: Count, side: Count, shared: Count, shape: Shape) -> tuple[WholeCall, ...]:
    """local_window (no shared blocks) and global_local with edges at blocks of `size` tokens; `side` and
    `shared` as `attention.sizes.window.window_blocks` has them."""
    causal = shape.causal
    begin = minimum(shared * size, shape.seq)
    seq = shape.seq - begin  # what is behind the global tokens
    blocks, short = seq // size, seq % size
    reach = side * size
    rows, columns = _global_calls(begin, shape, causal)
    own = WholeCall(
        "own blocks",
        begin,
        size,
        begin,
        size,
        views=blocks,
        view_step=size,
        right=0 if causal else None,
        first=True,
        exists=(side == 0) * (blocks > 0) * 1,
    )
    at = begin + blocks * size
    own_end = own._replace(
        name="own blocks, the end",
        start=at,
        length=short,
        key_start=at,
        key_length=short,
        views=1,
        exists=(side == 0) * (short > 0) * 1,
    )
    window = [call._replace(exists=call.exists * (side > 0)) for call in _window(begin, seq, reach, shape)]
    # A triangle has one row and one column fewer than its block.
    edge = size - 1
    pairs = maximum(blocks - side, 0)
    before = WholeCall(
        "edges before",
        begin + reach + 1,
        edge,
        begin,
        edge,
        views=pairs,
        view_step=size,
        right=0,
        exists=(side > 0) * (edge > 0) * (pairs > 0) * 1,
    )
    end = maximum(short - 1, 0)
    last = blocks - side  # the block that the last, short one sees an edge of
    before_end = before._replace(
        name="edges before, the end",
        start=at + 1,
        length=end,
        key_start=begin + maximum(last, 0) * size,
        key_length=end,
        views=1,
        exists=(side > 0) * (end > 0) * (last >= 0) * 1,
    )
    calls = [rows, own, own_end, *window, before, before_end]
    if not causal:
        behind = before._replace(
            name="edges behind", start=begin, key_start=begin + reach + 1, left=0, right=None
        )
        behind_end = before_end._replace(
            name="edges behind, the end",
            start=before_end.key_start,
            key_start=before_end.start,
            left=0,
            right=None,
        )
        calls += [behind, behind_end]
    return _for_all_heads((*calls, columns), shape)


def token_window_calls(side: Count, shared: Count, shape: Shape) -> tuple[WholeCall, ...]:
    """local_window and global_local whose edges are tokens: a query sees `side` tokens before it and, if not
    causal, behind it; `shared` tokens are global."""
    causal = shape.causal
    begin = minimum(shared, shape.seq)
    seq = shape.seq - begin
    side = minimum(side, shape.seq)
    rows, columns = _global_calls(begin, shape, causal)
    return _for_all_heads((rows, *_window(begin, seq, side, shape), columns), shape)


def _for_all_heads(calls: tuple[WholeCall, ...], shape: Shape) -> tuple[WholeCall, ...]:
    """The calls, each once for every query head of a group where a kernel has as many kv heads as heads."""
    if shape.windows == "any":
        return calls
    repeat = shape.heads // shape.kv_heads
    return tuple(call._replace(offsets=repeat, period=repeat) for call in calls)


def _window(begin: Count, seq: Count, side: Count, shape: Shape) -> list[WholeCall]:
    """The window of the `seq` tokens from `begin` on: so many before a query, and behind it if not causal."""
    right = 0 if shape.causal else side
    call = WholeCall(
        "window", begin, seq, begin, seq, left=side, right=right, first=True, exists=(seq > 0) * 1
    )
    if shape.causal or shape.windows == "any":
        return [call]
    side = minimum(side, maximum(seq - 1, 0))
    most = seq - side  # queries that have `side` tokens behind them
    call = call._replace(length=most, left=2 * side, right=0)
    last = WholeCall(
        "window, the end", begin + most, side, begin + most, side, first=True, exists=(side > 0) * 1
    )
    # Of those that have fewer, the ones from token `side` on do not see all that is before `most`.
    part = minimum(side, most)
    edge = last._replace(
        name="window, before the end",
        start=begin + seq - part,
        length=part,
        key_start=begin + most - part,
        key_length=part,
        left=0,
        first=False,
    )
    all_before = last._replace(
        name="window, all before the end",
        length=side - part,
        key_start=begin,
        key_length=most,
        first=False,
        exists=(side > part) * 1,
    )
    return [call, last, edge, all_before]


def _global_calls(tokens: Count, shape: Shape, causal: bool) -> tuple[WholeCall, WholeCall]:
    """The first `tokens` as queries, and as keys of those behind them, who merge them into their windows."""
    rows = WholeCall(
        "global rows",
        0,
        tokens,
        0,
        tokens if causal else shape.seq,
        right=0 if causal else None,
        first=True,
        exists=(tokens > 0) * 1,
    )
    behind = shape.seq - tokens
    columns = WholeCall("global columns", tokens, behind, 0, tokens, exists=(tokens > 0) * (behind > 0) * 1)
    return rows, columns


def by_cudnn(call: WholeCall, shape: Shape) -> Count:
    """1 if a call goes to cuDNN's attention, which has no windows and whose causal mask begins at the first
    key; else 0."""
    if not shape.cudnn_from or call.left is not None:
        return 0
    square = call.right is None or (call.length == call.key_length)
    return square * (call.queries >= shape.cudnn_from) * (call.keys >= shape.cudnn_from) * 1


class CallPart(NamedTuple):
    """What a kernel is given at once of a call."""

    views: Count
    kv_heads: Count
    """With the query heads that read them."""
    queries: Count = 1 << 62
    """Of one view and kv head; see `WholeCall.slices`."""


def forward_cut(call: WholeCall, shape: Shape) -> CallPart:
    """Parts whose results, which are merged into the output, take little beside it. What is the output comes
    in one part."""
    dim, e = up(shape.head_dim, CHANNELS), shape.itemsize
    # The efficient kernel sums up more channels in single precision in memory.
    summed = (shape.windows == "causal" and e < SINGLE) * (dim > REGISTER_CHANNELS)
    views = call.queries * call.heads(shape) * dim * (e + SINGLE * summed)
    views = views * (REVERSED if call.reverses(shape) else 1)
    room = PART_WORKSPACES * shape.workspace + floor_bytes(shape) // PART_SHARE
    return _cut(call, shape, views * (1 - call.covers(shape)), room)


def backward_cut(call: WholeCall, shape: Shape, room: Count | None = None) -> CallPart:
    """Parts whose scratch, and gradients and copies of operands where those are not the results and operands
    themselves, take no more than `room`, by default q, k, v and out of a batch item, and no more than so many
    workspaces: a smaller workspace takes less, in more calls."""
    heads, kv_heads, dim = call.heads(shape), call.kv_heads(shape), up(shape.head_dim, CHANNELS)
    e = shape.itemsize
    sums = SINGLE * call.queries * heads * up(shape.head_dim, 32)
    # Flash attention makes dk and dv of each query head and adds up those of a kv head.
    apart = 2 * call.keys * where(heads > kv_heads, heads, 0) * dim * e
    others = (3 * call.queries * heads + 2 * call.keys * kv_heads) * dim * e
    others = others * (2 if call.reverses(shape) else 1)
    a_view = sums + apart + others * (1 - call.covers(shape))
    if room is None:
        room = minimum(maximum(shape.workspace, floor_bytes(shape)), BACKWARD_WORKSPACES * shape.workspace)
    return _cut(call, shape, a_view, room)


def _cut(call: WholeCall, shape: Shape, a_view: Count, room: Count) -> CallPart:
    """Views of `a_view` bytes each, some kv heads of one view, or some queries of one kv head, that fit the
    room, `room` bytes."""
    kv_heads = call.kv_heads(shape)
    a_view = maximum(a_view, 1)
    views = minimum(maximum(call.views, 1), MOST_VIEWS, maximum(room // a_view, 1))
    some = minimum(maximum(kv_heads * room // a_view, 1), kv_heads)
    a_head = maximum(a_view // kv_heads, 1)
    few = minimum(maximum(call.queries * room // a_head, LEAST_SLICE), maximum(call.queries, 1))
    cuts = call.can_slice(shape) * (a_head > room)
    return CallPart(views, where(a_view > room, some, kv_heads), where(cuts, few, maximum(call.queries, 1)))


def floor_bytes(shape: Shape) -> Count:
    """Bytes of q, k, v and out of a batch item."""
    return 2 * (shape.queries * shape.token_bytes + shape.seq * shape.kv_token_bytes)
