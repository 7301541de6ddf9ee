"""What `recommend` shows, as plain text of at most 80 columns. Imports neither torch nor rich."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from attention.config import MIB, AttentionConfig
from planner.answers.recommendation import Pick, Recommendation, Step, Why, Without
from planner.answers.shared import SharedEstimate
from planner.question.dimensions import attention_kind
from planner.ranks.ring import way_text
from planner.report.text import words
from planner.report.text.estimate import WIDTH, label, launches, notes, waterfall, wrapped
from planner.report.text.shared import sharing_rows
from planner.report.text.snippet import snippet
from planner.units import format_bytes

if TYPE_CHECKING:
    from planner.answers.verified import Verified

NAME = 13
"""Columns of the name at the beginning of a row."""
_MEASURE = {"speed": "faster", "seq": "longer", "quality": "more mass"}


def recommend_text(answer: Recommendation, ink: str = "#") -> str:
    """The answer, the three picks, the budget, the reasons, the snippet."""
    parts = [
        _head(answer),
        _answer(answer),
        pairs(_shared(answer)),
        _picks(answer.alternatives),
        _budget(answer, ink),
        _why(answer),
        _steps(answer),
        _search(answer),
        [line for note in notes(answer.memory) for line in wrapped(f"note: {note}", "  ")],
        ["as a program (also: --format py)", "", *snippet(answer.config, answer.workload).splitlines()],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _head(answer: Recommendation) -> list[str]:
    return [f"{words.attention(answer.config)}, on {answer.on}", words.task(answer.workload)]


def _answer(answer: Recommendation) -> list[str]:
    left = answer.budget - answer.reserve - answer.memory.upper
    quality = answer.quality
    rows = [
        ("config", shape(answer.config)),
        (
            "memory",
            f"{format_bytes(answer.memory.upper)} at most, of {budgeted(answer)}; "
            f"{format_bytes(left)} left"
            + f", {format_bytes(answer.reserve)} reserved"
            * (answer.reserve > 0),
        ),
        ("", answer.memory.confidence),
        ("time", f"{seconds(answer.seconds)} a call, predicted"),
        ("attends to", f"{quality.mass:.1%} of dense attention's mass, profile {quality.profile!r}"),
        ("reach", reach(quality.layers)),
        ("calibration", answer.calibration),
    ]
    return pairs(rows)


def _shared(answer: Recommendation) -> list[tuple[str, str]]:
    """How GPUs share the call, but for the seconds' source, which is said with the calibration."""
    memory = answer.memory
    return sharing_rows(memory)[:-1] if isinstance(memory, SharedEstimate) else []


def shape(config: AttentionConfig) -> str:
    """The chosen value of each dimension, in words."""
    parts = []
    pattern = config.pattern
    if pattern is not None:
        parts.append(f"block {pattern.block_size}")
        if config.variant == "adaptive" or pattern.pattern_type == "dilated_sparse":
            parts.append(f"{pattern.sparsity_ratio:.3g} of blocks")
        else:
            parts.append(f"window {pattern.local_window_size:,}")
        if config.variant == "block_sparse" and pattern.pattern_type == "global_local":
            parts.append(f"global {pattern.global_tokens:,}")
        if config.token_edges:
            parts.append("edges token")
    if config.segment_lengths:
        branches = ", ".join(f"{length:,} / {rate}" for length, rate in config.branches)
        parts.append(f"segments / rates {branches}")
    if config.backend != "auto":
        parts.append(f"backend {config.backend}")
    parts.append(f"workspace {config.workspace_bytes / MIB:g} MiB")
    if config.sharding is not None:
        parts.append(f"exchange {way_text(config.sharding)}")
    return "; ".join(parts)


def seconds(value: float) -> str:
    """Seconds with a unit: 4,560 s, 1.23 s, 45.6 ms or 789 us."""
    if 999.5 <= value < 1e9:
        return f"{value:,.0f} s"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError


def reach(layers: int | None) -> str:
    """Reach in words; None: never."""
    if layers is None:
        return "never: some tokens stay out of reach, however many layers"
    return f"every token that causality permits, within {layers} layer{'s' * (layers != 1)}"


