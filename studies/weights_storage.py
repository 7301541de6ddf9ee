"""What do attention weights take, dense and as active blocks? `planner study weights-storage`

A call that is asked for its weights, predicted for the original project's card from 1,024 to 131,072 tokens,
and measured where the study runs for the short ones. Dense attention's weights are all blocks: the dense
matrix.

Letters: H heads, S tokens, e bytes a number, n active blocks a head of b x b weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Final

from attention.config import AttentionConfig, SparsePatternConfig
from planner import gpus
from planner.measuring.server import Batch
from planner.report.plot.figure import BLUE, INK, KINDS, MUTED, RED, named, title, token_axis
from planner.workload import Workload
from studies.bench import memory_rows
from studies.bench.memory_rows import CARD, MIB, mib, place
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study

LENGTHS: Final = tuple(1024 << n for n in range(8))
MEASURED, QUICK = (1024, 2048, 4096), (512,)
BLOCK: Final = 128
TIMEOUT: Final = 300.0

SEEDS: Final = {4096: 5.1, 8192: 9.8}
"""MiB of the block form's weights by tokens, in the report on it: 8 heads in float16 (256 MB of dense weights
at 4,096 tokens), blocks of 128, "95% sparsity"."""
SPARSE: Final = "dilated_sparse 5%"
"""The attention that the original project says it measured."""


def configs() -> dict[str, AttentionConfig]:
    """The attentions, by name; segments and rates are those of the original project's example."""

    def sparse(ratio: float) -> AttentionConfig:
        pattern = SparsePatternConfig(sparsity_ratio=ratio, block_size=BLOCK)
        return AttentionConfig(
            variant="block_sparse",
            pattern=pattern,
            segment_lengths=(2048, 4096, 8192),
            dilation_rates=(1, 2, 4),
        )

    window = SparsePatternConfig(pattern_type="local_window", block_size=BLOCK, local_window_size=512)
    return {
        "dense": AttentionConfig(variant="dense"),
        SPARSE: sparse(0.05),
        "dilated_sparse 1%": sparse(0.01),
        "local_window 512": AttentionConfig(variant="block_sparse", pattern=window),
    }


STYLES: Final = dict(
    zip(configs(), (KINDS["dense"], KINDS["dilated_sparse"], (BLUE, "o"), (RED, "D")), strict=True)
)


