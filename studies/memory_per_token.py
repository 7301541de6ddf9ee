"""How many bytes does a token take, from 2K to 1M tokens? `planner study memory-per-token`

Each attention against the floor (q, k, v and out): predicted for the original project's card, and measured
where the study runs at lengths that take little. The original project's table beside, with as little scratch
as it has.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from attention.config import AdaptiveConfig, AttentionConfig, MultiheadConfig, SparsePatternConfig
from planner.measuring.server import Batch
from planner.report.plot.figure import INK, KINDS, MUTED, title, token_axis
from planner.workload import Workload
from studies.bench import attentions, memory_rows
from studies.bench.attentions import HEAD_DIM, HEADS
from studies.bench.memory_rows import MIB, place
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study, rounded_up

LENGTHS: Final = tuple(2048 << n for n in range(10))
MEASURED, QUICK = (2048, 4096, 8192, 16_384), (512,)
DENSE_MOST: Final = 8192
"""The longest sequence at which dense attention is measured: beyond, it takes long."""
TIMEOUT: Final = 300.0
NEAR: Final = 0.05
"""The share by which a table may be off and still count as met."""
LEAN: Final = {"workspace_bytes": 64 * 1024}

SEEDS: Final = {
    ("base", 2048): 7.88,
    ("base", 4096): 5.89,
    ("base", 8192): 4.90,
    ("base", 16_384): 4.40,
    ("base", 32_768): 4.16,
    ("base", 65_536): 4.03,
    ("adaptive", 32_768): 4.19,
    ("multihead", 32_768): 34.49,
}
"""The original project's "KB" per token, which are MiB x 1000 / tokens, by implementation and tokens:
float16, 8 heads of 64 channels, on a GTX 1080."""
UNIT: Final = MIB / 1000
"""Bytes of that "KB" per token, times tokens: 1/1000 MiB."""


def configs() -> dict[str, AttentionConfig]:
    """The attentions, by kind."""
    some = attentions.configs()
    adaptive = AdaptiveConfig(num_heads=HEADS, head_dim=HEAD_DIM)
    chosen = SparsePatternConfig(sparsity_ratio=0.01, block_size=128)
    parts = MultiheadConfig(embed_dim=HEADS * HEAD_DIM, num_heads=HEADS)
    return {
        "local_window": some["local_window"],
        "global_local": some["global_local"],
        "dilated_sparse": some["dilated_sparse"],
        "dilated": some["dilated, 3 branches"],
        "dense": AttentionConfig(variant="dense"),
        "multihead": _with(some["local_window"], multihead=parts),
        "adaptive": AttentionConfig(variant="adaptive", pattern=chosen, adaptive=adaptive),
    }


def _with(config: AttentionConfig, **fields: Any) -> AttentionConfig:
    return AttentionConfig(**config.model_dump() | fields)


def seeds_config(implementation: str) -> AttentionConfig:
    """The config that stands for an implementation of the original project: little scratch, and for its base
    a narrow window."""
    if implementation != "base":
        return _with(configs()[implementation], **LEAN)
    window = SparsePatternConfig(pattern_type="local_window", block_size=64, local_window_size=128)
    return AttentionConfig(variant="block_sparse", pattern=window, workspace_bytes=LEAN["workspace_bytes"])


def card_row(name: str, seq: int) -> Row:
    """A call on the original project's card, predicted."""
    workload = Workload(seq=seq)
    head = {"part": "card", "attention": name, "seq": seq, "floor": workload.floor}
    return head | memory_rows.predicted(configs()[name], workload)


def here_row(name: str, seq: int, batch: Batch) -> Row:
    """A call where the study runs, predicted and measured."""
    workload = Workload(seq=seq)
    head = {"part": "here", "attention": name, "seq": seq, "floor": workload.floor}
    return head | memory_rows.measured(configs()[name], workload, batch)


def seeds_row(implementation: str, seq: int) -> Row:
    """A line of the original project's table, and what is predicted for it."""
    predicted = memory_rows.predicted(seeds_config(implementation), Workload(seq=seq))
    reported = SEEDS[implementation, seq] * UNIT * seq
    return {"part": "seeds", "attention": implementation, "seq": seq, "said": reported, **predicted}


def steps(scope: Scope) -> list[Job]:
    batch = scope.batch(timeout=TIMEOUT)
    short = QUICK if scope.quick else MEASURED
    return [
        *((f"{name} {seq}", partial(card_row, name, seq)) for name in configs() for seq in LENGTHS),
        *((f"original {name} {seq}", partial(seeds_row, name, seq)) for name, seq in SEEDS),
        *(
            (f"{name} {seq} measured", partial(here_row, name, seq, batch))
            for name in configs()
            for seq in short
            if name != "dense" or seq <= DENSE_MOST
        ),
    ]


def of_part(rows: Results, part: str, attention: str | None = None) -> Results:
    return [row for row in rows if row["part"] == part and attention in (None, row["attention"])]


def a_token(row: Row, what: str = "allocated") -> float:
    """Bytes per token of a row's `what`."""
    return float(row[what] / row["seq"])


def card_table(rows: Results) -> str:
    """Predicted bytes a token by attention and length."""
    body = [[name, *(f"{a_token(row):,.0f}" for row in of_part(rows, "card", name))] for name in configs()]
    floor = [f"{a_token(row, 'floor'):,.0f}" for row in of_part(rows, "card", "dense")]
    head = [f"bytes a token, {place(rows[0])}, predicted", *(f"{seq:,}" for seq in LENGTHS)]
    return markdown([*body, ["q, k, v and out", *floor]], head)


