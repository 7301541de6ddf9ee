"""What do one and ten million tokens need? `planner study million-tokens`

One million tokens in one process on the CPU: resident memory, and time a token against 131,072 tokens in the
same run. What one GPU would need for one and ten million, predicted. How many cards share one, ten or a
hundred million, predicted from the plans of their ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import torch

from attention import AttentionConfig, ShardingConfig, build
from planner.bisection import largest
from planner.gpus import Gpu, find
from planner.memory.estimate import MemoryEstimate, estimate
from planner.report.plot.figure import BLUE, INK, MUTED, ORANGE, RED, named, title, tokens
from planner.workload import ITEMSIZE, Dtype, Mode, Workload
from studies.bench.attentions import HEAD_DIM, HEADS, configs, one_of_each
from studies.bench.records import OK, Job, Row, markdown, timed
from studies.bench.study import Findings, Results, Scope, Study, rounded_up
from studies.floors import SEQ

MILLION = 1_048_576
COUNTS: Final = (MILLION, 10 * MILLION)
DTYPES: Final[tuple[Dtype, ...]] = ("float16", "bfloat16", "float32")
MODES: Final[tuple[Mode, ...]] = ("inference", "training")
CARD: Final = "h100-sxm"
"""The card whose kernels and context predictions are of, however large they get."""
RING: Final = ("gtx1080", "rtx4090", "h100-sxm")
"""Cards of 8, 24 and 80 GB."""
SHARED: Final = ("dense", "dilated", "local_window")
"""Attentions that cards share."""
SHARED_COUNTS: Final = (*COUNTS, 100 * MILLION)
SHARED_DTYPES: Final[tuple[Dtype, ...]] = ("float16", "float32")
MEASURED: Final = ("local_window", "dilated_sparse")
ALL: Final = 1.0
"""Share of the blocks that dilated_sparse may keep where it is measured: all that its branches reach, so
that a row keeps as many at either length. Of a million tokens they reach less than its usual share."""


class MemoryClaim(NamedTuple):
    """The GB that a million tokens need according to the original project, and the kind of attention here."""

    what: str
    gigabytes: float
    kind: str


CLAIMS: Final = (
    MemoryClaim("block-sparse, base", 4.06, "dilated_sparse"),
    MemoryClaim("block-sparse, adaptive", 4.09, "adaptive"),
    MemoryClaim("block-sparse, multihead", 33.68, "multihead"),
    MemoryClaim("standard attention", 1000.0, "dense"),
)
CLAIMED_ON: Final = "gtx1080"
NEAR: Final = 0.05
"""The share by which a figure may be off and still hold."""


def million_row(name: str, runs: int = 3, seq: int = MILLION, short: int = SEQ, heads: int = HEADS) -> Row:
    """`seq` tokens in bfloat16 in this process: resident peak, and time per token against `short`."""
    config = configs()[name]
    if name == "dilated_sparse":
        assert config.pattern is not None
        pattern = config.pattern.model_copy(update={"sparsity_ratio": ALL})
        config = config.model_copy(update={"pattern": pattern})
    module = build(config)
    q, k, v = (torch.empty(1, seq, heads, HEAD_DIM, dtype=torch.bfloat16).normal_() for _ in range(3))
    device = torch.device("cpu")
    before = _resident("VmRSS")
    with torch.inference_mode():
        part = [x[:, :short] for x in (q, k, v)]
        module(*part)
        module(q, k, v)
        seconds: dict[int, list[float]] = {short: [], seq: []}
        for _ in range(runs):
            seconds[short].append(timed(lambda: module(*part), device))
            seconds[seq].append(timed(lambda: module(q, k, v), device))
    a_token = {count: median(times) / count for count, times in seconds.items()}
    return {
        "part": "measured",
        "attention": name,
        "outcome": OK,
        "seq": seq,
        "short": short,
        "heads": heads,
        "floor": 4 * q.numel() * 2,
        "resident": _resident("VmHWM"),
        "before": before,
        "seconds": median(seconds[seq]),
        "per_token_ratio": a_token[seq] / a_token[short],
    }


def _resident(key: str) -> int:
    """Bytes of this process's VmRSS (now) or VmHWM (most ever)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _in_a_process(name: str, **sizes: int) -> Row:
    """`million_row` in a process of its own, whose resident peak is its alone; where it did not end well, why
    not."""
    code = (
        "import json; from studies import million_tokens as m; "
        f"print(json.dumps(m.million_row({name!r}, **{sizes!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        why = (done.stderr.splitlines() or [f"exit code {done.returncode}: memory may have run out"])[-1]
        return {"part": "measured", "attention": name, "outcome": why, "seq": sizes.get("seq", MILLION)}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def predicted_row(kind: str, config: AttentionConfig, seq: int) -> Row:
    """What a GPU needs by dtype and mode: bytes allocated, and the bound of what the card loses."""
    estimates = {
        f"{dtype} {mode}": estimate(config, Workload(seq=seq, dtype=dtype, mode=mode), CARD)
        for dtype in DTYPES
        for mode in MODES
    }
    return {
        "part": "predicted",
        "attention": kind,
        "seq": seq,
        "allocated": {name: one.allocated for name, one in estimates.items()},
        "upper": {name: one.upper for name, one in estimates.items()},
    }


def cards_needed(config: AttentionConfig, seq: int, dtype: Dtype, mode: Mode, gpu: Gpu) -> int:
    """The fewest of a card whose ranks are predicted to fit: 1 where one does without sharing."""

    def is_short(count: int) -> bool:
        workload = Workload(seq=seq, dtype=dtype, mode=mode, gpus=count)
        predicted: MemoryEstimate = estimate(config, workload, gpu)
        return predicted.upper > gpu.usable_bytes

    enough = 1
    while is_short(enough):
        enough *= 2
    return largest(is_short, enough // 2, enough) + 1


def ring_row(kind: str, seq: int, mode: Mode) -> Row:
    """How many cards of each size share a sequence, keys being exchanged."""
    config = one_of_each()[kind].model_copy(update={"sharding": ShardingConfig(exchange="keys")})
    cards = {name: find(name) for name in RING}
    return {
        "part": "ring",
        "attention": kind,
        "seq": seq,
        "mode": mode,
        "cards": {
            card.name: {dtype: cards_needed(config, seq, dtype, mode, card) for dtype in SHARED_DTYPES}
            for card in cards.values()
        },
    }


def claim_row(claim: MemoryClaim) -> Row:
    """The original project's figure for a million tokens beside what is predicted for its card, float16,
    inference."""
    predicted = estimate(one_of_each()[claim.kind], Workload(seq=MILLION), CLAIMED_ON)
    return {
        "part": "seeds",
        "what": claim.what,
        "said": claim.gigabytes,
        "attention": claim.kind,
        "allocated": predicted.allocated,
        "upper": predicted.upper,
        "usable": find(CLAIMED_ON).usable_bytes,
        "on": predicted.on,
    }


def steps(scope: Scope) -> list[Job]:
    """Quick, 32,768 tokens of one head are measured in place of a million."""
    small = {"runs": 1, "seq": SEQ // 4, "short": SEQ // 32, "heads": 1}
    measured: list[Job] = [
        (f"{name}, measured", partial(_in_a_process, name, **(small if scope.quick else {})))
        for name in (MEASURED[:1] if scope.quick else MEASURED)
    ]
    predicted: list[Job] = [
        (f"{kind}, {tokens(seq)}", partial(predicted_row, kind, config, seq))
        for kind, config in one_of_each().items()
        for seq in COUNTS
    ]
    ring: list[Job] = [
        (f"ring, {kind}, {tokens(seq)} {mode}", partial(ring_row, kind, seq, mode))
        for seq in (COUNTS[:1] if scope.quick else SHARED_COUNTS)
        for kind in SHARED
        for mode in MODES
    ]
    return [*measured, *predicted, *ring, *((claim.what, partial(claim_row, claim)) for claim in CLAIMS)]


def of_part(rows: Results, part: str) -> Results:
    """The rows of a part: `measured`, `predicted`, `ring` or `seeds` (the original project)."""
    return [row for row in rows if row["part"] == part]


def measured(rows: Results) -> Results:
    """The measured rows whose case ran; rows without an outcome did."""
    return [row for row in of_part(rows, "measured") if row.get("outcome", OK) == OK]


def million_table(rows: Results) -> str:
    """What one process held, and how time grew."""
    ran = measured(rows)
    return markdown(
        (
            [
                row["attention"],
                f"{row['seq']:,}",
                f"{row['resident'] / 2**30:.2f}",
                f"{row['floor'] / 2**30:.2f}",
                f"{row['seconds']:.1f}",
                f"{row['per_token_ratio']:.2f} x that at {row['short']:,}",
            ]
            if row in ran
            else [row["attention"], f"{row['seq']:,}", row["outcome"], "", "", ""]
            for row in of_part(rows, "measured")
        ),
        ["attention", "tokens", "resident GiB", "floor GiB", "seconds", "time a token"],
    )


def columns(rows: Results) -> dict[str, list[str]]:
    """Dtypes and modes in a column each, those of equal bounds in one: what it is called, and of which."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in rows[0]["upper"]:
        groups.setdefault(tuple(row["upper"][name] for row in rows), []).append(name)
    return {
        f"{names[0].split()[1]}, {' or '.join(name.split()[0] for name in names)}": names
        for names in groups.values()
    }


def predicted_table(rows: Results) -> str:
    """GB that an 80 GB card's kernels need, bound and context included."""
    rows = of_part(rows, "predicted")
    named_columns = columns(rows)
    body = [
        [
            row["attention"],
            tokens(row["seq"]),
            *(f"{row['upper'][n[0]] / 1e9:.1f}" for n in named_columns.values()),
        ]
        for row in sorted(rows, key=lambda row: row["seq"])
    ]
    return markdown(body, ["attention", "tokens", *(f"{name}, GB" for name in named_columns)])


def ring_table(rows: Results) -> str:
    """Markdown: the number of cards that share a sequence."""
    rows = of_part(rows, "ring")
    names = list(rows[0]["cards"])
    return markdown(
        (
            [
                tokens(row["seq"]),
                row["attention"],
                row["mode"],
                *(_counts(row["cards"][name]) for name in names),
            ]
            for row in rows
        ),
        ["tokens", "attention", "mode", *names],
    )


def _counts(cards: Mapping[str, int]) -> str:
    """The cards of 16 and of 32 bits."""
    return " / ".join(f"{count:,}" for count in cards.values())


def seeds_table(rows: Results) -> str:
    """The original project's GB for a million tokens beside the predicted."""
    return markdown(
        (
            [
                row["what"],
                f"{row['said']:,g}",
                row["attention"],
                f"{row['allocated'] / 1e9:.2f}",
                f"{row['upper'] / 1e9:.2f}",
                "yes" if row["upper"] <= row["usable"] else "no",
            ]
            for row in of_part(rows, "seeds")
        ),
        [
            "original project",
            "its GB",
            "here",
            "GB allocated, predicted",
            "GB of the card, at most",
            "fits the GTX 1080",
        ],
    )


def draw(figure: Any, rows: Results) -> None:
    """Above, GB by attention for one and ten million; below, what was measured, and how many cards."""
    figure.set_size_inches(9.5, 7.6)
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    panels = above.subplots(1, len(COUNTS), sharey=True)
    for axes, seq in zip(panels, COUNTS, strict=True):
        _draw_predicted(axes, [row for row in of_part(rows, "predicted") if row["seq"] == seq], seq)
    panels[0].invert_yaxis()
    above.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    left, right = below.subplots(1, 2)
    _draw_measured(left, measured(rows))
    _draw_ring(right, of_part(rows, "ring"))
    title(
        figure,
        _headline(rows),
        f"predicted for {HEADS} heads x {HEAD_DIM} on the kernels of an H100; measured on the CPU in "
        "bfloat16",
    )


SERIES: Final = (
    ("float16 inference", "inference, 16 bits", BLUE, "o", -0.17),
    ("float16 training", "training, 16 bits", BLUE, "^", -0.17),
    ("float32 inference", "inference, 32 bits", ORANGE, "o", 0.17),
    ("float32 training", "training, 32 bits", ORANGE, "^", 0.17),
)


def _draw_predicted(axes: Any, rows: Results, seq: int) -> None:
    for name, label, color, marker, shift in SERIES:
        places = [place + shift for place in range(len(rows))]
        needed = [row["upper"][name] / 1e9 for row in rows]
        axes.scatter(needed, places, color=color, marker=marker, s=30, label=label)
    maximum = max(max(row["upper"].values()) for row in rows) / 1e9
    for gb in (8, 24, 80):
        if maximum / 12 < gb < maximum:
            axes.axvline(gb, color=RED, linewidth=1)
            named(axes, gb, len(rows) - 0.3, f"{gb} GB", RED, xytext=(3, 0), va="bottom")
    axes.set_yticks(range(len(rows)), [row["attention"] for row in rows])
    axes.set(
        title=f"{seq:,} tokens",
        xlabel="needed, GB, predicted",
        xlim=(0, maximum * 1.08),
        ylim=(-0.6, len(rows) - 0.2),
    )
    axes.grid(axis="x")


def _draw_measured(axes: Any, rows: Results) -> None:
    for place, row in enumerate(rows):
        axes.barh(place, row["resident"] / 1e9, color=BLUE, height=0.4)
        axes.plot([row["floor"] / 1e9] * 2, [place - 0.25, place + 0.25], color=RED, linewidth=2)
        grown = f"{row['per_token_ratio']:.2f} times as long a token as {tokens(row['short'])}"
        named(axes, 0, place - 0.36, f"{row['seconds']:.1f} s, {grown}", xytext=(4, 0))
    axes.set_yticks(range(len(rows)), [row["attention"] for row in rows])
    axes.set(
        xlabel="resident, GB; red: q, k, v and out",
        ylim=(len(rows) - 0.4, -0.7),
        title=f"{rows[0]['seq']:,} tokens, measured",
    )


def _draw_ring(axes: Any, rows: Results) -> None:
    """A table: it is a few whole numbers."""
    names = list(rows[0]["cards"])
    lines = [row for row in rows if row["attention"] == SHARED[0]]
    for at, name in enumerate(names):
        axes.text(at, -0.9, name.removeprefix("NVIDIA ").replace("GeForce ", ""), ha="center", color=MUTED)
        for place, row in enumerate(lines):
            axes.text(at, place, _counts(row["cards"][name]), ha="center", va="center", color=INK)
    axes.set_yticks(range(len(lines)), [f"{tokens(row['seq'])}, {row['mode']}" for row in lines])
    axes.set(
        xticks=[],
        xlim=(-0.6, len(names) - 0.4),
        ylim=(len(lines) - 0.5, -1.2),
        title=f"cards that share {SHARED[0]} attention, 16 / 32 bits",
    )
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(left=False)


def _headline(rows: Results) -> str:
    """The headline: what a million tokens need, as a multiple of q, k, v and out."""
    name = "float16 inference"
    floor = Workload(seq=MILLION).floor
    needs = [row["upper"][name] / floor for row in of_part(rows, "predicted") if row["seq"] == MILLION]
    return (
        f"A million tokens need {min(needs):.2f} to {max(needs):.2f} times q, k, v and out in {name}, "
        "context included"
    )


def findings(rows: Results) -> Findings:
    ran = measured(rows)
    fullest = max(ran, key=lambda row: row["resident"] / row["floor"])
    slowest = rounded_up(max(row["per_token_ratio"] for row in ran), 2)
    held = rounded_up(fullest["resident"] / 1e9, 2)
    million = [row for row in of_part(rows, "predicted") if row["seq"] == MILLION]
    needs = sorted(row["upper"]["float16 inference"] / 1e9 for row in million)
    rings = of_part(rows, "ring")
    most = max(row["seq"] for row in rings)
    shared = [row for row in rings if row["seq"] == most and row["mode"] == "training"]
    return Findings(
        "Asked: what do one and ten million tokens need, by attention, dtype and mode, and how many cards?",
        f"Found: {ran[0]['seq']:,} tokens ran in one process with {held:.2f} GB "
        f"resident at most, q, k, v and out alone being {fullest['floor'] / 1e9:.2f}, in {slowest:.2f} times "
        f"the time a token that {fullest['short']:,} take, or less; a million in float16 is predicted to "
        f"need {needs[0]:.1f} to {needs[-1]:.1f} GB of a GPU for inference; to share {most:,} in training "
        f"takes {_shared_words(shared)}.",
        _beside(rows),
    )


def _shared_words(rows: Results) -> str:
    """The cards that share a sequence in float16, in words."""
    words = []
    for name in rows[0]["cards"]:
        counts = sorted({row["cards"][name]["float16"] for row in rows})
        span = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        words.append(f"{span} {name}")
    return " or ".join(words)


def _met(row: Row) -> bool:
    """Whether the original project's figure, its GB being GiB, is what is predicted."""
    return bool(abs(row["said"] * 2**30 / row["allocated"] - 1) <= NEAR)


def _beside(rows: Results) -> str:
    """The original project's figures for a million tokens, and whether they hold."""
    beside = {row["attention"]: row for row in of_part(rows, "seeds")}
    base, multihead, dense = (beside[kind] for kind in ("dilated_sparse", "multihead", "dense"))
    square = MILLION**2 * ITEMSIZE["float16"] * HEADS / 1e12
    projected = f"{multihead['allocated'] / 1e9:.2f}"
    if not _met(multihead):
        projected += ": projections hold their input, as large as q, beside"
        projected += ", not seven times as much" * (multihead["said"] > base["said"])
    does = {True: "does", False: "does not"}
    standard = f"; its {dense['said']:,g} for standard attention {does[_met(dense)]}"
    if not _met(multihead) and not _met(dense):
        standard = f", nor does its {dense['said']:,g} for standard attention"
    return (
        f"The original project's {base['said']:g} GB a million for block-sparse attention "
        f"{'holds' if _met(base) else 'does not hold'} if they are GiB "
        f"({base['said'] * 2**30 / 1e9:.2f} GB; {base['allocated'] / 1e9:.2f} predicted); its "
        f"{multihead['said']:g} for multihead {does[_met(multihead)]} ({projected}){standard}: all of its "
        f"weights would be {square:.0f} TB, and a fused kernel, which never holds them, needs "
        f"{dense['allocated'] / 1e9:.2f} GB."
    )


STUDY = Study(
    steps,
    {
        "million": million_table,
        "million-predicted": predicted_table,
        "million-ring": ring_table,
        "million-seeds": seeds_table,
    },
    draw,
    findings,
    devices=("cpu",),
)
