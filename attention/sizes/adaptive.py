"""Bytes that an adaptive attention's scorer and its gradient reserve: closed forms that the module and the
planner share. No torch.

Everything is done for one batch item at a time. Letters: n blocks of b tokens, of which a row keeps k; H
heads, D channels, E channels of a score, w bytes of a number in the scorer's sums. Sizes are ints, or NumPy
arrays for many at once.
"""

from __future__ import annotations

from typing import NamedTuple

from attention.sizes.arrays import Count, ceil_div, maximum, minimum
from attention.sizes.list_calls import part_room
from attention.sizes.shape import Shape


def active_of_choice(blocks: Count, kept: Count, causal: bool) -> Count:
    """Active blocks a head of an adaptive attention whose `blocks` rows keep up to `kept` blocks each;
    causal rows have only themselves and what came before."""
    return blocks * kept - causal * (kept * (kept - 1) // 2)


class Scorer(NamedTuple):
    """Sizes of a scorer: the blocks to choose from, and how they are scored."""

    size: Count
    """Tokens a block."""
    kept: Count
    """Blocks that a row keeps, at most as many as there are."""
    channels: Count
    """Channels of a score: E."""
    wide: int
    """Bytes of a number in sums: single precision or better."""
    casts: bool
    """Whether the parameters are of another type than that."""

    def blocks(self, shape: Shape) -> Count:
        """Blocks of a sequence: n."""
        return ceil_div(shape.seq, self.size)

    def mean_tokens(self, shape: Shape) -> Count:
        """Tokens of all heads that are widened at a time for their blocks' means: whole blocks, which fit a
        quarter of the workspace if one does."""
        block_bytes = self.size * shape.heads * shape.head_dim * self.wide
        return minimum(maximum(shape.workspace // 4 // block_bytes, 1) * self.size, shape.seq)

    def choosing_rows(self, shape: Shape) -> Count:
        """Rows of blocks of all heads that are scored against all key blocks at a time."""
        blocks = self.blocks(shape)
        row_bytes = shape.heads * (blocks * self.wide + self.kept * (self.wide + 25)) + blocks
        return minimum(maximum(shape.workspace // row_bytes, 1), blocks)

    def learning_rows(self, shape: Shape) -> Count:
        """Rows of blocks of all heads whose scores' gradients are spread over all key blocks at a time."""
        row_bytes = shape.heads * ((self.blocks(shape) + self.channels) * self.wide + self.kept * 8)
        return minimum(maximum(shape.workspace // row_bytes, 1), self.blocks(shape))


def _projecting(shape: Shape, scorer: Scorer) -> dict[str, Count]:
    rows = shape.heads * scorer.blocks(shape)
    narrow = shape.itemsize < scorer.wide
    return {
        "tokens": scorer.mean_tokens(shape) * shape.heads * shape.head_dim * scorer.wide * narrow,
        "means": rows * shape.head_dim * scorer.wide,
        "weight": shape.heads * shape.head_dim * scorer.channels * scorer.wide * scorer.casts,
        "queries": rows * scorer.channels * scorer.wide,
        "keys": rows * scorer.channels * scorer.wide,
    }


def choosing_sizes(shape: Shape, scorer: Scorer) -> dict[str, Count]:
    """Bytes of each buffer that choosing the blocks reserves."""
    rows, blocks = scorer.choosing_rows(shape), scorer.blocks(shape)
    picks = shape.heads * rows * scorer.kept
    return {
        **_projecting(shape, scorer),
        "place": blocks * 8,
        "scores": shape.heads * rows * blocks * scorer.wide,
        "mask": rows * blocks,
        "best": picks * scorer.wide,
        "picked": picks * 8,
        "sorted": picks * 8,
        "order": picks * 8,
        "none": picks,
    }


def learning_sizes(shape: Shape, scorer: Scorer) -> dict[str, Count]:
    """Bytes of each buffer that the gradient of the projections reserves."""
    rows, blocks = scorer.learning_rows(shape), scorer.blocks(shape)
    both = _projecting(shape, scorer)
    return {
        **both,
        "key means": both["means"],
        "gradient of keys": both["keys"],
        "gradient of scores": shape.heads * rows * blocks * scorer.wide,
        "index": shape.heads * rows * scorer.kept * 8,
        "gradient of queries": shape.heads * rows * scorer.channels * scorer.wide,
    }


def gate_tokens(shape: Shape, size: Count) -> Count:
    """Tokens of a block as the gate sees it: a block is never longer than the sequence."""
    return minimum(size, shape.seq)


class GatePart(NamedTuple):
    """What the gate's backward takes at a time."""

    heads: Count
    rows: Count
    """Of blocks, of each of these heads."""


def gate_part(shape: Shape, size: Count) -> GatePart:
    """Rows of one head that fit the workspace; where an attention is few calls, of as many heads as fit what
    a part of its backward pass may take."""
    row_bytes = 0 * size
    for nbytes in _gate_sizes(shape, size, 1 + 0 * size).values():
        row_bytes = row_bytes + nbytes
    blocks, heads = ceil_div(shape.seq, size), 1 + 0 * size
    room = shape.workspace
    if shape.windows == "any":
        room = part_room(shape, backward=True)
        heads = minimum(maximum(room // row_bytes, 1), shape.heads)
    rows = minimum(maximum(room // (row_bytes * heads), 1), blocks)
    return GatePart(heads, rows)


def gate_sizes(shape: Shape, size: Count) -> dict[str, Count]:
    """Bytes of each buffer that the gate's backward reserves."""
    part = gate_part(shape, size)
    sizes = _gate_sizes(shape, size, part.heads * part.rows)
    return sizes if shape.windows != "any" else sizes | {"kv heads": part.heads * 8}


def _gate_sizes(shape: Shape, size: Count, rows: Count) -> dict[str, Count]:
    tokens = rows * gate_tokens(shape, size)
    pairs = tokens * gate_tokens(shape, size)
    wide = shape.wide
    return {
        "q": tokens * shape.head_dim * wide,
        "grad": tokens * shape.head_dim * wide,
        "keys": tokens * shape.head_dim * wide,
        "row": tokens * shape.head_dim * shape.itemsize * (shape.itemsize < wide),
        "place": gate_tokens(shape, size) * 8,
        "position": tokens * 8,
        "last": tokens * 8,
        "lse": tokens * wide,
        "delta": tokens * wide,
        "weights": pairs * wide,
        "scores": pairs * wide,
        "hidden": pairs,
        "sums": rows * wide,
    }
