"""What studies of settings have in common: a config's memory and time, predicted for a card and measured
where the study runs, the mass and the reach that it keeps, and the table of all that.

A row is {"name", "series", "kind", "x", "config", "quality", "planned", "here"}, plus what a study adds.
`planned` is of the card, `here` of this machine, with what was predicted for it under `expected`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch

from attention.config import AdaptiveConfig, AttentionConfig, PatternType, SparsePatternConfig
from planner import gpus
from planner.measuring.server import Batch
from planner.memory.estimate import estimate, machine_of
from planner.quality.mass import mass_of
from planner.quality.profiles import DEFAULT, PRESETS
from planner.quality.reach import layers
from planner.question.dimensions import attention_kind
from planner.report.plot.figure import BLUE, GREEN, ORANGE, RED
from planner.speed.rates import speed_rates_of
from planner.speed.seconds import seconds_of
from planner.workload import Dtype, Workload
from studies.bench.panels import Curves, Panel, ReadRow, Series
from studies.bench.records import Job, Row, markdown
from studies.bench.study import Results, Scope

SEEDS_CARD: Final = "gtx1080"
"""The card of the original project."""
FLEX_CARD: Final = "h100-sxm"
"""A card on which block-sparse attention runs as compiled FlexAttention."""
HEADS, HEAD_DIM = 8, 64
"""Heads and channels of all workloads here, as in the original project."""
RUNS, TIMEOUT = 5, 300.0
Target = Literal["cpu"] | gpus.Gpu


class StudyConfig(NamedTuple):
    """A config of a study, and what it is sorted and drawn by."""

    name: str
    config: AttentionConfig
    series: str
    x: float = 0.0
    more: Mapping[str, Any] | None = None
    """Further fields of the row."""


class Purpose(NamedTuple):
    """The workload and the card that predictions are for."""

    workload: Workload
    card: Target


class Here(NamedTuple):
    """The device and the workload that a study measures."""

    plan: Purpose
    batch: Batch
    longest: float
    """Seconds of a call; configs that are predicted to take longer are not measured."""


def sparse(
    lengths: Sequence[int] = (),
    rates: Sequence[int] = (),
    *,
    kind: PatternType = "dilated_sparse",
    block: int = 64,
    **fields: Any,
) -> AttentionConfig:
    """A block-sparse config; `fields` are of its pattern."""
    return AttentionConfig(
        variant="block_sparse",
        segment_lengths=tuple(lengths),
        dilation_rates=tuple(rates),
        pattern=SparsePatternConfig(pattern_type=kind, block_size=block, **fields),
    )


def dilated(lengths: Sequence[int], rates: Sequence[int]) -> AttentionConfig:
    return AttentionConfig(variant="dilated", segment_lengths=tuple(lengths), dilation_rates=tuple(rates))


def adaptive(block: int, ratio: float) -> AttentionConfig:
    return AttentionConfig(
        variant="adaptive",
        pattern=SparsePatternConfig(block_size=block, sparsity_ratio=ratio),
        adaptive=AdaptiveConfig(num_heads=HEADS, head_dim=HEAD_DIM),
    )


def task(seq: int, **sizes: Any) -> Workload:
    """The workload of every config of a study."""
    return Workload(seq=seq, heads=HEADS, head_dim=HEAD_DIM, **sizes)


def here(scope: Scope, seq: int, longest: float = 3.0, **sizes: Any) -> Here:
    """This device, in the type that it computes best in: single precision on a CPU, whose matrix units for 16
    bits are rare, and float16 on a GPU."""
    batch = scope.batch(runs=1 if scope.quick else RUNS, reference=True, timeout=TIMEOUT)
    card: Target = "cpu"
    dtype: Dtype = "float32"
    if scope.device.type == "cuda":
        card, dtype = gpus.find(torch.cuda.get_device_name(scope.device)), "float16"
    return Here(Purpose(task(seq, dtype=dtype, **sizes), card), batch, longest)


def case_steps(cases: Iterable[StudyConfig], plan: Purpose, place: Here) -> list[Job]:
    """One step for each case."""
    return [(case.name, partial(row, case, plan, place)) for case in cases]


def row(case: StudyConfig, plan: Purpose, place: Here) -> Row:
    """One config: predicted, measured, judged."""
    profile = PRESETS[DEFAULT]
    return {
        "name": case.name,
        "series": case.series,
        "x": case.x,
        "kind": attention_kind(case.config),
        **(case.more or {}),
        "config": case.config.model_dump(mode="json", exclude_defaults=True),
        "quality": {
            "profile": profile.name,
            "mass": mass_of(case.config, plan.workload, profile),
            "layers": layers(case.config, plan.workload),
        },
        "planned": predicted(case.config, plan),
        "here": measured(case.config, place),
    }


def predicted(config: AttentionConfig, plan: Purpose) -> Row:
    """Predicted bytes allocated at the peak and seconds of a warm call."""
    workload, card = plan
    rates = speed_rates_of(card, workload, {})
    machine = machine_of(card, workload.dtype, None)
    return {
        **_task_row(plan),
        "allocated": estimate(config, workload, card).allocated,
        "seconds": seconds_of(config, workload, machine, rates),
    }


def _task_row(plan: Purpose) -> Row:
    workload, card = plan
    return {
        "on": "CPU" if isinstance(card, str) else card.name.removeprefix("NVIDIA "),
        "seq": workload.seq,
        "dtype": workload.dtype,
        "causal": workload.causal,
        "floor": workload.floor,
    }


def measured(config: AttentionConfig, place: Here) -> Row:
    """Measured bytes and seconds beside the predicted; None where the config did not run."""
    expected = predicted(config, place.plan)
    record: Row = {
        **_task_row(place.plan),
        "expected": {name: expected[name] for name in ("allocated", "seconds")},
        "outcome": "not run",
        "message": f"is expected to take more than {place.longest:g} s",
        "allocated": None,
        "seconds": None,
        "reference": None,
    }
    if expected["seconds"] > place.longest:
        return record
    ran = place.batch.measure(config, place.plan.workload)
    return record | {
        "outcome": ran.kind,
        "message": ran.message,
        "allocated": ran.allocated,
        "seconds": ran.seconds,
        "reference": ran.reference,
    }


# Figures of rows.


def seconds(row: Row) -> float | None:
    """Measured seconds of a warm call; None where it did not run."""
    measured_seconds: float | None = row["here"]["seconds"]
    return measured_seconds


def slower(row: Row, base: Row) -> float | None:
    """How many times as long as `base` it took, each by what the same small attention took at that time: a
    machine that others use too is slower at times."""
    pace, first = _pace(row["here"]), _pace(base["here"])
    return None if pace is None or first is None else pace / first


def _pace(part: Row) -> float | None:
    return part["seconds"] / part["reference"] if part["seconds"] else None


def held(part: Row) -> float | None:
    """Allocated at the peak, as a multiple of q, k, v and out; of `planned` or `here`."""
    return part["allocated"] / part["floor"] if part["allocated"] else None


def spread(figures: Iterable[float | None]) -> tuple[float, float]:
    """(minimum, maximum) of the figures that are not None; NaN if all are."""
    present = [figure for figure in figures if figure is not None]
    return min(present, default=math.nan), max(present, default=math.nan)


STEADY: Final = 1.25
"""Figures whose maximum is no more than this many times their minimum count as equal."""


def steady(figures: tuple[float, float]) -> bool:
    """Whether (minimum, maximum) are near each other."""
    minimum, maximum = figures
    return maximum <= STEADY * minimum


def memory_words(figures: tuple[float, float]) -> str:
    """(minimum, maximum) of `held` in words, to follow the word `memory`."""
    minimum, maximum = figures
    how = "stays at" if steady(figures) else "goes from"
    return f"{how} {minimum:.2f} to {maximum:.2f} times q, k, v and out"


def where(part: Row) -> str:
    """The device of `planned` or `here`, within a sentence."""
    return "the CPU" if part["on"] == "CPU" else f"a {part['on']}"


def seeds_kb(part: Row) -> float:
    """Memory per token in the reports' unit of 1/1000 MiB."""
    return float(part["allocated"] / part["seq"] * 1000 / 2**20)


