"""How far above q, k, v and out does each attention go? `planner study floors`

Forward and training step at 131,072 tokens, every allocation counted.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch

from attention import AttentionConfig, build
from attention.pool import buffers_for
from planner.measuring.footprint import footprint
from planner.report.plot.figure import BLUE, ORANGE, RED, title
from studies.bench.attentions import HEAD_DIM, HEADS, configs
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study, rounded_up

MIB = 1 << 20
SEQ, QUICK = 131_072, 8192
SEEDS: Final = (128, 408)
"""(minimum, maximum) MB of buffers for one call, as the original project counts them."""


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


def steps(scope: Scope) -> list[Job]:
    seq = QUICK if scope.quick else SEQ
    return [
        (f"{name} {dtype}", partial(floor_row, name, config, dtype, seq))
        for dtype in (torch.bfloat16, torch.float32)
        for name, config in configs().items()
    ]


def over(row: Row, what: str) -> int:
    """Bytes above the floor of `forward` or `training`."""
    return int(row[what] - row["floor"] * (2 if what == "training" else 1))


def draw(figure: Any, rows: Results) -> None:
    """MiB above the floor, forward and training, with the bars that they are to stay under."""
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), ("bfloat16", "float32"), strict=True):
        mine = [row for row in rows if row["dtype"] == dtype]
        for shift, color, what in ((-0.2, BLUE, "forward"), (0.2, ORANGE, "training")):
            places = [place + shift for place in range(len(mine))]
            axes.barh(places, [over(row, what) / MIB for row in mine], height=0.36, color=color, label=what)
            for place, row in zip(places, mine, strict=True):
                bar = (row[f"{what}_limit"] - row[what] + over(row, what)) / MIB
                axes.plot([bar, bar], [place - 0.18, place + 0.18], color=RED, linewidth=2)
        axes.set_yticks(range(len(mine)), [row["attention"] for row in mine])
        axes.set(title=dtype, xlabel="above the floor, MiB; red: at most")
        axes.grid(axis="x")
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    title(
        figure, "What an attention holds beside q, k, v and out", f"{rows[0]['seq']:,} tokens, 8 heads x 64"
    )


def findings(rows: Results) -> Findings:
    met = sum(row[what] <= row[f"{what}_limit"] for row in rows for what in ("forward", "training"))
    maximum = rounded_up(max(over(row, "forward") for row in rows) / MIB, 1)
    low, high = SEEDS
    need = (
        "kernels over views need none of them" if maximum < low else f"here it is {maximum:.1f} MiB at most"
    )
    return Findings(
        "Asked: how much does each attention allocate beyond its inputs and its output?",
        f"Found: at most {maximum:.1f} MiB forward at {rows[0]['seq']:,} tokens; {met} of {2 * len(rows)} "
        f"bars are kept{_by_branches(rows)}.",
        f"The original project counts {low} to {high} MB of buffers for one call; {need}.",
    )


def _by_branches(rows: Results) -> str:
    """What more branches take, in the dtype in which they take most; empty where one branch or all others did
    not run."""
    peaks: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["attention"].startswith("dilated, "):
            peaks.setdefault(row["dtype"], {})[row["attention"]] = over(row, "forward")
    one = "dilated, 1 branch"
    both = {dtype: by_branch for dtype, by_branch in peaks.items() if one in by_branch and len(by_branch) > 1}
    if not both:
        return ""
    dtype, by_branch = max(both.items(), key=lambda pair: max(pair[1].values()) - pair[1][one])
    more = [peak for name, peak in by_branch.items() if name != one]
    alike = "each" if len(set(more)) == 1 else f"to {max(more) / MIB:.1f}"
    return (
        f"; in {dtype} dilated takes {by_branch[one] / MIB:.1f} MiB with one branch and "
        f"{min(more) / MIB:.1f} MiB {alike} with two to four"
    )


STUDY = Study(steps, {"floors": floors_table}, draw, findings, devices=("cpu",), independent=True)
