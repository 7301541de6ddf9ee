"""A recommendation as a page. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from planner.answers.recommendation import Pick, Recommendation
from planner.answers.shared import SharedEstimate
from planner.answers.verified import Verified
from planner.question.dimensions import attention_kind
from planner.report.page.charts import SHAPES, Axis, Mark, delta, pair, points
from planner.report.page.html import Heading, Html, Section, join, page, pairs, table, tag
from planner.report.page.sections import budget, launches_column, layout, program, provenance, tiles
from planner.report.text import words
from planner.report.text.estimate import notes
from planner.report.text.recommend import budgeted, changed, dimension, reasons, searched, seconds, shape
from planner.report.text.shared import sharing_rows
from planner.units import format_bytes

MAXIMUM_ROWS: Final = 100
"""Rows that a table shows."""
_AIM: Final = {"speed": "The fastest attention", "seq": "The longest sequence", "quality": "The most mass"}


def recommend_page(answer: Recommendation, verified: Sequence[Verified]) -> str:
    """The page of a recommendation as one file of HTML."""
    each = f"{answer.workload.gpus:,} x " if answer.workload.gpus > 1 else ""
    where = f"{words.task(answer.workload)}, on {each}{answer.on}"
    head = join(
        [
            tag("p", f"{_AIM[answer.objective]} within {format_bytes(answer.budget)}", class_="kicker"),
            tag("h1", words.attention(answer.config)),
            tag("p", where),
            _tiles(answer, verified),
            tag("p", shape(answer.config), class_="shape"),
        ]
    )
    quality = answer.quality
    sections = [
        _picks(answer),
        budget(answer.memory, answer.budget, answer.reserve),
        *_shared(answer),
        _why(answer),
        _pareto(answer),
        layout(answer.config, answer.workload, quality.profile, quality.mass, quality.layers),
        *([_measured(verified)] if verified else []),
        program(answer.config, answer.workload),
        _provenance(answer),
    ]
    task = f"{answer.workload.seq:,} tokens in {format_bytes(answer.budget)}"
    title = f"{words.attention(answer.config)} for {task}"
    return page(title, head, sections, "Made by planner report.")


def _shared(answer: Recommendation) -> list[Section]:
    """How GPUs share the call, where they do."""
    memory = answer.memory
    if not isinstance(memory, SharedEstimate):
        return []
    return [Section("gpus", f"How {answer.workload.gpus:,} GPUs share it", pairs(sharing_rows(memory)))]


def _tiles(answer: Recommendation, verified: Sequence[Verified]) -> Html:
    quality = answer.quality
    ran = next((one for one in verified if one.role == "answer" and one.seconds is not None), None)
    time = "a call, predicted"
    if ran is not None and ran.seconds is not None:
        time += f"; {seconds(ran.seconds)} measured"
    layers = f"{quality.layers:,} layer{'s' * (quality.layers != 1)}" if quality.layers else "never"
    length = ("length", f"{answer.workload.seq:,}", "tokens, the most that fit")
    return tiles(
        [
            *([length] if answer.objective == "seq" else []),
            ("memory", format_bytes(answer.memory.upper), f"at most, of {budgeted(answer)}"),
            ("time", seconds(answer.seconds), time),
            ("mass", f"{quality.mass:.1%}", f"of dense attention's, profile {quality.profile!r}"),
            ("reach", layers, "until every token is reached"),
        ]
    )


def _picks(answer: Recommendation) -> Section:
    heading, cells = launches_column([one.launches for one in answer.alternatives])
    columns = [
        Heading("pick", "word"),
        Heading("attention", "word"),
        Heading("config"),
        Heading("tokens", "number"),
        Heading("memory", "number"),
        Heading("time", "number"),
        Heading("mass", "number"),
        Heading("layers", "number"),
        *heading,
    ]
    rows = [(one.role, *_figures(one), *cell) for one, cell in zip(answer.alternatives, cells, strict=True)]
    return Section("picks", "Three to choose from", table("Picks from the Pareto front", columns, rows))


def _figures(one: Pick) -> tuple[str, ...]:
    return (
        attention_kind(one.config),
        shape(one.config),
        f"{one.seq:,}",
        format_bytes(one.upper),
        seconds(one.seconds),
        f"{one.mass:.1%}",
        str(one.layers) if one.layers else "never",
    )


def _why(answer: Recommendation) -> Section:
    summary = pairs(reasons(answer.why, answer.objective))
    steps = answer.why.steps[:MAXIMUM_ROWS]
    if not steps:
        return Section("why", "Why this one", summary)
    columns = [
        Heading("one step"),
        Heading("time", "number"),
        Heading("", "bar"),
        Heading("memory", "number"),
        Heading("", "bar"),
        Heading("mass", "number"),
        Heading("", "bar"),
        Heading("layers", "number"),
        Heading("fails", "fails"),
    ]
    times = [step.seconds / answer.seconds - 1 if answer.seconds > 0 else 0.0 for step in steps]
    memory = [float(step.upper - answer.memory.upper) for step in steps]
    mass = [step.mass - answer.quality.mass for step in steps]
    rows = []
    for at, step in enumerate(steps):
        change = changed(answer, step)
        rows.append(
            (
                f"{dimension(step)}: {step.before} to {step.after}",
                change.time,
                _delta(times, at, -1),
                change.memory,
                _delta(memory, at, -1),
                f"{change.mass} points",
                _delta(mass, at, 1),
                str(step.layers or "never"),
                ", ".join(step.failed),
            )
        )
    what = "What half and double of each dimension would change, and which constraint it would then fail"
    return Section("why", "Why this one", join([summary, table(what, columns, rows, "bars steps")]))


def _delta(values: Sequence[float], at: int, better: int) -> Html:
    """One of several changes as a bar, the largest of them whole; blue is an improvement."""
    maximum = max(abs(value) for value in values) or 1.0
    return delta(values[at] / maximum, "better" if values[at] * better > 0 else "worse")


def _pareto(answer: Recommendation) -> Section:
    picks = answer.pareto[:MAXIMUM_ROWS]
    roles: dict[Pick, str] = {}
    for one in answer.alternatives:
        plain = one.model_copy(update={"role": ""})
        roles[plain] = ", ".join(filter(None, (roles.get(plain), one.role)))
    drawn = list(dict.fromkeys([*picks, *roles]))
    if not drawn:
        return Section("pareto", "What else there is", tag("p", "Nothing else was found."))
    maximum = max(one.upper for one in drawn) or 1
    marks = [_mark(one, roles.get(one, ""), maximum) for one in drawn]
    heading, cells = launches_column([one.launches for one in drawn])
    columns = [
        Heading("attention", "word"),
        Heading("config"),
        Heading("tokens", "number"),
        Heading("memory", "number"),
        Heading("time", "number"),
        Heading("mass", "number"),
        Heading("layers", "number"),
        *heading,
        Heading("pick"),
    ]
    rows = [(*_figures(one), *cell, roles.get(one, "")) for one, cell in zip(drawn, cells, strict=True)]
    what = "Pareto front of memory, time and mass"
    body = [
        tag(
            "p",
            "Each mark is a config on the Pareto front: no other is at least as good in memory, time and "
            "mass, and better in one. Its area is the memory that it takes. Up and to the left is better.",
        ),
        points(
            what,
            marks,
            Axis("time of a call, predicted", seconds, log=True),
            Axis(f"mass of dense attention, profile {answer.quality.profile!r}", _share),
        ),
        tag("details", tag("summary", "The same as a table"), table(what, columns, rows)),
    ]
    return Section("pareto", "What else there is", join(body))


def _mark(one: Pick, role: str, maximum: int) -> Mark:
    kind = attention_kind(one.config)
    description = (
        f"{kind}: {seconds(one.seconds)}, {one.mass:.1%} of the mass, {format_bytes(one.upper)} at most"
    )
    description += f", {one.seq:,} tokens. {shape(one.config)}"
    return Mark(
        one.seconds,
        100 * one.mass,
        one.upper / maximum,
        kind if kind in SHAPES else "dense",
        f"{role}, {description}" if role else description,
        role,
    )


def _share(value: float) -> str:
    return f"{value:g}%"


def _measured(results: Sequence[Verified]) -> Section:
    columns = [
        Heading("pick"),
        Heading("memory", "number"),
        Heading("at most", "number"),
        Heading("", "bar"),
        Heading("time", "number"),
        Heading("predicted", "number"),
        Heading("", "bar"),
        Heading("outcome"),
    ]
    largest = max(max(one.upper, one.allocated or 0) for one in results) or 1
    longest = max(max(one.predicted, one.seconds or 0.0) for one in results) or 1.0
    rows = [
        (
            one.role,
            format_bytes(one.allocated) if one.allocated is not None else "-",
            format_bytes(one.upper),
            pair(one.upper / largest, one.allocated / largest if one.allocated is not None else None),
            seconds(one.seconds) if one.seconds is not None else "-",
            seconds(one.predicted),
            pair(one.predicted / longest, one.seconds / longest if one.seconds is not None else None),
            f"{one.kind}: {one.message}" if one.message else one.kind,
        )
        for one in results[:MAXIMUM_ROWS]
    ]
    what = "Picks as they ran, beside what was predicted: pale the prediction, dark the measurement"
    return Section("measured", "Predicted and measured", table(what, columns, rows, "bars"))


def _provenance(answer: Recommendation) -> Section:
    rows = [
        ("device", answer.on),
        ("calibration", answer.calibration),
        ("searched", searched(answer)),
        *(("note", note) for note in notes(answer.memory)),
    ]
    return provenance(rows, answer.versions, answer.seed, answer.command)
