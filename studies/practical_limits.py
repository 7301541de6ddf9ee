"""Which attention for which length on cards of 8 to 80 GB? `planner study practical-limits`

What `recommend` answers for each card and length, predicted: attention, memory, time, mass; or that nothing
fits, and what would help. No GPU is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from planner import recommend
from planner.answers.recommendation import Pick
from planner.gpus import find
from planner.question.asked import MIN_MASS, TRIALS
from planner.question.dimensions import attention_kind
from planner.report.plot.figure import KINDS, MUTED, title, tokens
from planner.report.text.times import seconds
from planner.search.relax import NothingFitsError
from planner.workload import Mode
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study

CARDS: Final[tuple[str, ...]] = ("gtx1080", "rtx3060", "rtx4060ti-16gb", "rtx4090", "h100-sxm")
"""Cards of 8, 12, 16, 24 and 80 GB."""
LENGTHS: Final = tuple(1 << power for power in range(12, 23, 2))
MODES: Final[tuple[Mode, ...]] = ("inference", "training")
ALL: Final = 0.995
"""The share of the mass from which on an attention is called as good as complete."""


class RangeClaim(NamedTuple):
    """A line of the original project's table of practical limits on 8 GB, as it is written there."""

    range: str
    longest: int
    """The longest of LENGTHS that lies in this range."""
    advice: str


CLAIMS: Final = (
    RangeClaim("< 16K", 4096, "ImprovedDilatedAttention (no pool)"),
    RangeClaim("16K - 64K", 65_536, "ImprovedDilatedAttention (with pool)"),
    RangeClaim("64K - 256K", 262_144, "Ring Attention; requires better GPU"),
    RangeClaim("256K - 1M", 1_048_576, "Block Sparse Ring; 95% sparsity needed"),
    RangeClaim("> 1M", 4_194_304, "Distributed Block Sparse; multi-GPU required"),
)


def cell_row(card: str, seq: int, mode: Mode, trials: int = TRIALS) -> Row:
    """The recommendation for `seq` tokens on all of a card's memory, float16, 8 heads of 64 channels."""
    gpu = find(card)
    row: Row = {"card": gpu.name, "gb": gpu.nominal_bytes >> 30, "seq": seq, "mode": mode}
    try:
        answer = recommend(seq=seq, gpu=gpu, mode=mode, trials=trials)
    except NothingFitsError as error:
        return row | {"outcome": "nothing fits", "relaxations": list(error.relaxations)}
    widest = next(one for one in answer.alternatives if one.role == "widest")
    return row | {
        "outcome": "ok",
        "attention": attention_kind(answer.config),
        "config": answer.config.model_dump(mode="json", exclude_defaults=True),
        "upper": answer.memory.upper,
        "seconds": answer.seconds,
        "mass": answer.quality.mass,
        "widest": _figures(widest),
    }


def _figures(pick: Pick) -> Row:
    return {"attention": attention_kind(pick.config), "seconds": pick.seconds, "mass": pick.mass}


def steps(scope: Scope) -> list[Job]:
    """A step a card, length and mode; quick, two cards and three lengths, without trials."""
    cards, lengths, modes, trials = CARDS, LENGTHS, MODES, TRIALS
    if scope.quick:
        cards, lengths, modes, trials = CARDS[:1] + CARDS[3:4], LENGTHS[::2], MODES[:1], 0
    return [
        (f"{card}, {tokens(seq)}, {mode}", partial(cell_row, card, seq, mode, trials))
        for mode in modes
        for card in cards
        for seq in lengths
    ]


def still_fits(row: Row) -> int | None:
    """The longest sequence that fits where this length does not, from the relaxations."""
    matches = (re.fullmatch(r"--seq (\d+)", change) for change in row["relaxations"])
    return next((int(match[1]) for match in matches if match), None)


def limits_table(rows: Results) -> str:
    """Markdown: for each card and length the fastest that passes the gates, and the one with most mass."""
    return markdown(
        (_cells(row) for row in rows),
        [
            "card",
            "mode",
            "tokens",
            "recommended",
            "memory, GB",
            "time",
            "mass",
            "widest that fits",
            "its time",
        ],
    )


def _cells(row: Row) -> list[str]:
    head = [f"{row['gb']} GB, {_short(row['card'])}", row["mode"], tokens(row["seq"])]
    if row["outcome"] != "ok":
        return [*head, f"nothing fits; {', or '.join(row['relaxations'])}", "", "", "", "", ""]
    widest = row["widest"]
    return [
        *head,
        row["attention"],
        f"{row['upper'] / 1e9:.2f}",
        seconds(row["seconds"]),
        f"{row['mass']:.0%}",
        f"{widest['attention']}, {widest['mass']:.0%}",
        seconds(widest["seconds"]),
    ]


def _short(card: str) -> str:
    return re.sub(r"NVIDIA |GeForce | \d+GB.*", "", card)


def on_8_gb(rows: Results) -> Mapping[int, Row]:
    """The rows by length of inference on the card of 8 GB, which is the original project's."""
    return {row["seq"]: row for row in rows if row["gb"] == 8 and row["mode"] == "inference"}


