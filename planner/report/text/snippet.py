"""A recommendation as a program that runs as pasted. Imports no torch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from attention.config import (
    AdaptiveConfig,
    AttentionConfig,
    MultiheadConfig,
    ShardingConfig,
    SparsePatternConfig,
    Value,
)
from planner.ranks.ring import ring_of
from planner.workload import Workload

WIDTH = 74
"""Characters of a field beyond which each of its parts gets a line of its own."""
_PARTS = (SparsePatternConfig, AdaptiveConfig, MultiheadConfig, ShardingConfig)


_ALONE = ('device = "cuda" if torch.cuda.is_available() else "cpu"',)
_STARTED = (
    "# torchrun --nproc-per-node ... starts this program on each GPU",
    "cuda = torch.cuda.is_available()",
    'device = f"cuda:{os.environ[\'LOCAL_RANK\']}" if cuda else "cpu"',
    'torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")',
)


def snippet(config: AttentionConfig, workload: Workload) -> str:
    """Python that builds the attention and calls it once on random q, k, v of the workload; where GPUs share
    that, the program of each of them."""
    given_parts = (config.pattern, config.adaptive, config.multihead, config.sharding)
    parts = [type(part).__name__ for part in given_parts if part]
    names = ", ".join(sorted(["AttentionConfig", *parts]))
    given = ", is_causal=True" if workload.causal else ""
    given += ", documents=documents" if workload.documents is not None else ""
    given += ", sinks=sinks" if workload.sinks else ""
    training = workload.mode == "training"
    grad = ", requires_grad=True" if training else ""
    shared = workload.gpus > 1
    if shared:
        workload = workload.model_copy(update={"batch": ring_of(config, workload).batch})
    tokens = "own" if shared else str(workload.seq)
    sizes = f"{workload.batch}, {tokens}"
    asking = f"{workload.batch}, {tokens if shared else workload.query_tokens}"
    lines = [
        *(["import os", ""] if shared else []),
        "import torch",
        "",
        f"from attention import {names}, build",
        "",
        *_assignment(config),
        *(_STARTED if shared else _ALONE),
        "attend = build(config, device)",
        *([f"own = len(attend.positions({workload.seq}))  # tokens of this rank"] if shared else []),
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
    lines.append("print(tuple(out.shape), out.dtype, device)")
    return "\n".join([*lines, *(["torch.distributed.destroy_process_group()"] if shared else [])])


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
