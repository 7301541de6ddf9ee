"""The records of studies: where a figure was measured, data on disk, and the tables made from it.

Data is JSON beside the studies, one file a study and kind of machine (`peers.cpu-avx2.json`). A row of a
case that was to run or to fit says how it ended under `outcome`, itself or in its part `here`. Tables in
docs/ stand between `<!-- table: NAME -->` and `<!-- end -->` and are written by
`python -m studies.handbook.pages`, never by hand.
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final, NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from attention.errors import AttentionPlannerError
from attention.ops.kernels import matrix_unit
from planner.files import write_whole
from planner.search.recommend import versions

DATA = Path(__file__).parents[1] / "data"
CODE: Final = ("attention", "planner", "studies")
"""The packages that make data."""
OK: Final = "ok"
"""The `outcome` of what ran."""
Row = dict[str, Any]


class NothingRanError(AttentionPlannerError):
    """No case of a study ran: there is nothing to say, and nothing was written."""


def environment(device: torch.device) -> Row:
    """The provenance of a figure that is measured now: device, versions, threads and date."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "version": versions()["attention-planner"],
        "code": code(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "date": date.today().isoformat(),
    }


@cache
def code() -> str:
    """A digest of all files of the packages, data of studies aside: it differs between two states of the code
    with equal versions."""
    root, digest = Path(__file__).parents[2], sha256()
    for package in CODE:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and DATA not in path.parents:
                digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    amx = any("amx_bf16" in line for line in lines)
    return f"{models[0] if models else platform.machine()}{', AMX' if amx else ''}, {os.cpu_count()} cores"


def machine(device: torch.device) -> str:
    """The kind of machine that data belongs to: `cpu-amx`, `cpu-avx2`, `cuda-nvidia-h200`."""
    if device.type == "cpu":
        kind = "amx" if matrix_unit(torch.bfloat16) else torch.backends.cpu.get_cpu_capability()
    else:
        kind = torch.cuda.get_device_name(device)
    return f"{device.type}-{kind}".lower().replace(" ", "-")


Job = tuple[str, Callable[[], Row]]
"""A label, unique in its study, and the function that makes its row."""


class Collected(NamedTuple):
    """The rows of a study that has run."""

    rows: list[Row]
    failed: dict[str, str]
    """Why a step gave no row, by its label."""
    source: str
    """The command, and where, with what and when it was measured, for people."""


def collect(
    name: str,
    command: str,
    device: torch.device,
    steps: Sequence[Job],
    folder: Path = DATA,
    *,
    independent: bool = False,
) -> Collected:
    """The rows of a study, step by step, with a progress bar. They become the data of this kind of machine
    when all are there; a study that was interrupted goes on where it stopped, if code, machine and question
    are what they were, and what was there already keeps its date. What it goes on from stays beside the data
    until `settle`, so that whatever goes wrong after the last row costs none.

    `independent`: a step that ends in an error is a case that did not run, and the others go on.
    NothingRanError if no case ran: then nothing is left behind, and data that was there stays."""
    final = folder / f"{name}.{machine(device)}.json"
    part = _part(final)
    head: Row = {"command": command, "environment": environment(device)}
    failed: dict[str, str] = {}
    with progress() as bar:
        dated = _resumed(part, head, lambda line: _say(bar.console, f"{name}: {line}"))
        begun = sum(label in dated for label, _ in steps)
        task = bar.add_task(name, total=len(steps), completed=begun)
        for label, run in steps:
            if label in dated:
                continue
            bar.update(task, description=f"{name}: {label}")
            try:
                row = run()
            # RuntimeError: what torch raises, for want of memory, of a compiler, of a kernel.
            except (AttentionPlannerError, MemoryError, RuntimeError) as error:
                if not independent:
                    raise
                failed[label] = _reason(error)
            else:
                dated[label] = {"date": date.today().isoformat(), "row": row}
                write(part, as_json({**head, "rows": dated}))
            bar.advance(task)
    finished = [dated[label] for label, _ in steps if label in dated]
    rows = [each["row"] for each in finished]
    if not any(end == OK for end in endings(rows)):
        settle(final)
        raise NothingRanError(_nothing(name, [*endings(rows), *failed.values()]))
    head["environment"]["date"] = _span([each["date"] for each in finished])
    content = {**head, **({"failed": failed} if failed else {}), "rows": rows}
    write(final, as_json(content))
    return Collected(rows, failed, source(content))


def _reason(error: BaseException) -> str:
    """The first line of an error, shortened."""
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else "it gave no reason"
    return text if isinstance(error, AttentionPlannerError) else f"{type(error).__name__}: {text}"


