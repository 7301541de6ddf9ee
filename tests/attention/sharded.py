"""Attentions, shards and documents to try sharding on."""

from __future__ import annotations

import numpy as np
from edges import by_token
from hypothesis import strategies as st

from attention.config import AttentionConfig, SparsePatternConfig
from attention.sharding.shards import shards_of


def dilated(*branches: tuple[int, int], uncovered: str = "zero") -> AttentionConfig:
    lengths, rates = zip(*branches, strict=True)
    return AttentionConfig(
        variant="dilated", segment_lengths=lengths, dilation_rates=rates, uncovered=uncovered
    )


def windowed(size: int, window: int, shared: int = 0) -> AttentionConfig:
    pattern = SparsePatternConfig(
        pattern_type="global_local" if shared else "local_window",
        block_size=size,
        local_window_size=window,
        global_tokens=shared or 1,
    )
    return AttentionConfig(variant="block_sparse", pattern=pattern)


def listed(size: int, ratio: float, *branches: tuple[int, int]) -> AttentionConfig:
    """dilated_sparse; segments in blocks."""
    return AttentionConfig(
        variant="block_sparse",
        segment_lengths=tuple(size * n for n, _ in branches),
        dilation_rates=tuple(rate for _, rate in branches),
        pattern=SparsePatternConfig(pattern_type="dilated_sparse", block_size=size, sparsity_ratio=ratio),
    )


def longnet(length: int, branches: int, ratio: int = 2) -> AttentionConfig:
    return dilated(*((length * ratio**n, ratio**n) for n in range(branches)))


DENSE = AttentionConfig(variant="dense")
sizes = st.integers(1, 9)
windows = st.builds(windowed, sizes, st.integers(1, 50), st.integers(0, 30))
branches = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 8)), min_size=1, max_size=4)
configs = st.one_of(
    st.just(DENSE),
    windows,
    windows.map(by_token),
    branches.map(lambda some: listed(3, 0.4, *some)),
    branches.map(lambda some: dilated(*((max(pair), pair[1]) for pair in some))),
    st.builds(longnet, st.integers(4, 16), st.integers(1, 4), st.integers(2, 3)),
)


@st.composite
def cases(draw, tokens: int = 120):
    """(config, shards, causal, documents), of up to so many tokens."""
    config, seq, world = draw(configs), draw(st.integers(1, tokens)), draw(st.integers(1, 8))
    shards = shards_of(config, seq, world)
    if config.variant == "dense":
        shards = shards._replace(zigzag=draw(st.booleans()))
    return config, shards, draw(st.booleans()), draw(st.none() | documents_of(seq))


def documents_of(seq: int):
    """Lengths of the documents of one to two batch items."""
    edges = st.lists(st.integers(0, seq), max_size=5).map(lambda some: sorted({0, seq, *some}))
    return st.lists(edges.map(lambda some: tuple(np.diff(some).tolist())), min_size=1, max_size=2)
