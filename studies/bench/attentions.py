"""One attention of each kind, for studies that set them side by side."""

from __future__ import annotations

from typing import get_args

from attention import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.config import MultiheadConfig, PatternType
from studies.floors import HEAD_DIM, HEADS, configs

KEPT = 0.01
"""Share of all blocks that dilated_sparse and adaptive keep, as in the seeds; of dilated_sparse at most those
that its branches reach."""


def one_of_each(heads: int = HEADS, head_dim: int = HEAD_DIM) -> dict[str, AttentionConfig]:
    """By kind, as `planner.report.plot.figure.KINDS` has colours for them; multihead is dilated_sparse
    between projections."""
    known = configs()
    chosen = SparsePatternConfig(sparsity_ratio=KEPT, block_size=128)
    outside = MultiheadConfig(embed_dim=heads * head_dim, num_heads=heads)
    return {
        "dense": AttentionConfig(variant="dense"),
        "dilated": known["dilated, 3 branches"],
        **{pattern: known[pattern] for pattern in get_args(PatternType)},
        "adaptive": AttentionConfig(
            variant="adaptive", pattern=chosen, adaptive=AdaptiveConfig(num_heads=heads, head_dim=head_dim)
        ),
        "multihead": known["dilated_sparse"].model_copy(update={"multihead": outside}),
    }
