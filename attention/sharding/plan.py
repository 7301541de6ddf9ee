"""What a rank computes, fetches and sends in one attention over shards. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, pairwise
from typing import NamedTuple

from attention.config import AttentionConfig
from attention.ops.program import Tile
from attention.sharding.needs import Packing, Source, asking, deliveries, stages, visitors, visits
from attention.sharding.parts import PartProgram, Placement, joined_placement, own_placement
from attention.sharding.shards import Shards
from attention.sharding.traffic import travels_wide
from attention.sharding.whole_parts import ListedPart, WholePart, listed_part, whole_part
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import floor_bytes

Ranges = tuple[tuple[int, int], ...]
"""(first, one past the last) of some tokens, ascending and apart."""
FEW_PARTS = 2
"""Parts that may meet in a query, or in a key's gradient, before their sum is kept in single precision."""
SLAB_SHARE, SLAB_TOKENS = 256, 16
"""Where parts are added to a sum, slabs are widened one after the other: of at most one part in so many of
the rank's q, k, v and out, but not of fewer tokens than this."""


class RankPart(NamedTuple):
    """Some queries over the keys of one tensor."""

    queries: slice
    """Tokens of the local q, or of the visiting one."""
    program: PartProgram
    number: int
    """Its place among the rank's parts."""
    whole: WholePart | None = None
    """What does it instead of the program, where kernels take whole calls."""
    listed: ListedPart | None = None
    """What does it, where they take lists of blocks."""


class OwnPart(NamedTuple):
    """Some own queries, or visiting ones, over a piece of the own keys."""

    part: RankPart
    keys: slice
    """Tokens of the local k."""


class Fetch(NamedTuple):
    """Sources that are received into one tensor, with the parts that read it."""

    sources: tuple[Source, ...]
    rows: Placement
    own: tuple[slice, slice] | None
    """Rows of the tensor, and tokens of the local k, where own keys are copied in."""
    parts: tuple[RankPart, ...]


class FetchStage(NamedTuple):
    """What a rank fetches, and what it sends to those who fetch it in the same stage."""

    fetches: tuple[Fetch, ...]
    deliveries: tuple[Source, ...]


class Guest(NamedTuple):
    """Queries of a peer that visit, or own ones that visit it."""

    peer: int
    queries: slice
    """Where own ones are among the local ones; visiting ones are all there."""
    parts: tuple[OwnPart, ...]
    """What is computed of visiting ones."""


