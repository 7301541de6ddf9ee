"""How fast is the memory model? `python -m studies.model_speed`

100,000 candidates by arrays, one estimate, and a cold start of `planner estimate`; medians of 5.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, get_args

import numpy as np

from attention.config import AttentionConfig, PatternType, SparsePatternConfig
from planner import gpus
from planner.columns import Columns, Ints
from planner.memory.estimate import estimate
from planner.memory.kernels import Cuda
from planner.memory.many import peaks
from planner.workload import Mode, Workload

COMMAND = "python -m studies.model_speed"
SEQ = 131_072
RUNS = 5
MODES: tuple[Mode, ...] = get_args(Mode)
ASKED = "estimate --variant block_sparse --pattern local_window --seq 131072 --vram 8GB"


def candidates(count: int) -> list[Columns]:
    """`count` random candidates at 131,072 tokens: a fifth dilated of two branches, a fifth of four, and a
    fifth of each block-sparse pattern."""
    random = np.random.default_rng(0)
    n = count // 5

    def powers(low: int, high: int) -> Ints:
        found: Ints = 2 ** random.integers(low, high, n)
        return found

    def branches(number: int, first: bool) -> dict[str, Any]:
        rates = np.sort(2 ** random.integers(0, 4, (number, n)), axis=0)
        if first:
            rates[0] = 1
        return {"lengths": tuple(powers(9, 18) for _ in range(number)), "rates": tuple(rates)}

    found = [
        Columns("dilated", None, seq=SEQ, workspace=powers(20, 27), **branches(number, True))
        for number in (2, 4)
    ]
    for pattern in get_args(PatternType):
        found.append(
            Columns(
                "block_sparse", pattern, seq=SEQ, workspace=powers(20, 27), block_size=powers(4, 9),
                window=random.integers(64, 8192, n), global_tokens=random.integers(1, 1024, n),
                sparsity_ratio=10 ** random.uniform(-3, 0, n), **branches(3, False),
            )
        )  # fmt: skip
    return found


class Seconds(NamedTuple):
    """By the clock, and of processors: less than that where others use them too."""

    clock: float
    processor: float

    def __str__(self) -> str:
        return f"{self.clock:.4f} s ({self.processor:.4f} s of processor time)"


def seconds(run: Callable[[], object], runs: int = RUNS) -> Seconds:
    """Medians of `runs`, after one that is not timed."""
    taken = []
    for _ in range(runs + 1):
        start, used = perf_counter(), _processor()
        run()
        taken.append((perf_counter() - start, _processor() - used))
    return Seconds(*map(median, zip(*taken[1:], strict=True)))


def _processor() -> float:
    """Seconds that processors spent on this process and those that it started and saw end."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def array_seconds(count: int, mode: Mode, capability: tuple[int, int]) -> Seconds:
    """Of the peaks of `count` candidates."""
    groups, workload = candidates(count), Workload(seq=SEQ, mode=mode)
    return seconds(lambda: [peaks(group, workload, Cuda(capability)) for group in groups])


def estimate_seconds(mode: Mode) -> Seconds:
    """Of one estimate."""
    pattern = SparsePatternConfig(pattern_type="local_window")
    config = AttentionConfig(variant="block_sparse", pattern=pattern)
    card = gpus.find("gtx1080")
    return seconds(lambda: estimate(config, Workload(seq=SEQ, mode=mode), card))


def start_seconds(arguments: str = ASKED) -> Seconds:
    """Of a process from start to end, its compiled modules on disk, as after an installation."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        settings.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-m", "planner", *arguments.split()]
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True, env=settings))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, epilog=f"example: {COMMAND}")
    parser.add_argument("--quick", action="store_true", help="1,000 candidates, no cold start")
    quick = parser.parse_args(arguments).quick
    count = 1000 if quick else 100_000
    for capability, card in (((6, 1), "Pascal"), ((8, 0), "Ampere")):
        for mode in MODES:
            taken = array_seconds(count, mode, capability)
            print(f"{count:,} candidates, {mode}, {card}: {taken}")
    for mode in MODES:
        print(f"one estimate, {mode}: {estimate_seconds(mode)}")
    if not quick:
        print(f"python -c pass: {seconds(lambda: subprocess.run([sys.executable, '-c', 'pass']))}")
        print(f"planner {ASKED}: {start_seconds()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
