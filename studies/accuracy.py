"""How far are predictions from measurements? `planner study accuracy`

Memory, with the bound and with peers, on random configs that no calibration has seen; seconds, on timed runs
of other draws than those that the rates were fitted to. Run it on a machine that does nothing else.
"""

from __future__ import annotations

from statistics import median
from typing import Any, Final

import numpy as np

from planner.report.figure import BLUE, GREEN, INK, MUTED, ORANGE, RED, SKY, named, title
from studies import memory_model, speed_model
from studies.memory_model import about_memory
from studies.records import Step
from studies.study import Rows, Said, Scope, Study

LONG: Final = 8192
"""Tokens beyond which a run is one of few: most are short, so that all that differs among them can vary."""
PEERS = dict(zip(memory_model.PEERS, (BLUE, ORANGE, RED, MUTED), strict=True))


def steps(scope: Scope) -> list[Step]:
    return [*memory_model.steps(scope), *speed_model.steps(scope)]


def memory_errors(rows: Rows) -> dict[str, Any]:
    """Sizes of relative errors, ascending, of each that predicts, where it could."""
    found: dict[str, list[float]] = {name: [] for name in PEERS}
    for row in about_memory(rows):
        if row["outcome"] != "ok":
            continue
        for name in PEERS:
            said = row["predicted"] if name == "this project" else row["peers"].get(name, {}).get("bytes")
            if said is not None:
                found[name].append(abs(said - row["measured"]) / row["measured"])
    return {name: np.sort(errors) for name, errors in found.items() if errors}


def held_out(rows: Rows) -> list[tuple[float, float]]:
    """(measured, predicted) seconds of the held-out runs."""
    pairs = speed_model.predicted(rows)
    return [(row["seconds"], guess) for row, guess in pairs if row["part"] == "held out"]


def draw(figure: Any, rows: Rows) -> None:
    """Left: errors of memory, ours and peers'. Middle: the bound. Right: seconds."""
    figure.set_size_inches(11, 4.4)
    left, middle, right = figure.subplots(1, 3)
    for name, errors in memory_errors(rows).items():
        share = 100 * np.arange(1, errors.size + 1) / errors.size
        left.plot(share, 100 * np.maximum(errors, 1e-6), color=PEERS[name], drawstyle="steps-post")
    for place, name in enumerate(PEERS):
        left.annotate(name, (0.03, 0.95 - 0.06 * place), xycoords="axes fraction", color=PEERS[name])
    left.set(yscale="log", ylim=(5e-5, 1e4), xlabel="cases, %", ylabel="error of allocated memory, %")
    left.grid(axis="y")
    good = [row for row in about_memory(rows) if row["outcome"] == "ok"]
    sizes = np.array([row["measured"] for row in good]) / 1e6
    middle.scatter(sizes, [row["upper"] / row["measured"] for row in good], s=8, color=SKY)
    middle.axhline(1, color=RED, linewidth=1)
    middle.annotate("measured", (0.02, 1), xycoords=("axes fraction", "data"), xytext=(0, -12),
                    textcoords="offset points", color=RED)  # fmt: skip
    middle.set(xscale="log", xlabel="measured, MB", ylabel="upper bound / measured", ylim=(0.95, 1.25))
    middle.grid(axis="y")
    held = held_out(rows)
    measured, guessed = (1e3 * np.array(each) for each in zip(*held, strict=True))
    right.scatter(measured, guessed, s=10, color=GREEN)
    ends = np.array([measured.min(), measured.max()])
    right.plot(ends, ends, color=INK, linewidth=1)
    named(right, ends[1], ends[1], "equal", ha="right", xytext=(-6, 0))
    right.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
    right.grid()
    title(figure, "Memory is predicted to the byte in most cases, seconds to about a tenth",
          "held-out runs on this machine")  # fmt: skip


def said(rows: Rows) -> Said:
    good = [row for row in about_memory(rows) if row["outcome"] == "ok"]
    errors = memory_errors(rows)
    within = sum(row["measured"] <= row["upper"] for row in good)
    held = held_out(rows)
    off = median(abs(guess / seconds - 1) for seconds, guess in held)
    peer = errors.get("MemTracker, real tensors")
    beside = "" if peer is None else f", PyTorch's MemTracker by {np.median(peer):.1%}"
    ours = np.median(errors["this project"])
    lengths = sorted(row["workload"]["seq"] for row in good)
    long = [row for row in good if row["workload"]["seq"] > LONG]
    exact = sum(row["predicted"] == row["measured"] for row in long)
    off_most = max((abs(row["predicted"] / row["measured"] - 1) for row in long), default=0.0)
    beyond = f"; of {len(long)} longer than {LONG:,} tokens {exact} are exact" if long else ""
    beyond += f", the worst off by {off_most:.2%}" if long else ""
    return Said(
        "Asked: how far are predicted bytes and seconds from those of runs that no calibration has seen?",
        f"Found: memory is off by {ours:.3%} in the median{beside}, and {within} of {len(good)} runs, of "
        f"{lengths[0]:,} to {lengths[-1]:,} tokens and {lengths[len(lengths) // 2]:,} in the median, stay "
        f"within the bound{beyond}; on a machine calibrated by itself seconds are off by {off:.1%} in the "
        f"median of {len(held)}.",
        "The seeds' own breakdowns miss q, k and v by a factor of eight (48 MB for 384 MiB), which is why "
        "nothing here is taken from them.",
    )


STUDY = Study(
    steps,
    {
        "memory-model": memory_model.errors_table,
        "memory-model-peers": memory_model.peers_table,
        "speed-model": speed_model.errors_table,
        "speed-model-choices": speed_model.choices_table,
    },
    draw,
    said,
    devices=("cpu",),
)
