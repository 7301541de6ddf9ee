"""Where does a memory pool help, and where not? `planner study memory-pool`

The same attention with `pool="on"` and `pool="off"`, in one process: peaks with every allocation counted,
and the ratio of their times, the two run in turn. A cold call finds pool and caches empty, a warm one filled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Final, NamedTuple

import torch

from attention import AttentionConfig, SparsePatternConfig, build
from attention.config import Switch
from attention.pool import Buffers, buffers_for
from planner.measuring.footprint import footprints
from planner.report.plot.figure import BLUE, INK, MUTED, ORANGE, named, title, token_axis
from studies.bench.memory_rows import mib
from studies.bench.records import Job, Row, markdown, timed
from studies.bench.study import Findings, Results, Scope, Study

LENGTHS, QUICK = (16_384, 32_768, 65_536, 131_072), (1024, 2048)
HEADS, HEAD_DIM = 4, 64
RUNS, QUICK_RUNS = 7, 5
"""Number of pairs of calls whose times are compared."""
SWITCHES: Final[tuple[Switch, Switch]] = ("on", "off")
STATES: Final = ("cold", "warm")
LEAST: Final = 0.02
"""The share below which a difference of times is not clear."""
BOTTOM, TOP = 0.7, 1.3
"""Ends of the picture's axis of ratios, further out if a median lies there."""


class Medians(NamedTuple):
    """The original project's figures at a length: milliseconds and GB without a pool and with it."""

    ms: tuple[float, float]
    gb: tuple[float, float]

    @property
    def time(self) -> float:
        return self.ms[1] / self.ms[0]

    @property
    def memory(self) -> float:
        return self.gb[1] / self.gb[0]


SEEDS: Final = {
    16_384: Medians((14.4, 16.7), (0.30, 0.23)),
    32_768: Medians((29.3, 578.8), (0.58, 0.45)),
    65_536: Medians((1100.4, 1056.4), (0.72, 0.59)),
    131_072: Medians((3236.3, 2518.7), (1.53, 1.28)),
}
"""Figures by tokens of the report on extreme sequences: ImprovedDilatedAttention on a GTX 1080."""


def configs() -> dict[str, AttentionConfig]:
    """The attentions, by name."""
    branches: dict[str, Any] = {"segment_lengths": (1024, 2048, 4096), "dilation_rates": (1, 2, 4)}
    pattern = SparsePatternConfig(sparsity_ratio=0.01, block_size=128)
    return {
        "dilated": AttentionConfig(variant="dilated", **branches),
        "dilated_sparse": AttentionConfig(variant="block_sparse", pattern=pattern, **branches),
    }


class PoolCase(NamedTuple):
    """The attention with one setting of its pool."""

    call: Callable[[], object]
    buffers: Buffers


def pool_row(name: str, seq: int, device: torch.device, runs: int) -> Row:
    """Bytes and seconds with and without a pool, first and later calls."""
    dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
    q, k, v = torch.randn(3, 1, seq, HEADS, HEAD_DIM, device=device).to(dtype)
    sides = {switch: _side(name, switch, (q, k, v)) for switch in SWITCHES}
    floor = 4 * q.numel() * q.element_size()
    return {
        "attention": name,
        "seq": seq,
        "dtype": str(dtype).removeprefix("torch."),
        "floor": floor,
        "bytes": {switch: _bytes(side, floor, device) for switch, side in sides.items()},
        "seconds": _seconds(sides, device, runs),
    }


def _side(name: str, switch: Switch, inputs: tuple[torch.Tensor, ...]) -> PoolCase:
    config = AttentionConfig(**configs()[name].model_dump() | {"pool": switch})
    module = build(config, inputs[0].device)

    def call() -> object:
        with torch.no_grad():
            return module(*inputs)

    return PoolCase(call, buffers_for(config))


def _bytes(side: PoolCase, floor: int, device: torch.device) -> Row:
    """Peaks of a first and a second call, inputs included, and what the pool holds between calls."""
    side.buffers.release()
    cold, warm = footprints([side.call, side.call], device)
    inputs = 3 * floor // 4
    return {
        "cold": inputs + cold.peak,
        "warm": inputs + warm.peak,
        "held": side.buffers.stats.pool.held_bytes,
    }


