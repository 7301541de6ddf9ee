"""Parts that kernels take as whole calls, as on GPUs, by masks of their own. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from attention.config import AttentionConfig
from attention.sharding.cut_calls import cut_calls, with_views
from attention.sharding.parts import Placement, lanes_per_head
from attention.sizes.list_calls import ListCalls, calls_of_rows
from attention.sizes.row_bounds import rows_of
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import WholeCall, whole_calls


class WholePart(NamedTuple):
    """The calls of a part, over q of its queries and k of its rows."""

    shape: Shape
    """Of them. Its queries are not the last of its keys, and there may be more of them."""
    calls: tuple[WholeCall, ...]
    """None where no query sees a key."""

    @property
    def covers(self) -> bool:
        """Whether every query of every head is in some call."""
        covered = sum(call.views * call.length for call in self.calls if call.first and call.step == 1)
        return bool(covered == self.shape.queries)


def whole_part(
    config: AttentionConfig, queries: tuple[int, int], rows: Placement, whole: Shape
) -> WholePart | None:
    """The calls of queries (first, one past the last) over rows, if they are whole calls; `whole`: the shape
    of the whole sequence."""
    if whole.windows == "none" or len(rows.runs) > 1:
        return None
    begin, end, _ = rows.runs[0]
    if whole.windows == "causal":  # of tokens that see each other as a sequence of their own would
        if queries != (begin, end) or not is_twin(config, begin, end):
            return None
        shape = whole._replace(seq=end - begin)
        twin = whole_calls(config, shape)
        return None if twin is None else WholePart(shape, tuple(call for call in twin if call.exists))
    calls = whole_calls(config, whole)
    if calls is None:
        return None
    first = queries[0]
    repeat = int(whole.heads // whole.kv_heads)
    keys = rows.total * lanes_per_head(rows.rate, repeat)
    shape = whole._replace(seq=keys, origin=keys - queries[1] + first)
    placed = (
        call._replace(
            start=call.start - first + shape.origin, key_start=call.key_start - begin, rate=rows.rate
        )
        for call in cut_calls(calls, queries, (begin, end))
    )
    there = (call for call in placed if next(call.spans(shape), None))
    return WholePart(shape, tuple(with_views(call, shape) for call in there))


class ListedPart(NamedTuple):
    """A part over lists of blocks, of which its rows are those from `first` on."""

    shape: Shape
    calls: ListCalls
    first: int
    rows: Placement


def listed_part(
    config: AttentionConfig, queries: tuple[int, int], rows: Placement, whole: Shape
) -> ListedPart | None:
    """The calls over lists of queries (first, one past the last), whose own keys are among rows, if they are
    of an attention over lists and of blocks that nothing cuts; `whole`: the shape of the whole sequence."""
    pattern = config.pattern
    if whole.windows != "any" or pattern is None or pattern.pattern_type != "dilated_sparse":
        return None
    size, (first, stop) = pattern.block_size, queries
    edges = {edge for begin, end, _ in rows.runs for edge in (begin, end)} | {first, stop}
    if any(edge % size for edge in edges - {whole.seq}) or not rows.has_blocks(size):
        return None
    shape = whole._replace(seq=rows.total, origin=rows.total - stop + first)
    widest = rows_of(config, int(whole.seq), whole.causal)
    return ListedPart(shape, calls_of_rows(widest, shape, rows.row(first) // size), first // size, rows)


def joining(calls: Sequence[WholeCall]) -> tuple[WholeCall, ...]:
    """The calls as those are whose results are added to others: none is all that there is."""
    return tuple(call._replace(first=False) for call in calls)


def is_twin(config: AttentionConfig, begin: int, end: int) -> bool:
    """Whether the tokens begin..end attend to each other as a sequence of their own would."""
    if config.variant == "dense":
        return True
    if config.variant == "dilated":
        return all(
            begin % length == 0 if length <= end - begin else _inside(begin, end, length, rate)
            for length, rate in config.branches
        )
    pattern = config.pattern
    if pattern is None or config.variant != "block_sparse" or pattern.pattern_type != "local_window":
        return False
    return config.token_edges or begin % pattern.block_size == 0


def _inside(begin: int, end: int, length: int, rate: int) -> bool:
    """Whether tokens lie in one segment, at a multiple of its rate."""
    return begin // length == (end - 1) // length and begin % length % rate == 0
