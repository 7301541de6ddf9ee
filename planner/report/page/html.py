"""A page as one file: markup that cannot be broken out of, tables, and the page around them.

All markup is made by `tag`, which escapes whatever is not markup itself. The page asks for nothing over a
network, and says so to the browser: its policy allows this style and this script by their hashes, and
nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final, NamedTuple

_STYLE: Final = Path(__file__).with_name("page.css")
_SCRIPT: Final = Path(__file__).with_name("page.js")
_EMPTY: Final = {"meta", "link", "br"}


class Html(str):
    """Markup, not to be escaped again."""

    __slots__ = ()


Inside = str | int | float | None


def tag(name: str, /, *inside: Inside, **attributes: str | int | float | bool | None) -> Html:
    """An element. What is inside is escaped unless it is markup; None is nothing. In names of attributes a
    final underscore is dropped and others are dashes; None and False leave one out, True has no value."""
    written = "".join(
        f" {_named(key)}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{written}>" if name in _EMPTY else f"<{name}{written}>{join(inside)}</{name}>")


def _named(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def join(parts: Iterable[Inside]) -> Html:
    """Markup and text, one after another."""
    return Html(
        "".join(part if isinstance(part, Html) else escape(str(part)) for part in parts if part is not None)
    )


class Heading(NamedTuple):
    """A column of a table."""

    name: str
    kind: str = ""
    """The column's style: `number`, `bar`, `word` (never broken: for short names alone), or none for text."""


def table(caption: str, columns: Sequence[Heading], rows: Iterable[Sequence[Inside]], kind: str = "") -> Html:
    """A table; the first cell of a row is its heading. Roles are explicit because a narrow screen shows rows
    as blocks, and browsers no longer treat those as a table."""
    head = tag(
        "tr",
        *(tag("th", one.name, scope="col", role="columnheader", class_=one.kind or None) for one in columns),
        role="row",
    )
    body = [tag("tr", *_cells(columns, row), role="row") for row in rows]
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", head, role="rowgroup"),
        tag("tbody", *body, role="rowgroup"),
        role="table",
        class_=kind or None,
    )


def _cells(columns: Sequence[Heading], row: Sequence[Inside]) -> Iterable[Html]:
    for at, (column, cell) in enumerate(zip(columns, row, strict=True)):
        if at == 0:
            yield tag("th", cell, scope="row", role="rowheader", class_=column.kind or None)
        else:
            yield tag("td", cell, role="cell", class_=column.kind or None, data_name=column.name or None)


def pairs(rows: Iterable[tuple[str, Inside]], kind: str = "pairs") -> Html:
    """Rows of (name, content) as a list; a row without a name continues the one before."""
    parts: list[Html] = []
    for name, content in rows:
        parts += [tag("dt", name)] if name else []
        parts.append(tag("dd", content))
    return tag("dl", *parts, class_=kind)


class Section(NamedTuple):
    """A part of a page."""

    key: str
    """Its anchor."""
    heading: str
    body: Html


def page(title: str, head: Html, sections: Sequence[Section], foot: str) -> str:
    """The page as one file of HTML. `head`: the content of its header, with the first heading."""
    style, script = _STYLE.read_text(encoding="utf-8"), _SCRIPT.read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:"
    links = [tag("li", tag("a", one.heading, href=f"#{one.key}")) for one in sections]
    parts = [
        tag(
            "section",
            tag("h2", one.heading, id=f"{one.key}-heading"),
            one.body,
            id=one.key,
            aria_labelledby=f"{one.key}-heading",
        )
        for one in sections
    ]
    top = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        tag("a", "Skip to the answer", class_="skip", href="#main"),
        tag("header", head),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag("main", *parts, id="main", tabindex="-1"),
        tag("footer", tag("p", foot)),
        tag("script", Html(script)),
    )
    return f"<!doctype html>\n{tag('html', top, body, lang='en')}\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
