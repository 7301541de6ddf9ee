"""Attention for long sequences: exact, lean, any length. Configurations import no torch.

config = AttentionConfig(variant="dilated", segment_lengths=[2048, 4096], dilation_rates=[1, 2])
attend = build(config)
out = attend(q, k, v, is_causal=True)  # [batch, seq, heads, head_dim]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attention.config import (
    AdaptiveConfig,
    AttentionConfig,
    MultiheadConfig,
    ShardingConfig,
    SparsePatternConfig,
)
from attention.errors import (
    AttentionPlannerError,
    ConfigError,
    DistributedError,
    InputError,
    OutOfMemoryError,
    UnavailableError,
)

if TYPE_CHECKING:
    from attention.factories import (
        build,
        create_block_sparse_attention,
        create_dilated_attention,
        create_multihead_block_sparse,
    )
    from attention.layout import Layout, build_layout
    from attention.ops.weights import AttentionWeights
    from attention.reference import reference_attention

# Names that need torch or NumPy are imported when they are first used, so that planning needs neither.
_LATER = {
    "AttentionWeights": "attention.ops.weights",
    "Layout": "attention.layout",
    "build": "attention.factories",
    "build_layout": "attention.layout",
    "create_block_sparse_attention": "attention.factories",
    "create_dilated_attention": "attention.factories",
    "create_multihead_block_sparse": "attention.factories",
    "reference_attention": "attention.reference",
}

__all__ = [
    "AdaptiveConfig",
    "AttentionConfig",
    "AttentionPlannerError",
    "AttentionWeights",
    "ConfigError",
    "DistributedError",
    "InputError",
    "Layout",
    "MultiheadConfig",
    "OutOfMemoryError",
    "ShardingConfig",
    "SparsePatternConfig",
    "UnavailableError",
    "build",
    "build_layout",
    "create_block_sparse_attention",
    "create_dilated_attention",
    "create_multihead_block_sparse",
    "reference_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return __all__
