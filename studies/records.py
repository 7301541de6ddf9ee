"""What studies share: where a figure was measured, data on disk, and the tables made from it.

Data is JSON beside the studies, one file a study and kind of machine (`peers.cpu-avx2.json`). Tables in
docs/ stand between `<!-- table: NAME -->` and `<!-- end -->` and are written by `python -m studies.pages`,
never by hand.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

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

from attention.ops.kernels import matrix_unit
from planner.report.files import write_whole

DATA = Path(__file__).parent / "data"
Row = dict[str, Any]


def environment(device: torch.device) -> Row:
    """Where and with what a figure was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "date": date.today().isoformat(),
    }


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


Step = tuple[str, Callable[[], Row]]
"""A label, of its own in its study, and what makes its row."""


def collect(
    name: str, command: str, device: torch.device, steps: Sequence[Step], folder: Path = DATA
) -> list[Row]:
    """The rows of a study, step by step, with a progress bar. They become the data of this kind of machine
    when all are there; a study that was interrupted goes on where it stopped. What it goes on from stays
    beside the data until `settle`, so that whatever goes wrong after the last row costs none."""
    final = folder / f"{name}.{machine(device)}.json"
    part = _part(final)
    head = {"command": command, "environment": environment(device)}
    done = _resumed(part, head)
    with progress() as bar:
        task = bar.add_task(name, total=len(steps), completed=sum(label in done for label, _ in steps))
        for label, run in steps:
            if label in done:
                continue
            bar.update(task, description=f"{name}: {label}")
            done[label] = run()
            write(part, as_json({**head, "rows": done}))
            bar.advance(task)
    rows = [done[label] for label, _ in steps]
    write(final, as_json({**head, "rows": rows}))
    return rows


def settle(final: Path) -> None:
    """The data is all that was asked for: the next run of its command begins anew."""
    _part(final).unlink(missing_ok=True)


def _part(final: Path) -> Path:
    return final.with_suffix(".part")


def _resumed(part: Path, head: Row) -> dict[str, Row]:
    """What an interrupted run of the same command on the same machine left, of whatever day."""
    try:
        content = json.loads(part.read_text())
        content["environment"]["date"] = head["environment"]["date"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    rows: dict[str, Row] = content.pop("rows", {})
    return rows if content == head else {}


def as_json(content: Row) -> str:
    """Data as JSON, a row a line."""
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
    """Seconds of one run."""
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
    """A progress bar on stderr, so that stdout holds the answer alone."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    ]  # fmt: skip
    return Progress(*columns, console=Console(stderr=True), transient=True)
