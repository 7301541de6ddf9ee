"""One attention of each kind, for studies that set them side by side."""

from __future__ import annotations

from typing import Any, get_args

from attention import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.config import MultiheadConfig, PatternType

HEADS, HEAD_DIM = 8, 64
KEPT = 0.01
"""The share of all blocks that dilated_sparse and adaptive keep, as in the original project; dilated_sparse
keeps at most those that its branches reach."""


def configs() -> dict[str, AttentionConfig]:
    """The attentions of the table, by name."""
    lengths, rates = (2048, 4096, 8192, 16384), (1, 2, 4, 8)

    def sparse(kind: PatternType, **fields: Any) -> AttentionConfig:
        branches: dict[str, Any] = {}
        if kind == "dilated_sparse":
            branches = {"segment_lengths": lengths[:3], "dilation_rates": rates[:3]}
        pattern = SparsePatternConfig(pattern_type=kind, block_size=128, **fields)
        return AttentionConfig(variant="block_sparse", pattern=pattern, **branches)

    return {
        "local_window": sparse("local_window", local_window_size=1024),
        "global_local": sparse("global_local", local_window_size=1024, global_tokens=128),
        "dilated_sparse": sparse("dilated_sparse", sparsity_ratio=0.01),
        **{
            f"dilated, {n} branch{'es' if n > 1 else ''}": AttentionConfig(
                variant="dilated", segment_lengths=lengths[:n], dilation_rates=rates[:n]
            )
            for n in (1, 2, 3, 4)
        },
    }


def one_of_each(heads: int = HEADS, head_dim: int = HEAD_DIM) -> dict[str, AttentionConfig]:
    """A config of each kind in `planner.report.plot.figure.KINDS`; multihead is dilated_sparse between
    projections."""
    named = configs()
    chosen = SparsePatternConfig(sparsity_ratio=KEPT, block_size=128)
    outside = MultiheadConfig(embed_dim=heads * head_dim, num_heads=heads)
    return {
        "dense": AttentionConfig(variant="dense"),
        "dilated": named["dilated, 3 branches"],
        **{pattern: named[pattern] for pattern in get_args(PatternType)},
        "adaptive": AttentionConfig(
            variant="adaptive", pattern=chosen, adaptive=AdaptiveConfig(num_heads=heads, head_dim=head_dim)
        ),
        "multihead": named["dilated_sparse"].model_copy(update={"multihead": outside}),
    }
