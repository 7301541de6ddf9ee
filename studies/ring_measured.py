"""What do ranks send, hold and compute? `planner study ring-measured`

One training call of each attention over 1 to 4 ranks on this machine, processes that gloo joins: the bytes
that each sends, counted as they are sent; its peak, with every allocation counted; and how far its outputs
and gradients are from those of one device in double precision. Bytes and peaks stand beside what is planned.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from attention import AttentionConfig, ShardingConfig, build
from attention.config import ExchangeKind
from planner.measuring.footprint import footprint
from planner.memory.estimate import estimate
from planner.question.dimensions import attention_kind
from planner.report.plot.figure import KINDS, MUTED, named, title
from planner.workload import Dtype, Workload
from studies.bench.rank_runs import run_on_ranks
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study, rounded_up
from studies.bench.trade_offs import adaptive, dilated, sparse

WORLDS, QUICK_WORLDS = (1, 2, 4), (1, 2)
SEQ, QUICK = 16_384, 1024
EXACT = 2048
"""Tokens at which results are compared."""
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
TIMEOUT: Final = 120.0


class SharedAttention(NamedTuple):
    """An attention that ranks share, and how."""

    name: str
    config: AttentionConfig


def shared(config: AttentionConfig, exchange: ExchangeKind, **sharding: Any) -> AttentionConfig:
    return config.model_copy(
        update={"sharding": ShardingConfig(exchange=exchange, timeout_s=TIMEOUT, **sharding)}
    )


def attentions() -> list[SharedAttention]:
    """The attentions, with the ways of sharing that there are for them."""
    dense = AttentionConfig(variant="dense")
    window = sparse(kind="local_window", block=128, edges="token", local_window_size=1023)
    global_local = sparse(
        kind="global_local", block=128, edges="token", local_window_size=1023, global_tokens=64
    )
    lists = sparse((2048, 8192), (1, 4), block=128, sparsity_ratio=0.05)
    return [
        SharedAttention("dense, ring", shared(dense, "keys")),
        SharedAttention("dense, zigzag ring", shared(dense, "keys", shards="zigzag")),
        SharedAttention("dense, heads", shared(dense, "heads")),
        SharedAttention("local_window", shared(window, "keys")),
        SharedAttention("global_local", shared(global_local, "keys")),
        SharedAttention("dilated", shared(dilated((1024, 4096, 16_384), (1, 4, 16)), "keys")),
        SharedAttention("dilated_sparse", shared(lists, "keys")),
        SharedAttention("adaptive, heads", shared(adaptive(128, 0.05), "heads")),
    ]


def task(seq: int, dtype: Dtype, world: int) -> Workload:
    sizes: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    return Workload(seq=seq, dtype=dtype, mode="training", causal=True, gpus=world, **sizes)


class RankCall:
    """A training call of this rank over its tokens of a random sequence, the same on all ranks."""

    def __init__(self, config: AttentionConfig, seq: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.module: Any = build(config).to(dtype)
        self.whole = [
            torch.randn(1, seq, heads, HEAD_DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        ]

    def shard(self) -> None:
        """Keeps this rank's tokens alone."""
        alone = not hasattr(self.module, "shard")
        parts = [x if alone else self.module.shard(x) for x in self.whole]
        self.inputs, self.grad = [x.requires_grad_() for x in parts[:3]], parts[3]
        self.whole = []

    def __call__(self) -> Tensor:
        out: Tensor = self.module(*self.inputs, is_causal=True)
        out.backward(self.grad)
        return out

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in [*self.inputs, self.grad, *self.module.parameters()])


def rank_row(config: Row, seq: int, exact: int) -> Row:
    """What this rank sends, holds and computes."""
    described = AttentionConfig.model_validate(config)
    call = RankCall(described, seq, torch.float32)
    call.shard()
    peak = footprint(call, torch.device("cpu")).peak
    transport = getattr(call.module, "transport", None)
    sent = traffic = 0
    if transport:
        sent = sum(transport.sent.values())
        said = call.module.traffic(*call.inputs[:2], True)
        traffic = sum(count for part in (said.forward, said.backward) for count, _ in part.values())
    return {"sent": sent, "traffic": traffic, "peak": call.nbytes + peak, **differences(described, exact)}


def differences(config: AttentionConfig, seq: int) -> Row:
    """The largest difference of the output and of gradients from those of one device, as a share of the
    largest number of either, in double precision."""
    call = RankCall(config, seq, torch.float64)
    whole = [x.clone() for x in call.whole]
    call.shard()
    out = call()
    alone = RankCall(config.model_copy(update={"sharding": None}), seq, torch.float64)
    alone.module.load_state_dict(call.module.state_dict())
    alone.inputs, alone.grad = [x.requires_grad_() for x in whole[:3]], whole[3]
    wanted = alone()
    keep = getattr(call.module, "shard", lambda x: x)
    pairs = [(out, wanted), *((a.grad, b.grad) for a, b in zip(call.inputs, alone.inputs, strict=True))]
    shares = [
        float((part - keep(full)).abs().max() / full.abs().max())
        for part, full in pairs
        if part is not None and full is not None
    ]
    return {"out": shares[0], "gradients": max(shares[1:])}


