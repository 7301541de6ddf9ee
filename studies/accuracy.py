"""How far are predictions from measurements? `planner study accuracy`; for GPUs, `studies.bench.dry_model`

Memory, with the bound and with peers, on random configs that no calibration has seen; seconds, on timed runs
of other draws than those that the rates were fitted to. Run it on a machine that does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, Final

import numpy as np

from planner.report.plot.figure import BLUE, GREEN, INK, MUTED, ORANGE, RED, SKY, named, title
from studies.bench import dry_model, memory_model, speed_model
from studies.bench.memory_model import about_memory
from studies.bench.records import Job
from studies.bench.study import Findings, Results, Scope, Study

LONG: Final = 8192
"""Tokens beyond which a run is one of few: most are short, so that all that differs among them can vary."""
TOP: Final = 1.25
"""The upper end of the picture's axis of bounds; the number of those above it is written there."""
PEERS = dict(zip(memory_model.PEERS, (BLUE, ORANGE, RED, MUTED), strict=True))


def steps(scope: Scope) -> list[Job]:
    return [*memory_model.steps(scope), *speed_model.steps(scope)]


def memory_errors(rows: Results) -> dict[str, Any]:
    """Sizes of relative errors, ascending, of each that predicts, where it could."""
    by_name: dict[str, list[float]] = {name: [] for name in PEERS}
    for row in about_memory(rows):
        if row["outcome"] != "ok":
            continue
        for name in PEERS:
            prediction = (
                row["predicted"] if name == "this project" else row["peers"].get(name, {}).get("bytes")
            )
            if prediction is not None:
                by_name[name].append(abs(prediction - row["measured"]) / row["measured"])
    return {name: np.sort(errors) for name, errors in by_name.items() if errors}


def held_out(rows: Results) -> list[tuple[float, float]]:
    """(measured, predicted) seconds of the held-out runs."""
    pairs = speed_model.predicted(rows)
    return [(row["seconds"], guess) for row, guess in pairs if row["part"] == "held out"]


def draw(figure: Any, rows: Results) -> None:
    """Left: errors of memory, ours and peers'. Middle: the bound. Right: seconds. Dry runs have a picture of
    their own."""
    if dry_model.about_dry(rows):
        dry_model.draw(figure, rows)
        return
    figure.set_size_inches(11, 4.4)
    left, middle, right = figure.subplots(1, 3)
    left.set(yscale="log", ylim=(5e-5, 1e4), xlabel="cases, %", ylabel="error of allocated memory, %")
    for name, errors in memory_errors(rows).items():
        share = 100 * np.arange(1, errors.size + 1) / errors.size
        left.plot(share, 100 * np.maximum(errors, 1e-6), color=PEERS[name], drawstyle="steps-post")
    for place, name in enumerate(PEERS):
        left.annotate(name, (0.03, 0.95 - 0.06 * place), xycoords="axes fraction", color=PEERS[name])
    left.grid(axis="y")
    good = measured(rows)
    sizes = np.array([row["measured"] for row in good]) / 1e6
    bounds = [row["upper"] / row["measured"] for row in good]
    middle.scatter(sizes, bounds, s=8, color=SKY)
    minimum = min([0.95, *(0.99 * bound for bound in bounds)])
    beyond = sum(bound > TOP for bound in bounds)
    if beyond:
        middle.annotate(
            f"{beyond} of {len(good)} lie above, up to {max(bounds):,.1f}",
            (0.98, 0.98),
            xycoords="axes fraction",
            ha="right",
            va="top",
            color=MUTED,
        )
    middle.axhline(1, color=RED, linewidth=1)
    middle.annotate(
        "measured",
        (0.02, 1),
        xycoords=("axes fraction", "data"),
        xytext=(0, -12),
        textcoords="offset points",
        color=RED,
    )
    middle.set(xscale="log", xlabel="measured, MB", ylabel="upper bound / measured", ylim=(minimum, TOP))
    middle.grid(axis="y")
    held = held_out(rows)
    if held:
        measured_ms, predicted_ms = (1e3 * np.array(each) for each in zip(*held, strict=True))
        right.scatter(measured_ms, predicted_ms, s=10, color=GREEN)
        ends = np.array([measured_ms.min(), measured_ms.max()])
        right.plot(ends, ends, color=INK, linewidth=1)
        named(right, ends[1], ends[1], "equal", ha="right", xytext=(-6, 0))
    right.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
    right.grid()
    title(figure, _headline(good, held), "held-out runs on this machine")


