"""Runs a page as a reader would: its blocks from top to bottom, in a folder of its own.

Blocks of ```sh and ```python are run, but for those under `<!-- not run: WHY -->` and `<!-- ci: test -->`. A
```text block under `<!-- output: COMMAND -->` shows what the command prints, with `| head -N` the first lines
of it; under `<!-- output: above -->` what the snippet above printed. `<!-- drawn: COMMAND -->` runs a command
that draws a picture into docs/pictures. What is not as the page has it comes back as it should be.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from optuna.exceptions import ExperimentalWarning

from attention.errors import AttentionPlannerError

ROOT: Final = Path(__file__).resolve().parents[2]
PROGRAMS: Final = {"planner": "-m planner", "python": "", "torchrun": "-m torch.distributed.run"}
"""Programs in a reader's .venv/bin, and the options of Python that they stand for."""
TIMEOUT: Final = 120
REASONS: Final = (
    "installs packages",
    "needs a GPU",
    "needs a CUDA build of torch",
    "runs until it is stopped",
    "takes long",
)
"""The reasons for which a block may stay unrun."""
STEP: Final = re.compile(
    r"(?:^<!-- (?P<mark>not run|ci): (?P<why>[^>]*?) -->\n)?"
    r"^```(?P<language>sh|python)\n(?P<body>.*?)^```$"
    r"|^<!-- output: (?P<output>.*?)(?: \| head -(?P<lines>\d+))? -->\n```text\n.*?^```$"
    r"|^<!-- drawn: (?P<drawn>.*?) -->$",
    re.MULTILINE | re.DOTALL,
)


class PageError(AttentionPlannerError):
    """A page that a reader could not follow."""


class Followed(NamedTuple):
    """The result of running a page."""

    text: str
    """The page's text, with every output as it was printed."""
    pictures: dict[str, bytes]
    """The pictures that it drew, by name."""


def follow(text: str, name: str) -> Followed:
    """Runs a page's blocks; PageError where one fails."""
    with _folder() as folder:
        state: dict[str, Any] = {"__name__": name}
        printed: dict[str, str] = {}

        def step(match: re.Match[str]) -> str:
            try:
                return _step(match, folder, state, printed)
            except Exception as error:  # whatever a snippet raises
                line = text.count("\n", 0, match.start()) + 1
                raise PageError(f"{name}, line {line}: {type(error).__name__}: {error}") from error

        done = STEP.sub(step, text)
        pictures = {path.name: path.read_bytes() for path in (folder / "docs" / "pictures").iterdir()}
    return Followed(done, pictures)


def _step(match: re.Match[str], folder: Path, state: dict[str, Any], printed: dict[str, str]) -> str:
    if match["drawn"]:
        _shell(match["drawn"], folder)
    elif match["output"]:
        command = match["output"]
        if command not in printed:
            printed[command] = _shell(command, folder)
        lines = printed[command].splitlines()[: int(match["lines"]) if match["lines"] else None]
        begin, _, _ = match[0].partition("```text\n")
        return "\n".join([f"{begin}```text", *(line.rstrip() for line in lines), "```"])
    elif match["mark"] == "not run" and match["why"] not in REASONS:
        raise PageError(f"{match['why']!r} is no reason not to run it; one of {', '.join(REASONS)}")
    elif match["mark"]:
        pass
    elif match["language"] == "python":
        printed["above"] = _python(match["body"], folder, state)
    else:
        printed[plain(match["body"])] = _shell(match["body"], folder)
    return match[0]


def plain(block: str) -> str:
    """A block as an output names its command: in one line, without the program's folder and comments."""
    return re.sub(r"\s+#.*|\.venv/bin/|(?<=\s)\\\n\s*", "", block.strip())


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder with what a reader has after installing: the programs, the files of the docs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        for program, options in PROGRAMS.items():
            path = programs / program
            path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {options} "$@"\n')
            path.chmod(0o755)
        (folder / "docs" / "pictures").mkdir(parents=True)
        (folder / "docs" / "examples").symlink_to(ROOT / "docs" / "examples")
        yield folder


def _environment(folder: Path) -> dict[str, str]:
    """The environment without what changes the output: the user's calibrations, widths, colours."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "CLICOLOR_FORCE")
    }
    return inherited | {
        "COLUMNS": "80",
        "MPLBACKEND": "Agg",
        "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONPATH": str(ROOT),
        "XDG_DATA_HOME": str(folder / "data"),
    }


def _shell(script: str, folder: Path) -> str:
    """The output of a script, on stdout and stderr."""
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=_environment(folder),
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT,
        check=False,
    )
    if run.returncode:
        raise PageError(f"exit code {run.returncode} of\n{script}\n{run.stdout}")
    return run.stdout


def _python(snippet: str, folder: Path, state: dict[str, Any]) -> str:
    """The output of a snippet; the page's later snippets have its names."""
    before, printed = dict(os.environ), io.StringIO()
    os.environ.update(_environment(folder))
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            exec(compile(snippet, state["__name__"], "exec", dont_inherit=True), state)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return printed.getvalue()
