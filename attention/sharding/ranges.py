"""Which tokens the queries of a rank see, in closed forms of ints or of arrays. Imports no torch.

A *range* (begin, end, rate) of tokens stands for all of them if rate is 1; otherwise, for each query head h,
for those tokens p of it with p % rate == h % rate. It is empty where begin >= end.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from attention.config import AttentionConfig, Edges, PatternType, Variant
from attention.errors import ConfigError
from attention.sizes.arrays import Count, ascending, ceil_div, gcd, maximum, minimum, row_blocks, where
from attention.sizes.window import window_blocks

Range = tuple[Count, Count, Count]


class Band(NamedTuple):
    """Queries see keys of their segment of `length` tokens, up to `reach` tokens beyond the block that they
    are in; of each head h those keys p with p % length % rate == h % rate."""

    length: Count
    rate: Count
    reach: Count
    size: Count = 1
    """Tokens of a block."""


class Sight(NamedTuple):
    """What the queries of an attention see, if not causal to either side: all that one of the bands shows,
    and the first `shared` tokens."""

    bands: tuple[Band, ...]
    shared: Count = 0


def sight_of(config: AttentionConfig, seq: int, causal: bool) -> Sight:
    """The sight of a config; ConfigError for adaptive."""
    pattern = config.pattern
    if pattern is None:
        return sight(
            config.variant, None, seq, causal, lengths=config.segment_lengths, rates=config.dilation_rates
        )
    return sight(
        config.variant,
        pattern.pattern_type,
        seq,
        causal,
        size=pattern.block_size,
        window=pattern.local_window_size,
        global_tokens=pattern.global_tokens,
        ratio=pattern.sparsity_ratio,
        lengths=config.segment_lengths,
        rates=config.dilation_rates,
        edges=pattern.edges,
    )


def sight(
    variant: Variant,
    kind: PatternType | None,
    seq: Count,
    causal: bool,
    *,
    size: Count = 1,
    window: Count = 0,
    global_tokens: Count = 0,
    ratio: float = 1.0,
    lengths: Sequence[Count] = (),
    rates: Sequence[Count] = (),
    edges: Edges = "block",
) -> Sight:
    """The sight of an attention from its fields, of which its kind reads its own. Of dilated_sparse it is an
    upper bound: all tokens between the farthest blocks that a row may keep."""
    if variant == "dense":
        return Sight((Band(seq, 1, seq),))
    if variant == "dilated":
        pairs = zip(lengths, rates, strict=True)
        return Sight(tuple(Band(minimum(length, seq), rate, seq) for length, rate in pairs))
    if variant == "adaptive":
        raise ConfigError(
            "variant 'adaptive' chooses its keys when it runs, so nobody knows before who needs which; use "
            "exchange='heads'"
        )
    if kind == "dilated_sparse":
        blocks = ceil_div(seq, size)
        others = row_blocks(ratio, blocks) - 1
        # A rate beyond this reaches all blocks, and the product stays small.
        most = ceil_div(blocks, maximum(others, 1))
        pairs = zip(lengths, rates, strict=True)
        return Sight(
            tuple(Band(minimum(n, seq), 1, minimum(r, most) * others * size, size) for n, r in pairs)
        )
    block = 1 if edges == "token" else size
    tokens = global_tokens if kind == "global_local" else 0
    side, shared = window_blocks(window, tokens, block, ceil_div(seq, block), causal)
    return Sight((Band(seq, 1, side * block, block),), minimum(shared * block, seq))


def global_queries(sight: Sight, causal: bool) -> Count:
    """The first tokens that, as queries, see every key: they travel to the keys."""
    return 0 if causal else sight.shared


def hull(band: Band, seq: Count, begin: Count, end: Count) -> tuple[Count, Count]:
    """(first, one past the last) of the tokens that the tokens begin..end see through a band, and that see
    them, if not causal."""
    low, high = begin // band.size * band.size, ceil_div(end, band.size) * band.size
    first = maximum(begin // band.length * band.length, low - band.reach)
    return first, minimum(ceil_div(end, band.length) * band.length, high + band.reach, seq)


def seen(sight: Sight, seq: Count, begin: Count, end: Count) -> list[Range]:
    """What the queries begin..end see to either side, and those that share blocks with them: ranges that
    ascend and are disjoint, some of them empty.

    A band reaches from the begin of the segment of the first query to the end of that of the last one. Where
    bands meet, the rate is the greatest common divisor of theirs, and 1 if segments are no multiple of it.
    """
    # (begin, end, rate, tokens a segment or 0 if one is all) of each band.
    hulls: list[tuple[Count, ...]] = [(0, sight.shared, 1, 0)]
    for band in sight.bands:
        hulls.append((*hull(band, seq, begin, end), band.rate, where(band.length < seq, band.length, 0)))
    ranges: list[Range] = []
    for low, high in pairwise(ascending(*(edge for one in hulls for edge in one[:2]))):
        inside = [(first <= low) & (high <= stop) for first, stop, *_ in hulls]
        common: Count = 0
        for here, one in zip(inside, hulls, strict=True):
            common = gcd(common, where(here, one[2], 0))
        some = maximum(common, 1)
        uneven: Count = 0
        for here, one in zip(inside, hulls, strict=True):
            uneven = uneven + here * (one[3] % some)
        # Where no hull is, nothing is seen.
        ranges.append((low, where(common > 0, high, low), where(uneven > 0, 1, some)))
    return ranges