class KeysPlan(NamedTuple):
    """What a rank computes, fetches and sends in one attention over shards."""

    shape: Shape
    """Of the whole sequence, with chunks for a rank's tokens."""
    tokens: int
    """Own tokens."""
    own: tuple[OwnPart, ...]
    stages: tuple[FetchStage, ...]
    guests: tuple[Guest, ...]
    """Visiting queries."""
    hosts: tuple[Guest, ...]
    """Own queries that visit, by where."""
    locate: Callable[[Source], slice]
    """Tokens of the local k that are a source's."""
    wide_out: Ranges
    """Own queries in which more than `FEW_PARTS` meet."""
    wide_keys: Ranges
    """Own keys in whose gradients more than `FEW_PARTS` meet."""
    travels_wide: bool
    """Whether gradients travel in single precision."""

    @property
    def slab_tokens(self) -> int:
        """Tokens of a batch item that are widened at a time."""
        shape = self.shape._replace(seq=self.tokens, origin=0)
        token = shape.heads * shape.head_dim * shape.wide
        return max(int(floor_bytes(shape) // (SLAB_SHARE * token)), SLAB_TOKENS)

    def all_parts(self) -> Iterator[RankPart]:
        """Its parts, once each."""
        for guest in self.guests:
            yield from (one.part for one in guest.parts)
        yield from (one.part for one in self.own)
        for stage in self.stages:
            for fetch in stage.fetches:
                yield from fetch.parts


def keys_plan(
    config: AttentionConfig,
    shape: Shape,
    shards: Shards,
    rank: int,
    make: Callable[[Shape], Iterable[Tile]],
    documents: Packing | None,
    *,
    looks: bool = True,
) -> KeysPlan:
    """The plan of a rank. `shape`: of the whole sequence, with chunks for a rank's tokens; `make` makes the
    tiles of the whole sequence. Unless it `looks` at those, there may be parts without any, and more be
    fetched (`attention.sharding.needs.stages`)."""
    seq, causal, numbers = int(shape.seq), shape.causal, count()
    pieces = shards.pieces(rank)
    starts = _starts(pieces)
    visit_end = max((stop for _, _, stop in visitors(config, shards, rank, causal, documents)), default=0)

    def part(queries: tuple[int, int], rows: Placement, begin: int) -> RankPart | None:
        """Queries, of which local ones begin with token `begin`, over what lies in rows."""
        tokens = rows.runs[0][0], rows.runs[-1][1]
        first, stop = asking(config, seq, queries, tokens, causal)
        if first >= stop:
            return None
        program = PartProgram(make, (first, stop), rows, shape._replace(windows="none"), documents)
        whole = None if documents else whole_part(config, (first, stop), rows, shape)
        listed = None if documents else listed_part(config, (first, stop), rows, shape)
        if whole is not None and not whole.calls:
            return None
        if whole is None and listed is None and looks and not program.exists():
            return None
        place = slice(begin + first - queries[0], begin + stop - queries[0])
        return RankPart(place, program, next(numbers), whole, listed)

    def local(begin: int, end: int) -> slice:
        return slice(starts(begin), starts(begin) + end - begin)

    joins = is_joined(config)
    own = []
    for queries in () if joins else pieces:
        for keys in pieces:
            if made := part(queries, own_placement(*keys), starts(queries[0])):
                own.append(OwnPart(made, local(*keys)))

    def fetch(sources: Sequence[Source]) -> Fetch:
        unit = config.pattern.block_size if joins and config.pattern else 1
        rows, copied = joined_placement(sources, pieces if joins else (), unit)
        parts = []
        for begin, end in pieces:
            first = max(begin, min(visit_end, end))
            if made := part((first, end), rows, starts(first)):
                parts.append(made)
        placed = None
        if copied is not None:
            placed = (slice(copied, copied + pieces[0][1] - pieces[0][0]), local(*pieces[0]))
        return Fetch(tuple(sources), rows, placed, tuple(parts))

    made_stages = []
    given = deliveries(config, shards, rank, causal, documents, looks=looks)
    taken = stages(config, shards, rank, causal, documents, looks=looks)
    for sources, sent in zip(taken, given, strict=True):
        groups = [list(sources)] if joins else adjoining(sources)
        fetches = [fetch(group) for group in groups if group or (joins and pieces)]
        made_stages.append(FetchStage(tuple(fetches), sent))
    if joins and not made_stages and pieces:
        made_stages.append(FetchStage((fetch(()),), ()))

    guests = []
    for peer, begin, end in visits(config, shards, rank, causal, documents):
        over = [part((begin, end), own_placement(*keys), 0) for keys in pieces]
        parts = tuple(OwnPart(one, local(*keys)) for one, keys in zip(over, pieces, strict=True) if one)
        guests.append(Guest(peer, slice(0, end - begin), parts))
    hosts = tuple(
        Guest(peer, local(begin, end), ())
        for peer, begin, end in visitors(config, shards, rank, causal, documents)
    )
    met = [one.part.queries for one in own]
    met += [one.queries for stage in made_stages for fetch in stage.fetches for one in fetch.parts]
    met += [host.queries for host in hosts]
    added = [one.keys for one in own] + [one.keys for guest in guests for one in guest.parts]
    added += [local(*source[1:3]) for stage in made_stages for source in stage.deliveries]
    return KeysPlan(
        shape=shape,
        tokens=shards.tokens(rank),
        own=tuple(own),
        stages=tuple(made_stages),
        guests=tuple(guests),
        hosts=hosts,
        locate=lambda source: local(source.begin, source.end),
        wide_out=_where_many(met, shards.tokens(rank)),
        wide_keys=_where_many(added, shards.tokens(rank)),
        travels_wide=travels_wide(config),
    )


def is_joined(config: AttentionConfig) -> bool:
    """Whether fetched and own keys lie in one tensor: those of lists, which would be cut row by row."""
    pattern = config.pattern
    return pattern is not None and pattern.pattern_type == "dilated_sparse"


def _starts(pieces: Sequence[tuple[int, int]]) -> Callable[[int], int]:
    """What gives the place of a token among those of the pieces."""

    def start(token: int) -> int:
        before = 0
        for begin, end in pieces:
            if begin <= token <= end and (token < end or end == pieces[-1][1]):
                return before + token - begin
            before += end - begin
        raise AssertionError(f"token {token} is in none of {pieces}")

    return start


def adjoining(sources: Sequence[Source]) -> list[list[Source]]:
    """The sources, those together that adjoin and have one rate, where each begins in stride: one run."""
    groups: list[list[Source]] = []
    for source in sources:
        last = groups[-1][-1] if groups else None
        together = last and last.end == source.begin and last.rate == source.rate
        if together and (source.begin - groups[-1][0].begin) % source.rate == 0:
            groups[-1].append(source)
        else:
            groups.append([source])
    return groups


def all_if_many(parts: int, tokens: int) -> Ranges:
    """The tokens whose sum is kept in single precision, where so many parts meet in all of them."""
    return ((0, tokens),) if parts > FEW_PARTS and tokens else ()


def _where_many(parts: Sequence[slice], tokens: int) -> Ranges:
    """The tokens in which more than `FEW_PARTS` of the parts meet; all, where those are most."""
    edges = Counter(part.start for part in parts)
    edges.subtract(part.stop for part in parts)
    ranges: list[tuple[int, int]] = []
    depth = 0
    for begin, end in pairwise(sorted(edges)):
        depth += edges[begin]
        if depth > FEW_PARTS and ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], end)
        elif depth > FEW_PARTS:
            ranges.append((begin, end))
    return ((0, tokens),) if 2 * sum(end - begin for begin, end in ranges) > tokens else tuple(ranges)
