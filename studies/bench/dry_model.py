"""How far are predictions for GPUs from dry runs? The third of `planner study accuracy` about cards that are
not there: the rows of a sweep (`studies.bench.dry`) beside what was predicted for them, as the study's data.

    python -m studies.bench.dry_model rows.jsonl --peers 60

predicts all rows of the files anew and makes them the data, in place of what was there; the first cases also
with what PyTorch's `MemTracker` says of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from attention.config import AttentionConfig
from planner import gpus
from planner.fitting.samples import Sample
from planner.memory.dry_runs import SEGMENT
from planner.question.dimensions import attention_kind
from planner.report.plot.figure import KINDS, MUTED, RED, title
from planner.standin.install import torch_for
from planner.standin.interpreter import interpreter
from planner.standin.zygote import Zygote
from planner.workload import Workload
from studies.bench.dry import CARDS, DryCase, Error, case_of, errors, goes_flex, publish, read_rows
from studies.bench.memory_model import tracked
from studies.bench.records import Row, markdown
from studies.bench.study import Findings, Results

ABOUT: Final = "dry"
"""What rows of this part are about."""
MODULE: Final = "studies.bench.dry_model"
"""This module, also where it is run as a program."""


class Goal(NamedTuple):
    """What the rows are to show."""

    what: str
    figure: Callable[[Results], float]
    limit: float
    at_least: bool
    """Whether the figure is to be at least the limit, or at most."""
    shown: str
    """How figure and limit are written."""


def data_row(row: Row, case: DryCase, error: Error | None) -> Row:
    """A row of the study's data, of one of a sweep; without an error it did not run."""
    config, workload, card = case
    kind = "multihead" if config.multihead else "weights" if workload.weights else attention_kind(config)
    made: Row = {
        "about": ABOUT,
        "case": f"{row['seed']}.{row['number']}",
        "card": card,
        "kind": kind,
        "mode": workload.mode,
        "config": row["config"],
        "workload": row["workload"],
        "outcome": row["kind"],
        **({"flex": True} if goes_flex(case) else {}),
        **({"message": row["message"]} if row["message"] else {}),
    }
    if error is None:
        return made
    estimated = error.predicted
    return made | {
        "measured": {name: row[name] for name in ("allocated", "reserved", "device")},
        "predicted": {
            "allocated": estimated.allocated,
            "reserved": estimated.reserved,
            "upper": estimated.upper,
        },
        **({"peer": row["peer"]} if "peer" in row else {}),
    }


def about_dry(rows: Results) -> Results:
    """The rows of this part."""
    return [row for row in rows if row["about"] == ABOUT]


def measured(rows: Results) -> Results:
    """Those whose case ran."""
    return [row for row in about_dry(rows) if row["outcome"] == "ok"]


def error(row: Row, name: str) -> float:
    """The relative error of a prediction, `allocated` or `reserved`; signed."""
    return float(row["predicted"][name] / row["measured"][name] - 1)


def tightness(row: Row) -> float:
    """The upper bound over what the card lost."""
    return float(row["predicted"]["upper"] / row["measured"]["device"])


def _near(rows: Results, name: str, within: float, segments: int = 0) -> float:
    """The share whose error is at most `within`, or so many segments of 2 MiB."""
    bytes_off = [abs(row["predicted"][name] - row["measured"][name]) for row in rows]
    close = [
        off <= within * row["measured"][name] or off <= segments * SEGMENT
        for off, row in zip(bytes_off, rows, strict=True)
    ]
    return float(sum(close) / len(close))


BARS: Final = (
    Goal("allocated within 0.1%", lambda rows: _near(rows, "allocated", 0.001), 0.97, True, "{:.1%}"),
    Goal("allocated within 1%", lambda rows: _near(rows, "allocated", 0.01), 1.0, True, "{:.1%}"),
    Goal("reserved within 1% or 2 MiB", lambda rows: _near(rows, "reserved", 0.01, 1), 0.95, True, "{:.1%}"),
    Goal(
        "runs above the upper bound", lambda rows: sum(tightness(row) < 1 for row in rows), 0, False, "{:.0f}"
    ),
    Goal(
        "upper bound / measured, median",
        lambda rows: median(tightness(row) for row in rows),
        1.02,
        False,
        "{:.3f}",
    ),
)


def kept(bar: Goal, rows: Results) -> bool:
    figure = bar.figure(rows)
    return bool(figure >= bar.limit if bar.at_least else figure <= bar.limit)