def asked(part: Row) -> str:
    """The device and workload of `planned` or `here`, in words."""
    causal = ", causal" if part["causal"] else ""
    return f"{part['on']}, {part['seq']:,} tokens, {part['dtype']}{causal}"


# The table.


def table(rows: Results, more: Mapping[str, Callable[[Row], str]] | None = None) -> str:
    """Markdown: `more` columns after the name, then what was measured, predicted and judged."""
    first = rows[0]
    more = more or {}
    body = [
        [row["name"], *(cell(row) for cell in more.values()), *_cells(row, slower(row, first))]
        for row in rows
    ]
    return markdown(
        body,
        [
            "attention",
            *more,
            f"ms ({asked(first['here'])})",
            "times the first",
            "predicted ms",
            "MB allocated",
            "of q, k, v, out",
            f"predicted ms ({asked(first['planned'])})",
            "predicted MB",
            "of q, k, v, out",
            "mass",
            "reach, layers",
        ],
    )


def _cells(row: Row, ratio: float | None) -> list[str]:
    mine, card = row["here"], row["planned"]
    return [
        _ms(mine["seconds"]),
        "" if ratio is None else f"{ratio:.2f}",
        _ms(mine["expected"]["seconds"]),
        _mb(mine["allocated"]),
        _of_floor(mine),
        _ms(card["seconds"]),
        _mb(card["allocated"]),
        _of_floor(card),
        f"{row['quality']['mass']:.1%}",
        str(row["quality"]["layers"] or "never"),
    ]


