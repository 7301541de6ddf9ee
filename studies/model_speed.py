"""How fast are the planner's own models? `planner study model-speed`

100,000 candidates by arrays, one estimate, and cold starts of commands; medians of 5.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, get_args

import numpy as np

from attention.config import AttentionConfig, PatternType, SparsePatternConfig
from attention.sizes.arrays import Ints
from planner import gpus
from planner.configs import Columns
from planner.memory.estimate import estimate
from planner.memory.machines import Cuda
from planner.memory.peaks import peaks
from planner.report.plot.figure import BLUE, RED, named, title
from planner.workload import Mode, Workload
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Findings, Results, Scope, Study

SEQ = 131_072
RUNS = 5
MODES: tuple[Mode, ...] = get_args(Mode)
STARTS: dict[str, float] = {
    "--help": 0.3,
    "estimate --variant block_sparse --pattern local_window --seq 131072 --vram 8GB": 0.5,
    "recommend --vram 8GB --seq 131072": 1.5,
}
"""Commands whose cold start is timed, and the seconds that each is to stay under."""


def candidates(count: int) -> list[Columns]:
    """`count` random candidates at 131,072 tokens: a fifth dilated of two branches, a fifth of four, and a
    fifth of each block-sparse pattern."""
    random = np.random.default_rng(0)
    n = count // 5

    def powers(low: int, high: int) -> Ints:
        values: Ints = 2 ** random.integers(low, high, n)
        return values

    def branches(number: int, first: bool) -> dict[str, Any]:
        rates = np.sort(2 ** random.integers(0, 4, (number, n)), axis=0)
        if first:
            rates[0] = 1
        return {"lengths": tuple(powers(9, 18) for _ in range(number)), "rates": tuple(rates)}

    groups = [
        Columns("dilated", None, seq=SEQ, workspace=powers(20, 27), **branches(number, True))
        for number in (2, 4)
    ]
    for pattern in get_args(PatternType):
        groups.append(
            Columns(
                "block_sparse",
                pattern,
                seq=SEQ,
                workspace=powers(20, 27),
                block_size=powers(4, 9),
                window=random.integers(64, 8192, n),
                global_tokens=random.integers(1, 1024, n),
                sparsity_ratio=10 ** random.uniform(-3, 0, n),
                **branches(3, False),
            )
        )
    return groups


class Seconds(NamedTuple):
    """Seconds by the clock, and seconds of processors, which are fewer where other processes use them too."""

    clock: float
    processor: float


def seconds(run: Callable[[], object], runs: int = RUNS) -> Seconds:
    """Median seconds of `runs` calls, after one that is not timed."""
    times = []
    for _ in range(runs + 1):
        start, used = perf_counter(), _processor()
        run()
        times.append((perf_counter() - start, _processor() - used))
    return Seconds(*map(median, zip(*times[1:], strict=True)))


def _processor() -> float:
    """Seconds that processors spent on this process and those that it started and saw end."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def array_seconds(count: int, mode: Mode, capability: tuple[int, int]) -> Seconds:
    """Seconds of the memory peaks of `count` candidates."""
    groups, workload = candidates(count), Workload(seq=SEQ, mode=mode)
    return seconds(lambda: [peaks(group, workload, Cuda(capability)) for group in groups])


def estimate_seconds(mode: Mode) -> Seconds:
    """Seconds of one estimate."""
    pattern = SparsePatternConfig(pattern_type="local_window")
    config = AttentionConfig(variant="block_sparse", pattern=pattern)
    card = gpus.find("gtx1080")
    return seconds(lambda: estimate(config, Workload(seq=SEQ, mode=mode), card))


def start_seconds(arguments: str) -> Seconds:
    """Seconds of a process from start to end, its compiled modules on disk, as after an installation."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        settings.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-m", "planner", *arguments.split()]
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True, env=settings))


def _row(what: str, bar: float | None, measure: Callable[[], Seconds]) -> Row:
    clock, processor = measure()
    return {"what": what, "seconds": clock, "processor_seconds": processor, "at_most": bar}


def steps(scope: Scope) -> list[Job]:
    """Quick, 1,000 candidates and no cold starts."""
    count = 1000 if scope.quick else 100_000
    cases: list[tuple[str, float | None, Callable[[], Seconds]]] = []
    for card, capability in (("Pascal", (6, 1)), ("Ampere", (8, 0))):
        for mode in MODES:
            what = f"memory of {count:,} candidates, {mode}, {card}"
            cases.append((what, 0.25, partial(array_seconds, count, mode, capability)))
    cases += [(f"one estimate, {mode}", 0.005, partial(estimate_seconds, mode)) for mode in MODES]
    if not scope.quick:
        nothing = [sys.executable, "-c", "pass"]
        cases.append(("python -c pass", None, lambda: seconds(lambda: subprocess.run(nothing, check=True))))
        cases += [
            (f"planner {arguments}", bar, partial(start_seconds, arguments))
            for arguments, bar in STARTS.items()
        ]
    return [(what, partial(_row, what, bar, measure)) for what, bar, measure in cases]


def table(rows: Results) -> str:
    """Markdown: the seconds of each, beside the limit that this project sets itself."""
    return markdown(
        (
            [
                row["what"],
                f"{row['seconds']:.4f}",
                f"{row['processor_seconds']:.4f}",
                "" if row["at_most"] is None else f"{row['at_most']:g}",
            ]
            for row in rows
        ),
        ["what", "seconds", "of processors", "at most"],
    )


def draw(figure: Any, rows: Results) -> None:
    """Bars of seconds, with the bar that each is to stay under."""
    figure.set_size_inches(8, 1.6 + 0.36 * len(rows))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        axes.barh(place, row["seconds"], color=BLUE, height=0.6)
        named(axes, row["seconds"], place, f"{row['seconds']:.3g} s", "white", xytext=(-6, 0), ha="right")
        if row["at_most"] is not None:
            axes.plot([row["at_most"]] * 2, [place - 0.4, place + 0.4], color=RED, linewidth=2)
    axes.set_yticks(range(len(rows)), [row["what"].partition(" --variant")[0] for row in rows])
    axes.set(xscale="log", xlabel="seconds, median; red: at most")
    axes.margins(x=0.3)
    axes.invert_yaxis()
    title(figure, "What an answer costs")


def findings(rows: Results) -> Findings:
    barred = [row for row in rows if row["at_most"] is not None]
    over = [row["what"] for row in barred if row["seconds"] > row["at_most"]]
    arrays = [row["seconds"] for row in rows if "candidates" in row["what"]]
    slowest = f"the slowest array evaluation takes {max(arrays):.3g} s; " if arrays else ""
    bars = f"over their bar: {', '.join(over)}" if over else f"all {len(barred)} bars are kept"
    return Findings(
        "Asked: how long do the planner's models and commands take?",
        f"Found: {slowest}{bars}.",
        "The original project has no planner: each of its figures is a run.",
    )


STUDY = Study(steps, {"model-speed": table}, draw, findings, devices=("cpu",), independent=True)