def _seconds(sides: dict[Switch, PoolCase], device: torch.device, runs: int) -> Row:
    """Seconds of each run by state and switch; the n-th of either are of one pair."""
    times: Row = {state: {switch: [] for switch in sides} for state in STATES}

    def pairs(state: str, before: Callable[[PoolCase], object]) -> None:
        for number in range(runs):
            for switch in list(sides)[:: 1 if number % 2 else -1]:
                before(sides[switch])
                times[state][switch].append(timed(sides[switch].call, device))

    for side in sides.values():
        side.call()  # starts threads and libraries
    pairs("cold", lambda side: side.buffers.release())
    for side in sides.values():
        side.call()  # from a second use on things are kept
    pairs("warm", lambda side: None)
    for side in sides.values():
        side.buffers.release()
    return times


def steps(scope: Scope) -> list[Job]:
    lengths, runs = (QUICK, QUICK_RUNS) if scope.quick else (LENGTHS, RUNS)
    return [
        (f"{name} {seq}", partial(pool_row, name, seq, scope.device, runs))
        for name in configs()
        for seq in lengths
    ]


def ratios(row: Row, state: str) -> list[float]:
    """Time with a pool over time without one, pair by pair."""
    seconds = row["seconds"][state]
    return [on / off for on, off in zip(seconds["on"], seconds["off"], strict=True)]


def verdict(row: Row, state: str) -> str:
    """Whether the pool makes calls `faster` or `slower`: in all pairs, and in the median by at least
    `LEAST`."""
    by_pair = ratios(row, state)
    if max(by_pair) < 1 and median(by_pair) < 1 - LEAST:
        return "faster"
    if min(by_pair) > 1 and median(by_pair) > 1 + LEAST:
        return "slower"
    return "no clear difference"


def memory_ratio(row: Row, state: str) -> float:
    """Peak with a pool over peak without one."""
    return float(row["bytes"]["on"][state] / row["bytes"]["off"][state])


def pool_table(rows: Results) -> str:
    """Time and memory, case by case."""
    body = []
    for row in rows:
        for state in STATES:
            by_pair = ratios(row, state)
            seconds, peaks = row["seconds"][state], row["bytes"]
            body.append(
                [
                    row["attention"],
                    f"{row['seq']:,}",
                    state,
                    *(f"{1000 * median(seconds[switch]):,.0f}" for switch in reversed(SWITCHES)),
                    f"{median(by_pair):.2f}",
                    f"{min(by_pair):.2f} to {max(by_pair):.2f}",
                    verdict(row, state),
                    *(mib(peaks[switch][state]) for switch in reversed(SWITCHES)),
                    f"{memory_ratio(row, state):.4f}",
                    mib(peaks["on"]["held"]),
                ]
            )
    return markdown(
        body,
        [
            "attention",
            "tokens",
            "call",
            "without, ms",
            "with a pool, ms",
            "ratio",
            "of all pairs",
            "the pool is",
            "peak without, MiB",
            "with, MiB",
            "ratio",
            "held between calls, MiB",
        ],
    )


def seeds_table(rows: Results) -> str:
    """The original project's figures, and the ratios here at the same lengths in warm calls."""
    body = []
    for seq, reported in SEEDS.items():
        line = [
            f"{seq:,}",
            *(f"{ms:,.1f}" for ms in reported.ms),
            f"{reported.time:.2f}",
            *(f"{gb:.2f}" for gb in reported.gb),
            f"{reported.memory:.2f}",
        ]
        for name in configs():
            mine = [row for row in rows if (row["attention"], row["seq"]) == (name, seq)]
            line += [f"{median(ratios(row, 'warm')):.2f}" for row in mine] or [""]
            line += [f"{memory_ratio(row, 'warm'):.2f}" for row in mine] or [""]
        body.append(line)
    return markdown(
        body,
        [
            "tokens",
            "original project: without, ms",
            "with, ms",
            "ratio",
            "without, GB",
            "with, GB",
            "ratio",
            *(head for name in configs() for head in (f"{name} here: time", "memory")),
        ],
    )


