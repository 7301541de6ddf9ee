"""Attentions of whole calls, and the pairs that calls meet."""

from __future__ import annotations

import numpy as np
from conformance import IMPLEMENTATIONS, LEAST_WORKSPACE
from flash import hidden

from attention import AttentionConfig, SparsePatternConfig
from attention.ops.whole_calls import parts
from attention.sizes.shape import Shape, chunk_tokens

WHOLE = {
    name: config
    for name, config in IMPLEMENTATIONS.items()
    if not name.startswith(("adaptive", "dilated_sparse"))
}
WHOLE |= {
    f"{kind}, block {block}, window {window}": AttentionConfig(
        variant="block_sparse",
        pattern=SparsePatternConfig(
            pattern_type=kind, block_size=block, local_window_size=window, global_tokens=shared
        ),
    )
    for kind, block, window, shared in [
        ("local_window", 1, 5, 1),
        ("local_window", 5, 1, 1),
        ("local_window", 32, 64, 1),
        ("local_window", 8, 1000, 1),
        ("global_local", 1, 6, 3),
        ("global_local", 5, 22, 7),
        ("global_local", 16, 1, 40),
        ("global_local", 8, 40, 1000),
        ("global_local", 64, 64, 1),
    ]
}


def shape_of(
    seq: int, heads: int = 4, kv_heads: int = 2, causal: bool = False, windows: str = "any", **fields
) -> Shape:
    sizes = {"seq": seq, "heads": heads, "kv_heads": kv_heads, "head_dim": 16, "itemsize": 2}
    sizes |= {"workspace": LEAST_WORKSPACE, **fields}
    chunk = chunk_tokens(cpu=False, **sizes)
    return Shape(**sizes, causal=causal, chunk=chunk, packs=False, widens=False, windows=windows)


def met(calls, shape: Shape, cut_of) -> np.ndarray:
    """How often each (head, query, key) is met, [H, Q, S], in the parts that a kernel is given; where a call
    says that nothing came before, nothing did."""
    counts = np.zeros((shape.heads, shape.queries, shape.seq), np.int64)
    repeat = shape.heads // shape.kv_heads
    for call in calls:
        if not call.exists:
            continue
        here = np.zeros_like(counts)
        for _, _, queries, keys in parts([call], shape, 1, cut_of):
            sees = ~hidden(queries.length, keys.length, call.left, call.right).numpy()
            assert sees.any(axis=1).all(), "a query that sees nothing would have no log-sum-exp"
            assert queries.heads % keys.heads == 0
            for n in range(queries.batch):
                tokens = queries.start + n * queries.batch_step + queries.step * np.arange(queries.length)
                tokens -= shape.origin
                assert tokens.min() >= 0
                seen = keys.start + n * keys.batch_step + keys.step * np.arange(keys.length)
                assert tokens.max() < shape.queries
                assert seen.max() < shape.seq
                for place in range(queries.heads):
                    head = queries.head + n * queries.batch_head + place * queries.head_step
                    kv_head = keys.head + n * keys.batch_head
                    kv_head += place // (queries.heads // keys.heads) * keys.head_step
                    assert kv_head == head // repeat
                    here[head][np.ix_(tokens, seen)] += sees
        assert not (call.first and (counts.any(axis=2) & here.any(axis=2)).any())
        counts += here
    return counts