def _headline(good: Results, held: list[tuple[float, float]]) -> str:
    exact = sum(row["predicted"] == row["measured"] for row in good)
    parts = [f"memory is predicted to the byte in {exact / len(good):.0%} of cases"] if good else []
    if held:
        parts.append(f"seconds are off by {_off(held):.1%} in the median")
    text = ", ".join(parts) or "Nothing to hold predictions against"
    return text[0].upper() + text[1:]


def _off(held: list[tuple[float, float]]) -> float:
    """The median error of seconds."""
    return median(abs(guess / seconds - 1) for seconds, guess in held)


def measured(rows: Results) -> Results:
    """The rows of memory whose case ran."""
    return [row for row in about_memory(rows) if row["outcome"] == "ok"]


def findings(rows: Results) -> Findings:
    if dry_model.about_dry(rows):
        return dry_model.findings(rows)
    held = held_out(rows)
    time = "no seconds were held against predictions"
    if held:
        time = (
            f"on a machine calibrated by itself seconds are off by {_off(held):.1%} in the median of "
            f"{len(held)}"
        )
    return Findings(
        "Asked: how far are predicted bytes and seconds from those of runs that no calibration has seen?",
        f"Found: {_memory(rows)}; {time}.",
        "The original project's own breakdowns miss q, k and v by a factor of eight (48 MB for 384 MiB), "
        "which is why nothing here is taken from them.",
    )


def _memory(rows: Results) -> str:
    good = measured(rows)
    if not good:
        return "of memory no run was measured"
    errors = memory_errors(rows)
    within = sum(row["measured"] <= row["upper"] for row in good)
    peer = errors.get("MemTracker, real tensors")
    beside = "" if peer is None else f", PyTorch's MemTracker by {np.median(peer):.1%}"
    ours = np.median(errors["this project"])
    lengths = sorted(row["workload"]["seq"] for row in good)
    long = [row for row in good if row["workload"]["seq"] > LONG]
    exact = sum(row["predicted"] == row["measured"] for row in long)
    worst = max((abs(row["predicted"] / row["measured"] - 1) for row in long), default=0.0)
    beyond = f"; of {len(long)} longer than {LONG:,} tokens {exact} are exact" if long else ""
    beyond += f", the worst off by {worst:.2%}" if long else ""
    return (
        f"memory is off by {ours:.3%} in the median{beside}, and {within} of {len(good)} runs, of "
        f"{lengths[0]:,} to {lengths[-1]:,} tokens and {lengths[len(lengths) // 2]:,} in the median, stay "
        f"within the bound{beyond}"
    )


def _of_runs(table: Callable[[Results], str]) -> Callable[[Results], str]:
    """A table that is empty for dry runs, which have tables of their own."""
    return lambda rows: "" if dry_model.about_dry(rows) else table(rows)


STUDY = Study(
    steps,
    {
        "memory-model": _of_runs(memory_model.errors_table),
        "memory-model-peers": _of_runs(memory_model.peers_table),
        "dry-model-bars": dry_model.bars_table,
        "dry-model": dry_model.errors_table,
        "dry-model-peers": dry_model.peers_table,
        "speed-model": _of_runs(speed_model.errors_table),
        "speed-model-choices": _of_runs(speed_model.choices_table),
    },
    draw,
    findings,
    devices=("cpu",),
)