def _nothing(name: str, ends: Sequence[str]) -> str:
    """The message that nothing ran, with the most frequent reasons."""
    reasons = Counter(ends).most_common()
    text = "; ".join(f"{reason} ({count} of {len(ends)})" for reason, count in reasons[:3])
    more = f"; and {len(reasons) - 3} more reasons" if len(reasons) > 3 else ""
    return (
        f"study {name}: nothing ran, so that there is nothing to say, and no file was written: {text}{more}"
    )


def _span(dates: Sequence[str]) -> str:
    """The day of all dates, or the first and the last."""
    first, last = min(dates), max(dates)
    return first if first == last else f"{first} to {last}"


def endings(rows: Iterable[Row]) -> list[str]:
    """How each case ended that was to run or to fit: `ok`, or why not. Rows that do not say are no such
    cases, but if none says, all ran."""
    rows = list(rows)
    parts = [part for row in rows if "outcome" in (part := row.get("here", row))]
    if not parts:
        return [OK] * len(rows)
    return [part["outcome"] if part["outcome"] == OK else _why(part) for part in parts]


def _why(part: Row) -> str:
    return str(part.get("message") or part["outcome"])


def source(content: Row) -> str:
    """The source of data, for people: command, device, versions, date. Older data has no version."""
    where = content["environment"]
    version = f"version {where['version']}, " if where.get("version") else ""
    return f"`{content['command']}`, {where['device']}, {version}torch {where['torch']}, {where['date']}"


def settle(final: Path) -> None:
    """Removes what an interrupted run would continue from: the next run of the command begins anew."""
    _part(final).unlink(missing_ok=True)


def _part(final: Path) -> Path:
    return final.with_suffix(".part")


def _resumed(part: Path, head: Row, say: Callable[[str], None]) -> dict[str, Row]:
    """The rows that an interrupted run of the same command left, as {date, row} by label; none from other
    code, another machine or a file that cannot be read. `say` gets a line about it."""
    try:
        text = part.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        say(f"begins anew: {part} cannot be read ({error})")
        return {}
    try:
        content = json.loads(text)
        rows: dict[str, Row] = content.pop("rows")
        dates = [each["date"] for each in rows.values() if isinstance(each["row"], dict)]
        content["environment"] = {**content["environment"], "date": head["environment"]["date"]}
    except (ValueError, LookupError, TypeError, AttributeError):
        say(f"begins anew: {part} is not what an interrupted study leaves")
        return {}
    if content != head:
        say(f"begins anew: what {part} has is of another version, machine or command")
        return {}
    if dates:
        count = "1 row" if len(dates) == 1 else f"{len(dates)} rows"
        say(f"goes on with {count} of {_span(dates)} from {part}; delete it to begin anew")
    return rows


def as_json(content: Row) -> str:
    """Data as JSON, one row per line."""
    rows = content["rows"]
    if isinstance(rows, dict):
        lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
        body = "{\n" + ",\n".join(lines) + "\n}"
    else:
        body = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
    head = json.dumps({name: value for name, value in content.items() if name != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": {body}\n}}\n'


def write(path: Path, text: str) -> None:
    """Whole or not at all: an interrupted write leaves the file that was there."""
    write_whole(path, text.encode(), "study data")


def load(name: str, folder: Path = DATA) -> list[dict[str, Any]]:
    """The committed data of a study: one {command, environment, rows} for each kind of machine."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.*.json"))]


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - begin


def versus(
    ours: Callable[[], object], peer: Callable[[], object], device: torch.device, runs: int
) -> tuple[float, float, float]:
    """(median seconds of ours, of the peer, median ratio peer / ours), the two run in turn after two
    warm-ups each, so that a machine that slows down slows both."""
    for _ in range(2):
        ours()
        peer()
    pairs = [(timed(ours, device), timed(peer, device)) for _ in range(runs)]
    return median(a for a, _ in pairs), median(b for _, b in pairs), median(b / a for a, b in pairs)


def markdown(rows: Iterable[Sequence[object]], head: Sequence[str]) -> str:
    """A Markdown table, numbers to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    number = [all(_is_number(row[i]) for row in body) for i in range(len(head))]
    rule = ["---:" if right else "---" for right in number]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(head), rule, *body])


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace(",", "").replace("-", "", 1).isdigit() or text == ""


def progress() -> Progress:
    """A progress bar on stderr, so that stdout holds the answer alone; nothing where it is no terminal."""
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _say(console: Console, line: str) -> None:
    """A line above the bar, as the command line has its own."""
    console.print(f"planner: {line}", markup=False, highlight=False, soft_wrap=True)
