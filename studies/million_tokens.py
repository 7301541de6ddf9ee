"""What do one and ten million tokens need? `planner study million-tokens`

One million tokens in one process on the CPU, resident memory and time per token against 131,072 tokens in the
same run; and what predictions say of GPUs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from attention import build
from planner.report.figure import BLUE, title
from studies.floors import HEAD_DIM, HEADS, SEQ, configs
from studies.records import Row, Step, markdown, timed
from studies.study import Rows, Said, Scope, Study

MILLION = 1_048_576


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

    code = f"import json; from studies import million_tokens as m; print(json.dumps(m.million_row({name!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=dict(os.environ)
    )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def steps(scope: Scope) -> list[Step]:
    return [(name, partial(_million_in_a_process, name)) for name in ("local_window", "dilated_sparse")]


def draw(figure: Any, rows: Rows) -> None:
    axes = figure.add_subplot()
    axes.bar([row["attention"] for row in rows], [row["resident"] / 2**30 for row in rows], color=BLUE)
    axes.set_ylabel("resident, GiB")
    title(figure, "One million tokens")


def said(rows: Rows) -> Said:
    return Said("", "", "")


STUDY = Study(steps, {"million": million_table}, draw, said, devices=("cpu",))
