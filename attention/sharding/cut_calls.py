"""Whole calls cut to some queries and some keys of a sequence, as a rank's part has them. Imports no torch.

Of a call's views those that lie within both stay together; the few that an edge cuts are calls of one view
each, whose offsets are views again where they lie in equal steps. A window that is cut is a window: without
the queries and keys that see nobody, its edges are counted from the end of what is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attention.sizes.arrays import ceil_div
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import WholeCall


def cut_calls(
    calls: Sequence[WholeCall], queries: tuple[int, int], keys: tuple[int, int]
) -> tuple[WholeCall, ...]:
    """What some queries do of a sequence's calls, which are of ints, over some keys: the same tokens, or none
    of them, both given as (first, one past the last). Tokens are counted as they were."""
    parts = [part for call in calls if call.exists for part in _parts(call, queries, keys)]
    return tuple(part._replace(first=part.first or not n) for n, part in enumerate(parts))


def with_views(call: WholeCall, shape: Shape) -> WholeCall:
    """A call of one view whose offsets are views, as far as queries and keys lie in equal steps: each is of
    few tokens, and little for a kernel."""
    spans = list(call.spans(shape))
    sizes = {(queries.length, queries.heads, keys.length) for queries, keys in spans}
    if call.views > 1 or len(spans) != call.offsets or len(sizes) > 1:
        return call
    places = [(queries.start, queries.head, keys.start, keys.head) for queries, keys in spans]
    for count in range(1, call.offsets // 2 + 1):
        steps = {
            tuple(b - a for a, b in zip(*pair, strict=True))
            for pair in zip(places, places[count:], strict=False)
        }
        if call.offsets % count or len(steps) > 1:
            continue
        tokens, heads, rows, key_heads = steps.pop()
        if tokens > 0 and min(rows, key_heads) >= 0 and rows + key_heads > 0:
            return call._replace(
                offsets=count,
                views=call.offsets // count,
                view_step=tokens,
                view_heads=heads,
                key_view=(rows, key_heads),
            )
    return call


def _parts(call: WholeCall, queries: tuple[int, int], keys: tuple[int, int]) -> Iterator[WholeCall]:
    (first, stop), (begin, end) = queries, keys
    length, seen = call.length, call.key_length
    some = _views(call, (first - length + 1, stop), (begin - seen + 1, end))
    whole = _views(call, (first, stop - length + 1), (begin, end - seen + 1))
    before, behind = range(some.start, whole.start), range(whole.stop, some.stop)
    if not whole:
        before, behind = some, range(0)
    singles = [part for view in before if (part := _cut(_moved(call, view), queries, keys))]
    if whole:
        singles.append(_moved(call, whole.start)._replace(views=len(whole)))
    singles += [part for view in behind if (part := _cut(_moved(call, view), queries, keys))]
    for number, part in enumerate(singles):
        yield part._replace(name=call.name if not number else f"{call.name}, {number + 1}")


def _views(call: WholeCall, queries: tuple[int, int], keys: tuple[int, int]) -> range:
    """The views whose first query and first key are of such tokens."""
    views = range(call.views)
    for start, (low, high) in ((call.start, queries), (call.key_start, keys)):
        if call.views > 1:
            step = call.view_step
            ahead, rest = max(ceil_div(low - start, step), 0), max(ceil_div(high - start, step), 0)
            views = range(max(views.start, ahead), min(views.stop, rest))
        elif not low <= start < high:
            views = range(0)
    return views


def _moved(call: WholeCall, view: int) -> WholeCall:
    """The call from one of its views on, which are one."""
    shift = view * call.view_step
    return call._replace(start=call.start + shift, key_start=call.key_start + shift, views=1)


def _cut(call: WholeCall, queries: tuple[int, int], keys: tuple[int, int]) -> WholeCall | None:
    """A view's queries and keys among some; None where they see none of each other."""
    first, stop = max(queries[0], call.start), min(queries[1], call.start + call.length)
    begin, end = max(keys[0], call.key_start), min(keys[1], call.key_start + call.key_length)
    # A query sees the keys from so many tokens behind it on, and up to so many.
    apart = call.key_start + call.key_length - call.start - call.length
    low = None if call.left is None else apart - call.left
    high = None if call.right is None else apart + call.right
    if high is not None:
        first = max(first, begin - high)
    if low is not None:
        stop = min(stop, end - low)
        begin = max(begin, first + low)
    if high is not None:
        end = min(end, stop + high)
    if first >= stop or begin >= end:
        return None
    behind = end - stop
    hidden_before = low is not None and stop - 1 + low > begin
    hidden_behind = high is not None and first + high < end - 1
    if call.step > 1 and hidden_behind:  # of each offset as many queries as keys
        assert (first, stop) == (begin, end), (call, queries, keys)
    return call._replace(
        start=first,
        length=stop - first,
        key_start=begin,
        key_length=end - begin,
        left=behind - low if low is not None and hidden_before else None,
        right=high - behind if high is not None and hidden_behind else None,
        view_step=0,
        turn=(call.turn - first + call.start) % call.step,
        key_turn=(call.key_turn - begin + call.key_start) % call.step,
    )