def draw(figure: Any, rows: Results) -> None:
    """Left: ratios of times, with all pairs. Right: ratios of peaks. The original project's beside."""
    figure.set_size_inches(10, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    medians = [median(ratios(*case)) for case in _cases(rows)]
    bottom, top = min(BOTTOM, *medians) - 0.02, max(TOP, *medians) + 0.02
    series = [
        (name, state, color, fill)
        for name, color in zip(configs(), (BLUE, ORANGE), strict=True)
        for state, fill in (("cold", "white"), ("warm", color))
    ]
    for number, (name, state, color, fill) in enumerate(series):
        mine = [row for row in rows if row["attention"] == name]
        places = [row["seq"] * 2 ** (0.12 * (number - 1.5)) for row in mine]
        pairs = [ratios(row, state) for row in mine]
        for place, by_pair in zip(places, pairs, strict=True):
            left.plot([place, place], [min(by_pair), max(by_pair)], color=color, linewidth=1.2)
        looks = {"color": color, "markerfacecolor": fill, "marker": "o", "markersize": 6, "linestyle": "none"}
        left.plot(places, [median(by_pair) for by_pair in pairs], label=f"{name}, {state}", **looks)
        right.plot(places, [memory_ratio(row, state) for row in mine], **looks)
    crosses = {"color": INK, "marker": "x", "s": 36, "zorder": 3}
    inside = [seq for seq, reported in SEEDS.items() if reported.time < top]
    left.scatter(inside, [SEEDS[seq].time for seq in inside], **crosses, label="original, GTX 1080")
    for seq in SEEDS.keys() - set(inside):
        named(left, seq, top, f"original: {SEEDS[seq].time:.1f}", va="top", ha="center", xytext=(0, -2))
    right.scatter(list(SEEDS), [reported.memory for reported in SEEDS.values()], **crosses)
    for axes, what in ((left, "time: median, lowest and highest pair"), (right, "memory at the peak")):
        axes.axhline(1, color=MUTED, linewidth=1)
        axes.set(title=what, xlabel="tokens", ylim=(bottom, top))
        token_axis(axes.xaxis, sorted({row["seq"] for row in rows} | set(SEEDS)))
        axes.grid(axis="y")
    left.set_ylabel("with a pool / without")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    title(
        figure,
        f"In time a pool makes no clear difference in {len(_alike(rows))} of {len(_cases(rows))} cases",
        f"{HEADS} heads x {HEAD_DIM}, {rows[0]['dtype']}; below 1 the pool is faster or leaner",
    )


NamedRow = tuple[Row, str]


def _cases(rows: Results) -> list[NamedRow]:
    return [(row, state) for row in rows for state in STATES]


def _alike(rows: Results) -> list[NamedRow]:
    """The cases in which a pool makes no clear difference."""
    return [case for case in _cases(rows) if verdict(*case) == "no clear difference"]


def findings(rows: Results) -> Findings:
    cases, alike = _cases(rows), _alike(rows)
    clear = [
        f"{verdict(row, state)} ({median(ratios(row, state)):.2f}) for {row['attention']} at {row['seq']:,} "
        f"tokens in {state} calls"
        for row, state in cases
        if (row, state) not in alike
    ]
    reported = SEEDS.values()
    return Findings(
        f"Asked: where between {rows[0]['seq']:,} and {rows[-1]['seq']:,} tokens does keeping buffers "
        "between calls save time or memory?",
        f"Found: in time it makes no clear difference in {len(alike)} of {len(cases)} cases"
        f"{' and is ' * bool(clear)}{'; '.join(clear)}; median times are "
        f"{_range([median(ratios(*case)) for case in cases])} times those without, peaks "
        f"{_range([memory_ratio(*case) for case in cases], 3)} times, and the pool holds up to "
        f"{mib(max(row['bytes']['on']['held'] for row in rows))} MiB between calls.",
        f"The original project has {_range([each.time for each in reported])} times the time and "
        f"{_range([each.memory for each in reported])} times the memory, with code that allocates buffers as "
        "large as segments over and over; a call here takes one arena of a tile, pool or no pool.",
    )


def _range(figures: list[float], digits: int = 2) -> str:
    return f"{min(figures):.{digits}f} to {max(figures):.{digits}f}"


STUDY = Study(
    steps, {"memory-pool": pool_table, "memory-pool-seeds": seeds_table}, draw, findings, independent=True
)
