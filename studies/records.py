"""What studies share: where a figure was measured, data on disk, and the tables made from it.

Data is JSON beside the studies. Tables in docs/ stand between `<!-- table: NAME -->` and
`<!-- end -->` and are written by `python -m studies.tables`, never by hand.
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


def save(name: str, command: str, device: torch.device, rows: Sequence[Row], folder: Path = DATA) -> Path:
    """Writes NAME.json: rows with the command that repeats them and where they come from. Whole or not
    at all: an interrupted write leaves the file that was there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"command": command, "environment": environment(device), "rows": list(rows)}
    fresh = path.with_suffix(".json.new")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(path)
    return path


def measured(name: str, folder: Path = DATA) -> bool:
    """Whether there is data of this name."""
    return (folder / f"{name}.json").exists()


def load(name: str, folder: Path = DATA) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


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
