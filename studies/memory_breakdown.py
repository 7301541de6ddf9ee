"""What do ring-style buffers cost, and what do four optimisations give back? `planner study memory-breakdown`

The original project describes two implementations by what they hold: a base, and a ring-style one with a
pool, caches, communication buffers and outputs made beforehand. Each line of that is a formula here, and this
project's plan of the same config stands beside it. What the description gives no size for (checkpointing,
error recovery, monitoring) is left out, and what it leaves open is counted at its minimum.

Letters: B batch, S tokens, H heads, D channels, e bytes a number, n active blocks of b tokens; s a branch's
segment, at most S, and L the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import torch

from attention import AttentionConfig, build
from attention.layout import count_active
from attention.pool import buffers_for
from planner import gpus
from planner.measuring.server import Batch
from planner.memory.cuda_process import blas_workspace
from planner.report.plot.figure import BLUE, ORANGE, SKY, title
from planner.workload import Workload
from studies.bench import memory_rows
from studies.bench.memory_rows import CARD, MIB, mib, place
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study
from studies.config_impact import SEQ, configs

BUFFERS, PATTERNS = 10, 100
"""Entries of the pool, and of the pattern cache."""
INDEX: Final = 8
"""Bytes of an index as torch has them, int64."""
SETTINGS_SEQ, QUICK = 32_768, 4096
NEAR: Final = 0.05
"""The share by which a figure of the original project may be off, as it rounds."""
TIMEOUT: Final = 600.0


class Measures(NamedTuple):
    """The sizes that the formulas use, in bytes unless they are tokens."""

    full: int
    """B S H D e."""
    segments: tuple[int, ...]
    """Tokens s of a segment of each branch."""
    pattern: int
    """2 x 8 n: a row and a column of each active block."""
    block: int
    workload: Workload

    @property
    def rows(self) -> int:
        """B S H."""
        return self.full // (self.workload.head_dim * self.workload.itemsize)

    def over(self, tokens: int) -> int:
        """B x tokens x H D e."""
        return self.full // self.workload.seq * tokens


def sizes_of(config: AttentionConfig, workload: Workload) -> Measures:
    assert config.pattern is not None
    return Measures(
        full=workload.floor // 4,
        segments=tuple(min(length, workload.seq) for length in config.segment_lengths),
        pattern=2 * INDEX * count_active(config, workload.seq, workload.causal),
        block=config.pattern.block_size,
        workload=workload,
    )


Formula = tuple[str, Callable[[Measures], int]]


class Component(NamedTuple):
    """A component of the description."""

    what: str
    here: tuple[str, ...]
    """The components of this project's plan that stand for it."""
    base: Formula | None
    """The formula of its bytes in the base; None if the base has none."""
    ring: Formula | None
    """The formula of its bytes ring-style; None for none."""
    optimisation: str = ""
    """The optimisation of the four that gives it back."""


def cublas(_: object = None) -> int:
    """Bytes of cuBLAS's workspace on the card."""
    return int(blas_workspace(gpus.find(CARD).capability).bytes)


