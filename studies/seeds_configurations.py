"""Configuration A against B of the seeds, part by part: `python -m studies.seeds_configurations`

They say that large segments, more rates and larger blocks double the memory of one implementation, from
128 to 305 MB at 131,072 tokens. Here both configs are planned, beside the seeds' own arithmetic.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from attention.config import AttentionConfig
from planner.comparison import Comparison, Side, compare
from planner.memory.estimate import estimate
from planner.units import format_bytes
from planner.workload import Workload

COMMAND = "python -m studies.seeds_configurations"
EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
SEQ = 131_072
DEVICE = "gtx1080"


class Claim(NamedTuple):
    """A line of the seeds' breakdown of A and of B, as it is written there, and what to hold against it."""

    what: str
    a: str
    b: str
    found: str


CLAIMS = (
    Claim("q, k, v and out", "not counted", "not counted", "4 x 131,072 x 8 x 64 x 2 bytes: 537 MB"),
    Claim("segment buffer", "64 times 2 MB", "128 MB", "none: segments are views, or lists of one tile"),
    Claim("pattern indices", "200 KB", "13 MB", "2 bytes a block, in host memory"),
    Claim("temporary arrays", "1 MB", "64 MB", "one tile, whatever the segment"),
    Claim("segment structures", "none", "100 MB", "none"),
    Claim("together", "128 MB", "305 MB", "less than q, k, v and out alone"),
)


def comparison(seq: int = SEQ) -> Comparison:
    """Both configs on the seeds' card."""
    sides = (
        AttentionConfig.from_json((EXAMPLES / f"{name}.json").read_bytes()) for name in ("small", "large")
    )
    a, b = (Side(estimate(config, Workload(seq=seq), DEVICE)) for config in sides)
    return compare(a, b)


def components_table(found: Comparison) -> str:
    """Component by component, as Markdown."""
    a, b = found.a.estimate, found.b.estimate
    rows = [(name, *both) for name, both in found.components.items() if name != "context"]
    rows += [("**allocated**", a.allocated, b.allocated), ("reserved", a.reserved, b.reserved)]
    lines = ["| component | A | B | B - A |", "| --- | ---: | ---: | ---: |"]
    for name, one, two in rows:
        lines.append(f"| {name} | {format_bytes(one)} | {format_bytes(two)} | {_change(two - one)} |")
    return "\n".join(lines)


def claims_table() -> str:
    """What the seeds say, as Markdown."""
    lines = ["| the seeds' line | A | B | here |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(claim)} |" for claim in CLAIMS)])


def _change(count: int) -> str:
    return f"{'+' if count > 0 else '-'}{format_bytes(abs(count))}" if count else "="


def text(seq: int = SEQ) -> str:
    """Both tables."""
    return f"{components_table(comparison(seq))}\n\n{claims_table()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, epilog=f"example: {COMMAND}")
    parser.parse_args(arguments)
    print(text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