def here_table(rows: Results) -> str:
    """Markdown: bytes per token, predicted and measured."""
    mine = of_part(rows, "here")
    return markdown(
        (
            [
                row["attention"],
                f"{row['seq']:,}",
                f"{a_token(row):,.1f}",
                f"{a_token(row, 'cold'):,.1f}" if row["cold"] else row["outcome"],
            ]
            for row in mine
        ),
        ["attention", "tokens", f"bytes a token, {place(mine[0])}, predicted", "measured"],
    )


def seeds_table(rows: Results) -> str:
    """The original project's figures and the predictions, in its unit."""
    return markdown(
        (
            [
                row["attention"],
                f"{row['seq']:,}",
                f"{row['said'] / UNIT / row['seq']:.2f}",
                f"{a_token(row) / UNIT:.2f}",
                f"{row['allocated'] / row['said'] - 1:+.1%}",
            ]
            for row in of_part(rows, "seeds")
        ),
        [
            "implementation",
            "tokens",
            "original project, MiB x 1000 / tokens",
            f"{place(rows[0])}, predicted",
            "off by",
        ],
    )


def draw(figure: Any, rows: Results) -> None:
    """Left: predicted for the card, with the original project's figures. Right: predicted and measured
    here."""
    figure.set_size_inches(10, 4.9)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for name in configs():
        color, marker = KINDS[name]
        card, here = of_part(rows, "card", name), of_part(rows, "here", name)
        left.plot(
            [row["seq"] for row in card],
            list(map(a_token, card)),
            color=color,
            marker=marker,
            markersize=5,
            label=name,
        )
        right.plot([row["seq"] for row in here], list(map(a_token, here)), color=color, linewidth=1)
        ran = [row for row in here if row["cold"]]
        right.scatter(
            [row["seq"] for row in ran],
            [a_token(row, "cold") for row in ran],
            color=color,
            s=32,
            marker=marker,
        )
    base = of_part(rows, "seeds", "base")
    left.scatter(
        [row["seq"] for row in base],
        [a_token(row, "said") for row in base],
        s=110,
        marker="o",
        facecolors="none",
        edgecolors=INK,
        zorder=3,
        label="original base",
    )
    floor = a_token(rows[0], "floor")
    for axes, part, how in ((left, "card", "predicted"), (right, "here", "lines predicted, points measured")):
        axes.axhline(floor, color=MUTED, linewidth=1)
        axes.set(title=f"{place(of_part(rows, part)[0])}, {how}", xlabel="tokens", ylim=(3500, None))
        token_axis(axes.xaxis, sorted({row["seq"] for row in of_part(rows, part)}))
        axes.grid(axis="y")
    left.annotate(
        f"q, k, v and out: {floor:,.0f}",
        (1, floor),
        xytext=(0, -5),
        color=MUTED,
        ha="right",
        va="top",
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
    )
    left.set_ylabel("memory, bytes a token")
    left.legend(loc="upper right", ncols=2)
    ends = [a_token(of_part(rows, "card", name)[-1]) for name in configs()]
    title(
        figure,
        f"At {LENGTHS[-1]:,} tokens a token takes {min(ends):,.0f} to {max(ends):,.0f} bytes",
        f"float16, {HEADS} heads x {HEAD_DIM}",
    )


def findings(rows: Results) -> Findings:
    def at(seq: int) -> str:
        return _range([a_token(row) for row in of_part(rows, "card") if row["seq"] == seq])

    ran = [row for row in of_part(rows, "here") if row["cold"]]
    off = rounded_up(max((abs(row["allocated"] / row["cold"] - 1) for row in ran), default=0.0), 4)
    base = max(abs(row["allocated"] / row["said"] - 1) for row in of_part(rows, "seeds", "base"))
    (multihead,) = of_part(rows, "seeds", "multihead")
    return Findings(
        f"Asked: how many bytes does a token take, from {LENGTHS[0]:,} to {LENGTHS[-1]:,} tokens, where q, "
        f"k, v and out are {a_token(rows[0], 'floor'):,.0f}?",
        f"Found: on a {place(rows[0])} {at(LENGTHS[0])} bytes at {LENGTHS[0]:,} tokens and {at(LENGTHS[-1])} "
        f"at {LENGTHS[-1]:,}, projections included, predicted; what was measured on the "
        f"{place(of_part(rows, 'here')[0])} is within {off:.2%} of its predictions in {len(ran)} cases.",
        f"The original project's table for its base is {_met(rounded_up(base, 3))}; its "
        f"{multihead['said'] / UNIT / multihead['seq']:.2f} for multihead is "
        f"{multihead['said'] / multihead['allocated']:.1f} times what projections need.",
    )


def _met(off: float) -> str:
    """Whether the predictions meet the original project's table for its base, in words."""
    if off > NEAR:
        return f"missed by up to {off:.1%}"
    return f"met within {off:.1%}: it is q, k, v and out, cuBLAS's workspace and little more"


def _range(figures: list[float]) -> str:
    return f"{min(figures):,.0f} to {max(figures):,.0f}"


STUDY = Study(
    steps,
    {
        "memory-per-token": card_table,
        "memory-per-token-measured": here_table,
        "memory-per-token-seeds": seeds_table,
    },
    draw,
    findings,
)
