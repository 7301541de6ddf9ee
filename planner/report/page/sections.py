"""Parts that the pages of a recommendation and of tuning have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from attention.config import AttentionConfig
from attention.errors import ConfigError
from attention.sizes.arrays import Floats
from planner.memory.estimate import MemoryEstimate
from planner.quality.profiles import DEFAULT, PRESETS
from planner.report.page.charts import SHADES, bar, matrix, strip
from planner.report.page.html import Heading, Html, Section, join, pairs, table, tag
from planner.report.seen import Seen, cells, seen, strips
from planner.report.text.estimate import label, waterfall
from planner.report.text.layout import figures, percent
from planner.report.text.snippet import snippet
from planner.units import format_bytes
from planner.workload import Workload

CELLS: Final = 64
"""The largest number of rows and of columns of a layout's picture."""
SHADE_NAMES: Final = ("none", "up to 1/3", "up to 2/3", "more", "all")


def tiles(figures: Iterable[tuple[str, str, str]]) -> Html:
    """The main figures, as (name, figure, its meaning) each."""
    parts = [
        tag("div", tag("dt", name), tag("dd", tag("strong", figure), " ", tag("span", meaning)))
        for name, figure, meaning in figures
    ]
    return tag("dl", *parts, class_="tiles")


def launches_column(counts: Sequence[int | None]) -> tuple[list[Heading], list[list[str]]]:
    """The heading of a column of kernels that calls launch, and its cell of each row; none where no count is
    known, as of calls on a CPU."""
    if all(count is None for count in counts):
        return [], [[] for _ in counts]
    return [Heading("launches", "number")], [["-" if count is None else f"{count:,}"] for count in counts]


def budget(memory: MemoryEstimate, whole: int, reserve: int) -> Section:
    """The budget, share by share, each bar beginning where the one before ends."""
    shares = [(label(step.name), step.bytes, "") for step in waterfall(memory)]
    shares.append(("margin", memory.upper - memory.device, "margin"))
    shares.append(("reserved", reserve, "reserved"))
    shares.append(("left", whole - reserve - memory.upper, "left"))
    rows, start, total = [], 0, max(whole, 1)
    for name, count, kind in shares:
        if count > 0:
            drawn = bar(start / total, count / total, kind)
            rows.append((name, drawn, format_bytes(count), f"{count / total:.1%}"))
            start += count
    rows.append(("the budget", bar(0, whole / total, "whole"), format_bytes(whole), "100.0%"))
    columns = [Heading("share"), Heading("", "bar"), Heading("bytes", "number"), Heading("of it", "number")]
    body = [
        table("What the budget is made of at the peak of memory", columns, rows, "bars shares"),
        tag("p", f"The peak is in {memory.at!r}. Upper bound: {memory.confidence}."),
    ]
    return Section("budget", "Where the budget goes", join(body))


def layout(
    config: AttentionConfig, workload: Workload, profile: str, mass: float, layers: int | None
) -> Section:
    """A picture of the attention mask, and its figures."""
    heading = "Attention mask"
    try:
        mask = seen(config, workload, PRESETS.get(profile, PRESETS[DEFAULT]))
    except ConfigError as error:
        return Section("layout", heading, tag("p", f"No picture: {error}."))
    # Mass and reach are the answer's, under its own profile.
    mask = mask._replace(mass=None if mask.chosen else mass, profile=profile, layers=mask.layers or layers)
    rows: list[tuple[str, str]] = figures(mask)
    if mask.chosen:
        return Section("layout", heading, pairs(rows))
    shares = cells(mask, CELLS, CELLS)
    whose = "that head 0 keeps" if mask.by_head else "kept"
    what = f"A square with a mark for each pair of {mask.unit}s {whose}: {percent(mask.share)} of all"
    picture = tag(
        "figure",
        tag(
            "div",
            tag("span", "keys", class_="keys"),
            tag("span", "queries", class_="queries"),
            matrix(what, shares),
            class_="square",
        ),
        tag("figcaption", _scale(mask, len(shares)), _shades(shares)),
    )
    return Section(
        "layout", heading, tag("div", picture, tag("div", pairs(rows), _heads(mask)), class_="beside")
    )


def _scale(mask: Seen, across: int) -> str:
    seq = mask.workload.seq
    each = f"{round(seq / across):,}" if across < mask.units else f"{mask.size:,}"
    whose = " For head 0." if mask.by_head else ""
    way = f"{seq:,} tokens each way"
    if mask.first:
        way = f"{mask.workload.query_tokens:,} queries by {seq:,} keys"
    return f"{way}, {each} a mark; the first is at the top left.{whose}"


def _shades(shares: Floats) -> Html | None:
    """The meaning of the shades; None if no cell is kept in part."""
    if not ((shares > 0) & (shares < 1)).any():
        return None
    marks = [
        tag(
            "li",
            tag(
                "svg",
                tag("path", d="M0 0h1v1h-1z", class_=f"shade-{level}"),
                viewBox="0 0 1 1",
                class_="mark",
                aria_hidden="true",
            ),
            " " + SHADE_NAMES[level],
        )
        for level in range(SHADES)
    ]
    return join([" Share of a mark's pairs that is kept:", tag("ul", *marks, class_="key")])


def _heads(mask: Seen) -> Html | None:
    """The positions that heads attend to; None if the attention is not dilated."""
    rows = [
        (
            f"{one.length:,} / {one.rate}",
            ", ".join(map(str, one.heads[:3])) + ", ..." * (len(one.heads) > 3),
            strip(one.positions),
        )
        for one in strips(mask)
    ]
    if not rows:
        return None
    first = max(len(one.positions) for one in strips(mask))
    columns = [Heading("segment / rate"), Heading("heads"), Heading("", "bar")]
    return table(
        f"Positions that heads attend to, of the first {first} of a segment", columns, rows, "bars strips"
    )


def program(config: AttentionConfig, workload: Workload) -> Section:
    """The program that builds the config, with a button to copy it."""
    code = tag("pre", tag("code", snippet(config, workload), id="code"), tabindex="0", aria_label="Program")
    button = tag("button", "Copy", type="button", class_="copy", hidden=True)
    status = tag("span", role="status", class_="copied")
    return Section("program", "Run it", join([tag("p", button, status, class_="copying"), code]))


def provenance(
    rows: Iterable[tuple[str, str]], versions: Mapping[str, str | None], seed: int, command: str
) -> Section:
    """The sources of the figures, and the command that repeats them."""
    installed = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    entries = [*rows, ("versions", installed), ("seed", str(seed))]
    repeat = [("repeat with", tag("code", command))] if command else []
    return Section("provenance", "Where this is from", pairs([*entries, *repeat]))
