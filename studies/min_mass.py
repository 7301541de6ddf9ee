"""What does mass cost? `planner study min-mass`

For each attention profile and card the fastest config that keeps at least so much of dense attention's mass,
as `recommend` finds it, as a share of dense attention's time; and what layouts keep that models are served
with.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any, Final

from attention.config import AttentionConfig, SparsePatternConfig
from planner.quality.mass import mass_of
from planner.quality.profiles import PRESETS
from planner.report.plot.figure import COLORS, RED, named, title
from planner.search.recommend import answered
from planner.search.relax import NothingFitsError
from planner.workload import Workload
from studies.bench.records import OK, Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study

LEVELS: Final = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
CARDS: Final = ("gtx1080", "rtx4060", "h100")
LENGTHS: Final = (16_384, 131_072)


def _window(tokens: int, shared: int = 0) -> AttentionConfig:
    kind: Any = "global_local" if shared else "local_window"
    pattern = SparsePatternConfig(
        pattern_type=kind, block_size=64, local_window_size=tokens, global_tokens=max(shared, 1)
    )
    return AttentionConfig(variant="block_sparse", pattern=pattern)


KNOWN: Final[dict[str, AttentionConfig]] = {
    "window of 4,096 (Mistral 7B)": _window(4096),
    "window of 4,096 and 4 sinks (StreamingLLM)": _window(4096, 4),
    "window of 512 and 64 global tokens (Longformer)": _window(512, 64),
    "LongNet: 2,048 to 32,768, rates 1 to 16": AttentionConfig(
        variant="dilated", segment_lengths=(2048, 4096, 8192, 16_384, 32_768), dilation_rates=(1, 2, 4, 8, 16)
    ),
}


def price_row(profile: str, card: str, seq: int) -> Row:
    """Predicted seconds of the fastest config at each level of mass, and of dense attention."""
    options: dict[str, Any] = {"seq": seq, "gpu": card, "causal": True, "profile": profile}
    row: Row = {"profile": profile, "card": card, "seq": seq, "seconds": {}}
    for level in (*LEVELS, 1.0):
        try:
            row["seconds"][str(level)] = answered(None, min_mass=level, layers=None, **options).answer.seconds
        except NothingFitsError as error:
            row["seconds"][str(level)], row["message"] = None, str(error)
    nothing = not any(row["seconds"].values()) or row["seconds"]["1.0"] is None
    return row | {"outcome": "nothing fits" if nothing else OK}


def known_row(name: str) -> Row:
    """The mass of a layout under each profile, at each length."""
    return {
        "layout": name,
        "mass": {
            f"{profile} {seq}": mass_of(KNOWN[name], Workload(seq=seq, causal=True), PRESETS[profile])
            for profile in PRESETS
            for seq in LENGTHS
        },
    }


def prices_table(rows: list[Row]) -> str:
    """Markdown: the median over cards and lengths of the share of dense attention's time."""
    body = []
    for profile in PRESETS:
        body.append([profile, *(_percent(share(rows, profile, level)) for level in LEVELS)])
    return markdown(body, ["profile", *(f"{level:g} of the mass" for level in LEVELS)])


def known_table(rows: list[Row]) -> str:
    """Markdown: the mass that known layouts keep."""
    layouts = [row for row in rows if "layout" in row]
    if not layouts:
        return "No layout was asked about."
    names = list(layouts[0]["mass"])
    return markdown(
        ([row["layout"], *(f"{row['mass'][name]:.1%}" for name in names)] for row in layouts),
        ["layout", *(f"{name.rpartition(' ')[0]}, {int(name.rpartition(' ')[2]):,}" for name in names)],
    )


def steps(scope: Scope) -> list[Job]:
    cards, lengths = (CARDS[:1], LENGTHS[:1]) if scope.quick else (CARDS, LENGTHS)
    prices: list[Job] = [
        (f"{profile} {card} {seq}", partial(price_row, profile, card, seq))
        for profile in PRESETS
        for card in cards
        for seq in lengths
    ]
    return prices + [(name, partial(known_row, name)) for name in KNOWN]


def share(rows: Results, profile: str, level: float) -> float | None:
    """The median share of dense attention's time for `level` of the mass; None where no config has it."""
    mine = [row["seconds"] for row in rows if row.get("profile") == profile]
    shares = [each[str(level)] / each["1.0"] for each in mine if each[str(level)] and each["1.0"]]
    return median(shares) if shares else None


def _percent(part: float | None) -> str:
    return "" if part is None else f"{part:.1%}"


def draw(figure: Any, rows: Results) -> None:
    """The share of dense attention's time over mass, a line for each profile."""
    axes = figure.add_subplot()
    for profile, color in zip(PRESETS, COLORS, strict=False):
        points = [(100 * level, 100 * part) for level in LEVELS if (part := share(rows, profile, level))]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4)
        # At the left end lines are apart; at the right they meet.
        named(axes, *points[0], profile, color, xytext=(-6, 0), ha="right")
    axes.axvline(80, color=RED, linewidth=1, linestyle="--")
    axes.annotate(
        "the gate",
        (80, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -12),
        textcoords="offset points",
        color=RED,
    )
    axes.set(
        yscale="log",
        xlabel="mass of dense attention kept at least, %",
        xlim=(40, 101),
        ylabel="predicted time, % of dense attention's",
    )
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.grid(axis="y")
    title(figure, _headline(rows), "median over cards and lengths, causal")


def _headline(rows: Results) -> str:
    shares = [part for profile in PRESETS if (part := share(rows, profile, 0.8)) is not None]
    if not shares:
        return "No config keeps four fifths of the mass"
    if max(shares) < 0.5:
        return "The last fifth of the mass costs most of the time"
    return f"Four fifths of the mass cost {min(shares):.0%} to {max(shares):.0%} of the time"


def _cost(rows: Results, level: float) -> str:
    part = share(rows, "balanced", level)
    return "cannot be had" if part is None else f"takes {part:.1%}"


def findings(rows: Results) -> Findings:
    return Findings(
        "Asked: what does the fastest config that keeps a given share of dense attention's mass cost?",
        f"Found: under the profile 'balanced' 80% of the mass {_cost(rows, 0.8)} of dense attention's "
        f"predicted time, 90% {_cost(rows, 0.9)} and 99% {_cost(rows, 0.99)}.",
        "The original project chooses sparsity for memory and speed alone and does not ask what is attended "
        "to; then there is no reason to attend to more.",
    )


STUDY = Study(
    steps, {"min-mass": prices_table, "min-mass-known": known_table}, draw, findings, devices=("cpu",)
)
