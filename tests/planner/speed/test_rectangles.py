"""Pairs of queries and keys in closed form against masks."""

import numpy as np
import pytest

from attention import AttentionConfig, SparsePatternConfig
from attention.layout import build_layout
from planner.speed.rectangles import pairs

DENSE = AttentionConfig(variant="dense")
SEQ = 420
RECTANGLES = [
    ((0, SEQ), (0, SEQ)),
    ((100, 230), (40, 100)),
    ((100, 230), (230, 420)),
    ((64, 65), (0, 300)),
    ((210, 420), (0, 1)),
    ((5, 400), (17, 333)),
]
BLOCK = 8


def sparse(kind, **fields):
    branches = {"segment_lengths": (64, 256), "dilation_rates": (1, 4)} if kind == "dilated_sparse" else {}
    pattern = SparsePatternConfig(pattern_type=kind, block_size=BLOCK, **fields)
    return AttentionConfig(variant="block_sparse", pattern=pattern, **branches)


def counted(mask, queries, keys):
    return mask[slice(*queries), slice(*keys)].sum()


def by_token(causal, reach, shared=0):
    q, k = np.ogrid[:SEQ, :SEQ]
    side = reach if causal else reach // 2
    mask = (q - k <= side) & (k - q <= (0 if causal else side)) | (k < shared)
    return mask & (k <= q) if causal else mask | (q < shared)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries, keys", RECTANGLES)
def test_pairs_to_the_token_are_counted_exactly(causal, queries, keys):
    dense = np.tril(np.ones((SEQ, SEQ), bool)) if causal else np.ones((SEQ, SEQ), bool)
    assert pairs(AttentionConfig(variant="dense"), SEQ, causal, queries, keys) == counted(
        dense, queries, keys
    )
    window = sparse("local_window", local_window_size=50, edges="token")
    assert pairs(window, SEQ, causal, queries, keys) == counted(by_token(causal, 50), queries, keys)
    both = sparse("global_local", local_window_size=50, global_tokens=9, edges="token")
    assert pairs(both, SEQ, causal, queries, keys) == counted(by_token(causal, 50, 9), queries, keys)
    q, k = np.ogrid[:SEQ, :SEQ]
    segments = (q // 64 == k // 64) & dense
    dilated = AttentionConfig(variant="dilated", segment_lengths=(64,), dilation_rates=(1,))
    assert pairs(dilated, SEQ, causal, queries, keys) == counted(segments, queries, keys)


@pytest.mark.parametrize("causal", [False, True])
def test_of_dilated_branches_each_head_has_its_share(causal):
    config = AttentionConfig(variant="dilated", segment_lengths=(64, 256), dilation_rates=(1, 4))
    queries, keys = (128, 256), (0, 128)  # of the second branch alone
    assert pairs(config, SEQ, causal, queries, keys) == 128 * 128 / 16


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        sparse("local_window", local_window_size=64),
        sparse("global_local", local_window_size=64, global_tokens=20),
        sparse("dilated_sparse", sparsity_ratio=0.2),
    ],
)
def test_pairs_of_blocks_are_counted_nearly(config, causal):
    layout = build_layout(config, SEQ, causal)
    active = np.zeros((layout.blocks, layout.blocks), bool)
    active[np.repeat(np.arange(layout.blocks), layout.counts), layout.cols] = True
    blocks = np.kron(active, np.ones((BLOCK, BLOCK), bool))[:SEQ, :SEQ]
    mask = np.tril(blocks) if causal else blocks
    for queries, keys in RECTANGLES[:3]:
        assert pairs(config, SEQ, causal, queries, keys) == pytest.approx(
            counted(mask, queries, keys), rel=0.12, abs=BLOCK * BLOCK
        )


def test_documents_have_their_own_pairs():
    assert pairs(DENSE, SEQ, False, (0, SEQ), (0, SEQ), (20, 400)) == 20**2 + 400**2
    assert pairs(DENSE, SEQ, True, (10, 30), (5, 25), (20, 400)) == 105 + 40
