"""Writes the generated parts of README.md and the pages of docs/: `python -m studies.handbook.pages
[PAGE...]`, or with `--check` only compares.

- `<!-- table: NAME -->` to `<!-- end -->`: a table of a study's committed data, or of what the code has;
- `<!-- findings: STUDY -->` to `<!-- end -->`: a study's sentences, on each kind of machine that it ran on;
- `<!-- picture: STUDY -->`: its picture, on the site only: drawn from the same data while the site is built;
- outputs of commands and pictures that they draw: see `studies.handbook.reader`, which runs the page;
- the reference: whole pages, from the code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from planner.report.plot.figure import drawn
from studies.bench.catalogue import QUESTIONS
from studies.bench.records import Row, load, source
from studies.bench.study import study
from studies.handbook import house, reference
from studies.handbook.reader import ROOT, follow

DOCS: Final = ROOT / "docs"
PICTURES: Final = DOCS / "pictures"
WHOLE: Final[dict[str, Callable[[], str]]] = {
    "reference/cli.md": reference.command_line,
    "reference/api.md": reference.library,
}
"""Pages that are generated whole."""
DRAWN: Final[dict[str, dict[str, Callable[[Any], None]]]] = {
    "docs/contributing.md": {"house.svg": house.draw}
}
"""Pictures of the code, by page and file name."""
TABLES: Final = {**reference.TABLES, "rooms": house.table}
"""Tables of the code, by name."""
MISSING: Final = "Not measured yet."
PLACE: Final = re.compile(
    r"(<!-- (?P<kind>table|findings): (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL
)
PICTURE: Final = re.compile(r"<!-- picture: (?P<name>[\w-]+) -->")
COMMENT: Final = re.compile(r"^<!-- .*? -->\n", re.MULTILINE)
NUMBER: Final = re.compile(rb"-?\d+\.?\d*(?:e-?\d+)?")
NEAR: Final = 0.01
"""The largest difference allowed between numbers of a drawing: processors round differently."""


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted({*DOCS.rglob("*.md"), *(DOCS / name for name in WHOLE)})]


def stale(page: Path) -> dict[Path, bytes]:
    """The files of a page, its pictures included, that are not up to date: their new contents by path."""
    name = page.relative_to(ROOT).as_posix()
    whole = WHOLE.get(name.removeprefix("docs/"))
    if whole:
        files = {page: whole().encode()}
    else:
        followed = follow(filled(page.read_text(encoding="utf-8")), name)
        files = {page: followed.text.encode()}
        files |= {PICTURES / picture: content for picture, content in followed.pictures.items()}
        for picture, draw in DRAWN.get(name, {}).items():
            [files[PICTURES / picture]] = drawn(["svg"], draw, f"{picture}:")
    return {path: content for path, content in files.items() if not same(path, content)}


def same(path: Path, content: bytes) -> bool:
    """Whether a file has this content; numbers of drawings may differ by NEAR."""
    try:
        before = path.read_bytes()
    except FileNotFoundError:
        return False
    if path.suffix != ".svg" or before == content:
        return before == content
    was, now = (list(map(float, NUMBER.findall(text))) for text in (before, content))
    return NUMBER.sub(b"", before) == NUMBER.sub(b"", content) and all(
        abs(a - b) <= NEAR for a, b in zip(was, now, strict=True)
    )


def filled(text: str) -> str:
    """The text with every table and every study's sentences as they follow from the data, for each kind of
    machine, with the command that repeats them."""
    tables = {table: name for name in QUESTIONS for table in study(name).tables}

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if match["kind"] == "findings":
            body = _each(
                name, lambda rows: "\n".join(f"- {sentence}" for sentence in study(name).findings(rows))
            )
        elif name in TABLES:
            body = TABLES[name]()
        else:
            body = _each(tables[name], study(tables[name]).tables[name])
        return f"{match[1]}\n{body}\n\n{match[4]}"

    return PLACE.sub(replace, text)


def _each(name: str, show: Callable[[Any], str]) -> str:
    """The output of `show` for a study's rows, machine by machine, each with its source; a machine of which
    there is nothing to show is left out."""
    parts = []
    for data in load(name):
        if shown := show(data["rows"]):
            parts += [shown, source(data)]
    return "\n\n".join(parts or [MISSING])


# The site.


def pictures() -> Iterator[tuple[str, bytes]]:
    """(file name, SVG) of every study with data, machine by machine."""
    for name in QUESTIONS:
        for number, data in enumerate(load(name)):
            yield _file(name, number), _drawn(name, data)


def _drawn(name: str, data: Row) -> bytes:
    [picture] = drawn(["svg"], lambda figure: study(name).draw(figure, data["rows"]), f"study {name}:")
    return picture


def _file(name: str, number: int) -> str:
    return f"study-{name}-{number}.svg"


def for_site(text: str, folder: str) -> str:
    """A page as the site shows it: with the pictures of `folder` in their places, without the comments."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        shown = [
            f"![{QUESTIONS[name]}]({folder}/{_file(name, number)})\n\n{data['environment']['device']}"
            for number, data in enumerate(load(name))
        ]
        return "\n\n".join(shown)

    return COMMENT.sub("", PICTURE.sub(replace, text))


def main(arguments: list[str]) -> int:
    selected = {Path(name).resolve() for name in arguments if not name.startswith("-")}
    wrong = False
    for page in pages():
        if selected and page not in selected:
            continue
        for path, content in stale(page).items():
            name = path.relative_to(ROOT).as_posix()
            if "--check" in arguments:
                print(
                    f"{name} is not what it should be; run python -m studies.handbook.pages", file=sys.stderr
                )
                wrong = True
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                print(f"wrote {name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
