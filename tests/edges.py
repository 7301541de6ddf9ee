"""Configs whose windows end at the token, made of those that end at blocks."""

from __future__ import annotations

from attention.config import AttentionConfig

WINDOWED = ("local_window", "global_local")


def by_token(config: AttentionConfig, more: int = 0) -> AttentionConfig:
    """A window of `more` tokens more that ends at the token; other configs as they are."""
    pattern = config.pattern
    if pattern is None or config.variant != "block_sparse" or pattern.pattern_type not in WINDOWED:
        return config
    window = max(pattern.local_window_size + more, 1)
    pattern = pattern.model_copy(update={"edges": "token", "local_window_size": window})
    return config.model_copy(update={"pattern": pattern})