def measured_row(attention: SharedAttention, world: int, seq: int, exact: int) -> Row:
    """The figures of all ranks: those of the one with most, beside what is planned."""
    rows = run_on_ranks(
        world, f"{__name__}:rank_row", config=attention.config.model_dump(mode="json"), seq=seq, exact=exact
    )
    workload = task(seq, "float32", world)
    planned = estimate(attention.config, workload, threads=1)
    return {
        "attention": attention.name,
        "kind": attention_kind(attention.config),
        "world": world,
        "seq": seq,
        "exact": exact,
        "floor": workload.floor,
        "planned": planned.allocated,
        "upper": planned.upper,
        **{name: max(row[name] for row in rows) for name in rows[0]},
        "as_said": all(row["sent"] == row["traffic"] for row in rows),
    }


def steps(scope: Scope) -> list[Job]:
    worlds, seq, exact = (QUICK_WORLDS, QUICK, 256) if scope.quick else (WORLDS, SEQ, EXACT)
    some = attentions()
    return [
        (f"{attention.name}, {world} ranks", partial(measured_row, attention, world, seq, exact))
        for attention in (some[3:5] if scope.quick else some)
        for world in worlds
    ]


def _mib(count: float) -> str:
    return f"{count / 2**20:,.2f}"


def measured_table(rows: Results) -> str:
    """What the rank that needs most holds and sends, measured and planned, and how exact it is."""
    return markdown(
        (
            [
                row["attention"],
                row["world"],
                _mib(row["peak"]),
                _mib(row["planned"]),
                f"{row['peak'] / alone:.3f}" if (alone := _alone(rows, row)) else "",
                _mib(row["sent"]),
                "yes" if row["as_said"] else "no",
                f"{row['out']:.1e}",
                f"{row['gradients']:.1e}",
            ]
            for row in rows
        ),
        [
            "attention",
            "ranks",
            "peak, MiB",
            "planned, MiB",
            "of one rank's",
            "sent, MiB",
            "as `traffic` says",
            "output off by",
            "gradients off by",
        ],
    )


def _alone(rows: Results, row: Row) -> int | None:
    """The peak of the same attention on one rank."""
    peaks = [one["peak"] for one in rows if one["attention"] == row["attention"] and one["world"] == 1]
    return peaks[0] if peaks else None


def draw(figure: Any, rows: Results) -> None:
    """Peak and bytes sent of the rank with most, over ranks."""
    figure.set_size_inches(10, 5)
    peaks, sent = figure.subplots(1, 2)
    for name in dict.fromkeys(row["attention"] for row in rows):
        line = [row for row in rows if row["attention"] == name]
        color, marker = KINDS[line[0]["kind"]]
        style = {"color": color, "marker": marker, "markersize": 6}
        style |= {"linestyle": ":" if "heads" in name else "--" if "zigzag" in name else "-"}
        worlds = [row["world"] for row in line]
        peaks.plot(worlds, [row["peak"] / row["floor"] for row in line], label=name, **style)
        sent.plot(worlds, [row["sent"] / 2**20 for row in line], **style)
    worlds = sorted({row["world"] for row in rows})
    peaks.plot(worlds, [2 / world for world in worlds], color=MUTED, linewidth=1)
    named(peaks, worlds[-1], 2 / worlds[-1], "2 / ranks", MUTED, xytext=(-6, -10), ha="right")
    for axes in (peaks, sent):
        axes.set_xscale("log", base=2)
        axes.set_xticks(worlds, [str(world) for world in worlds])
        axes.minorticks_off()
        axes.set_xlabel("ranks")
        axes.grid(axis="y")
    peaks.set(ylabel="peak of the fullest rank / floor", ylim=(0, None))
    sent.set(ylabel="sent by the rank that sends most, MiB", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=4)
    title(
        figure,
        "What a rank holds and sends in training, measured",
        f"{rows[0]['seq']:,} tokens, {HEADS}:{KV_HEADS} heads x {HEAD_DIM}, float32, causal; floor: q, k, v "
        "and out",
    )


def findings(rows: Results) -> Findings:
    several = [row for row in rows if row["world"] > 1]
    within = sum(row["peak"] <= row["upper"] for row in rows)
    off = max(abs(row["peak"] / row["planned"] - 1) for row in rows)
    return Findings(
        "Asked: what do ranks of a gloo group send, hold and compute, beside what is planned?",
        f"Found: {within} of {len(rows)} peaks are within the bound, the worst "
        f"{rounded_up(100 * off, 2):g}% off its plan{_exchanged(several)}.",
        "The original project has figures of what a ring would cost, and none of one that ran on several "
        "devices.",
    )


def _exchanged(rows: Results) -> str:
    """What several ranks sent and computed, in words."""
    if not rows:
        return "; several ranks did not run"
    said = sum(row["as_said"] for row in rows)
    out, gradients = (max(row[name] for row in rows) for name in ("out", "gradients"))
    sent = sorted({row["sent"] for row in rows if row["kind"] == "local_window"})
    moved = ""
    if sent:
        span = _mib(sent[0]) if len(sent) == 1 else f"{_mib(sent[0])} to {_mib(sent[-1])}"
        moved = f"; a causal window sends {span} MiB on each number of ranks"
    return (
        f"; in {said} of {len(rows)} cases every rank sent what `traffic` says, to the byte{moved}; outputs "
        f"are within {out:.0e} of those of one device and gradients within {gradients:.0e}, in double "
        "precision"
    )


STUDY = Study(steps, {"ring-measured": measured_table}, draw, findings, devices=("cpu",), independent=True)
