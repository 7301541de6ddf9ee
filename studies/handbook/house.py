"""The rooms of the house, from the imports: the rooms that each imports from, as a table and a picture.

A room is a folder of `planner/` or `studies/`, or a module on the top level of `planner/`; `attention/` is
one room, and so are the questions on the top level of `studies/`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Final

from matplotlib.patches import Rectangle

from studies.bench.records import markdown
from studies.handbook.reader import ROOT

PACKAGES: Final = ("attention", "planner", "studies")
COLOURS: Final = {"attention": "#fde2c8", "planner": "#d6e4f5", "studies": "#dcefd9"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the three packages, parsed, by its dotted name."""
    parsed = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            parsed[name] = ast.parse(path.read_text(encoding="utf-8"))
    return parsed


def imported(tree: ast.Module, parsed: Mapping[str, ast.Module]) -> Iterator[str]:
    """The modules among `parsed` that a module imports, wherever in the file it does so."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in parsed:
                name = name.rpartition(".")[0]
            if name:
                yield name


def room(module: str) -> str:
    """The room that a module lies in: `planner.search.tune` in `planner.search`, a study in `studies`."""
    package, *rest = module.split(".")
    question = package == "studies" and rest[:1] not in (["bench"], ["handbook"])
    return package if package == "attention" or question else ".".join([package, *rest[:1]])


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports from. The packages' own `__init__` are doors, not rooms."""
    parsed = modules()
    to: dict[str, set[str]] = {}
    for name, tree in parsed.items():
        if name in ("planner", "studies"):
            continue
        here = to.setdefault(room(name), set())
        here |= {room(other) for other in imported(tree, parsed) if other not in ("planner", "studies")}
        here.discard(room(name))
    return to


def layers() -> list[list[str]]:
    """The rooms in rows, top to bottom: each imports from rows below its own alone. ValueError where rooms
    import each other in a circle."""
    to = arrows()
    rows: list[list[str]] = []
    placed: set[str] = set()
    while len(placed) < len(to):
        row = sorted(name for name in to if name not in placed and to[name] <= placed)
        if not row:
            raise ValueError(f"a circle of imports among {sorted(set(to) - placed)}")
        rows.append(row)
        placed.update(row)
    return rows[::-1]


def path(name: str) -> str:
    """A room as a path: a folder with its slash, or a file."""
    place = ROOT / name.replace(".", "/")
    return f"{name.replace('.', '/')}{'/' if place.is_dir() else '.py'}"


def table() -> str:
    """Markdown: the rooms from the top down, what each is for, and those that it imports from directly."""
    to = arrows()
    rows = [
        (f"`{path(name)}`", _purpose(name), ", ".join(f"`{path(other)}`" for other in nearest(name, to)))
        for row in layers()
        for name in row
    ]
    return markdown(rows, ["room", "what it is for", "stands on"])


def _purpose(name: str) -> str:
    """The first sentence of a room's docstring."""
    text = " ".join((ast.get_docstring(modules()[name]) or "").split())
    return text.partition(". ")[0].rstrip(".")


def nearest(name: str, to: Mapping[str, set[str]]) -> list[str]:
    """Rooms that a room imports from, without those that it reaches through another of them as well."""

    def below(start: str) -> set[str]:
        return {start}.union(*(below(other) for other in to[start]))

    through = {further for other in to[name] for further in below(other) - {other}}
    return sorted(to[name] - through)


def draw(figure: Any) -> None:
    """The rooms in rows, a line from each to those that it stands on: what lies lower is imported by what
    lies higher, never the other way round."""
    rows, to = layers(), arrows()
    width = max(map(len, rows))
    figure.set_layout_engine("none")
    figure.set_size_inches(1.8 * width, 0.72 * len(rows))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(len(rows), 0))
    axes.axis("off")
    middles = {
        name: (x + (width - len(row)) / 2 + 0.5, y + 0.5)
        for y, row in enumerate(rows)
        for x, name in enumerate(row)
    }
    for name, (x, y) in middles.items():
        for other in nearest(name, to):
            axes.plot(*zip((x, y), middles[other], strict=True), color="#b9c0c8", linewidth=1, zorder=0)
        size, colour = (0.8, 0.56), COLOURS[name.partition(".")[0]]
        axes.add_patch(
            Rectangle((x - size[0] / 2, y - size[1] / 2), *size, facecolor=colour, edgecolor="#5b6470")
        )
        label = path(name).replace("/", "/\n", 1) if "." in name else path(name)
        axes.text(x, y, label, ha="center", va="center", fontsize=9)
