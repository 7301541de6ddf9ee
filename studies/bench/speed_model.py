"""How far are predictions of seconds from measurements? The half of `planner study accuracy` about time.

Rates are fitted to timed runs of this machine, then held against runs of other draws: single configs of all
kinds, and scenarios, a workload each with many candidates, of which the fastest in truth should be among the
five that are predicted to be fastest. Every run is timed in a process of its own. Run it on a machine that
does nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby, islice
from statistics import median
from typing import Any

import numpy as np

from attention.config import AttentionConfig
from planner.fitting.calibrate import REPETITIONS
from planner.fitting.samples import BACKWARD_WORK, Sample, work_of
from planner.fitting.speed import RUNS, fit, machine_of, rank_correlation, speed_runs, steady
from planner.fitting.speed_runs import (
    DTYPES,
    KINDS,
    LONGER,
    SLOW,
    WORK,
    config_of,
    timing_samples,
    workload_of,
)
from planner.measuring.measure import Environment, Measurement
from planner.measuring.server import Batch
from planner.question.dimensions import attention_kind
from planner.speed.seconds import seconds_of
from planner.workload import Workload
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Scope

SEED = 2003
"""The random seed, another than a calibration's."""
CASES, SCENARIOS, CANDIDATES = 150, 30, 16
TOP = 5
TIMEOUT = 120.0
DRAWS = 200
"""Configs that are drawn for a scenario before it goes with fewer candidates."""


def timed_row(part: str, kind: str, sample: Sample, batch: Batch) -> Row:
    """One sample and its seconds."""
    config, workload = sample
    measurement = batch.measure(config, workload)
    return {
        "about": "seconds",
        "part": part,
        "kind": kind,
        "config": config.model_dump(mode="json", exclude_defaults=True),
        "workload": workload.model_dump(mode="json", exclude_defaults=True),
        "mode": workload.mode,
        "dtype": workload.dtype,
        "outcome": measurement.kind,
        "seconds": measurement.seconds,
        "spread": measurement.spread,
        "reference": measurement.reference,
        "threads": measurement.environment.threads,
        "capability": measurement.environment.capability,
    }


