"""What was asked, in a line each. Imports no torch."""

from __future__ import annotations

from attention.config import AttentionConfig
from planner.workload import Workload


def attention(config: AttentionConfig) -> str:
    """Which attention it is."""
    inside = ", between projections" * (config.multihead is not None)
    if config.variant == "block_sparse" and config.pattern:
        return f"{config.variant}, {config.pattern.pattern_type}{inside}"
    return config.variant + inside


def kind_of(config: AttentionConfig) -> str:
    """The variant, or a block-sparse one's pattern."""
    if config.variant == "block_sparse" and config.pattern:
        return config.pattern.pattern_type
    return config.variant


def task(workload: Workload) -> str:
    """What it is asked to do."""
    return f"{workload.seq:,} tokens, {sizes(workload)}"


def sizes(workload: Workload) -> str:
    """All of it but the length."""
    groups = f" ({workload.groups} for keys)" if workload.groups != workload.heads else ""
    return (
        f"batch {workload.batch}, {workload.heads} heads{groups} x {workload.head_dim}, {workload.dtype}, "
        f"{workload.mode}" + ", causal" * workload.causal + ", with weights" * workload.weights
    )
