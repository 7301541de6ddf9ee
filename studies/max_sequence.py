"""How long a sequence fits 1 to 80 GB, by attention? `planner study max-sequence`

Predicted for cards of that memory. On the CPU the predicted longest is run with the process held to the
budget; one block more is above the bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any, Final, NamedTuple

from attention import AttentionConfig
from planner.gpus import find, generic
from planner.measuring.measure import measure
from planner.report.plot.figure import KINDS, MUTED, RED, named, title, token_axis
from planner.search.longest import longest
from planner.units import format_bytes
from planner.workload import Mode, Workload
from studies.bench.attentions import one_of_each
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study, many

GB: Final = 10**9
CARDS: Final[Mapping[int, str | None]] = {
    1: None,
    2: None,
    4: None,
    8: "gtx1080",
    12: "rtx3060",
    16: "rtx4060ti-16gb",
    24: "rtx4090",
    40: "a100-sxm4-40gb",
    80: "h100-sxm",
}
"""The cards by their GB; None for the generic card."""
MODES: Final[tuple[Mode, ...]] = ("inference", "training")
APART: Final = {12: -4, 16: 1}
"""By GB, the points by which a label stands aside from its mark, which is near another."""
CAPS: Final = (64_000_000, 256_000_000, GB)
"""Budgets in bytes that runs on the CPU are limited to."""
QUICK: Final = (8_000_000,)
DENSE_MOST: Final = CAPS[0]
"""The largest budget for dense attention: with more, its longest takes minutes a run on two cores."""
BESIDE: Final[Mapping[Mode, int]] = {"inference": 48 << 20, "training": 192 << 20}
"""Bytes that a capped process may have besides what torch allocates, which is what bounds are of: the block
of 32 MiB that keeps the heap steady, buffers of threads, and for training the code that torch loads at the
first backward and holes in the heap, where blocks below 32 MiB lie."""


class LengthClaim(NamedTuple):
    """A limit on 8 GB as the original project reports it, the memory that it counts there, and a config of
    that kind."""

    what: str
    seq: int
    counted: str
    config: AttentionConfig


def claims() -> list[LengthClaim]:
    """The original project's limits, all of one card of 8 GB."""
    here = one_of_each()
    pool, none = (here["dilated"].model_copy(update={"pool": switch}) for switch in ("on", "off"))
    return [
        LengthClaim("block-sparse, base", 65_536, "264.2 MB", here["dilated_sparse"]),
        LengthClaim("block-sparse, configuration A", 131_072, "128 MB", here["dilated_sparse"]),
        LengthClaim("block-sparse, multihead", 65_536, "2,250.3 MB", here["multihead"]),
        LengthClaim("block-sparse, adaptive", 32_768, "137.2 MB", here["adaptive"]),
        LengthClaim("improved dilated, with a pool", 65_536, "0.59 GB", pool),
        LengthClaim("improved dilated, without a pool", 24_576, "no figure, but 0.72 GB at 65,536", none),
    ]


def card_row(kind: str, config: AttentionConfig, mode: Mode, budget: int) -> Row:
    """The longest sequence on the card of `budget` GB, float16."""
    name = CARDS[budget]
    card = find(name) if name else generic(budget * GB)
    answer = longest(config, Workload(seq=1, mode=mode), budget * GB, card, {})
    return {
        "part": "cards",
        "attention": kind,
        "mode": mode,
        "gb": budget,
        "card": card.name,
        "seq": answer.fits.workload.seq if answer.fits else 0,
        "upper": answer.fits.upper if answer.fits else None,
        "beyond": answer.beyond.upper,
    }


def seeds_row(claim: LengthClaim) -> Row:
    """The longest sequence of that kind on the original project's card, beside its own limit."""
    row = card_row(claim.what, claim.config, "inference", 8)
    return row | {"part": "seeds", "said": claim.seq, "counted": claim.counted, "pool": claim.config.pool}


def capped_row(kind: str, config: AttentionConfig, mode: Mode, budget: int) -> Row:
    """The longest sequence in float32 on the CPU, run in a process that is limited to `budget` bytes and
    what it has besides."""
    answer = longest(config, Workload(seq=1, mode=mode, dtype="float32"), budget, "cpu", {})
    row: Row = {
        "part": "capped",
        "attention": kind,
        "mode": mode,
        "budget": budget,
        "beyond": answer.beyond.upper,
        "outcome": "nothing fits",
    }
    if answer.fits is None:
        return row
    workload = answer.fits.workload
    ran = measure(config, workload, "cpu", runs=1, timeout=600, cap_bytes=budget + BESIDE[mode])
    return row | {
        "seq": workload.seq,
        "upper": answer.fits.upper,
        "outcome": ran.kind,
        "message": ran.message,
        "allocated": ran.allocated,
    }


