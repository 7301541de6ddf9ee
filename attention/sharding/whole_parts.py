"""Parts that kernels take as whole calls, as on GPUs, by masks of their own. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from attention.config import AttentionConfig
from attention.sharding.parts import Placement
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import WholeCall, whole_calls
from attention.sizes.window import token_side


class WholePart(NamedTuple):
    """The calls of a part, over q of its queries and k of its rows."""

    shape: Shape
    calls: tuple[WholeCall, ...]


def whole_part(
    config: AttentionConfig, queries: tuple[int, int], rows: Placement, whole: Shape
) -> WholePart | None:
    """The calls of queries (first, one past the last) over rows, where there are any; `whole`: the shape of
    the whole sequence."""
    if whole.windows == "none" or len(rows.runs) > 1 or rows.rate > 1:
        return None
    begin, end, _ = rows.runs[0]
    if queries == (begin, end):
        shape = whole._replace(seq=end - begin)
        calls = whole_calls(config, shape) if is_twin(config, begin, end) else None
        return None if calls is None else WholePart(shape, calls)
    if whole.windows != "any" or (queries[0] < end and begin < queries[1]):
        return None
    left = right = None
    if config.token_edges:
        if config.pattern is None or config.pattern.pattern_type != "local_window":
            return None
        reach = token_side(config.pattern.local_window_size, whole.causal)
        if end <= queries[0]:
            left = reach - (queries[1] - end)
        else:
            right = reach - (end - queries[1])
    elif config.variant != "dense":
        return None
    asking = queries[1] - queries[0]
    shape = whole._replace(seq=end - begin, origin=end - begin - asking, causal=False)
    call = WholeCall(
        "part",
        start=shape.origin,
        length=asking,
        key_start=0,
        key_length=end - begin,
        left=left,
        right=right,
        first=True,
    )
    return WholePart(shape, (call,))


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
