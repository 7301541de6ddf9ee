"""Who holds which tokens of a sequence. Imports no torch."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from attention.config import AttentionConfig
from attention.errors import InputError
from attention.sizes.arrays import Count, Ints, any_of, ceil_div, maximum, minimum, where

FULLEST: Final = (17, 16)
"""A rank may hold so much more than the mean, as a fraction, for the sake of shards that end where blocks and
segments do."""


class Shards(NamedTuple):
    """A sequence of `seq` tokens dealt to the ranks of a world.

    It is cut into *chunks*, a rank's own one after the other: one a rank, or two if `zigzag`, of which rank r
    holds the r-th and the r-th from the end. Chunks end at multiples of `unit` tokens, those of `seq / unit`
    units being dealt as evenly as whole units go, the first chunks having one more. So the last ranks may be
    empty, and the last unit short. All but `zigzag`, and what the methods take, may be arrays that broadcast.
    """

    seq: Count
    world: Count
    unit: Count = 1
    zigzag: bool = False

    @property
    def chunks(self) -> Count:
        return 2 * self.world if self.zigzag else self.world

    @property
    def deal(self) -> tuple[Count, Count]:
        """(units of every chunk, chunks that have one more)."""
        units = ceil_div(self.seq, self.unit)
        return units // self.chunks, units % self.chunks

    def edge(self, chunk: Count) -> Count:
        """The token at which a chunk begins and the one before it ends."""
        each, more = self.deal
        return minimum((chunk * each + minimum(chunk, more)) * self.unit, self.seq)

    def chunk(self, token: Count) -> Count:
        """The chunk that a token is in."""
        each, more = self.deal
        unit = token // self.unit
        longer = more * (each + 1)
        return where(unit < longer, unit // (each + 1), more + (unit - longer) // maximum(each, 1))

    def holder(self, chunk: Count) -> Count:
        """The rank that holds a chunk."""
        return minimum(chunk, self.chunks - 1 - chunk) if self.zigzag else chunk

    def owner(self, token: Count) -> Count:
        """The rank that holds a token."""
        return self.holder(self.chunk(token))

    @property
    def fullest(self) -> Count:
        """The most tokens that a rank holds. Zigzag, the first may have the last chunk, which is short, and
        the last rank two that are longer."""
        ends = maximum(self.tokens(0), self.tokens(self.world - 1))
        return maximum(ends, self.tokens(minimum(1, self.world - 1)))

    def tokens(self, rank: Count) -> Count:
        """How many tokens a rank holds."""
        own = self.edge(rank + 1) - self.edge(rank)
        if not self.zigzag:
            return own
        other = self.chunks - 1 - rank
        return own + self.edge(other + 1) - self.edge(other)

    def pieces(self, rank: int) -> tuple[tuple[int, int], ...]:
        """The (begin, end) of the tokens of a rank, in the order of its local tensors; none that is empty."""
        chunks = (rank, self.chunks - 1 - rank) if self.zigzag else (rank,)
        pieces = ((self.edge(chunk), self.edge(chunk + 1)) for chunk in chunks)
        return tuple((begin, end) for begin, end in pieces if begin < end)

    def positions(self, rank: int) -> Ints:
        """The positions in the sequence of a rank's tokens, in the order of its local tensors."""
        ranges = [np.arange(begin, end) for begin, end in self.pieces(rank)]
        return np.concatenate([np.zeros(0, np.int64), *ranges])


def shards_of(config: AttentionConfig, seq: int, world: int) -> Shards:
    """How the tokens of an attention are dealt, causal or not: by their number alone, so that layers of
    different kinds share them, unless one of them is zigzag. InputError without tokens or ranks."""
    if seq < 1 or world < 1:
        raise InputError(f"shards need at least 1 token and 1 rank, got seq={seq} and world={world}")
    zigzag = config.sharding is not None and config.sharding.shards == "zigzag"
    return Shards(seq, world, int(unit_of(seq, 2 * world if zigzag else world)), zigzag)


def unit_of(seq: Count, chunks: Count) -> Count:
    """The largest power of two that leaves no chunk much longer than others: most blocks and segments are
    then whole, or divide what a rank holds."""
    above, below = FULLEST
    mean, largest, unit = ceil_div(seq, chunks), 0 * seq + 1, 1
    while any_of(unit <= mean):
        even = ceil_div(ceil_div(seq, unit), chunks) * unit * chunks * below <= seq * above
        largest = where((unit <= mean) & even, unit, largest)
        unit *= 2
    return largest
