"""What do 1 to 1,024 GPUs make of a sequence? `planner study scaling`

Each attention in training, predicted: memory of a rank, bytes that it receives, seconds, and efficiency. Once
the sequence grows with the GPUs, once it stays. Beside them what a ring of whole keys and torchscale's
LongNet receive, by formula, and the efficiency of rings that others measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final, Literal, NamedTuple

from attention import AttentionConfig
from attention.config import ShardKind
from planner import estimate
from planner.answers.shared import SharedEstimate
from planner.gpus import find
from planner.memory.estimate import machine_of
from planner.question.dimensions import attention_kind
from planner.report.plot.figure import KINDS, MUTED, TEXT, title
from planner.report.text.times import seconds
from planner.speed.rates import speed_rates_of
from planner.speed.seconds import seconds_of
from planner.workload import Mode, Workload
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study, together
from studies.bench.trade_offs import dilated, sparse
from studies.ring_measured import shared

CARD, LINK, NODE = "h100-sxm", "nvlink4,ndr", 8
WORLDS, QUICK_WORLDS = (1, 2, 4, 8, 16, 64, 256, 1024), (1, 8, 64)
A_GPU: Final = 131_072
"""Tokens a GPU where the sequence grows with the GPUs."""
FIXED: Final = 1 << 20
"""Tokens where it stays."""
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
"""Those of Llama-3-8B."""
Growth = Literal["grows", "stays"]
GROWTHS: Final[tuple[Growth, ...]] = ("grows", "stays")


class MeasuredRing(NamedTuple):
    """An efficiency that others measured, of a ring of dense causal attention in bfloat16."""

    card: str
    link: str
    shards: ShardKind
    mode: Mode
    efficiency: float
    """Seconds of one GPU for the tokens of one, times the GPUs, by seconds of all: that is as many times the
    work of one, shared."""


RING_SOURCE: Final = "github.com/zhuzilin/ring-flash-attention, README, batch api"
RING_GPUS, RING_TOKENS = 8, 8192
"""GPUs, and tokens of each, of `RINGS`; heads as here."""
RINGS: Final = (
    MeasuredRing("a100-sxm4-80gb", "nvlink3", "contiguous", "inference", 0.514),
    MeasuredRing("a100-sxm4-80gb", "nvlink3", "zigzag", "inference", 0.817),
    MeasuredRing("a100-sxm4-80gb", "nvlink3", "contiguous", "training", 0.525),
    MeasuredRing("a100-sxm4-80gb", "nvlink3", "zigzag", "training", 0.898),
)


def longnet(seq: int) -> AttentionConfig:
    """LongNet's branches: from 2,048 tokens four times as long each, up to the whole sequence, with four
    times the rate."""
    lengths = [2048]
    while lengths[-1] < seq:
        lengths.append(min(4 * lengths[-1], seq))
    return dilated(lengths, [4**n for n in range(len(lengths))])


def attentions(seq: int, world: int) -> Mapping[str, AttentionConfig]:
    """The attentions, as these GPUs can share them."""
    dense = AttentionConfig(variant="dense")
    window: dict[str, Any] = {"block": 128, "edges": "token", "local_window_size": 4095}
    lists = sparse((2048, 16_384, 262_144), (1, 4, 16), block=128, sparsity_ratio=0.01)
    by_keys = {
        "dense, zigzag ring": shared(dense, "keys", shards="zigzag"),
        "LongNet": shared(longnet(seq), "keys"),
        "local_window": shared(sparse(kind="local_window", **window), "keys"),
        "global_local": shared(sparse(kind="global_local", global_tokens=128, **window), "keys"),
        "dilated_sparse": shared(lists, "keys"),
    }
    return by_keys if KV_HEADS % world else {"dense, heads": shared(dense, "heads"), **by_keys}


def task(seq: int, world: int, mode: Mode = "training") -> Workload:
    return Workload(
        seq=seq,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype="bfloat16",
        mode=mode,
        causal=True,
        gpus=world,
    )


def ring_bytes(seq: int, world: int) -> int:
    """Bytes that a rank of a ring of keys and values receives forward: those of all others, 2 K D numbers of
    2 bytes a token."""
    return (seq - seq // world) * 2 * KV_HEADS * HEAD_DIM * 2


def torchscale_bytes(config: AttentionConfig, seq: int, world: int) -> int:
    """Bytes that a rank of torchscale's LongNet receives forward: of each branch that is longer than a rank's
    tokens, the dilated keys and values of all other ranks. Heads that share one of keys begin at tokens of
    their own, so that it sends as many as there are."""
    held = seq // world
    branches = zip(config.segment_lengths, config.dilation_rates, strict=True)
    group = HEADS // KV_HEADS
    tokens = sum((seq - held) * min(rate, group) // rate for length, rate in branches if length > held)
    return tokens * 2 * KV_HEADS * HEAD_DIM * 2


def alone(config: AttentionConfig, workload: Workload, card: str = CARD) -> float:
    """Seconds of a call on one card, predicted, whether its memory would do or not."""
    gpu = find(card)
    one = config.model_copy(update={"sharding": None})
    whole = workload.model_copy(update={"gpus": 1})
    return seconds_of(one, whole, machine_of(gpu, workload.dtype, None), speed_rates_of(gpu, workload, {}))


def scaling_row(name: str, sequence: Growth, world: int) -> Row:
    """An attention on so many GPUs."""
    seq = A_GPU * world if sequence == "grows" else FIXED
    config, workload = attentions(seq, world)[name], task(seq, world)
    links: dict[str, Any] = {"link": LINK, "node": NODE} if world > NODE else {}
    predicted = estimate(config, workload, CARD, **links)
    row: Row = {
        "attention": name,
        "kind": attention_kind(config),
        "sequence": sequence,
        "world": world,
        "seq": seq,
        "upper": predicted.upper,
        "allocated": predicted.allocated,
        "one": alone(config, workload),
        "ring": ring_bytes(seq, world),
        "torchscale": torchscale_bytes(config, seq, world) if name == "LongNet" else None,
    }
    if not isinstance(predicted, SharedEstimate):
        return row | {"seconds": row["one"], "received": 0, "exposed": 0.0, "efficiency": 1.0}
    sharing = predicted.sharing
    passes = [each for each in (sharing.forward, sharing.backward) if each]
    return row | {
        "seconds": sharing.seconds,
        "received": sharing.forward.received,
        "exposed": sum(each.exposed or 0.0 for each in passes),
        "efficiency": row["one"] / (world * (sharing.seconds or float("nan"))),
    }


def published_row(ring: MeasuredRing) -> Row:
    """What is predicted for a ring that others measured, by their measure."""
    config = shared(AttentionConfig(variant="dense"), "keys", shards=ring.shards)
    workload = task(RING_GPUS * RING_TOKENS, RING_GPUS, ring.mode)
    predicted = estimate(config, workload, ring.card, link=ring.link)
    assert isinstance(predicted, SharedEstimate)
    one = alone(config, task(RING_TOKENS, 1, ring.mode), ring.card)
    return {
        "published": ring.efficiency,
        "predicted": RING_GPUS * one / (predicted.sharing.seconds or float("nan")),
        **{name: getattr(ring, name) for name in ("card", "link", "shards", "mode")},
    }


def steps(scope: Scope) -> list[Job]:
    worlds = QUICK_WORLDS if scope.quick else WORLDS
    jobs: list[Job] = [
        (f"{name}, {world} GPUs, {sequence}", partial(scaling_row, name, sequence, world))
        for sequence in (GROWTHS[:1] if scope.quick else GROWTHS)
        for world in worlds
        for name in attentions(A_GPU, world)
    ]
    return jobs + [
        (f"published, {ring.card} {ring.shards} {ring.mode}", partial(published_row, ring)) for ring in RINGS
    ]


def of_scaling(rows: Results, sequence: Growth = "grows") -> Results:
    """The rows of attentions whose sequence grows, or stays."""
    return [row for row in rows if row.get("sequence") == sequence]


def _table(rows: Results, sequence: Growth) -> str:
    return markdown(
        (
            [
                row["attention"],
                f"{row['world']:,}",
                f"{row['seq']:,}",
                f"{row['upper'] / 1e9:.2f}",
                f"{row['received'] / 1e6:,.1f}",
                f"{row['ring'] / 1e6:,.1f}",
                "" if row["torchscale"] is None else f"{row['torchscale'] / 1e6:,.1f}",
                seconds(row["seconds"]),
                seconds(row["exposed"]) if row["exposed"] else "0",
                f"{row['efficiency']:.0%}",
            ]
            for row in of_scaling(rows, sequence)
        ),
        [
            "attention",
            "GPUs",
            "tokens",
            "GB a GPU, at most",
            "received forward, MB",
            "a ring's, MB",
            "torchscale's, MB",
            "time of a step",
            "of it exposed",
            "efficiency",
        ],
    )


def scaling_table(rows: Results) -> str:
    """Memory, traffic, time and efficiency where the sequence grows with the GPUs."""
    return _table(rows, "grows")


def fixed_table(rows: Results) -> str:
    """The same where it stays; empty without such rows."""
    return _table(rows, "stays") if of_scaling(rows, "stays") else ""


def published_table(rows: Results) -> str:
    """Efficiencies that others measured beside what is predicted; empty without such rows."""
    if not any("published" in row for row in rows):
        return ""
    return markdown(
        (
            [
                find(row["card"]).name.removeprefix("NVIDIA "),
                row["link"],
                row["shards"],
                "forward" if row["mode"] == "inference" else "forward and backward",
                f"{row['published']:.1%}",
                f"{row['predicted']:.1%}",
            ]
            for row in rows
            if "published" in row
        ),
        [f"{RING_GPUS} cards", "link", "shards", "pass", "published efficiency", "predicted"],
    )


def draw(figure: Any, rows: Results) -> None:
    """Memory, bytes and efficiency over GPUs, the sequence growing with them."""
    rows = of_scaling(rows)
    figure.set_size_inches(12, 5.2)
    memory, received, efficiency = figure.subplots(1, 3)
    worlds = sorted({row["world"] for row in rows})
    for name in dict.fromkeys(row["attention"] for row in rows):
        line = [row for row in rows if row["attention"] == name]
        color, marker = KINDS[line[0]["kind"]]
        style = {"color": color, "marker": marker, "markersize": 6}
        style |= {"linestyle": ":" if name.endswith("heads") else "-"}
        memory.plot([row["world"] for row in line], [row["upper"] / 1e9 for row in line], label=name, **style)
        some = [row for row in line if row["received"]]
        received.plot([row["world"] for row in some], [row["received"] / 1e6 for row in some], **style)
        efficiency.plot([row["world"] for row in line], [row["efficiency"] for row in line], **style)
    beside = {"a ring of whole keys": "ring", "torchscale's LongNet": "torchscale"}
    for (label, key), dashes in zip(beside.items(), ("--", "-."), strict=True):
        line = [row for row in rows if row["attention"] == "LongNet" and row[key]]
        received.plot(
            [row["world"] for row in line],
            [row[key] / 1e6 for row in line],
            color=MUTED,
            linestyle=dashes,
            label=label,
        )
    published = [ring.efficiency for ring in RINGS if ring.shards == "zigzag"]
    efficiency.axhspan(min(published), max(published), color=MUTED, alpha=0.2, linewidth=0)
    efficiency.annotate(
        "zigzag rings that others measured",
        (worlds[-1], min(published)),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color=MUTED,
        fontsize=TEXT,
    )
    for axes in (memory, received, efficiency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(worlds[::2], [f"{world:,}" for world in worlds[::2]])
        axes.minorticks_off()
        axes.set_xlabel("GPUs")
        axes.grid(axis="y")
    memory.set(ylabel="memory of a GPU at most, GB", ylim=(0, None))
    received.set(ylabel="received by a GPU forward, MB", yscale="log")
    efficiency.set(ylabel="efficiency against one GPU", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=4)
    title(
        figure,
        f"{A_GPU:,} tokens a GPU in training, predicted",
        f"{HEADS}:{KV_HEADS} heads x {HEAD_DIM}, bfloat16, causal; H100 SXM, NVLink in nodes of {NODE}, NDR "
        "InfiniBand between them",
    )


def findings(rows: Results) -> Findings:
    grown = of_scaling(rows)
    most = max(row["world"] for row in grown)
    last = {row["attention"]: row for row in grown if row["world"] == most}
    uppers = sorted(row["upper"] / 1e9 for row in last.values())
    needs = f"{uppers[0]:.1f} to {uppers[-1]:.1f}" if len(uppers) > 1 else f"{uppers[0]:.1f}"
    efficiencies = ", ".join(f"{name} {row['efficiency']:.0%}" for name, row in last.items())
    return Findings(
        "Asked: what do 1 to 1,024 GPUs hold, exchange and take, by attention?",
        f"Found (predicted): on {most:,} GPUs with {max(row['seq'] for row in last.values()):,} tokens each "
        f"needs {needs} GB{_steady(grown)}{_gathered(last)}; efficiency: {efficiencies}{_others(rows)}.",
        "The original project names ring attention for sequences beyond one card and a million tokens, with "
        "no figure of several devices.",
    )


def _steady(rows: Results) -> str:
    """The attentions that receive the same bytes however many GPUs there are, in words."""
    several = [row for row in rows if row["world"] > 2]
    received = {
        name: {row["received"] for row in several if row["attention"] == name}
        for name in dict.fromkeys(row["attention"] for row in several)
    }
    steady = [name for name, counts in received.items() if len(counts) == 1]
    verb = "receives" if len(steady) == 1 else "receive"
    return f"; {together(steady)} {verb} the same bytes whatever the GPUs" if steady else ""


def _gathered(last: Mapping[str, Row]) -> str:
    """What LongNet receives here and in torchscale, in words."""
    row = last.get("LongNet")
    if row is None or not row["received"]:
        return ""
    return (
        f"; LongNet receives {row['received'] / 1e6:,.0f} MB where torchscale's gathers "
        f"{row['torchscale'] / 1e6:,.0f}"
    )


def _others(rows: Results) -> str:
    """How far what is predicted is from rings that others measured, in words."""
    apart = [abs(row["predicted"] - row["published"]) for row in rows if "published" in row]
    if not apart:
        return ""
    return f"; of rings that others measured it is predicted within {100 * max(apart):.0f} points"


STUDY = Study(
    steps,
    {"scaling": scaling_table, "scaling-fixed": fixed_table, "scaling-published": published_table},
    draw,
    findings,
    devices=("cpu",),
    independent=True,
)