def scenario(number: int) -> list[Sample]:
    """Random candidates of one workload, with no more work than WORK allows, so that all can be timed."""
    rng = random.Random(f"scenario {SEED} {number}")
    mode: Any = ("inference", "training")[number // len(DTYPES) % 2]
    dtype = DTYPES[number % len(DTYPES)]
    workload = workload_of(rng, dtype, mode, seq=rng.choice((1024, 2000, 2048, 4096, 4096, 8192)))
    maximum = WORK["cpu"][1] / 2 * SLOW[dtype] * (BACKWARD_WORK if mode == "training" else 1)
    configs: dict[AttentionConfig, None] = {}
    for _ in range(DRAWS):
        config = config_of(rng, rng.choice(KINDS[:5]), workload)
        if work_of(config, workload) <= maximum:
            configs[config] = None
        if len(configs) == CANDIDATES:
            break
    return [Sample(config, workload) for config in configs]


def steps(scope: Scope) -> list[Job]:
    """Runs to fit to, held-out runs, and the scenarios' candidates."""
    fitted, cases, scenarios = (42, 21, 1) if scope.quick else (RUNS * 3 // 4, CASES, SCENARIOS)
    repetitions, longer = (3, 1) if scope.quick else (REPETITIONS, LONGER)
    batch = scope.batch(timeout=TIMEOUT, memory=False, runs=repetitions, reference=True)
    jobs: list[Job] = []

    def add(part: str, samples: Iterable[Sample]) -> None:
        for n, sample in enumerate(samples):
            kind = _kind(sample.config)
            jobs.append((f"time, {part} {n} {kind}", partial(timed_row, part, kind, sample, batch)))

    add("fit", speed_runs("cpu", SEED, fitted))
    add("held out", islice(timing_samples("cpu", SEED + 1, longer=longer), cases))
    for number in range(scenarios):
        add(f"scenario {number}", scenario(number))
    return jobs


def _kind(config: AttentionConfig) -> str:
    return "multihead" if config.multihead is not None else attention_kind(config)


def _measurement(row: Row) -> Measurement:
    # Rows without the field are older, of a CPU without a matrix unit.
    capability = row.get("capability", "")
    place = Environment(
        threads=row["threads"], capability=capability, python="", system="", settings={}, date=""
    )
    return Measurement(
        config=AttentionConfig.from_json(json.dumps(row["config"])),
        workload=Workload.from_json(json.dumps(row["workload"])),
        device="cpu",
        kind="ok",
        seconds=row["seconds"],
        spread=row["spread"],
        reference=row["reference"],
        runs=REPETITIONS,
        environment=place,
    )


def predicted(rows: list[Row]) -> list[tuple[Row, float]]:
    """(row, predicted seconds) of all rows but those fitted to; their seconds are steadied by the reference.
    Empty if no row ran that could be fitted to."""
    ran = [row for row in rows if row["about"] == "seconds" and row["outcome"] == "ok"]
    runs = steady([_measurement(row) for row in ran])
    good = [({**row, "seconds": m.seconds}, m) for row, m in zip(ran, runs, strict=True)]
    fitted = [m for row, m in good if row["part"] == "fit"]
    if not fitted:
        return []
    rates = fit(fitted)
    return [
        (row, seconds_of(m.config, m.workload, machine_of(m), rates))
        for row, m in good
        if row["part"] != "fit"
    ]


def errors_table(rows: list[Row]) -> str:
    """Markdown: the errors of held-out runs by kind, by dtype and mode, and together."""
    held = [(row, guess) for row, guess in predicted(rows) if row["part"] == "held out"]
    body = []
    keys: tuple[Callable[[Row], str], ...] = (
        lambda row: str(row["kind"]),
        lambda row: f"{row['dtype']}, {row['mode']}",
        lambda _: "all",
    )
    for key in keys:
        ordered = sorted(held, key=lambda pair: key(pair[0]))
        body += [
            [name, *_errors(list(group))] for name, group in groupby(ordered, key=lambda pair: key(pair[0]))
        ]
    return markdown(
        body,
        [
            "held-out runs",
            "runs",
            "median error",
            "90%",
            "worst",
            "median signed",
            "rank correlation",
            "repeats spread",
        ],
    )


def _errors(held: list[tuple[Row, float]]) -> list[str]:
    measured = np.array([row["seconds"] for row, _ in held])
    guessed = np.array([guess for _, guess in held])
    signed = guessed / measured - 1
    size = np.abs(signed)
    return [
        str(len(held)),
        f"{np.median(size):.1%}",
        f"{np.quantile(size, 0.9):.1%}",
        f"{size.max():.1%}",
        f"{np.median(signed):+.1%}",
        f"{rank_correlation(guessed, measured):.3f}",
        f"{median(row['spread'] for row, _ in held):.1%}",
    ]


def choices_table(rows: list[Row]) -> str:
    """Markdown: in how many scenarios the fastest candidate is among the predicted fastest, and what is lost
    by taking the predicted fastest without measuring, and by measuring five."""
    by_scenario: dict[str, list[tuple[float, float]]] = {}
    for row, guess in predicted(rows):
        if row["part"].startswith("scenario"):
            by_scenario.setdefault(row["part"], []).append((guess, row["seconds"]))
    hits, first, five, ranks, counts = 0, [], [], [], []
    for pairs in by_scenario.values():
        ordered = [truth for _, truth in sorted(pairs)]
        best = min(ordered)
        hits += best in ordered[:TOP]
        first.append(ordered[0] / best - 1)
        five.append(min(ordered[:TOP]) / best - 1)
        counts.append(len(pairs))
        guesses, truths = (np.array(x) for x in zip(*pairs, strict=True))
        ranks.append(rank_correlation(guesses, truths))
    if not counts:
        return "No scenario was measured."
    cells = [
        str(len(counts)),
        f"{median(counts):g}",
        f"{hits / len(counts):.0%}",
        f"{median(first):.1%}",
        f"{max(five):.1%}",
        f"{median(ranks):.3f}",
    ]
    return markdown(
        [cells],
        [
            "scenarios",
            "candidates each",
            f"fastest among predicted {TOP}",
            "lost by taking the first, median",
            f"lost by the best of {TOP}, worst",
            "rank correlation within, median",
        ],
    )
