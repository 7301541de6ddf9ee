"""What `tune` shows: a line for each trial, and the result, as plain text of at most 80 columns."""

from __future__ import annotations

from planner.answers.tuned import Trial, Tuned
from planner.question.dimensions import attention_kind
from planner.report.text import words
from planner.report.text.recommend import pairs, shape
from planner.report.text.times import seconds
from planner.search.tune import TuningProgress
from planner.units import format_bytes


def progress_text(now: TuningProgress) -> str:
    """A line about the trial that ended last and the best one so far."""
    assert now.last is not None
    best = f"best {seconds(now.best.seconds)}" if now.best and now.best.seconds else "none has run yet"
    return f"{now.measured} of {now.wanted}: {outcome(now.last)}, {named(now.last)}; {best}"


def tuned_text(tuned: Tuned) -> str:
    """The fastest, what it was compared with, and all that was measured, fastest first."""
    best, analytic = tuned.best, tuned.analytic
    rows = [
        ("config", shape(best.config)),
        ("time", f"{outcome(best)} a call, measured; {seconds(best.predicted)} were predicted"),
        ("memory", _memory(best)),
        ("analytic", f"{outcome(analytic)}, {named(analytic)}: the fastest takes {_ratio(tuned)} of it"),
        ("trials", _counts(tuned)),
        ("kept in", f"{tuned.storage}, study {tuned.study}"),
    ]
    head = [f"{words.attention(best.config)}, on {tuned.on}", words.task(tuned.workload)]
    ordered = sorted(tuned.trials, key=lambda t: (t.seconds if t.good and t.seconds else 1e9, t.number))
    counted = any(trial.launches is not None for trial in ordered[:15])
    heading = f" {'launches':>10}" * counted
    table = [f"{'trial':>5}  {'time':>9} {'predicted':>10} {'memory':>11}{heading}  config"]
    for trial in ordered[:15]:
        memory = format_bytes(trial.allocated) if trial.allocated else "-"
        number = "-" if trial.launches is None else f"{trial.launches:,}"
        line = f"{trial.number:>5}  {outcome(trial):>9} {seconds(trial.predicted):>10} {memory:>11}"
        line += f" {number:>10}" * counted + "  "
        table.append(line + named(trial)[: 80 - len(line)])
    return "\n\n".join("\n".join(part) for part in (head, pairs(rows), table))


def outcome(trial: Trial) -> str:
    """A trial's time, or how else it ended."""
    return seconds(trial.seconds) if trial.good and trial.seconds else trial.kind


def named(trial: Trial) -> str:
    """A trial's config in words."""
    return f"{attention_kind(trial.config)}: {shape(trial.config)}"


def _memory(trial: Trial) -> str:
    if trial.allocated is None:
        return f"{format_bytes(trial.upper)} at most, predicted"
    return f"{format_bytes(trial.allocated)} measured, {format_bytes(trial.upper)} at most predicted"


def _ratio(tuned: Tuned) -> str:
    return f"{1 / tuned.speedup:.1%}" if tuned.speedup else "-"


def _counts(tuned: Tuned) -> str:
    failed = sum(not trial.good for trial in tuned.trials)
    reused = f", {tuned.kept} of them kept from before" if tuned.kept else ""
    return f"{len(tuned.trials)} measured{reused}; {failed} did not run within the budget"