def steps(scope: Scope) -> list[Job]:
    """A step for each card, mode and attention, for each limit of the original project and for each capped
    run; quick, few budgets."""
    every = one_of_each()
    few = {kind: every[kind] for kind in ("local_window", "dilated_sparse")}
    cards: list[Job] = [
        (f"{kind}, {mode}, {budget} GB", partial(card_row, kind, config, mode, budget))
        for kind, config in every.items()
        for mode in MODES
        for budget in (1, 8, 80) * scope.quick or CARDS
    ]
    seeds: list[Job] = [(claim.what, partial(seeds_row, claim)) for claim in claims()]
    capped: list[Job] = [
        (f"{kind}, {mode}, {format_bytes(budget)}", partial(capped_row, kind, config, mode, budget))
        for budget in (QUICK if scope.quick else CAPS)
        for kind, config in (few if scope.quick else every).items()
        for mode in (MODES[:1] if scope.quick else MODES)
        if kind != "dense" or budget <= DENSE_MOST
    ]
    return [*cards, *seeds, *capped]


def of_part(rows: Results, part: str) -> Results:
    """The rows of a part: `cards`, `seeds` (the original project) or `capped`."""
    return [row for row in rows if row["part"] == part]


def cards_table(rows: Results) -> str:
    """Longest sequence by attention, mode and GB."""
    rows = of_part(rows, "cards")
    budgets = list(dict.fromkeys(row["gb"] for row in rows))
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        lines.setdefault((row["attention"], row["mode"]), []).append(f"{row['seq']:,}")
    names = [f"{gb} GB, {next(row['card'] for row in rows if row['gb'] == gb)}" for gb in budgets]
    return markdown(([*line, *lengths] for line, lengths in lines.items()), ["attention", "mode", *names])


def capped_table(rows: Results) -> str:
    """What was predicted to fit, run under a cap."""
    return markdown(
        (
            [
                row["attention"],
                row["mode"],
                format_bytes(row["budget"]),
                f"{row.get('seq', 0):,}",
                row["outcome"],
                f"{used(row):.1%}" if row["outcome"] == "ok" else "",
                f"{row['beyond'] / row['budget']:.2%}",
            ]
            for row in of_part(rows, "capped")
        ),
        [
            "attention",
            "mode",
            "budget",
            "longest predicted",
            "ran",
            "of the budget allocated",
            "bound of one block more",
        ],
    )


def seeds_table(rows: Results) -> str:
    """The original project's limits on 8 GB beside the predicted ones."""
    return markdown(
        (
            [
                row["attention"],
                f"{row['said']:,}",
                row["counted"],
                f"{row['seq']:,}",
                f"{row['seq'] / row['said']:.0f}",
            ]
            for row in of_part(rows, "seeds")
        ),
        [
            "original project, 8 GB",
            "its longest",
            "memory it counts there",
            "predicted here",
            "times as long",
        ],
    )


def used(row: Row) -> float:
    """Share of the budget that was allocated."""
    return float(row["allocated"] / row["budget"])


def _ran(rows: Results) -> Results:
    return [row for row in of_part(rows, "capped") if row["outcome"] == "ok"]


def draw(figure: Any, rows: Results) -> None:
    """Above, the longest by attention and GB, for inference and training; below, what was allocated of the
    budgets that runs were held to."""
    figure.set_size_inches(9.5, 7)
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    panels = above.subplots(1, 2, sharey=True, sharex=True)
    for axes, mode in zip(panels, MODES, strict=True):
        _draw_longest(axes, [row for row in of_part(rows, "cards") if row["mode"] == mode], mode)
    reported = [row["said"] for row in of_part(rows, "seeds")]
    for axes in panels:
        axes.axvspan(min(reported), max(reported), color=RED, alpha=0.12, linewidth=0, zorder=0)
    lowest = panels[0].get_ylim()[1]
    named(panels[0], max(reported), lowest, "where the original project stops on 8 GB", RED, va="bottom")
    panels[0].invert_yaxis()
    _draw_used(below.subplots(), _ran(rows))
    title(
        figure,
        _headline(of_part(rows, "cards")),
        "above: predicted, GB above marks, 8 heads x 64, float16; below: run on the CPU in float32",
    )


def _draw_longest(axes: Any, rows: Results, mode: str) -> None:
    kinds = list(dict.fromkeys(row["attention"] for row in rows))
    for place, kind in enumerate(kinds):
        color, marker = KINDS[kind]
        mine = [row for row in rows if row["attention"] == kind and row["seq"]]
        axes.plot([row["seq"] for row in mine], [place] * len(mine), color=color, linewidth=1, alpha=0.5)
        axes.scatter([row["seq"] for row in mine], [place] * len(mine), color=color, marker=marker, s=30)
    for row in rows:
        if row["attention"] == kinds[0] and row["seq"]:
            unit = " GB" if row["gb"] == 1 else ""
            aside = APART.get(row["gb"], 0)
            named(axes, row["seq"], 0, f"{row['gb']}{unit}", MUTED, xytext=(aside, 12), ha="center")
    axes.set_yticks(range(len(kinds)), kinds)
    token_axis(axes.xaxis, [1 << power for power in range(12, 26, 2)])
    axes.set(title=mode, xlabel="longest sequence, tokens", ylim=(-0.9, len(kinds)))
    axes.grid(axis="x")


