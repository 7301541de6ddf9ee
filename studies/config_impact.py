"""Does configuration B need twice the memory of configuration A? `planner study config-impact`

According to the original project large segments, more rates and larger blocks take one implementation from
128 to 305 MB at 131,072 tokens. Here both configs are planned for its card, and planned and measured where
the study runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from attention.config import AttentionConfig, SparsePatternConfig
from attention.layout import build_layout
from planner.measuring.server import Batch
from planner.memory.table import COMPONENTS
from planner.report.plot.figure import BLUE, MUTED, ORANGE, SKY, title
from planner.units import format_bytes
from planner.workload import Workload
from studies.bench import memory_rows
from studies.bench.memory_rows import MIB, mib, place
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study, rounded_up

SEQ, QUICK = 131_072, 4096
TIMEOUT: Final = 600.0


def configs() -> dict[str, AttentionConfig]:
    """A and B, as small.json and large.json of docs/examples have them, which no package brings."""

    def sparse(ratio: float, block: int, lengths: tuple[int, ...], rates: tuple[int, ...]) -> AttentionConfig:
        pattern = SparsePatternConfig(sparsity_ratio=ratio, block_size=block)
        return AttentionConfig(
            variant="block_sparse", pattern=pattern, segment_lengths=lengths, dilation_rates=rates
        )

    return {"A": sparse(0.01, 64, (2048,), (1,)), "B": sparse(0.02, 256, (65_536, 131_072), (1, 2))}


class BreakdownClaim(NamedTuple):
    """A line of the original project's breakdown: its bytes of A and of B, None where it has none. Against
    it stand this project's bytes, and why they are so many."""

    what: str
    a: int | None
    b: int | None
    here: Callable[[Row], int]
    why: str


def _of(*components: str) -> Callable[[Row], int]:
    return lambda row: sum(row["components"].get(name, 0) for name in components)


TOGETHER: Final = (128 * MIB, 305 * MIB)
CLAIMS: Final = (
    BreakdownClaim("q, k, v and out", None, None, _of("qkv", "output"), "nothing runs below it"),
    BreakdownClaim("segment buffers", 64 * 2 * MIB, 128 * MIB, lambda row: 0, "segments are views"),
    BreakdownClaim(
        "pattern indices", 200 * 1024, 13 * MIB, lambda row: row["layout"], "2 bytes a block, in host memory"
    ),
    BreakdownClaim(
        "temporary arrays",
        MIB,
        64 * MIB,
        _of("workspace", "temp_buffers", "rounding"),
        "one tile, whatever the segment, and cuBLAS's workspace",
    ),
    BreakdownClaim(
        "segment structures", 0, 100 * MIB, _of("memory_pool", "pattern_cache", "masks"), "no segment has any"
    ),
    BreakdownClaim("together", *TOGETHER, lambda row: row["allocated"], "q, k, v and out counted"),
)
"""The lines of the report on configurations; its MB are MiB."""


def card_row(name: str) -> Row:
    """A config on the original project's card, predicted."""
    config, workload = configs()[name], Workload(seq=SEQ)
    head = {"config": name, "part": "card", "seq": SEQ, "floor": workload.floor}
    layout = build_layout(config, SEQ, causal=False).nbytes
    return head | memory_rows.predicted(config, workload) | {"layout": layout}


def here_row(name: str, seq: int, batch: Batch) -> Row:
    """A config where the study runs, predicted and measured."""
    workload = Workload(seq=seq)
    head = {"config": name, "part": "here", "seq": seq, "floor": workload.floor}
    return head | memory_rows.measured(configs()[name], workload, batch)


def steps(scope: Scope) -> list[Job]:
    batch = scope.batch(timeout=TIMEOUT)
    seq = QUICK if scope.quick else SEQ
    return [
        *((f"{name} predicted", partial(card_row, name)) for name in configs()),
        *((f"{name} measured", partial(here_row, name, seq, batch)) for name in configs()),
    ]


def pair(rows: Results, part: str) -> tuple[Row, Row]:
    """The rows of A and of B in a part."""
    a, b = (row for row in rows if row["part"] == part)
    return a, b


def components_table(rows: Results) -> str:
    """Component by component, on the card and where the study ran."""
    both = (pair(rows, "card"), pair(rows, "here"))
    body: list[list[str]] = []
    for name in (*COMPONENTS, "rounding"):
        counts = [[row["components"].get(name, 0) for row in rows] for rows in both]
        if any(map(any, counts)):
            body.append([name, *_cells(*counts[0]), *_cells(*counts[1])])
    totals = [[row["allocated"] for row in rows] for rows in both]
    body.append(["**allocated, predicted**", *_cells(*totals[0]), *_cells(*totals[1])])
    body.append(["**allocated, measured**", "", "", "", *_cells(*(row["cold"] for row in both[1]))])
    return markdown(body, ["component", *_head(both[0][0]), *_head(both[1][0])])


def _head(row: Row) -> list[str]:
    where = f"{place(row)}, {row['seq']:,} tokens"
    return [f"A, {where}", f"B, {where}", "B - A"]


