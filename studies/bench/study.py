"""Studies, and how one becomes files: data first, then the picture and three sentences.

`planner study NAME` writes NAME.MACHINE.json (the rows, with the command that repeats them and where they
were measured), .csv (the same rows), .png, .svg and .md. A study that is interrupted goes on where it
stopped when the same command runs again.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch

from attention.errors import AttentionPlannerError, ConfigError
from planner.measuring.server import Batch
from planner.report.plot.figure import written
from studies.bench.catalogue import QUESTIONS
from studies.bench.records import Job, Row, collect, machine, write

Results = list[Row]


class Findings(NamedTuple):
    """The three sentences of a study."""

    question: str
    answer: str
    original: str
    """Where the reports of the original project (docs/reports.md) say otherwise, and why; or that they do
    not."""


def many(ratio: float) -> str:
    """A ratio in words: whole from 10 on, with two decimals below."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}"


def together(names: Sequence[str]) -> str:
    """The names as `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def rounded_up(value: float, digits: int) -> float:
    """A value rounded up to so many decimals, for sentences that say "at most"."""
    unit = 10.0**digits
    return math.ceil(round(value * unit, 6)) / unit


@dataclass
class Scope:
    """How much of a study to run, and where."""

    device: torch.device
    quick: bool
    _open: ExitStack = field(default_factory=ExitStack)

    def batch(self, **options: Any) -> Batch:
        """A server that measures runs in processes of their own on the study's device, ended with the study.
        Options are those of `planner.measuring.server.Batch`."""
        kind: Any = self.device.type
        return self._open.enter_context(Batch(kind, **options))

    def close(self) -> None:
        self._open.close()


class Study(NamedTuple):
    """One question. Rows are plain data; everything else is computed from them."""

    steps: Callable[[Scope], list[Job]]
    """The steps that make the rows; a quick scope has so few that all studies together take minutes."""
    tables: Mapping[str, Callable[[Results], str]]
    """Markdown tables by name; docs show them by it. Empty: there is nothing of its kind among the rows."""
    draw: Callable[[Any, Results], None]
    """Draws into an empty matplotlib Figure; see `planner.report.plot.figure`."""
    findings: Callable[[Results], Findings]
    devices: tuple[str, ...] = ("cpu", "cuda")
    """The devices on which it can run."""
    independent: bool = False
    """Whether a step that ends in an error only leaves out its row; otherwise it ends the study."""


class StudyRun(NamedTuple):
    """A study that has run."""

    name: str
    findings: Findings
    files: tuple[Path, ...]
    failed: Mapping[str, str]
    """Why a case gave no row, by its label."""


def command(name: str, device: torch.device, quick: bool) -> str:
    """The command that repeats a study."""
    return f"planner study {name}" + " --quick" * quick + f" --device {device.type}" * (device.type != "cpu")


def able(names: Sequence[str], device: str, every: bool) -> list[str]:
    """The studies that run on this device. ConfigError where one was named that does not; `every`: none was
    named, and those that do not are left out."""
    suitable = [name for name in names if device in study(name).devices]
    unable = [name for name in names if name not in suitable]
    if unable and not every:
        raise ConfigError(
            f"on {device} there is no study {', '.join(unable)}: they run on "
            f"{' or '.join(study(unable[0]).devices)}"
        )
    return suitable


def run(name: str, *, device: torch.device, quick: bool, out: Path) -> StudyRun:
    """Runs a study and writes its files into `out`, which is made if it is not there. NothingRanError where
    no case ran; then no file is written."""
    writable(out)
    definition = study(name)
    command_line = command(name, device, quick)
    stem = name + "-quick" * quick
    with _scope(device, quick) as scope:
        rows, failed, source = collect(
            stem,
            command_line,
            device,
            definition.steps(scope),
            folder=out,
            independent=definition.independent,
        )
    base = out / f"{stem}.{machine(device)}"
    files = [base.with_name(f"{base.name}.{kind}") for kind in ("json", "csv", "md", "png", "svg")]
    # The rows are on disk by now: whatever goes wrong from here on loses none of them.
    findings = definition.findings(rows)
    write(files[1], as_csv(rows))
    write(files[2], as_markdown(name, source, rows, failed))
    written(files[3:], lambda figure: definition.draw(figure, rows), f"study {name}:")
    return StudyRun(name, findings, tuple(files), failed)


@contextmanager
def _scope(device: torch.device, quick: bool) -> Iterator[Scope]:
    scope = Scope(device, quick)
    try:
        yield scope
    finally:
        scope.close()


def writable(out: Path) -> None:
    """Makes the folder; AttentionPlannerError if nothing can be written into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        why = "it is a file" if out.is_file() else error.strerror
        raise AttentionPlannerError(
            f"--out {out} cannot be written into ({why}); choose another folder"
        ) from None


def as_csv(rows: Results) -> str:
    """The rows as CSV, what is nested under dotted names; a cell that a row lacks is empty."""
    flat = [dict(_flat(row)) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def as_markdown(name: str, source: str, rows: Results, failed: Mapping[str, str]) -> str:
    """The question, the three sentences, what gave no row, the tables, the command and where it ran."""
    definition = study(name)
    findings = definition.findings(rows)
    lost = "".join(f"\n{line}" for line in did_not_run(failed))
    tables = "\n\n".join(filter(None, (table(rows) for table in definition.tables.values())))
    sentences = "\n".join(findings)
    return f"# {QUESTIONS[name]}\n\n{sentences}{lost}\n\n{tables}\n\n{source}\n"


def did_not_run(failed: Mapping[str, str]) -> list[str]:
    """A line for each case that gave no row."""
    return [f"Did not run: {label}: {why}" for label, why in failed.items()]


def study(name: str) -> Study:
    """The study of a name. Imports torch."""
    definition: Study = import_module(f"studies.{name.replace('-', '_')}").STUDY
    return definition
