"""A recommendation as a program that runs as pasted. Imports no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from attention.config import AdaptiveConfig, AttentionConfig, MultiheadConfig, SparsePatternConfig, Value
from planner.workload import Workload

WIDTH = 74
"""Characters of a field beyond which each of its parts gets a line of its own."""
_PARTS = (SparsePatternConfig, AdaptiveConfig, MultiheadConfig)


def snippet(config: AttentionConfig, workload: Workload) -> str:
    """Python that builds the attention and calls it once on random q, k, v of the workload."""
    parts = [type(part).__name__ for part in (config.pattern, config.adaptive, config.multihead) if part]
    names = ", ".join(sorted(["AttentionConfig", *parts]))
    given = ", is_causal=True" if workload.causal else ""
    given += ", documents=documents" if workload.documents is not None else ""
    given += ", sinks=sinks" if workload.sinks else ""
    training = workload.mode == "training"
    grad = ", requires_grad=True" if training else ""
    sizes = f"{workload.batch}, {workload.seq}"
    asking = f"{workload.batch}, {workload.query_tokens}"
    lines = [
        "import torch",
        "",
        f"from attention import {names}, build",
        "",
        *_assignment(config),
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        "attend = build(config, device)",
        "",
        f'options = {{"dtype": torch.{workload.dtype}, "device": device}}',
        f"q = torch.randn({asking}, {workload.heads}, {workload.head_dim}, **options{grad})",
        f"k = torch.randn({sizes}, {workload.groups}, {workload.head_dim}, **options{grad})",
        f"v = torch.randn({sizes}, {workload.groups}, {workload.head_dim}, **options{grad})",
        *_beside(workload, grad),
    ]
    if training:
        lines += [f"out = attend(q, k, v{given})", "out.backward(torch.ones_like(out))"]
    else:
        lines += ["with torch.no_grad():", f"    out = attend(q, k, v{given})"]
    return "\n".join([*lines, "print(tuple(out.shape), out.dtype, device)"])


def _beside(workload: Workload, grad: str) -> list[str]:
    """What a call is given beside q, k and v."""
    lines = []
    if workload.documents is not None:
        lengths = _wrapped(workload.documents)
        lines += [
            "lengths = torch.tensor([",
            *(f"    {line}" for line in lengths),
            "])",
            "numbers = torch.arange(len(lengths), dtype=torch.int32)",
            f"documents = numbers.repeat_interleave(lengths).expand({workload.batch}, -1).to(device)",
        ]
    if workload.sinks:
        lines.append(f"sinks = torch.randn({workload.heads}, **options{grad})")
    return lines


def _wrapped(numbers: Sequence[int]) -> list[str]:
    """Numbers, each with a comma behind it, in lines."""
    return textwrap.wrap(" ".join(f"{number}," for number in numbers), WIDTH)


def _assignment(config: AttentionConfig) -> list[str]:
    lines = []
    for field in _fields(config):
        if len(field) > WIDTH and field.endswith(")"):
            head = field.partition("(")[0]
            parts = _fields(getattr(config, head.partition("=")[0]))
            lines += [f"    {head}(", *(f"        {part}," for part in parts), "    ),"]
        else:
            lines.append(f"    {field},")
    return ["config = AttentionConfig(", *lines, ")"]


def _fields(value: Value) -> list[str]:
    """The fields that differ from their defaults, as keyword arguments."""
    arguments = []
    for name, field in type(value).model_fields.items():
        setting = getattr(value, name)
        if setting != field.default:
            arguments.append(f"{name}={_literal(setting)}")
    return arguments


def _literal(value: Any) -> str:
    if isinstance(value, _PARTS):
        return f"{type(value).__name__}({', '.join(_fields(value))})"
    if isinstance(value, tuple):
        return f"[{', '.join(map(repr, value))}]"
    return '"' + value + '"' if isinstance(value, str) else repr(value)
