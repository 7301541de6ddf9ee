"""How far above q + k + v + out does each attention go? `python -m studies.memory`

Forward and training step at 131,072 tokens, every allocation counted; and one million tokens in one
process, resident memory and time per token against 131,072 tokens in the same run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from attention import AttentionConfig, SparsePatternConfig, build
from attention.config import PatternType
from attention.pool import buffers_for
from planner.footprint import footprint
from studies.records import Row, Step, collect, markdown, timed

MIB = 1 << 20
HEADS, HEAD_DIM = 8, 64
SEQ, MILLION = 131_072, 1_048_576
COMMAND = "python -m studies.memory"


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


def floor_row(name: str, config: AttentionConfig, dtype: torch.dtype, seq: int = SEQ) -> Row:
    """Peaks of a forward and of a training step, in bytes, inputs included, beside their floors."""
    device = torch.device("cpu")
    module = build(config)
    q, k, v, grad = (torch.randn(1, seq, HEADS, HEAD_DIM, dtype=dtype) for _ in range(4))
    buffers_for(config).release()  # a cold start, so that the pool's growth counts
    with torch.no_grad():
        forward = footprint(lambda: module(q, k, v), device)
    buffers_for(config).release()  # a cold start, so that the pool's growth counts
    for x in (q, k, v):
        x.requires_grad_()
    training = footprint(lambda: module(q, k, v).backward(grad), device)
    floor = 4 * q.numel() * q.element_size()
    lse = q.numel() // HEAD_DIM * 4
    return {
        "attention": name,
        "dtype": str(dtype).removeprefix("torch."),
        "seq": seq,
        "floor": floor,
        "forward": 3 * floor // 4 + forward.peak,
        "forward_limit": int(floor * 1.02) + 16 * MIB,
        "training": floor + training.peak,
        "training_limit": 2 * floor + lse + 32 * MIB,
    }


def million_row(name: str, runs: int = 3) -> Row:
    """One million tokens in bfloat16 in this process: resident peak, and time per token against
    131,072 tokens."""
    module = build(configs()[name])
    q, k, v = (torch.empty(1, MILLION, HEADS, HEAD_DIM, dtype=torch.bfloat16).normal_() for _ in range(3))
    device = torch.device("cpu")
    before = _resident("VmRSS")
    with torch.inference_mode():
        short = [x[:, :SEQ] for x in (q, k, v)]
        module(*short)
        module(q, k, v)
        seconds: dict[int, list[float]] = {SEQ: [], MILLION: []}
        for _ in range(runs):
            seconds[SEQ].append(timed(lambda: module(*short), device))
            seconds[MILLION].append(timed(lambda: module(q, k, v), device))
    a_token = {seq: median(times) / seq for seq, times in seconds.items()}
    return {
        "attention": name,
        "floor": 4 * q.numel() * 2,
        "resident": _resident("VmHWM"),
        "before": before,
        "seconds": median(seconds[MILLION]),
        "per_token_ratio": a_token[MILLION] / a_token[SEQ],
    }


def _resident(key: str) -> int:
    """Bytes of this process's VmRSS (now) or VmHWM (most ever)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def floors_table(rows: list[Row]) -> str:
    def above(row: Row, what: str, floor: int) -> str:
        return f"{(row[what] - floor) / MIB:.1f}"

    return markdown(
        (
            [
                row["attention"],
                row["dtype"],
                f"{row['floor'] / MIB:,.0f}",
                above(row, "forward", row["floor"]),
                above(row, "forward_limit", row["floor"]),
                above(row, "training", 2 * row["floor"]),
                above(row, "training_limit", 2 * row["floor"]),
            ]
            for row in rows
        ),
        ["attention", "dtype", "floor MiB", "forward above", "at most", "training above 2 floors", "at most"],
    )


def million_table(rows: list[Row]) -> str:
    return markdown(
        (
            [
                row["attention"],
                f"{row['resident'] / 2**30:.2f}",
                f"{row['floor'] / 2**30:.2f}",
                f"{row['seconds']:.1f}",
                f"{row['per_token_ratio']:.2f}",
            ]
            for row in rows
        ),
        ["attention", "resident GiB", "floor GiB", "seconds", "time a token against 131,072"],
    )


def _million_in_a_process(name: str) -> Row:
    """`million_row` in a process of its own, whose resident peak is its alone."""
    import json

    code = f"import json; from studies.memory import million_row; print(json.dumps(million_row({name!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def _floor_steps(seq: int) -> list[Step]:
    return [
        (f"{name} {dtype}", partial(floor_row, name, config, dtype, seq))
        for dtype in (torch.bfloat16, torch.float32)
        for name, config in configs().items()
    ]


TABLES = {"floors": ("floors", floors_table), "million": ("million", million_table)}
"""The docs' tables: the study whose data they show, and what makes them from its rows."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, epilog=f"example: {COMMAND}")
    parser.add_argument("--quick", action="store_true", help="8,192 tokens, no million; saves nothing")
    quick = parser.parse_args(arguments).quick
    cpu = torch.device("cpu")
    print(floors_table(collect("floors", COMMAND, cpu, _floor_steps(8192 if quick else SEQ), keep=not quick)))
    if not quick:
        steps = [(name, partial(_million_in_a_process, name)) for name in ("local_window", "dilated_sparse")]
        print("\n" + million_table(collect("million", COMMAND, cpu, steps, keep=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
