"""Docs run and point somewhere: snippets execute, links resolve, no path of anyone's machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
KEPT = ("attention", "planner", "studies", "tests", "docs", ".ci")
TEXT = {"", ".py", ".md", ".toml", ".txt", ".json", ".yaml", ".yml", ".csv", ".svg", ".sh"}

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
SOMEONES_PATH = re.compile(r"(?<![\w.~$}/-])/(?:home|root|Users|work|workspace|mnt)/[\w.]|[A-Z]:\\Users\\")


def fences(text: str, language: str) -> list[str]:
    return [match["body"] for match in FENCE.finditer(text) if match["language"] == language]


def repository_files() -> Iterator[Path]:
    """Files that belong to the project, without asking git: a copy of the tree has none."""
    yield from (path for path in ROOT.iterdir() if path.is_file())
    for folder in KEPT:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


SNIPPETS = fences(README.read_text(encoding="utf-8"), "python")


def test_readme_has_a_snippet():
    assert SNIPPETS


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_readme_snippet_runs(snippet: str):
    exec(compile(snippet, "<README.md>", "exec", dont_inherit=True), {"__name__": "readme"})


def test_readme_test_command_is_one_line_that_ends_in_pytest():
    _, _, after = README.read_text(encoding="utf-8").partition("<!-- ci: test -->\n")
    assert after.startswith("```sh\n"), "the block must come right under the marker: .ci/run reads it there"
    (line,) = fences(after, "sh")[0].splitlines()
    assert line.startswith("python3 -m venv .venv && ")
    assert line.endswith(" && .venv/bin/pytest")


OUTPUT = re.compile(r"<!-- output: (?P<command>.*?) -->\n```text\n(?P<text>.*?)```\n", re.DOTALL)


def test_readme_shows_what_the_command_prints():
    """`python tests/test_readme.py` writes it anew."""
    text = README.read_text(encoding="utf-8")
    assert OUTPUT.search(text)
    assert shown(text) == text


def shown(text: str) -> str:
    """The text with every output as the command of this very checkout prints it."""

    def printed(match: re.Match[str]) -> str:
        run = subprocess.run(
            [sys.executable, "-m", *match["command"].split()], cwd=ROOT, capture_output=True, check=True,
            encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        return f"<!-- output: {match['command']} -->\n```text\n{run.stdout}```\n"

    return OUTPUT.sub(printed, text)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_local_links_resolve(page: Path):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [match["target"] for match in LINK.finditer(prose)]
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    assert not [target for target in local if not (page.parent / target).exists()]


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


if __name__ == "__main__":
    README.write_text(shown(README.read_text(encoding="utf-8")), encoding="utf-8")