def errors_table(rows: Results) -> str:
    """Markdown: errors of allocated and reserved peaks by attention and mode, and together; empty without
    rows of this part."""
    rows = about_dry(rows)
    if not rows:
        return ""
    key = lambda row: (row["kind"], row["mode"])  # noqa: E731
    body = [[*name, *_errors(list(group))] for name, group in groupby(sorted(rows, key=key), key=key)]
    flex = [row for row in rows if row.get("flex")]
    if flex:
        body.append(["of them by FlexAttention", "", *_errors(flex)])
    head = ["attention", "mode", "cases", "did not run"]
    head += ["allocated: to the byte", "within 0.1%", "worst", "most under"]
    head += [
        "reserved: to the byte",
        "within 1% or 2 MiB",
        "most under",
        "within the bound",
        "bound / measured",
    ]
    return markdown([*body, ["all", "", *_errors(rows)]], head)


def _errors(rows: Results) -> list[str]:
    good = measured(rows)
    counts = [str(len(rows)), str(len(rows) - len(good))]
    if not good:
        return [*counts, *[""] * 9]
    signed = {name: [error(row, name) for row in good] for name in ("allocated", "reserved")}
    return [
        *counts,
        f"{_near(good, 'allocated', 0):.1%}",
        f"{_near(good, 'allocated', 0.001):.1%}",
        f"{max(map(abs, signed['allocated'])):.2%}",
        f"{max(0.0, -min(signed['allocated'])):.2%}",
        f"{_near(good, 'reserved', 0):.1%}",
        f"{_near(good, 'reserved', 0.01, 1):.1%}",
        f"{max(0.0, -min(signed['reserved'])):.1%}",
        str(sum(tightness(row) >= 1 for row in good)),
        f"{median(map(tightness, good)):.4f}",
    ]


def bars_table(rows: Results) -> str:
    """Markdown: what the predictions are to reach, and whether they do; empty without rows that ran."""
    good = measured(rows)
    if not good:
        return ""
    return markdown(
        (
            [
                bar.what,
                bar.shown.format(bar.figure(good)),
                f"{'at least' if bar.at_least else 'at most'} {bar.shown.format(bar.limit)}",
                "yes" if kept(bar, good) else "no",
            ]
            for bar in BARS
        ),
        ["of all that ran", "figure", "bar", "reached"],
    )


def peers_table(rows: Results) -> str:
    """Markdown: the errors of allocated peaks on the cases that PyTorch's MemTracker was asked about; empty
    where it was asked about none."""
    asked = [row for row in measured(rows) if "peer" in row]
    if not asked:
        return ""
    ours = [row["predicted"]["allocated"] for row in asked]
    peer = [row["peer"] for row in asked]
    return markdown(
        [["this project", *_peer(ours, asked)], ["MemTracker, in the dry run", *_peer(peer, asked)]],
        ["prediction by", "cases", "cannot", "median error", "worst", "under"],
    )


def _peer(predictions: Sequence[int | None], rows: Results) -> list[str]:
    off = [
        bytes_ / row["measured"]["allocated"] - 1
        for bytes_, row in zip(predictions, rows, strict=True)
        if bytes_ is not None
    ]
    counts = [str(len(rows)), str(len(rows) - len(off))]
    if not off:
        return [*counts, "", "", ""]
    size = [abs(share) for share in off]
    under = sum(share < 0 for share in off) / len(off)
    return [*counts, f"{median(size):.3%}", f"{max(size):.2%}", f"{under:.1%}"]


def draw(figure: Any, rows: Results) -> None:
    """Errors of allocated and of reserved peaks, and the bound, each by what was measured."""
    figure.set_size_inches(11, 4.6)
    good = measured(rows)
    left, middle, right = figure.subplots(1, 3)
    for axes, name in ((left, "allocated"), (middle, "reserved")):
        _scatter(axes, good, name, partial(_percent_off, name))
        axes.set_yscale("symlog", linthresh=0.1, linscale=0.6)
        axes.set(ylabel=f"{name} predicted, % off", ylim=(-60, 60))
        limit = 0.1 if name == "allocated" else 1.0
        axes.axhspan(-limit, limit, color=MUTED, alpha=0.15, linewidth=0)
        share = f"{100 * _near(good, name, limit / 100, int(name == 'reserved')):.1f}"
        what = f"{share}% within {limit:g}%" + (" or 2 MiB" if name == "reserved" else "")
        axes.annotate(what, (0.03, 0.96), xycoords="axes fraction", va="top", color=MUTED)
    _scatter(right, good, "device", tightness)
    right.axhline(1, color=RED, linewidth=1)
    right.annotate(
        "measured",
        (0.98, 1),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=RED,
    )
    right.set(ylabel="upper bound / measured", ylim=(min(0.98, *map(tightness, good)) - 0.005, None))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8)
    title(
        figure,
        _headline(good),
        "random configs on cards that are not there; filled: training, empty: inference",
    )


