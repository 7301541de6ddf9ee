"""How long does a command take beside the libraries that it is made of? `python -m studies.answer_time`

Processor time of whole processes, by turns, so that what else the machine does falls on all alike. Written
bytecode counts: with PYTHONDONTWRITEBYTECODE=1, or before the first run, every start compiles this project.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from statistics import median
from typing import Final

LIBRARIES: Final = ("-c", "import numpy, pydantic, typer, rich.table")
COMMANDS: Final = ("--help", "recommend --vram 8GB --seq 131072", "recommend --vram 8GB")
PAIRS: Final = 9


def cpu_seconds(*arguments: str) -> float:
    """Processor seconds of a Python process with these arguments, its start and end included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ratios(line: str, pairs: int) -> list[tuple[float, float]]:
    """(seconds, times the libraries') of a command, pair by pair; one more is run first and not counted."""
    timings = []
    for _ in range(pairs + 1):
        libraries = cpu_seconds(*LIBRARIES)
        seconds = cpu_seconds("-m", "planner", *line.split())
        timings.append((seconds, seconds / libraries))
    return timings[1:]


def main() -> None:
    print(f"medians of {PAIRS} pairs; python {' '.join(LIBRARIES)} is 1")
    for line in COMMANDS:
        seconds, times = zip(*ratios(line, PAIRS), strict=True)
        print(f"planner {line:<36} {median(times):5.2f} times   {median(seconds):5.2f} s")


if __name__ == "__main__":
    main()
