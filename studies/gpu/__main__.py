"""One command for the day that a GPU is at hand: is everything right, how much memory does it take, how fast
is it?

    python -m studies.gpu --minutes 8

does the most useful first and stops after so many minutes. The same command goes on where it stopped; Ctrl-C
stops it earlier, and what is done is kept. It writes gpu.MACHINE.json, which is worth committing, and
gpu.MACHINE.md, the page that says what ran, what failed and what there was no time for.

- checks: every way of the library against the oracle in float64
- peers: beside SDPA, with each of its backends, and compiled FlexAttention
- length: seconds and bytes by length; running out of memory is a figure too
- memory: bytes predicted beside measured
- dry runs: bytes of recorded dry runs of a card like this beside measured
- calibration: the runs of `planner calibrate`, as many as there is time for

A row that fails is recorded, and the run goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from attention.errors import AttentionPlannerError
from studies.bench.records import DATA, OK
from studies.gpu.run import run

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code: 0 done, 1 something is wrong or failed, 2 it cannot be asked, 130
    interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so many (default: 8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of data and page")
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        parser.error(f"--minutes must be above 0, got {given.minutes:g}")
    try:
        done = run(given.device, given.minutes, given.out)
    except AttentionPlannerError as error:
        print(f"studies.gpu: error: {error}", file=sys.stderr)
        return 2
    rows = done["rows"].values()
    bad = sum(row["outcome"] not in (OK, "oom", "refused") for row in rows)
    print(f"{len(rows)} rows, {bad} wrong or failed, {len(done['missing'])} not reached")
    print("\n".join(f"wrote {path}" for path in done["files"]))
    return INTERRUPTED if done["interrupted"] else int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