def stored_row(name: str, seq: int) -> Row:
    """A call with weights on the original project's card, predicted, and the bytes of the weights and their
    indices in it."""
    workload = Workload(seq=seq, weights=True)
    predicted = memory_rows.predicted(configs()[name], workload)
    components = predicted["components"]
    return {
        "part": "stored",
        "attention": name,
        "seq": seq,
        "dense": workload.heads * seq**2 * workload.itemsize,
        "stored": components["weights"] + components["sparse_indices"],
        "rows": -(-seq // BLOCK),
        "block_bytes": workload.heads * BLOCK**2 * workload.itemsize,
        **predicted,
    }


def measured_row(name: str, seq: int, batch: Batch) -> Row:
    """A call with weights where the study runs, predicted and measured."""
    head = {"part": "measured", "attention": name, "seq": seq}
    return head | memory_rows.measured(configs()[name], Workload(seq=seq, weights=True), batch)


def steps(scope: Scope) -> list[Job]:
    batch = scope.batch(timeout=TIMEOUT)
    short = QUICK if scope.quick else MEASURED
    return [
        *((f"{name} {seq}", partial(stored_row, name, seq)) for name in configs() for seq in LENGTHS),
        *(
            (f"{name} {seq} measured", partial(measured_row, name, seq, batch))
            for name in configs()
            for seq in short
        ),
    ]


def of_part(rows: Results, part: str, attention: str) -> Results:
    return [row for row in rows if row["part"] == part and row["attention"] == attention]


def stored_table(rows: Results) -> str:
    """Weights by length: dense, and as active blocks with their share of dense."""
    by_name = {name: of_part(rows, "stored", name) for name in configs()}
    body = []
    for number, dense in enumerate(by_name["dense"]):
        line = [f"{dense['seq']:,}", mib(dense["stored"])]
        for name in list(by_name)[1:]:
            row = by_name[name][number]
            line += [mib(row["stored"]), f"{row['stored'] / row['dense']:.1%}"]
        body.append(line)
    names = [head for name in list(by_name)[1:] for head in (f"{name}, MiB", "of dense")]
    return markdown(body, ["tokens", "dense, MiB", *names])


def measured_table(rows: Results) -> str:
    """Whole calls with weights where the study ran."""
    mine = [row for row in rows if row["part"] == "measured"]
    return markdown(
        (
            [
                row["attention"],
                f"{row['seq']:,}",
                mib(row["allocated"]),
                mib(row["cold"]) if row["cold"] else row["outcome"],
            ]
            for row in mine
        ),
        ["attention", "tokens", f"{place(mine[0])}, predicted MiB", "measured MiB"],
    )


def claims_table(rows: Results) -> str:
    """The original project's sizes, how many blocks a row they are, and the sizes here."""
    body = []
    for seq, size in SEEDS.items():
        row = stored(rows, SPARSE, seq)
        body.append(
            [
                f"{seq:,}",
                mib(row["dense"]),
                f"{size}",
                f"{size * MIB / row['dense']:.1%}",
                f"{blocks_a_row(row, size * MIB):.2f}",
                mib(row["rows"] * row["block_bytes"]),
                mib(row["stored"]),
            ]
        )
    return markdown(
        body,
        [
            "tokens",
            "dense, MiB",
            "original project's blocks, MiB",
            "of dense",
            f"blocks of {BLOCK} a row",
            "one block a row, MiB",
            f"{SPARSE}, here, MiB",
        ],
    )


def stored(rows: Results, attention: str, seq: int) -> Row:
    """The row of a length."""
    return next(row for row in of_part(rows, "stored", attention) if row["seq"] == seq)


def blocks_a_row(row: Row, size: float) -> float:
    """How many blocks each row of blocks would have, if its weights took `size` bytes."""
    return size / float(row["block_bytes"] * row["rows"])


def longest(rows: Results, attention: str) -> int:
    """The longest of the lengths whose call fits the original project's card; 0 for none."""
    budget = gpus.find(CARD).usable_bytes
    return max(
        (row["seq"] for row in of_part(rows, "stored", attention) if row["upper"] <= budget), default=0
    )


def draw(figure: Any, rows: Results) -> None:
    """Left: the weights. Right: whole calls, against the card's memory."""
    figure.set_size_inches(10, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for name, (color, marker) in STYLES.items():
        mine = of_part(rows, "stored", name)
        counts = [row["seq"] for row in mine]
        for axes, what in ((left, "stored"), (right, "allocated")):
            axes.plot(counts, [row[what] / MIB for row in mine], color=color, linewidth=1.6)
        named(left, counts[-1], mine[-1]["stored"] / MIB, name, color)
        ran = [row for row in of_part(rows, "measured", name) if row["cold"]]
        sizes = [row["cold"] / MIB for row in ran]
        right.scatter([row["seq"] for row in ran], sizes, color=color, marker=marker, s=30, zorder=3)
    left.scatter(list(SEEDS), list(SEEDS.values()), color=INK, marker="x", s=40, zorder=3)
    named(left, 8192, SEEDS[8192], "original: 95% sparsity", INK, va="top")
    card = gpus.find(CARD).usable_bytes / MIB
    right.axhline(card, color=MUTED, linestyle="--", linewidth=1)
    right.annotate(
        f"{place(rows[0])}, {card / 1024:.1f} GiB",
        (0.02, card),
        xytext=(0, 4),
        color=MUTED,
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
    )
    left.set(ylabel="memory", title="weights and their indices")
    right.set_title(f"the whole call: lines predicted, {place(rows[0])};\ndots measured, {place(rows[-1])}")
    for axes in (left, right):
        axes.set(yscale="log", xlabel="tokens")
        token_axis(axes.xaxis, sorted({row["seq"] for row in rows}))
        axes.grid(axis="y")
    left.set_yticks([1, 32, 1 << 10, 1 << 15], ["1 MiB", "32 MiB", "1 GiB", "32 GiB"])
    left.minorticks_off()
    seq = LENGTHS[-1]
    row = stored(rows, SPARSE, seq)
    title(
        figure,
        f"Weights as active blocks: {row['stored'] / row['dense']:.1%} of dense at {seq:,} tokens",
        f"{SPARSE}; 8 heads, float16",
    )


def findings(rows: Results) -> Findings:
    seq = LENGTHS[-1]
    sizes = {name: f"{mib(stored(rows, name, seq)['stored'])} MiB for {name}" for name in configs()}
    fits = {name: f"{longest(rows, name):,} for {name}" for name in configs()}
    seeds = [stored(rows, SPARSE, tokens) for tokens in SEEDS]
    counts = [blocks_a_row(row, SEEDS[row["seq"]] * MIB) for row in seeds]
    lacking = "so that not every row has one" if max(counts) < 1 else "which is enough for every row"
    return Findings(
        f"Asked: what do attention weights take, dense and as active blocks, from {LENGTHS[0]:,} to {seq:,} "
        "tokens?",
        f"Found: at {seq:,} tokens {', '.join(sizes.values())}; of these lengths the longest whose call with "
        f"weights fits a {place(rows[0])} is {', '.join(fits.values())}.",
        f"The original project has {_and(SEEDS.values())} MB at {_and(f'{tokens:,}' for tokens in SEEDS)} "
        f"tokens for 95% sparsity, which is {_and(f'{count:.2f}' for count in counts)} blocks of {BLOCK} a "
        f"row, "
        f"{lacking}; here every row keeps its own block and 5% of all blocks are "
        f"{_and(mib(row['stored']) for row in seeds)} MiB.",
    )


def _and(parts: Iterable[object]) -> str:
    return " and ".join(map(str, parts))


STUDY = Study(
    steps,
    {
        "weights-storage": stored_table,
        "weights-storage-measured": measured_table,
        "weights-storage-claims": claims_table,
    },
    draw,
    findings,
)