def _cells(a: int | None, b: int | None) -> list[str]:
    if a is None or b is None:
        return [*("did not run" if count is None else format_bytes(count) for count in (a, b)), ""]
    sign = "+" if b > a else "-"
    return [format_bytes(a), format_bytes(b), f"{sign}{format_bytes(abs(b - a))}" if a != b else "="]


def claims_table(rows: Results) -> str:
    """The original project's lines, each beside what stands here in its place."""

    def size_text(count: int | None) -> str:
        return "not counted" if count is None else mib(count)

    a, b = pair(rows, "card")
    body = [
        [
            claim.what,
            size_text(claim.a),
            mib(claim.here(a)),
            size_text(claim.b),
            mib(claim.here(b)),
            claim.why,
        ]
        for claim in CLAIMS
    ]
    head = ["MiB", "A, original project", "A, here", "B, original project", "B, here", "what it is here"]
    return markdown(body, head)


class StackedBar(NamedTuple):
    """A bar of the picture."""

    name: str
    seq: int
    parts: dict[str, float]
    """Bytes per token: `seeds`, as the original project counts; `floor` and `else`, what there is here."""


PARTS: Final = {
    "seeds": (ORANGE, "as the original project counts, without q, k, v and out"),
    "floor": (SKY, "q, k, v and out"),
    "else": (BLUE, "all else"),
}


def bars(rows: Results) -> list[StackedBar]:
    """A and B in the original project, predicted for its card, predicted and measured here."""
    card, here = pair(rows, "card"), pair(rows, "here")
    stacks = [
        StackedBar(f"{row['config']}, original project", SEQ, {"seeds": count / SEQ})
        for row, count in zip(card, TOGETHER, strict=True)
    ]
    ways = ((card, "allocated", "predicted"), (here, "allocated", "predicted"), (here, "cold", "measured"))
    for both, key, how in ways:
        for row in both:
            if row[key] is not None:
                floor = row["floor"] / row["seq"]
                parts = {"floor": floor, "else": row[key] / row["seq"] - floor}
                stacks.append(StackedBar(f"{row['config']}, {place(row)}, {how}", row["seq"], parts))
    return stacks


def draw(figure: Any, rows: Results) -> None:
    """Bars of the bytes per token, two for each way of knowing them."""
    axes = figure.add_subplot()
    shown = bars(rows)
    heights = [number + number // 2 * 0.5 for number in range(len(shown))]
    for height, bar in zip(heights, shown, strict=True):
        end = 0.0
        for part, size in bar.parts.items():
            axes.barh(height, size, left=end, color=PARTS[part][0])
            end += size
        axes.annotate(
            f"{end:,.0f}  ({mib(end * bar.seq)} MiB)",
            (end, height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.axvline(rows[0]["floor"] / rows[0]["seq"], color=MUTED, linewidth=0.8)
    axes.set_yticks(heights, [bar.name for bar in shown])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set(xlabel="memory, bytes a token")
    axes.margins(x=0.3)
    axes.set_xlim(left=0)
    handles = [axes.barh(0, 0, color=color, label=text) for color, text in PARTS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    (a, b), (here, _) = pair(rows, "card"), pair(rows, "here")
    shorter = f", measured at {here['seq']:,}" if here["seq"] != SEQ else ""
    title(
        figure,
        f"B is predicted to take {b['allocated'] / a['allocated']:.2f} times A's memory; "
        f"the original project has {TOGETHER[1] / TOGETHER[0]:.1f}",
        f"{SEQ:,} tokens{shorter}; float16, 8 heads x 64",
    )


def findings(rows: Results) -> Findings:
    (a, b), (a_here, b_here) = pair(rows, "card"), pair(rows, "here")
    above = rounded_up(max(row["allocated"] / row["floor"] for row in (a, b)) - 1, 3)
    if a_here["cold"] and b_here["cold"]:
        run = (
            f"measured on the {place(a_here)} at {a_here['seq']:,} tokens it is "
            f"{b_here['cold'] / a_here['cold']:.3f} times"
        )
    else:
        run = f"on the {place(a_here)} they ended so: A {a_here['outcome']}; B {b_here['outcome']}"
    return Findings(
        "Asked: does configuration B, with large segments, two rates and larger blocks, need twice the "
        f"memory of configuration A at {SEQ:,} tokens?",
        f"Found: on a {place(a)} B is predicted to allocate {b['allocated'] / a['allocated']:.3f} times as "
        f"much as A ({mib(b['allocated'])} against {mib(a['allocated'])} MiB), both within {above:.1%} of "
        f"q, k, v and out; {run}.",
        f"The original project has {mib(TOGETHER[1])} against {mib(TOGETHER[0])} MiB, "
        f"{TOGETHER[1] / TOGETHER[0]:.1f} times, because its code copies whole segments; for A it adds up 64 "
        "segments that run one after the other, and for neither does it count the "
        f"{mib(a['floor'])} MiB of q, k, v and out.",
    )


STUDY = Study(
    steps, {"config-impact": components_table, "config-impact-claims": claims_table}, draw, findings
)