def _draw_used(axes: Any, rows: Results) -> None:
    """Dots for each budget and mode, one for each attention; a dash for the bound of one block more."""
    groups = list(dict.fromkeys((row["budget"], row["mode"]) for row in rows))
    kinds = list(dict.fromkeys(row["attention"] for row in rows))
    for row in rows:
        color, marker = KINDS[row["attention"]]
        place = groups.index((row["budget"], row["mode"])) + 0.1 * (
            kinds.index(row["attention"]) - (len(kinds) - 1) / 2
        )
        axes.scatter(place, 100 * used(row), color=color, marker=marker, s=30)
        axes.scatter(place, 100 * row["beyond"] / row["budget"], color=RED, marker="_", s=40)
    axes.axhline(100, color=RED, linewidth=1)
    axes.set_xticks(range(len(groups)), [f"{format_bytes(budget, 0)}\n{mode}" for budget, mode in groups])
    axes.set(ylabel="allocated at the peak,\n% of the budget", xlim=(-0.5, len(groups) - 0.5))
    axes.grid(axis="y")
    named(
        axes, 1, 1, "dashes: the bound of one block more", RED, xycoords="axes fraction", va="top", ha="right"
    )


def _headline(rows: Results) -> str:
    """The headline: whether memory or the attention matters more for the length."""

    def apart(*names: str) -> float:
        """The largest factor between lengths among rows that have these fields in common."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row in rows:
            if row["seq"]:
                groups.setdefault(tuple(row[name] for name in names), []).append(row["seq"])
        return max((max(lengths) / min(lengths) for lengths in groups.values()), default=1.0)

    by_memory, by_kind = apart("attention", "mode"), apart("gb", "mode")
    if by_kind < by_memory:
        return "Length follows memory; which attention it is matters less"
    return (
        f"Length differs by a factor of {many(by_kind)} from attention to attention, of {many(by_memory)} "
        "from card to card"
    )


def _span(rows: Results, budget: int, mode: str) -> str:
    """The shortest and the longest sequence of a budget and mode, with their attentions."""
    matches = [row for row in of_part(rows, "cards") if (row["gb"], row["mode"]) == (budget, mode)]
    ends = []
    for seq in (pick(row["seq"] for row in matches) for pick in (min, max)):
        first, *others = (row["attention"] for row in matches if row["seq"] == seq)
        ends.append(f"{seq:,} ({first}{f' and {len(others)} more' if others else ''})")
    return " to ".join(ends)


def findings(rows: Results) -> Findings:
    capped = [row for row in of_part(rows, "capped") if row["outcome"] != "nothing fits"]
    ran = _ran(rows)
    over = sum(row["beyond"] > row["budget"] for row in capped)
    took = f" and allocated {median(map(used, ran)):.1%} of the budget in the median" if ran else ""
    beside = of_part(rows, "seeds")
    times = sorted(row["seq"] / row["said"] for row in beside)
    stopped = "memory was not what stopped it" if times[0] > 1 else "memory may have stopped it"
    return Findings(
        "Asked: how long a sequence fits 1 to 80 GB, by attention, and does what is predicted to fit run?",
        f"Found: of one config an attention, on 8 GB {_span(rows, 8, 'inference')} tokens are predicted for "
        f"inference and {_span(rows, 8, 'training')} for training, on 80 GB {_span(rows, 80, 'inference')} "
        f"and {_span(rows, 80, 'training')}; {len(ran)} of {len(capped)} lengths predicted for the CPU "
        f"ran{took}, in a process held to the budget and {min(BESIDE.values()) >> 20} MiB (training: "
        f"{max(BESIDE.values()) >> 20}) for what torch does not allocate, and for {over} of them the bound "
        "of one block more is above the budget.",
        f"The original project stops at {min(row['said'] for row in beside):,} to "
        f"{max(row['said'] for row in beside):,} tokens on 8 GB, where {many(times[0])} to {many(times[-1])} "
        f"times as many are predicted to fit; {stopped}: it counts at most 2.3 of 8 GB in use there, gives "
        "figures without a pool for lengths beyond its limit without one, and names a limit of kernel "
        "launches as what it met beyond.",
    )


STUDY = Study(
    steps,
    {"max-sequence": cards_table, "max-sequence-capped": capped_table, "max-sequence-seeds": seeds_table},
    draw,
    findings,
    devices=("cpu",),
)
