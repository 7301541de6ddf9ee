"""A recommendation as a page. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from planner.answers.recommendation import Pick, Recommendation
from planner.answers.verified import Verified
from planner.report.page.charts import SHAPES, Axis, Mark, delta, pair, points
from planner.report.page.html import Heading, Html, Section, join, page, pairs, table, tag
from planner.report.page.sections import budget, layout, program, provenance, tiles
from planner.report.text import words
from planner.report.text.recommend import changed, dimension, reasons, searched, seconds, shape
from planner.units import format_bytes

MOST: Final = 100
"""Rows that a table shows."""
_AIM: Final = {"speed": "The fastest attention", "seq": "The longest sequence", "quality": "The most mass"}


def recommend_page(found: Recommendation, verified: Sequence[Verified]) -> str:
    """The whole file."""
    where = f"{words.task(found.workload)}, on {found.on}"
    head = join(
        [
            tag("p", f"{_AIM[found.objective]} within {format_bytes(found.budget)}", class_="kicker"),
            tag("h1", words.attention(found.config)),
            tag("p", where),
            _tiles(found, verified),
            tag("p", shape(found.config), class_="shape"),
        ]
    )
    quality = found.quality
    sections = [
        _picks(found),
        budget(found.memory, found.budget, found.reserve),
        _why(found),
        _pareto(found),
        layout(found.config, found.workload, quality.profile, quality.mass, quality.layers),
        *([_measured(verified)] if verified else []),
        program(found.config, found.workload),
        _provenance(found),
    ]
    title = (
        f"{words.attention(found.config)} for {found.workload.seq:,} tokens in {format_bytes(found.budget)}"
    )
    return page(title, head, sections, "Made by planner report.")


def _tiles(found: Recommendation, verified: Sequence[Verified]) -> Html:
    quality = found.quality
    ran = next((one for one in verified if one.role == "answer" and one.seconds is not None), None)
    time = "a call, predicted"
    if ran is not None and ran.seconds is not None:
        time += f"; {seconds(ran.seconds)} measured"
    layers = f"{quality.layers:,} layer{'s' * (quality.layers != 1)}" if quality.layers else "never"
    length = ("length", f"{found.workload.seq:,}", "tokens, the most that fit")
    return tiles(
        [
            *([length] if found.objective == "seq" else []),
            ("memory", format_bytes(found.memory.upper), f"at most, of {format_bytes(found.budget)}"),
            ("time", seconds(found.seconds), time),
            ("mass", f"{quality.mass:.1%}", f"of dense attention's, profile {quality.profile!r}"),
            ("reach", layers, "until every token can be heard of"),
        ]
    )


def _picks(found: Recommendation) -> Section:
    columns = [
        Heading("pick", "word"),
        Heading("attention", "word"),
        Heading("config"),
        Heading("tokens", "number"),
        Heading("memory", "number"),
        Heading("time", "number"),
        Heading("mass", "number"),
        Heading("layers", "number"),
    ]
    rows = [(one.role, *_figures(one)) for one in found.alternatives]
    return Section("picks", "Three to choose from", table("Picks of what nothing surpasses", columns, rows))


def _figures(one: Pick) -> tuple[str, ...]:
    return (
        words.kind_of(one.config),
        shape(one.config),
        f"{one.seq:,}",
        format_bytes(one.upper),
        seconds(one.seconds),
        f"{one.mass:.1%}",
        str(one.layers) if one.layers else "never",
    )


def _why(found: Recommendation) -> Section:
    said = pairs(reasons(found.why, found.objective))
    steps = found.why.steps[:MOST]
    if not steps:
        return Section("why", "Why this one", said)
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
    times = [step.seconds / found.seconds - 1 if found.seconds > 0 else 0.0 for step in steps]
    memory = [float(step.upper - found.memory.upper) for step in steps]
    mass = [step.mass - found.quality.mass for step in steps]
    rows = []
    for at, step in enumerate(steps):
        change = changed(found, step)
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
    return Section("why", "Why this one", join([said, table(what, columns, rows, "bars steps")]))


def _delta(values: Sequence[float], at: int, better: int) -> Html:
    """One of several changes as a bar, the largest of them whole; blue is for the better."""
    most = max(abs(value) for value in values) or 1.0
    return delta(values[at] / most, "better" if values[at] * better > 0 else "worse")


def _pareto(found: Recommendation) -> Section:
    picks = found.pareto[:MOST]
    roles: dict[Pick, str] = {}
    for one in found.alternatives:
        plain = one.model_copy(update={"role": ""})
        roles[plain] = ", ".join(filter(None, (roles.get(plain), one.role)))
    drawn = list(dict.fromkeys([*picks, *roles]))
    if not drawn:
        return Section("pareto", "What else there is", tag("p", "Nothing else was found."))
    most = max(one.upper for one in drawn) or 1
    marks = [_mark(one, roles.get(one, ""), most) for one in drawn]
    columns = [
        Heading("attention", "word"),
        Heading("config"),
        Heading("tokens", "number"),
        Heading("memory", "number"),
        Heading("time", "number"),
        Heading("mass", "number"),
        Heading("layers", "number"),
        Heading("pick"),
    ]
    rows = [(*_figures(one), roles.get(one, "")) for one in drawn]
    what = "What nothing surpasses in memory, time and mass together"
    body = [
        tag(
            "p",
            "Each mark is a config that nothing surpasses in memory, time and mass together; its area "
            "is the memory that it takes. Up and to the left is better.",
        ),
        points(
            what,
            marks,
            Axis("time of a call, predicted", seconds, log=True),
            Axis(f"mass of dense attention, profile {found.quality.profile!r}", _share),
        ),
        tag("details", tag("summary", "The same as a table"), table(what, columns, rows)),
    ]
    return Section("pareto", "What else there is", join(body))


def _mark(one: Pick, role: str, most: int) -> Mark:
    kind = words.kind_of(one.config)
    said = f"{kind}: {seconds(one.seconds)}, {one.mass:.1%} of the mass, {format_bytes(one.upper)} at most"
    said += f", {one.seq:,} tokens. {shape(one.config)}"
    return Mark(
        one.seconds,
        100 * one.mass,
        one.upper / most,
        kind if kind in SHAPES else "dense",
        f"{role}, {said}" if role else said,
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
    most = max(max(one.upper, one.allocated or 0) for one in results) or 1
    longest = max(max(one.predicted, one.seconds or 0.0) for one in results) or 1.0
    rows = [
        (
            one.role,
            format_bytes(one.allocated) if one.allocated is not None else "-",
            format_bytes(one.upper),
            pair(one.upper / most, one.allocated / most if one.allocated is not None else None),
            seconds(one.seconds) if one.seconds is not None else "-",
            seconds(one.predicted),
            pair(one.predicted / longest, one.seconds / longest if one.seconds is not None else None),
            f"{one.kind}: {one.message}" if one.message else one.kind,
        )
        for one in results[:MOST]
    ]
    what = "Picks as they ran, beside what was predicted: pale the prediction, dark the measurement"
    return Section("measured", "Predicted and measured", table(what, columns, rows, "bars"))


def _provenance(found: Recommendation) -> Section:
    rows = [
        ("device", found.on),
        ("rests on", found.calibration),
        ("searched", searched(found)),
        *(("note", note) for note in found.memory.notes),
    ]
    return provenance(rows, found.versions, found.seed, found.command)
