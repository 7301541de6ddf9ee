"""Configs and workloads in words, a line each. Imports no torch."""

from __future__ import annotations

from attention.config import AttentionConfig
from planner.workload import Workload


def attention(config: AttentionConfig) -> str:
    """The variant and, if it is block-sparse, its pattern."""
    inside = ", between projections" * (config.multihead is not None)
    if config.variant == "block_sparse" and config.pattern:
        return f"{config.variant}, {config.pattern.pattern_type}{inside}"
    return config.variant + inside


def task(workload: Workload) -> str:
    """The sizes of a workload, its length first."""
    return f"{workload.seq:,} tokens, {sizes(workload)}"


def sizes(workload: Workload) -> str:
    """The sizes of a workload without its length."""
    groups = f" ({workload.groups} for keys)" if workload.groups != workload.heads else ""
    return (
        f"batch {workload.batch}, {workload.heads} heads{groups} x {workload.head_dim}, {workload.dtype}, "
        f"{workload.mode}" + ", causal" * workload.causal + ", with weights" * workload.weights
    ) + features(workload)


def features(workload: Workload) -> str:
    """What a workload has beyond its sizes, each after a comma: fewer queries, documents, sinks."""
    parts = []
    if workload.query_tokens < workload.seq:
        parts.append("the last token asks" if workload.queries == 1 else f"the last {workload.queries:,} ask")
    if workload.documents is not None:
        count = len(workload.documents)
        parts.append(f"{count:,} document" + "s" * (count != 1))
    if workload.sinks:
        parts.append("sinks")
    return "".join(f", {part}" for part in parts)
