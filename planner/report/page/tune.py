"""What tuning found, as a page. Imports no torch."""

from __future__ import annotations

import math
from typing import Final

from planner.answers.tuned import Trial, Tuned
from planner.report.page.charts import SHAPES, Axis, Mark, points
from planner.report.page.html import Heading, Section, join, page, pairs, table, tag
from planner.report.page.sections import budget, layout, program, provenance, tiles
from planner.report.text import words
from planner.report.text.recommend import seconds, shape
from planner.report.text.tune import named, outcome
from planner.units import format_bytes

MOST: Final = 300
"""Trials that are shown."""


def tune_page(found: Tuned) -> str:
    """The whole file."""
    best, quality = found.best, found.quality
    ran = sum(trial.good for trial in found.trials)
    taken = f"{format_bytes(best.allocated)}" if best.allocated is not None else format_bytes(best.upper)
    meant = f"at the peak, measured, of {format_bytes(found.budget)}"
    if best.allocated is None:
        meant = f"at most, predicted, of {format_bytes(found.budget)}"
    layers = f"{quality.layers:,} layer{'s' * (quality.layers != 1)}" if quality.layers else "never"
    head = join(
        [
            tag(
                "p", f"The fastest of {ran:,} that ran, within {format_bytes(found.budget)}", class_="kicker"
            ),
            tag("h1", words.attention(found.config)),
            tag("p", f"{words.task(found.workload)}, on {found.on}"),
            tiles(
                [
                    ("time", outcome(best), f"a call, measured; {seconds(best.predicted)} predicted"),
                    ("memory", taken, meant),
                    ("mass", f"{quality.mass:.1%}", f"of dense attention's, profile {quality.profile!r}"),
                    ("reach", layers, "until every token can be heard of"),
                ]
            ),
            tag("p", shape(found.config), class_="shape"),
        ]
    )
    sections = [
        _trials(found),
        budget(found.memory, found.budget, found.reserve),
        layout(found.config, found.workload, quality.profile, quality.mass, quality.layers),
        program(found.config, found.workload),
        _provenance(found),
    ]
    title = f"{words.attention(found.config)}, tuned for {found.workload.seq:,} tokens on {found.on}"
    return page(title, head, sections, "Made by planner report.")


def _trials(found: Tuned) -> Section:
    shown = sorted(found.trials, key=lambda one: (_time(one) or math.inf, one.number))[:MOST]
    ran = [one for one in shown if _time(one) is not None]
    marks = [_mark(one, found) for one in ran]
    failed = sum(not one.good for one in found.trials)
    said = [
        ("the best", f"{outcome(found.best)}, {named(found.best)}"),
        ("models alone", f"{outcome(found.analytic)}, {named(found.analytic)}{_ratio(found)}"),
        ("trials", f"{len(found.trials):,} measured; {failed:,} did not run within the budget"),
    ]
    columns = [
        Heading("trial", "number"),
        Heading("time", "number"),
        Heading("predicted", "number"),
        Heading("memory", "number"),
        Heading("at most", "number"),
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
            words.kind_of(one.config),
            shape(one.config),
            f"{one.kind}: {one.message}" if one.message else one.kind,
        )
        for one in shown
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
        pairs(said),
        *(chart if marks else []),
        tag("details", tag("summary", "All trials as a table"), table(what, columns, rows)),
    ]
    return Section("measured", "Predicted and measured", join(body))


def _time(one: Trial) -> float | None:
    return one.seconds if one.good else None


def _ratio(found: Tuned) -> str:
    if not math.isfinite(found.speedup) or found.speedup <= 0:
        return ""
    return f": the best takes {1 / found.speedup:.1%} of its time"


def _mark(one: Trial, found: Tuned) -> Mark:
    kind = words.kind_of(one.config)
    names = [
        name
        for name, other in (("best", found.best), ("models alone", found.analytic))
        if other.config == one.config
    ]
    said = f"trial {one.number}, {kind}: {outcome(one)} measured, {seconds(one.predicted)} predicted. "
    return Mark(
        one.predicted,
        one.seconds or 0.0,
        0.5,
        kind if kind in SHAPES else "dense",
        said + shape(one.config),
        ", ".join(names),
    )


def _provenance(found: Tuned) -> Section:
    rows = [
        ("device", found.on),
        ("rests on", found.calibration),
        ("study", found.study),
        *(("note", note) for note in found.memory.notes),
        *([("", "tuning was interrupted; the same command goes on")] if found.interrupted else []),
    ]
    return provenance(rows, found.versions, found.seed, found.command)