def budgeted(answer: Recommendation) -> str:
    """The budget, which is that of each of several GPUs."""
    each = f" of each of {answer.workload.gpus:,} GPUs" if answer.workload.gpus > 1 else ""
    return format_bytes(answer.budget) + each


def _picks(picks: Sequence[Pick]) -> list[str]:
    if not picks:
        return []
    rows: list[tuple[str, list[str]]] = [
        ("", [pick.role for pick in picks]),
        ("attention", [attention_kind(pick.config) for pick in picks]),
        *_dimensions(picks),
        ("tokens", [f"{pick.seq:,}" for pick in picks]),
        ("memory", [format_bytes(pick.upper) for pick in picks]),
        ("time", [seconds(pick.seconds) for pick in picks]),
        ("mass", [f"{pick.mass:.1%}" for pick in picks]),
        ("layers", [str(pick.layers) if pick.layers else "never" for pick in picks]),
        *_launches(picks),
    ]
    return [f"{name:<{NAME}}" + "".join(f"{cell:<22.21}" for cell in cells).rstrip() for name, cells in rows]


def _launches(picks: Sequence[Pick]) -> Iterator[tuple[str, list[str]]]:
    """A row where any pick is for a GPU and has its kernels counted."""
    if any(pick.launches is not None for pick in picks):
        yield "launches", ["-" if pick.launches is None else launches(pick.launches) for pick in picks]


def _dimensions(picks: Sequence[Pick]) -> Iterator[tuple[str, list[str]]]:
    """A row for each dimension that any of the picks has."""

    def row(name: str, cells: list[str]) -> Iterator[tuple[str, list[str]]]:
        if any(cells):
            yield name, [cell or "-" for cell in cells]

    patterns = [pick.config.pattern for pick in picks]
    yield from row("block", [str(p.block_size) if p else "" for p in patterns])
    kinds = [attention_kind(pick.config) for pick in picks]
    yield from row(
        "window",
        [
            f"{p.local_window_size:,}" if p and k in ("local_window", "global_local") else ""
            for p, k in zip(patterns, kinds, strict=True)
        ],
    )
    yield from row("edges", ["token" if pick.config.token_edges else "" for pick in picks])
    yield from row(
        "blocks kept",
        [
            f"{p.sparsity_ratio:.3g}" if p and k in ("dilated_sparse", "adaptive") else ""
            for p, k in zip(patterns, kinds, strict=True)
        ],
    )
    shared = [way_text(pick.config.sharding) if pick.config.sharding else "" for pick in picks]
    yield from row("exchange", shared)
    for n in range(max(len(pick.config.branches) for pick in picks)):
        branches = [pick.config.branches[n : n + 1] for pick in picks]
        yield f"branch {n + 1}", [f"{b[0][0]:,} / {b[0][1]}" if b else "-" for b in branches]


def _budget(answer: Recommendation, ink: str) -> list[str]:
    """The budget, share by share, with bars of `ink`."""
    whole = answer.budget
    shares = [(label(step.name), step.bytes) for step in waterfall(answer.memory)]
    shares += [("margin", answer.memory.upper - answer.memory.device), ("reserved", answer.reserve)]
    shares.append(("left", whole - answer.reserve - answer.memory.upper))
    bar = WIDTH - 42
    lines = [f"{'the budget':<{WIDTH - 20}} {'bytes':>11} {'share':>7}"]
    for name, count in shares:
        if count > 0:
            drawn = (ink if name != "left" else ".") * max(round(count / whole * bar), 1)
            text = f"{name:<18.18} {drawn}"
            lines.append(f"{text:<{WIDTH - 20}} {format_bytes(count):>11} {count / whole:>7.1%}")
    return lines


def _why(answer: Recommendation) -> list[str]:
    return pairs(reasons(answer.why, answer.objective))


