"""Docs run, are what the code and the data say, and point somewhere: README.md and every page of docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import attention
import planner
from studies.bench import catalogue
from studies.handbook import pages, reader, reference, site

ROOT = pages.ROOT
README = ROOT / "README.md"
KEPT = ("attention", "planner", "studies", "tests", "docs", ".ci")
TEXT = {"", ".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ".csv", ".css", ".svg", ".sh"}

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.*)$", re.MULTILINE)
SOMEONES_PATH = re.compile(r"(?<![\w.~$}/-])/(?:home|root|Users|work|workspace|mnt)/[\w.]|[A-Z]:\\Users\\")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# Pages run as many commands as all other tests together. `.ci/run` checks them all, beside the linters.
PAGES = [pytest.param(page, marks=() if page == README else pytest.mark.slow) for page in pages.pages()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_runs_and_is_what_the_code_and_the_data_say(page: Path):
    """`python -m studies.handbook.pages` writes it anew, and with `--check` says which are not."""
    assert not [name_of(path) for path in pages.stale(page)]


# The README.


def test_the_readme_begins_with_the_command_that_installs_and_recommends_and_shows_what_it_prints():
    first = FENCE.search(README.read_text(encoding="utf-8"))
    assert first is not None
    command = "planner recommend --vram 8GB --seq 131072"
    assert first["body"] == (
        f"python3 -m venv .venv && .venv/bin/pip install -c constraints.txt . && .venv/bin/{command}\n"
    )
    assert f"<!-- output: {command} " in README.read_text(encoding="utf-8")


def test_the_readmes_test_command_is_one_line_that_ends_in_pytest():
    _, _, after = README.read_text(encoding="utf-8").partition("<!-- ci: test -->\n")
    assert after.startswith("```sh\n"), "the block must come right under the marker: .ci/run reads it there"
    match = FENCE.match(after)
    assert match is not None
    (line,) = match["body"].splitlines()
    assert line.startswith("python3 -m venv .venv && ")
    assert line.endswith(" && .venv/bin/pytest -n auto")


# Links.


def anchors(page: Path) -> set[str]:
    """As MkDocs makes them of headings."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in HEADING.findall(prose))
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", pages.pages(), ids=name_of)
def test_links_resolve(page: Path):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    wrong = []
    for target in (match["target"] for match in LINK.finditer(prose)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else page.parent / path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            wrong.append(target)
    assert not wrong


def test_an_output_stands_under_its_command():
    for page in pages.pages():
        text = page.read_text(encoding="utf-8")
        for match in reader.STEP.finditer(text):
            if match["output"] and match["output"] != "above":
                block = [
                    fence for fence in FENCE.finditer(text[: match.start()]) if fence["language"] == "sh"
                ][-1]
                assert match["output"] in reader.plain(block["body"]), name_of(page)


def test_the_site_has_every_page():
    listed = re.findall(r'"([\w/-]+\.md)"', site.SETTINGS.read_text(encoding="utf-8"))
    there = {page.relative_to(pages.DOCS).as_posix() for page in pages.pages() if page != README}
    assert sorted(listed) == sorted(there)


def test_pages_name_studies_that_there_are():
    places = re.compile(r"<!-- (?:findings|picture): ([\w-]+) -->")
    named = {name for page in pages.pages() for name in places.findall(page.read_text(encoding="utf-8"))}
    assert named <= set(catalogue.QUESTIONS)


# Following a page.


def follow(text: str) -> str:
    return reader.follow(text, "page").text


def test_a_shell_blocks_output_is_shown():
    text = "```sh\n.venv/bin/python -c 1\necho 1\n```\n\n<!-- output: echo 1 -->\n```text\n{}```\n"
    assert follow(text.format("")) == text.format("1\n")


def test_only_the_first_lines_are_shown_if_so_wanted():
    text = "<!-- output: printf '1\\n2\\n3\\n' | head -2 -->\n```text\n{}```\n"
    assert follow(text.format("")) == text.format("1\n2\n")


def test_a_snippet_has_the_names_of_the_one_above_and_shows_what_it_printed():
    text = "```python\na = 1\n```\n\n```python\nprint(a)\n```\n\n<!-- output: above -->\n```text\n{}```\n"
    assert follow(text.format("2\n")) == text.format("1\n")


@pytest.mark.parametrize("block", ["```sh\nfalse\n```\n", "```python\nraise ValueError('no')\n```\n"])
def test_a_block_that_fails_is_named_by_its_line(block: str):
    with pytest.raises(reader.PageError, match="page, line 3: "):
        follow(f"# A page\n\n{block}")


def test_a_block_is_left_out_for_a_known_reason_only():
    block = "<!-- not run: {} -->\n```sh\nfalse\n```\n"
    assert follow(block.format("needs a GPU")) == block.format("needs a GPU")
    with pytest.raises(reader.PageError, match="is no reason"):
        follow(block.format("too lazy"))


def test_what_a_page_draws_comes_back():
    found = reader.follow("<!-- drawn: echo x > docs/pictures/a.svg -->\n", "page")
    assert found.pictures == {"a.svg": b"x\n"}


# The reference.


@pytest.mark.parametrize("module", [attention, planner])
def test_the_reference_has_every_public_name(module: ModuleType):
    page = reference.library()
    assert not [name for name in module.__all__ if f"\n### {name}\n" not in page]


def test_the_reference_has_every_command_with_its_example():
    page = reference.command_line()
    for name in ("recommend", "tune", "estimate", "study"):
        assert f"\n## planner {name}\n" in page
        assert f"Usage: planner {name} " in page
    assert "Exit codes: 0 done, 1 " in page
    assert "planner tune --vram 1GB --seq 4K --trials 5" in page


def test_types_and_defaults_are_shown_as_a_reader_knows_them():
    page = reference.library()
    assert "- `segment_lengths`: `tuple[int, ...]`, default `()`. Tokens a segment" in page
    assert "- `sparsity_ratio`: `float`, default `0.1`. Fraction of blocks" in page
    assert "    trials: int = 30,\n" in page


@pytest.mark.parametrize("name", reference.TABLES)
def test_tables_of_constants_are_tables(name: str):
    head, rule, *rows = reference.TABLES[name]().splitlines()
    assert rows
    assert len({line.count("|") for line in (head, rule, *rows)}) == 1


# Pictures.


def test_drawings_may_differ_by_as_little_as_processors_do(tmp_path):
    path = tmp_path / "a.svg"
    path.write_bytes(b'<path d="M 1.0 2.0"/>')
    assert pages.same(path, b'<path d="M 1.000001 2.0"/>')
    assert not pages.same(path, b'<path d="M 1.1 2.0"/>')
    assert not pages.same(path, b'<line d="M 1.0 2.0"/>')
    assert not pages.same(tmp_path / "none.svg", b"")


def test_the_site_shows_a_studys_picture_where_there_is_data_and_no_remarks(monkeypatch):
    data = [{"environment": {"device": "a CPU"}}]
    monkeypatch.setattr(pages, "load", lambda name: data if name == "fits" else [])
    text = "<!-- output: x -->\nA\n\n<!-- picture: fits -->\n\n<!-- picture: floors -->\n"
    question = catalogue.QUESTIONS["fits"]
    assert pages.for_site(text, "../pictures") == (
        f"A\n\n![{question}](../pictures/study-fits-0.svg)\n\na CPU\n\n\n"
    )


def test_the_sites_pages_are_all_pages_without_remarks_and_with_pictures(monkeypatch, tmp_path):
    monkeypatch.setattr(site, "pictures", lambda: [("study-fits-0.svg", b"<svg/>")])
    site.prepare(tmp_path / "pages")
    made = {path.relative_to(tmp_path / "pages").as_posix() for path in (tmp_path / "pages").rglob("*.md")}
    assert made == {page.relative_to(pages.DOCS).as_posix() for page in pages.pages() if page != README}
    assert (tmp_path / "pages/pictures/study-fits-0.svg").read_bytes() == b"<svg/>"
    assert "<!-- " not in (tmp_path / "pages/index.md").read_text()
    shown = (tmp_path / "pages/explanation/memory.md").read_text()
    assert "<!-- output" not in shown


# No path of anyone's machine.


def repository_files() -> Iterator[Path]:
    """Files that belong to the project, without asking git: a copy of the tree has none, and what a linked
    tree has is a file."""
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.name != ".git")
    for folder in KEPT:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def test_no_path_of_a_machine():
    found = []
    for path in repository_files():
        if path.suffix not in TEXT:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if SOMEONES_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


@pytest.mark.parametrize("line", ["see /home/" + "ann/x", "'/root/" + ".cache'", "C:" + r"\Users\ann"])
def test_the_path_check_can_fail(line: str):
    assert SOMEONES_PATH.search(line)