def _ms(duration: float | None) -> str:
    if duration is None:
        return ""
    return f"{duration * 1e3:,.0f}" if duration >= 0.1 else f"{duration * 1e3:.3g}"


def _mb(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:,.1f}"


def _of_floor(part: Row) -> str:
    share = held(part)
    return "" if share is None else f"{share:.3f}"


# The panels.


def memory_panel(first: Row, reported: ReadRow) -> Panel:
    """The panel of memory for rows beside each other: measured, predicted for the card, and reported (per
    token, in the reports' unit)."""
    mine, card = first["here"], first["planned"]

    def seeds(row: Row) -> float | None:
        kb = reported(row)
        return None if kb is None else kb / 1000 * 2**20 * card["seq"] / card["floor"]

    return Panel(
        "memory, times\nq, k, v and out",
        (
            Series(f"predicted, {card['on']}", lambda row: held(row["planned"]), ORANGE, "D", hollow=True),
            Series(f"reported, {card['on']}", seeds, RED, "X"),
            Series(f"measured, {mine['on']}", lambda row: held(row["here"]), BLUE),
        ),
    )


MASS: Final = Panel(
    "mass of dense\nattention, %", (Series("computed", lambda row: 100 * row["quality"]["mass"], GREEN, "s"),)
)
REACH: Final = Panel(
    "reach,\nlayers", (Series("computed", lambda row: row["quality"]["layers"], GREEN, "s"),), none="never"
)


def five(rows: Results) -> tuple[Curves, ...]:
    """Time here and on the card, memory, mass, reach, over a setting."""
    mine, card = rows[0]["here"], rows[0]["planned"]
    return (
        Curves(
            f"ms, {mine['on']} (line: predicted)",
            lambda row: 1e3 * row["here"]["expected"]["seconds"],
            lambda row: None if row["here"]["seconds"] is None else 1e3 * row["here"]["seconds"],
            log=True,
        ),
        Curves(f"predicted ms, {card['on']}", lambda row: 1e3 * row["planned"]["seconds"], log=True),
        Curves(
            f"memory, times q, k, v and out,\n{mine['on']} (line: predicted)",
            lambda row: row["here"]["expected"]["allocated"] / row["here"]["floor"],
            lambda row: held(row["here"]),
        ),
        Curves("mass of dense attention, %", lambda row: 100 * row["quality"]["mass"]),
        Curves("reach, layers", lambda row: row["quality"]["layers"], log=True, none="never"),
    )
