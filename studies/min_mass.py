"""What does mass cost? `python -m studies.min_mass`

For each attention profile and card the fastest config of the grid that keeps at least so much of dense
attention's mass, as a share of dense attention's time; and what layouts that models are served with keep.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Final

import torch

from attention.config import AttentionConfig, SparsePatternConfig
from planner.quality.mass import mass_of
from planner.quality.profiles import PRESETS
from planner.recommendation import question
from planner.search.relax import NothingFitsError
from planner.workload import Workload
from studies.records import Row, Step, collect, markdown

COMMAND = "python -m studies.min_mass"
LEVELS: Final = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
CARDS: Final = ("gtx1080", "rtx4060", "h100")
LENGTHS: Final = (16_384, 131_072)
CPU = torch.device("cpu")


def _window(tokens: int, shared: int = 0) -> AttentionConfig:
    kind: Any = "global_local" if shared else "local_window"
    pattern = SparsePatternConfig(
        pattern_type=kind, block_size=64, local_window_size=tokens, global_tokens=max(shared, 1)
    )
    return AttentionConfig(variant="block_sparse", pattern=pattern)


KNOWN: Final[dict[str, AttentionConfig]] = {
    "window of 4,096 (Mistral 7B)": _window(4096),
    "window of 4,096 and 4 sinks (StreamingLLM)": _window(4096, 4),
    "window of 512 and 64 global tokens (Longformer)": _window(512, 64),
    "LongNet: 2,048 to 32,768, rates 1 to 16": AttentionConfig(
        variant="dilated", segment_lengths=(2048, 4096, 8192, 16_384, 32_768), dilation_rates=(1, 2, 4, 8, 16)
    ),
}


def price_row(profile: str, card: str, seq: int) -> Row:
    """Seconds of the fastest at each level, and of dense."""
    asked: dict[str, Any] = {"seq": seq, "gpu": card, "causal": True, "profile": profile, "trials": 0}
    row: Row = {"profile": profile, "card": card, "seq": seq, "seconds": {}}
    for level in (*LEVELS, 1.0):
        try:
            row["seconds"][str(level)] = question(None, min_mass=level, layers=None, **asked).answer.seconds
        except NothingFitsError:
            row["seconds"][str(level)] = None
    return row


def known_row(name: str) -> Row:
    """Mass of a layout under each profile, at each length."""
    return {
        "layout": name,
        "mass": {
            f"{profile} {seq}": mass_of(KNOWN[name], Workload(seq=seq, causal=True), PRESETS[profile])
            for profile in PRESETS
            for seq in LENGTHS
        },
    }


def prices_table(rows: list[Row]) -> str:
    """Median over cards and lengths of the share of dense attention's time."""
    body = []
    for profile in PRESETS:
        mine = [row["seconds"] for row in rows if row.get("profile") == profile]
        cells = [
            f"{median(each[str(level)] / each['1.0'] for each in mine if each[str(level)]):.1%}"
            for level in LEVELS
        ]
        body.append([profile, *cells])
    return markdown(body, ["profile", *(f"{level:g} of the mass" for level in LEVELS)])


def known_table(rows: list[Row]) -> str:
    """What known layouts keep."""
    layouts = [row for row in rows if "layout" in row]
    names = list(layouts[0]["mass"])
    return markdown(
        ([row["layout"], *(f"{row['mass'][name]:.1%}" for name in names)] for row in layouts),
        ["layout", *(f"{name.rpartition(' ')[0]}, {int(name.rpartition(' ')[2]):,}" for name in names)],
    )


def steps() -> list[Step]:
    prices: list[Step] = [
        (f"{profile} {card} {seq}", partial(price_row, profile, card, seq))
        for profile in PRESETS
        for card in CARDS
        for seq in LENGTHS
    ]
    return prices + [(name, partial(known_row, name)) for name in KNOWN]


TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "min-mass": ("min-mass", prices_table),
    "min-mass-known": ("min-mass", known_table),
}
"""The docs' tables: the study whose data they show, and what makes them from its rows."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, epilog=f"example: {COMMAND}")
    parser.add_argument("--quick", action="store_true", help="saves nothing")
    options = parser.parse_args(arguments)
    rows = collect("min-mass", COMMAND, CPU, steps(), keep=not options.quick)
    print(f"{prices_table(rows)}\n\n{known_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
