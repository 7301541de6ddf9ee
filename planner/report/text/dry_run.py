"""A dry run for people, in 80 columns. Imports no torch."""

from __future__ import annotations

import shlex
from typing import Final

from planner import gpus
from planner.answers.dry_run import DryRun, OutOfMemory
from planner.report.text.estimate import WIDTH, wrapped
from planner.units import format_bytes

STEPS: Final = 4
"""Steps that are shown, the last among them."""
REAL: Final = "allocator and operators are torch's own, kernels did nothing, values are garbage"


def dry_run_text(run: DryRun) -> str:
    """What ran where, what it took and whether it fitted, what held memory at the peak, what to beware of."""
    card = gpus.find(run.gpu)
    size = run.gpus[0].total if run.gpus else card.usable_bytes
    head = [
        *wrapped(shlex.join(run.command), "  "),
        *wrapped(f"on {card.name} with {format_bytes(size)}, torch {run.torch}: a dry run; {REAL}", "  "),
    ]
    if not run.used and run.out_of_memory is None:
        notes = [line for note in run.warnings for line in wrapped(f"note: {note}", "  ")]
        return "\n".join([*head, "", f"It used no card, and ended with exit code {run.exit_code}.", *notes])
    parts = [head, _figures(run), _verdict(run), _holders(run), _steps(run)]
    parts += [[line for note in run.warnings for line in wrapped(f"note: {note}", "  ")]]
    parts += [[line for name in run.unknown for line in wrapped(f"not in these figures: {name}", "  ")]]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _row(name: str, count: int, what: str) -> str:
    return f"{name:<10} {format_bytes(count):>10}  {what}".rstrip()


def _figures(run: DryRun) -> list[str]:
    if not run.gpus:
        return []
    outside = run.device - run.reserved
    rows = [
        _row("allocated", run.allocated, "tensors, at their peak"),
        _row("reserved", run.reserved, "the allocator's segments, at their peak"),
        _row("device", run.device, f"with {format_bytes(outside)} for the CUDA context"),
        _row("left", run.left, f"of {format_bytes(run.gpus[0].total)}"),
    ]
    if len(run.gpus) > 1:
        rows += [
            _row(f"gpu {use.gpu}", use.device, f"device; {format_bytes(use.allocated)} allocated")
            for use in run.gpus
        ]
    return rows


def _verdict(run: DryRun) -> list[str]:
    out = run.out_of_memory
    lines = []
    if out is not None:
        lines += wrapped(_out(out, run.exit_code), "  ")
    elif run.stopped:
        lines += wrapped(f"It fits so far: asked to end after {run.stepped} optimizer steps.", "  ")
    elif run.left < 0:
        lines += [f"It does not fit: the card has {format_bytes(-run.left)} too little."]
    else:
        lines += ["It fits." if run.exit_code == 0 else f"It ended with exit code {run.exit_code}."]
    if run.retries and out is None:
        times = f"{run.retries} times" if run.retries > 1 else "once"
        lines += wrapped(f"The allocator gave its cache back and tried again {times}: it is tight.", "  ")
    if run.error and (out is None or out.caught):
        lines += wrapped(run.error, "  ")
    return lines


def _out(out: OutOfMemory, code: int) -> str:
    when = f"after {out.step} optimizer steps" if out.step != 1 else "after 1 optimizer step"
    missing = (
        f"{format_bytes(out.short)} too little"
        if out.short
        else "kept by fragmentation or a limit of its own"
    )
    text = (
        f"Out of memory {when}: {format_bytes(out.requested)} were asked for and {format_bytes(out.free)} "
        f"left, {missing}, at {out.where}."
    )
    if not out.caught:
        return text
    return f"{text} The program caught it and {'went on' if code == 0 else f'ended with exit code {code}'}."


def _holders(run: DryRun) -> list[str]:
    if not run.largest:
        return []
    rows = [f"{'held at the peak, by where it was made':<{WIDTH - 20}} {'bytes':>11} {'tensors':>7}"]
    for held in run.largest:
        *begin, last = wrapped(held.where, "  ", first="")
        if len(last) > WIDTH - 21:
            begin, last = [*begin, last], ""
        rows += [*begin, f"{last:<{WIDTH - 20}} {format_bytes(held.bytes):>11} {held.tensors:>7,}"]
    return rows


def _steps(run: DryRun) -> list[str]:
    if not run.steps:
        return []
    shown = run.steps if len(run.steps) <= STEPS else (*run.steps[: STEPS - 1], run.steps[-1])
    rows = [f"{'optimizer step':<14} {'allocated':>11} {'reserved':>11}   peaks so far"]
    for step in shown:
        rows.append(
            f"{step.number:<14,} {format_bytes(step.allocated):>11} {format_bytes(step.reserved):>11}"
        )
    return rows
