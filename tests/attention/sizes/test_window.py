"""The rule of local_window and global_local agrees with the oracle's mask, which tells it independently."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from attention import AttentionConfig, SparsePatternConfig
from attention.reference import multiplicity
from attention.sizes.window import window_blocks, window_spans

tokens = st.integers(1, 90)


def kept_by_the_oracle(window, global_tokens, size, seq, causal):
    """[blocks, blocks]: whether the mask pairs a query of block i with a key of block c."""
    fields = {"pattern_type": "local_window", "block_size": size, "local_window_size": window}
    if global_tokens:
        fields |= {"pattern_type": "global_local", "global_tokens": global_tokens}
    pattern = SparsePatternConfig(**fields)
    mask = multiplicity(AttentionConfig(variant="block_sparse", pattern=pattern), seq, 1, causal)[0] > 0
    edges = np.arange(0, seq, size)
    return np.logical_or.reduceat(np.logical_or.reduceat(mask.numpy(), edges, axis=0), edges, axis=1)


@given(
    window=tokens, global_tokens=st.integers(0, 90), size=st.integers(1, 20), seq=tokens, causal=st.booleans()
)
def test_rows_keep_what_the_mask_pairs(window, global_tokens, size, seq, causal):
    blocks = -(-seq // size)
    reach, shared = window_blocks(window, global_tokens, size, blocks, causal)
    kept = np.zeros((blocks, blocks), np.bool_)
    for i in range(blocks):
        (zero, apart), (start, stop) = window_spans(i, reach, shared, blocks, causal)
        assert zero == 0 <= apart <= start <= i < stop <= blocks
        kept[i, :apart] = kept[i, start:stop] = True
    assert (kept == kept_by_the_oracle(window, global_tokens, size, seq, causal)).all()
    if not causal:
        assert (kept == kept.T).all(), "the rows that keep a block are those that it keeps"


@given(
    window=tokens, global_tokens=st.integers(0, 90), size=st.integers(1, 20), seq=tokens, causal=st.booleans()
)
def test_rows_at_once_are_rows_one_by_one(window, global_tokens, size, seq, causal):
    blocks = -(-seq // size)
    fields = (window, global_tokens, size, blocks)
    reach, shared = window_blocks(*fields, causal)
    together = window_blocks(*(np.full(blocks, field) for field in fields), causal)
    assert [column.tolist() for column in together] == [[reach] * blocks, [shared] * blocks]
    (_, apart), (start, stop) = window_spans(np.arange(blocks), *together, blocks, causal)
    one_by_one = [window_spans(i, reach, shared, blocks, causal) for i in range(blocks)]
    assert [((0, a), (b, c)) for a, b, c in zip(apart, start, stop, strict=True)] == one_by_one


def test_the_rule_takes_ints_without_numpy():
    code = (
        "import sys; from attention.sizes.window import window_spans as spans; "
        "assert spans(5, 2, 1, 9, True) == ((0, 1), (3, 6)) and not {'numpy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