def seeds_table(rows: Results) -> str:
    """The original project's practical limits on 8 GB beside what is recommended for the longest of each
    range."""
    here = on_8_gb(rows)
    return markdown(
        (
            [claim.range, claim.advice, tokens(claim.longest), _answer(here[claim.longest])]
            for claim in CLAIMS
            if claim.longest in here
        ),
        ["range", "original project, 8 GB", "tokens here", "recommended, predicted"],
    )


def _answer(row: Row) -> str:
    if row["outcome"] == "ok":
        return f"{row['attention']}, {row['upper'] / 1e9:.2f} GB, {seconds(row['seconds'])}"
    longest = still_fits(row)
    return "nothing fits" + (f"; {longest:,} tokens would" if longest else "")


def draw(figure: Any, rows: Results) -> None:
    """A grid of cards and lengths for each mode: kind of attention by colour and name, time, memory."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure.set_size_inches(10, 1 + 3.7 * len(modes))
    for axes, mode in zip(figure.subplots(len(modes), squeeze=False)[:, 0], modes, strict=True):
        _draw_grid(axes, [row for row in rows if row["mode"] == mode], mode)
    axes.set_xlabel("tokens")
    title(
        figure,
        f"The fastest attention that fits the card and keeps {MIN_MASS:.0%} of the mass",
        "predicted time of a call and memory at most, float16, 8 heads x 64; grey: what keeps most, "
        "and its time",
    )


def _draw_grid(axes: Any, rows: Results, mode: str) -> None:
    cards = list(dict.fromkeys((row["gb"], _short(row["card"])) for row in rows))
    lengths = list(dict.fromkeys(row["seq"] for row in rows))
    for row in rows:
        x, y = lengths.index(row["seq"]), cards.index((row["gb"], _short(row["card"])))
        fits = row["outcome"] == "ok"
        color = KINDS[row["attention"]][0] if fits else "none"
        axes.bar(x, 0.94, width=0.96, bottom=y - 0.47, color=color, alpha=0.2)
        if fits:
            text = f"{row['attention']}\n{seconds(row['seconds'])}, {row['upper'] / 1e9:.1f} GB"
            widest = f"{row['widest']['attention']} {seconds(row['widest']['seconds'])}"
            axes.text(x, y - 0.13, text, ha="center", va="center")
            axes.text(x, y + 0.29, widest, ha="center", va="center", color=MUTED)
        else:
            axes.text(x, y, _no(row), ha="center", va="center", color=MUTED)
    axes.set_xticks(range(len(lengths)), [tokens(seq) for seq in lengths])
    axes.set_yticks(range(len(cards)), [f"{gb} GB\n{name}" for gb, name in cards])
    axes.set(title=mode, xlim=(-0.5, len(lengths) - 0.5), ylim=(len(cards) - 0.5, -0.5))
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def _no(row: Row) -> str:
    longest = still_fits(row)
    return "nothing fits" + (f"\nup to {longest / (1 << 20):.2f}M" if longest else "")


def findings(rows: Results) -> Findings:
    good = [row for row in rows if row["outcome"] == "ok"]
    kinds = sorted({row["attention"] for row in good})
    here = on_8_gb(rows)
    return Findings(
        "Asked: which attention is recommended for 4K to 4M tokens on cards of 8 to 80 GB, and where does "
        "nothing fit?",
        f"Found (predicted): something fits in {len(good)} of {len(rows)} cells, where {' or '.join(kinds)} "
        f"is the fastest; {_longest(here)}.",
        "The original project asks for a better GPU from 64K tokens on, 95% sparsity from 256K and several "
        f"cards beyond 1M; {_widest(here)}.",
    )


def _longest_row(here: Mapping[int, Row]) -> Row | None:
    """The row of the longest sequence that fits a card."""
    return max(
        (row for row in here.values() if row["outcome"] == "ok"), key=lambda row: row["seq"], default=None
    )


def _longest(here: Mapping[int, Row]) -> str:
    """The longest sequence that fits the card of 8 GB, and what it takes, in words."""
    row = _longest_row(here)
    if row is None:
        return "on the card of 8 GB none of them fits"
    limits = [still_fits(row) for row in here.values() if row["outcome"] != "ok"]
    beyond = f", and {max(filter(None, limits)):,} tokens still fit there" if any(limits) else ""
    return (
        f"on the {row['card']} {row['seq']:,} tokens take {row['upper'] / 1e9:.1f} GB and "
        f"{seconds(row['seconds'])} in inference{beyond}"
    )


def _widest(here: Mapping[int, Row]) -> str:
    """What else fits that card at that length, and what sparsity saves there, in words."""
    row = _longest_row(here)
    if row is None:
        return "here nothing fits 8 GB either"
    widest = row["widest"]
    fits = (
        f"{widest['attention']} attention with {widest['mass']:.0%} of the mass fits "
        f"({seconds(widest['seconds'])})"
    )
    if widest["mass"] < ALL:
        return f"for {row['seq']:,} tokens on 8 GB {fits}, and nothing that keeps more"
    saves = "time, not memory" if widest["seconds"] > row["seconds"] else "neither time nor memory"
    return f"for {row['seq']:,} tokens on 8 GB even {fits}: what sparsity saves there is {saves}"


STUDY = Study(
    steps,
    {"practical-limits": limits_table, "practical-limits-seeds": seeds_table},
    draw,
    findings,
    devices=("cpu",),
)