def _percent_off(name: str, row: Row) -> float:
    return 100 * error(row, name)


def _scatter(axes: Any, rows: Results, x: str, y: Callable[[Row], float]) -> None:
    for kind, (color, marker) in {**KINDS, "weights": (MUTED, "p")}.items():
        for mode, face in (("training", color), ("inference", "none")):
            mine = [row for row in rows if (row["kind"], row["mode"]) == (kind, mode)]
            axes.scatter(
                [row["measured"][x] / 1e6 for row in mine],
                [y(row) for row in mine],
                s=14,
                marker=marker,
                facecolors=face,
                edgecolors=color,
                linewidths=0.7,
                label=kind if mode == "training" else None,
            )
    axes.set(xscale="log", xlabel=f"{x} measured, MB")
    axes.grid(axis="y")


def _headline(good: Results) -> str:
    above = sum(tightness(row) < 1 for row in good)
    return f"On GPUs, by dry runs, {above or 'none'} of {len(good)} runs took more than the bound"


def findings(rows: Results) -> Findings:
    good = measured(rows)
    cards = len({row["card"] for row in good})
    missed = [bar.what for bar in BARS if not kept(bar, good)]
    bars = f"not reached: {', '.join(missed)}" if missed else "all bars are reached"
    lengths = np.array([row["workload"]["seq"] for row in good])
    return Findings(
        f"Asked: how far are bytes predicted for {cards} cards from those of dry runs, whose allocator and "
        "operators are real while kernels are not run?",
        f"Found: of {len(good)} runs, of {lengths.min():,} to {lengths.max():,} tokens, allocated peaks are "
        f"right to the byte in {_near(good, 'allocated', 0):.1%} and within 0.1% in "
        f"{_near(good, 'allocated', 0.001):.1%}, reserved ones within 1% or 2 MiB in "
        f"{_near(good, 'reserved', 0.01, 1):.1%}; {sum(tightness(row) < 1 for row in good)} took more than "
        f"the upper bound, which is {median(map(tightness, good)):.3f} times what was measured in the "
        f"median; {bars}.",
        "The original project has no planner: each of its figures is a run.",
    )


def published(rows: Iterable[Row]) -> Results:
    """The study's rows, of those of a sweep; what the library refuses to plan is none."""
    rows = [row for row in rows if row["kind"] != "refused"]
    by_case = {(e.row["seed"], e.row["number"]): e for e in errors(rows)}
    return [data_row(row, case_of(row), by_case.get((row["seed"], row["number"]))) for row in rows]


def tracked_bytes(config: Row, workload: Row) -> int:
    """What PyTorch's `MemTracker` says of a call on the card of this process; run in a dry run."""
    return tracked(Sample(AttentionConfig(**config), Workload(**workload)), torch.device("cuda", 0))


def with_peers(rows: Results, count: int) -> Results:
    """The rows, the first `count` of those that ran with what MemTracker says: bytes, or None where it raised
    an error."""
    build, ahead = torch_for(interpreter(sys.executable))
    asked = [row["case"] for row in measured(rows)][:count]
    made = []
    with Zygote(gpus.find(CARDS[0]), torch=build, ahead=ahead) as dry:
        for row in rows:
            if row["case"] in asked:
                sample = {"config": row["config"], "workload": row["workload"]}
                end = dry.run(MODULE, "tracked_bytes", sample, gpu=gpus.find(row["card"]))
                row = row | {"peer": end.value if end.kind == "ok" else None}
            made.append(row)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="files of rows of `studies.bench.dry`")
    parser.add_argument("--peers", type=int, default=0, help="cases that MemTracker is asked about too")
    given = parser.parse_args()
    for path in given.rows:
        if not path.exists():
            parser.error(f"there is no file {path}")
    swept = [row for path in given.rows for row in read_rows(path)]
    rows = published(swept)
    if given.peers:
        rows = with_peers(rows, given.peers)
    command = f"python -m {MODULE} FILE --peers {given.peers}"
    print(f"wrote {publish('accuracy', command, rows, [row['torch'] for row in swept if row.get('torch')])}")
    print(bars_table(rows))


if __name__ == "__main__":
    main()
