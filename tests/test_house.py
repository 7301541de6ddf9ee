"""The house is in order: what a newcomer may rely on in any room, held by reading the source."""

from __future__ import annotations

import ast
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from studies.handbook.house import layers

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("attention", "planner", "studies")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


TREES = {name: tree_of(path) for name, path in MODULES.items()}


@cache
def imports(tree: ast.Module) -> list[tuple[str, str, str]]:
    """(module, name taken of it or "", name here) of all imports, in functions and for type checkers too."""
    taken = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            taken += [(alias.name, "", alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            assert node.module
            taken += [(node.module, alias.name, alias.asname or alias.name) for alias in node.names]
    return taken


def ours(module: str, name: str = "") -> str | None:
    """The module of this repository that an import takes; None of another's."""
    return next((known for known in (f"{module}.{name}", module) if known in MODULES), None)


@cache
def defined(module: str) -> set[str]:
    """Names at a module's top level, exported ones included."""
    names: set[str] = set()
    for node in ast.walk(TREES[module]):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name):
                names.add(name)
            case ast.Constant(value=str(name)):  # of a lazy package's table
                names.add(name)
            case ast.alias(name=name, asname=other):
                names.add(other or name)
    return names


# ---- imports


def test_every_import_of_ours_exists():
    """An editable install of another checkout would serve modules that this one no longer has."""
    missing = {
        f"{path.relative_to(ROOT)}: {module} {name}"
        for path in (*MODULES.values(), *TESTS)
        for module, name, _ in imports(tree_of(path))
        if module.partition(".")[0] in PACKAGES
        and (module not in MODULES or (name and ours(module, name) == module and name not in defined(module)))
    }
    assert not missing


def test_imports_have_no_circle():
    graph = {
        name: {other for module, what, _ in imports(tree) if (other := ours(module, what))}
        - {name, *PACKAGES}
        for name, tree in TREES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_uses(tree: ast.Module) -> Iterator[str]:
    """Private names of other modules of ours, imported or reached as attributes."""
    modules = {}
    for module, name, here in imports(tree):
        if ours(module) and is_private(name):
            yield f"{module}.{name}"
        if not name or ours(module, name) not in (None, module):
            modules[here] = f"{module}.{name}".removesuffix(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            module = modules.get(ast.unparse(node.value), "")
            if ours(module):
                yield f"{module}.{node.attr}"


@pytest.mark.parametrize(
    "code",
    [
        "from planner.units import _secret",
        "def f():\n    from planner import units\n    return units._secret",
        "import planner.units as u\nu._secret()",
        "import planner.units\nplanner.units._secret",
    ],
)
def test_a_private_name_is_noticed_however_it_is_reached(code: str):
    assert list(private_uses(ast.parse(code))) == ["planner.units._secret"]


def test_private_names_are_their_modules_own():
    assert not {name: used for name, tree in TREES.items() if (used := sorted(private_uses(tree)))}


# ---- files


def test_rooms_do_not_import_each_other_in_circles():
    assert layers()  # or it raises


def test_the_hall_of_the_planner_is_small():
    assert len([path for path in (ROOT / "planner").glob("*.py") if not path.stem.startswith("__")]) <= 10


SUFFIXES = ("ation", "ment", "able", "ions", "ing", "ion", "ed", "er", "or", "es", "e", "s", "y")


def stems(word: str) -> set[str]:
    """The word, and the word without what an ending may be."""
    return {word} | {word.removesuffix(suffix) for suffix in SUFFIXES if len(word) - len(suffix) >= 3}


@pytest.mark.parametrize(
    "one, other",
    [("tune", "tuning"), ("calibrate", "calibration"), ("measure", "measurement"), ("plan", "plans")],
)
def test_words_of_one_stem_are_noticed(one: str, other: str):
    assert stems(one) & stems(other)
    assert not stems(one) & stems("units")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_modules_of_a_folder_differ_only_in_their_ending(package: str):
    for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
        names = sorted(
            {p.stem for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
        )
        alike = [(a, b) for a in names for b in names if a < b and stems(a) & stems(b)]
        assert not alike, folder


# ---- types


def types_of(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Public classes and type aliases that a module defines."""
    for node in body:
        match node:
            case ast.ClassDef(name=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)) if "TypeAlias" in ast.unparse(node.annotation):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() | ast.BinOp()):
                if name[:1].isupper() and not name.isupper():
                    yield name
            case ast.If():
                yield from types_of([*node.body, *node.orelse])


def test_the_name_of_a_type_means_one_thing():
    homes: dict[str, set[str]] = defaultdict(set)
    for module, tree in TREES.items():
        for name in types_of(tree.body):
            if not name.startswith("_"):
                homes[name].add(module)
    twice = {name: modules for name, modules in homes.items() if len(modules) > 1}
    assert not twice


def test_what_is_taken_of_a_package_by_attribute_is_there():
    """In a script that no fast test runs, a name that has moved would be found by nobody."""
    missing = {
        f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
        for path in [*MODULES.values(), *TESTS]
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in PACKAGES
        and node.value.id in {here for _, _, here in imports(tree_of(path))}
        and not node.attr.startswith(("__", "no_such"))
        and ours(node.value.id, node.attr) == node.value.id
        and node.attr not in import_module(node.value.id).__all__
    }
    assert not missing


# ---- what is cited


PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
WRITTEN_ELSEWHERE = {"attend.py", "train.py", "version.py"}
"""The reader's own, in tutorials and examples, and torch's."""
OTHERS = ("torch/", "torchvision/", "transformers/", "../examples/")
"""Packages whose files a dry run names; and links of pages, which tests/test_docs.py follows."""
CITED_FILE = re.compile(
    r"(?<![\w/.-])(?:[\w/.-]*\w\.py|(?:attention|planner|studies|tests|docs)/[\w./-]*\w\.(?:md|json|svg|css|js))\b"
)
CITED_MODULE = re.compile(r"`((?:attention|planner|studies)(?:\.[A-Za-z_]\w*)+)`")


def notes(path: Path) -> Iterator[str]:
    """Comments and docstrings, those of fields too."""
    with path.open("rb") as source:
        yield from (one.string for one in tokenize.tokenize(source.readline) if one.type == tokenize.COMMENT)
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield text


@cache
def prose() -> list[tuple[str, str]]:
    """(place, text) of all pages, of the packages' modules whole, and of what tests say beside their code."""
    whole = {path: path.read_text(encoding="utf-8") for path in (*PAGES, *MODULES.values())}
    beside = {path: "\n".join(notes(path)) for path in TESTS}
    return [(str(path.relative_to(ROOT)), text) for path, text in (whole | beside).items()]


def test_cited_files_exist():
    """By their path, or by the end of it: `tiles.py` beside a file of that name."""
    folders = (*PACKAGES, "tests", "docs")
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.py")]
    missing = {
        f"{place}: {cited}"
        for place, text in prose()
        for cited in CITED_FILE.findall(text)
        if not (ROOT / cited).exists()
        and cited.removeprefix("/") not in WRITTEN_ELSEWHERE
        and not cited.removeprefix("/").startswith(OTHERS)
        and not any(file.endswith("/" + cited) for file in files)
    }
    assert not missing


def is_there(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name that one defines."""
    module, _, name = dotted.rpartition(".")
    while module and module not in MODULES:
        module, _, name = module.rpartition(".")
    return dotted in MODULES or (bool(module) and name in defined(module))


def test_cited_modules_and_names_exist():
    missing = {
        f"{place}: {cited}"
        for place, text in prose()
        for cited in CITED_MODULE.findall(text)
        if not is_there(cited)
    }
    assert not missing


def test_what_a_file_is_cited_for_is_in_it():
    """Sources of figures: `attention/sizes/flex.py flex_list_bytes`."""
    places = {str(path.relative_to(ROOT)): name for name, path in MODULES.items()}
    cited = {
        match.groups()
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if (match := re.fullmatch(r"([\w/]+\.py) (\w+)(?:\.\w+)?", node.value))
    }
    assert cited
    assert not {(file, name) for file, name in cited if name not in defined(places[file])}


def test_the_formatter_is_obeyed_but_for_tables_with_a_reason():
    lines = {
        f"{path.relative_to(ROOT)}:{number}": line
        for path in [*MODULES.values(), *TESTS]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.endswith("# fmt: skip")
    }
    assert len(lines) <= 30
    assert not [place for place, line in lines.items() if not re.search(r"  # \w[^#]*  # fmt: skip$", line)]