def reasons(why: Why, objective: str) -> list[tuple[str, str]]:
    """Why this config was chosen, as (name, text) each."""
    rows = []
    if why.binding is None:
        rows.append(("why", "no constraint binds: without any of them the answer would be the same"))
    for one in why.without:
        rows.append(("why" if one is why.without[0] else "", _without(one, objective)))
    if why.runner_up is not None and why.behind is not None:
        rows.append(
            (
                "runner-up",
                f"{attention_kind(why.runner_up.config)}: {shape(why.runner_up.config)}; "
                f"{_behind(why.behind, objective)}",
            )
        )
    return rows


def _without(one: Without, objective: str) -> str:
    better = f"{one.gain:.1%} {_MEASURE[objective]}"
    if objective != "quality" and one.gain >= 1:
        better = f"{1 + one.gain:.1f} times as {'fast' if objective == 'speed' else 'long'}"
    pick = one.pick
    return (
        f"{one.constraint} binds: without it {better}, by {attention_kind(pick.config)} with {pick.mass:.1%} "
        f"of the mass in {format_bytes(pick.upper)}"
    )


def _behind(behind: float, objective: str) -> str:
    if abs(behind) < 0.0005:
        return "as good"
    if objective == "speed":
        return f"{1 / max(1 - behind, 1e-9) - 1:.1%} slower"
    return f"{behind:.1%} less"


def _steps(answer: Recommendation) -> list[str]:
    if not answer.why.steps:
        return []
    lines = [f"{'one step':<34}{'time':>9}{'memory':>11}{'mass':>8}{'layers':>8}  fails"]
    for step in answer.why.steps:
        change = changed(answer, step)
        figures = f"{f'{dimension(step)} to {step.after}':<33.33} {change.time:>9}{change.memory:>11}"
        figures += f"{change.mass:>8}{step.layers or 'never':>8}"
        lines.append(f"{figures}  {','.join(step.failed)}".rstrip())
    return lines


class Change(NamedTuple):
    """The changes that a step of one dimension makes, in words."""

    time: str
    memory: str
    mass: str
    """Percentage points."""


def changed(answer: Recommendation, step: Step) -> Change:
    memory = step.upper - answer.memory.upper
    return Change(
        f"{step.seconds / answer.seconds - 1:+.1%}" if answer.seconds > 0 else "-",
        ("+" if memory >= 0 else "-") + format_bytes(abs(memory), 1),
        f"{(step.mass - answer.quality.mass) * 100:+.1f}",
    )


def dimension(step: Step) -> str:
    """The dimension that a step changes, as the options name it."""
    return step.dimension.removesuffix("_bytes").removesuffix("_size")


def _search(answer: Recommendation) -> list[str]:
    return pairs([("searched", searched(answer))])


def searched(answer: Recommendation) -> str:
    """How many candidates were evaluated and tried, and what the trials gained."""
    search = answer.search
    text = (
        f"{search.grid:,} candidates of the grid, all evaluated: {search.fit:,} fit, {search.passed:,} of "
        f"them pass mass and time"
    )
    if search.trials:
        gap = f"{search.gain:.2%} {_MEASURE[answer.objective]} than" if search.gain > 0 else "no better than"
        text += f"; {search.trials:,} trials over the full space: {gap} the grid's exact optimum"
    return text


def pairs(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Rows of (name, text) as lines of at most 80 columns."""
    return [line for name, text in rows for line in wrapped(text, " " * NAME, first=f"{name:<{NAME}}")]


def verified_text(results: Sequence[Verified]) -> str:
    """The picks as they ran here: measured memory and time beside the predicted."""
    lines = [f"{'measured here':<14}{'memory':>12}{'upper bound':>14}{'time':>11}{'predicted':>11}  outcome"]
    for one in results:
        memory = format_bytes(one.allocated) if one.allocated is not None else "-"
        time = seconds(one.seconds) if one.seconds is not None else "-"
        lines.append(
            f"{one.role:<14}{memory:>12}{format_bytes(one.upper):>14}{time:>11}{seconds(one.predicted):>11}"
            f"  {one.kind}"
        )
        if one.message:
            lines += wrapped(one.message, "    ", first="    ")
    return "\n".join(lines)
