"""The result of tuning as a page. Imports no torch."""

from __future__ import annotations

import math
from typing import Final

from planner.answers.tuned import Trial, Tuned
from planner.question.dimensions import attention_kind
from planner.report.page.charts import SHAPES, Axis, Mark, points
from planner.report.page.html import Heading, Section, join, page, pairs, table, tag
from planner.report.page.sections import budget, launches_column, layout, program, provenance, tiles
from planner.report.text import words
from planner.report.text.recommend import shape
from planner.report.text.times import seconds
from planner.report.text.tune import named, outcome
from planner.units import format_bytes

MAXIMUM_TRIALS: Final = 300
"""Trials that a page shows."""


def tune_page(tuned: Tuned) -> str:
    """The page of a tuning result as one file of HTML."""
    best, quality = tuned.best, tuned.quality
    ran = sum(trial.good for trial in tuned.trials)
    memory = f"{format_bytes(best.allocated)}" if best.allocated is not None else format_bytes(best.upper)
    memory_note = f"at the peak, measured, of {format_bytes(tuned.budget)}"
    if best.allocated is None:
        memory_note = f"at most, predicted, of {format_bytes(tuned.budget)}"
    layers = f"{quality.layers:,} layer{'s' * (quality.layers != 1)}" if quality.layers else "never"
    head = join(
        [
            tag(
                "p", f"The fastest of {ran:,} that ran, within {format_bytes(tuned.budget)}", class_="kicker"
            ),
            tag("h1", words.attention(tuned.config)),
            tag("p", f"{words.task(tuned.workload)}, on {tuned.on}"),
            tiles(
                [
                    ("time", outcome(best), f"a call, measured; {seconds(best.predicted)} predicted"),
                    ("memory", memory, memory_note),
                    ("mass", f"{quality.mass:.1%}", f"of dense attention's, profile {quality.profile!r}"),
                    ("reach", layers, "until every token is reached"),
                ]
            ),
            tag("p", shape(tuned.config), class_="shape"),
        ]
    )
    sections = [
        _trials(tuned),
        budget(tuned.memory, tuned.budget, tuned.reserve),
        layout(tuned.config, tuned.workload, quality.profile, quality.mass, quality.layers),
        program(tuned.config, tuned.workload),
        _provenance(tuned),
    ]
    title = f"{words.attention(tuned.config)}, tuned for {tuned.workload.seq:,} tokens on {tuned.on}"
    return page(title, head, sections, "Made by planner report.")


def _trials(tuned: Tuned) -> Section:
    shown = sorted(tuned.trials, key=lambda one: (_time(one) or math.inf, one.number))[:MAXIMUM_TRIALS]
    ran = [one for one in shown if _time(one) is not None]
    marks = [_mark(one, tuned) for one in ran]
    failed = sum(not one.good for one in tuned.trials)
    summary = [
        ("the best", f"{outcome(tuned.best)}, {named(tuned.best)}"),
        ("models alone", f"{outcome(tuned.analytic)}, {named(tuned.analytic)}{_ratio(tuned)}"),
        ("trials", f"{len(tuned.trials):,} measured; {failed:,} did not run within the budget"),
    ]
    heading, cells = launches_column([one.launches for one in shown])
    columns = [
        Heading("trial", "number"),
        Heading("time", "number"),
        Heading("predicted", "number"),
        Heading("memory", "number"),
        Heading("at most", "number"),
        *heading,
        Heading("attention", "word"),
        Heading("config"),
        Heading("outcome"),
    ]
    rows = [
        (
            one.number,
            seconds(one.seconds) if one.seconds is not None else "-",
            seconds(one.predicted),
            format_bytes(one.allocated) if one.allocated is not None else "-",
            format_bytes(one.upper),
            *cell,
            attention_kind(one.config),
            shape(one.config),
            f"{one.kind}: {one.message}" if one.message else one.kind,
        )
        for one, cell in zip(shown, cells, strict=True)
    ]
    what = "All that was measured, fastest first"
    chart = [
        tag(
            "p",
            "Each mark is a config that ran within the budget; on the line time was as predicted, "
            "above it the call took longer.",
        ),
        points(
            "Time predicted and time measured",
            marks,
            Axis("time predicted", seconds, log=True),
            Axis("time measured", seconds, log=True),
            diagonal=True,
        ),
    ]
    body = [
        pairs(summary),
        *(chart if marks else []),
        tag("details", tag("summary", "All trials as a table"), table(what, columns, rows)),
    ]
    return Section("measured", "Predicted and measured", join(body))


def _time(one: Trial) -> float | None:
    return one.seconds if one.good else None


def _ratio(tuned: Tuned) -> str:
    if not math.isfinite(tuned.speedup) or tuned.speedup <= 0:
        return ""
    return f": the best takes {1 / tuned.speedup:.1%} of its time"


def _mark(one: Trial, tuned: Tuned) -> Mark:
    kind = attention_kind(one.config)
    names = [
        name
        for name, other in (("best", tuned.best), ("models alone", tuned.analytic))
        if other.config == one.config
    ]
    description = f"trial {one.number}, {kind}: {outcome(one)} measured, {seconds(one.predicted)} predicted. "
    return Mark(
        one.predicted,
        one.seconds or 0.0,
        0.5,
        kind if kind in SHAPES else "dense",
        description + shape(one.config),
        ", ".join(names),
    )


def _provenance(tuned: Tuned) -> Section:
    rows = [
        ("device", tuned.on),
        ("calibration", tuned.calibration),
        ("study", tuned.study),
        *(("note", note) for note in tuned.memory.notes),
        *([("", "tuning was interrupted; the same command continues it")] if tuned.interrupted else []),
    ]
    return provenance(rows, tuned.versions, tuned.seed, tuned.command)