_QKV: Formula = ("3 B S H D e", lambda x: 3 * x.full)
_OUT: Formula = ("B S H D e", lambda x: x.full)
_CUBLAS: Formula = ("4,096 KiB x 2 + 16 KiB x 8", cublas)
OPTIMISATIONS: Final = {
    "conditional features": "one device has nobody to send to and passes no ring",
    "dynamic pool sizing": "a pool keeps what a call gives back, and no more",
    "lazy caching": "lists lie in host memory, 2 bytes a block; what is used once is not kept",
    "configuration-aware allocation": "one tile, whatever the segments and the branches",
}
CONDITIONAL, POOL, LAZY, AWARE = OPTIMISATIONS
PARTS: Final = (
    Component("q, k and v", ("qkv",), _QKV, _QKV),
    Component("out", ("output",), _OUT, _OUT),
    Component("cuBLAS workspace", (), _CUBLAS, _CUBLAS),
    Component("communication buffers", ("comm_buffers",), None,
         ("2 B S H D e: a neighbour's k and v", lambda x: 2 * x.full), CONDITIONAL),
    Component("ring's state", ("ring",), None,
         ("2 x 4 B S H: maximum and sum of each row", lambda x: 8 * x.rows), CONDITIONAL),
    Component("memory pool", ("memory_pool",), None,
         ("10 B L H D e", lambda x: BUFFERS * x.over(max(x.segments))), POOL),
    Component("block lists", ("sparse_indices",), ("2 x 8 n", lambda x: x.pattern),
         ("2 x 8 n a branch", lambda x: x.pattern * len(x.segments)), LAZY),
    Component("pattern cache", ("pattern_cache",), None,
         ("100 x 2 x 8 n, and as much in host memory", lambda x: PATTERNS * x.pattern), LAZY),
    Component("dilated-index cache", (), None, ("8 s a branch", lambda x: INDEX * sum(x.segments)), LAZY),
    Component("causal-mask cache", ("masks",), None, ("b b a branch", lambda x: x.block**2 * len(x.segments)),
         LAZY),
    Component("temporary outputs", ("workspace", "temp_buffers", "rounding"),
         ("B L H D e", lambda x: x.over(max(x.segments))),
         ("B ceil(S / s) s H D e a branch",
          lambda x: sum(x.over(-(-x.workload.seq // s) * s) for s in x.segments)), AWARE),
)  # a table of parts, a row each  # fmt: skip

CLAIMS: Final[dict[str, tuple[int, int, tuple[str, ...]]]] = {
    "q, k and v": (48, 24, ("q, k and v",)),
    "sparse indices": (13, 20, ("block lists",)),
    "pattern cache, both copies": (0, 50, ("pattern cache", "pattern cache")),
    "memory pool": (0, 128, ("memory pool",)),
    "temporary buffers": (32, 64, ("temporary outputs",)),
    "out": (16, 32, ("out",)),
    "caches of indices, masks, communication": (
        0,
        40,
        ("dilated-index cache", "causal-mask cache", "communication buffers"),
    ),
    "ring structures": (0, 20, ("ring's state",)),
    "overhead": (19, 30, ("cuBLAS workspace",)),
}
"""The original project's breakdown by line: its MB of the base with A at 131,072 tokens, of the ring with B
at 65,536, and the parts that the line covers."""
RING_SEQ: Final = 65_536

SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "as it is": {},
    "pool='off'": {"pool": "off"},
    "cache_entries=0": {"cache_entries": 0},
    "cache_bytes=64 KiB": {"cache_bytes": 1 << 16},
}


def plan_row(name: str, seq: int) -> Row:
    """The bytes of a config by part: as base, ring-style, and planned here for the original project's
    card."""
    config, workload = configs()[name], Workload(seq=seq)
    sizes = sizes_of(config, workload)
    predicted = memory_rows.predicted(config, workload)
    components = predicted["components"]
    here = {part.what: sum(components.get(name, 0) for name in part.here) for part in PARTS}
    here["cuBLAS workspace"] = cublas()
    here["temporary outputs"] -= cublas()
    return {
        "part": "plan",
        "config": name,
        "seq": seq,
        "on": predicted["on"],
        "base": {part.what: part.base[1](sizes) if part.base else 0 for part in PARTS},
        "ring": {part.what: part.ring[1](sizes) if part.ring else 0 for part in PARTS},
        "here": here,
        "allocated": predicted["allocated"],
    }


def setting_row(name: str, setting: str, seq: int, batch: Batch, device: torch.device) -> Row:
    """What a setting of this project changes where the study runs: peaks of a first and a second causal call,
    and what is kept between calls."""
    config = AttentionConfig(**configs()[name].model_dump() | SETTINGS[setting])
    workload = Workload(seq=seq, causal=True)
    head = {"part": "setting", "config": name, "setting": setting, "seq": seq}
    measured = memory_rows.measured(config, workload, batch)
    # What did not run in a process of its own would end this one.
    return head | measured | {"kept": kept(config, workload, device) if measured["cold"] else None}


def kept(config: AttentionConfig, workload: Workload, device: torch.device) -> Row:
    """Bytes that pool and caches hold after two equal calls; those of layouts are in host memory."""
    module, buffers = build(config, device), buffers_for(config)
    shape = (3, workload.batch, workload.seq, workload.heads, workload.head_dim)
    q, k, v = torch.randn(shape, dtype=getattr(torch, workload.dtype), device=device)
    buffers.release()
    with torch.no_grad():
        for _ in range(2):
            module(q, k, v, is_causal=workload.causal)
    stats = buffers.stats
    buffers.release()
    return {"pool": stats.pool.held_bytes, "layouts": stats.layouts.bytes, "masks": stats.masks.bytes}


def steps(scope: Scope) -> list[Job]:
    batch = scope.batch(timeout=TIMEOUT)
    plans = [("A", SEQ), ("B", SEQ), ("B", RING_SEQ)]
    seq, names, settings = SETTINGS_SEQ, ["A", "B"], list(SETTINGS)
    if scope.quick:
        seq, names, settings = QUICK, ["B"], settings[:2]
    return [
        *((f"{name} {tokens}", partial(plan_row, name, tokens)) for name, tokens in plans),
        *(
            (f"{name} {setting}", partial(setting_row, name, setting, seq, batch, scope.device))
            for name in names
            for setting in settings
        ),
    ]


def plan(rows: Results, name: str, seq: int = SEQ) -> Row:
    """The plans of a config."""
    return next(row for row in rows if row["part"] == "plan" and (row["config"], row["seq"]) == (name, seq))


class Saving(NamedTuple):
    """A step of the waterfall."""

    optimisation: str
    bytes: int
    """The bytes that it gives back."""
    left: int
    """The bytes that are allocated after it."""


def savings(row: Row) -> list[Saving]:
    """The savings from ring-style down to this project's bytes, in the order of the original project."""
    left, waterfall = sum(row["ring"].values()), []
    for name in OPTIMISATIONS:
        parts = [part.what for part in PARTS if part.optimisation == name]
        saved = sum(row["ring"][part] - row["here"][part] for part in parts)
        left -= saved
        waterfall.append(Saving(name, saved, left))
    return waterfall


STYLES: Final = ("base", "ring", "here")


def parts_table(rows: Results) -> str:
    """Markdown: the formulas and their bytes, part by part, at 131,072 tokens."""
    both = [plan(rows, name) for name in configs()]

    def line(part: Component) -> list[str]:
        formulas = [formula[0] if formula else "" for formula in (part.base, part.ring)]
        return [part.what, *formulas, *(mib(row[style][part.what]) for row in both for style in STYLES)]

    total = ["**together**", "", "", *(mib(sum(row[style].values())) for row in both for style in STYLES)]
    names = [f"{row['config']}, {style}" for row in both for style in ("base", "ring-style", "here")]
    return markdown([*map(line, PARTS), total], ["MiB", "base", "ring-style", *names])


def savings_table(rows: Results) -> str:
    """The four optimisations, one after the other."""
    a, b = (plan(rows, name) for name in configs())
    begin = ["ring-style", "", "", mib(sum(a["ring"].values())), "", mib(sum(b["ring"].values()))]
    body = []
    for one, two in zip(savings(a), savings(b), strict=True):
        name = one.optimisation
        parts = ", ".join(part.what for part in PARTS if part.optimisation == name)
        cells = [mib(one.bytes), mib(one.left), mib(two.bytes), mib(two.left)]
        body.append([name, f"{parts}: {OPTIMISATIONS[name]}", *cells])
    head = ["MiB", "gives back", "A, given back", "A, left", "B, given back", "B, left"]
    return markdown([begin, *body], head)


def claims_table(rows: Results) -> str:
    """The original project's breakdown beside what the formulas give for the same configs and lengths."""
    base, ring = plan(rows, "A")["base"], plan(rows, "B", RING_SEQ)["ring"]

    def line(what: str, claimed: tuple[int, int], parts: tuple[str, ...]) -> list[str]:
        sums = [sum(made[part] for part in parts) for made in (base, ring)]
        return [what, f"{claimed[0]:,}", mib(sums[0]), f"{claimed[1]:,}", mib(sums[1])]

    body = [line(what, (a, b), parts) for what, (a, b, parts) in CLAIMS.items()]
    every = tuple(part for *_, parts in CLAIMS.values() for part in parts)
    body.append(line("**together**", claimed(), every))
    head = [
        "MiB",
        f"base, A, {SEQ:,}: original project",
        "by formula",
        f"ring, B, {RING_SEQ:,}: original project",
        "by formula",
    ]
    return markdown(body, head)


def claimed() -> tuple[int, int]:
    """The original project's totals for base and ring, in its MB."""
    return sum(a for a, *_ in CLAIMS.values()), sum(b for _, b, _ in CLAIMS.values())


def settings_table(rows: Results) -> str:
    """This project's own settings, measured."""
    mine = [row for row in rows if row["part"] == "setting"]
    return markdown(
        (
            [
                row["config"],
                row["setting"],
                mib(row["allocated"]),
                *(mib(row[call]) if row[call] else "did not run" for call in ("cold", "warm")),
                *(
                    f"{row['kept'][what] / 1024:,.1f}" if row["kept"] else ""
                    for what in ("pool", "layouts", "masks")
                ),
            ]
            for row in mine
        ),
        [
            "config",
            f"setting; {mine[0]['seq']:,} tokens, causal, {place(mine[0])}",
            "predicted MiB",
            "first call MiB",
            "second MiB",
            "kept in the pool KiB",
            "in layouts KiB",
            "in masks KiB",
        ],
    )


def draw(figure: Any, rows: Results) -> None:
    """The waterfalls of A and of B, from ring-style to what is allocated here."""
    figure.set_size_inches(9.5, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name in ((left, "A"), (right, "B")):
        _waterfall(axes, plan(rows, name))
    left.invert_yaxis()
    a, b = (plan(rows, name) for name in configs())
    biggest = [max(savings(row), key=lambda saving: saving.bytes).optimisation for row in (a, b)]
    title(
        figure,
        f"Ring-style buffers: the largest part comes back by {biggest[0]} (A), {biggest[1]} (B)",
        f"{SEQ:,} tokens, float16, 8 heads x 64, on a {place(a)}",
    )


def _waterfall(axes: Any, row: Row) -> None:
    floor = row["here"]["q, k and v"] + row["here"]["out"]
    base, ring = (sum(row[style].values()) for style in ("base", "ring"))
    bars = [("base, by formula", 0, base), ("ring-style, by formula", 0, ring)]
    bars += [(saving.optimisation, saving.left, saving.bytes) for saving in savings(row)]
    bars.append(("this project, predicted", 0, row["allocated"]))
    for height, (name, start, count) in enumerate(bars):
        whole = name not in OPTIMISATIONS
        axes.barh(height, count / MIB, left=start / MIB, color=BLUE if whole else ORANGE)
        if whole:
            axes.barh(height, floor / MIB, color=SKY)
        end = (start + count) / MIB
        axes.annotate(
            f"{'' if whole else '-'}{mib(count)}",
            (end, height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.set(title=f"configuration {row['config']}", xlabel="allocated, MiB; light: q, k, v and out")
    axes.grid(axis="x")


def findings(rows: Results) -> Findings:
    clauses = []
    for row in (plan(rows, name) for name in configs()):
        base, ring = (sum(row[style].values()) for style in ("base", "ring"))
        biggest = max(savings(row), key=lambda saving: saving.bytes)
        clauses.append(
            f"with {row['config']} a base takes {mib(base)} MiB, ring-style buffers {mib(ring)}, and "
            f"{mib(row['allocated'])} are left after all four, of which {biggest.optimisation} gives back "
            f"{mib(biggest.bytes)}"
        )
    return Findings(
        "Asked: what do a ring-style implementation's buffers take, and what does each of the four proposed "
        f"optimisations give back, at {SEQ:,} tokens?",
        f"Found: {clauses[0]}; {clauses[1]}. {_held_text(rows)}.",
        f"The original project has {claimed()[0]} MB for the base at {SEQ:,} tokens and {claimed()[1]} for "
        f"the ring at half of that, which {_follows(plan(rows, 'B', RING_SEQ)['ring'])}.",
    )


def _held_text(rows: Results) -> str:
    """The bytes held between calls in the first setting with B that ran, or else with A, in words."""
    ran = [row for row in rows if row["part"] == "setting" and row["kept"]]
    run = min(ran, key=lambda row: row["config"] != "B")
    held = sum(run["kept"].values())
    return (
        f"Between two calls of {run['seq']:,} tokens with {run['config']} this project's pool and caches "
        f"hold {mib(held)} MiB, measured"
    )


def _follows(ring: Row) -> str:
    """Whether two lines of the original project's breakdown follow from its description, by formula."""
    lines = (("q, k and v are", "q, k and v", " MiB there"), ("ten buffers of a segment", "memory pool", ""))
    clauses, off = [], False
    for what, line, unit in lines:
        claim = CLAIMS[line][1]
        apart = abs(ring[line] / MIB - claim) > NEAR * claim
        clauses.append(f"{what} {mib(ring[line])}{unit}{f', not {claim}' if apart else ''}")
        off |= apart
    return f"{'do not follow' if off else 'follow'} from its own description: {', and '.join(clauses)}"


STUDY = Study(
    steps,
    {
        "memory-breakdown": parts_table,
        "memory-breakdown-steps": savings_table,
        "memory-breakdown-claims": claims_table,
        "memory-breakdown-settings": settings_table,
    },
    draw,
    findings,
)
