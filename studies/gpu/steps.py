"""What there is to be done on a device, the most useful first.

Rows about one thing come together, so that few processes start; each thing comes twice, first as little of it
as says something and later the rest. A row is known by its label.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from typing import Any, Final, Literal

from attention.config import AttentionConfig
from attention.errors import AttentionPlannerError, ConfigError
from planner import gpus
from planner.fitting.calibrate import REPETITIONS, plan_runs, plan_timed
from planner.fitting.samples import Sample
from planner.measuring.measure import Device, Measurement
from planner.measuring.server import Batch
from planner.memory.estimate import estimate
from planner.workload import Mode, Workload
from studies.bench.attentions import one_of_each
from studies.bench.records import DATA, OK, Row
from studies.gpu import checks
from studies.gpu.worker import Worker

Subject = Literal["checks", "peers", "length", "memory", "dry runs", "calibration"]
CHECK_SECONDS, ROW_SECONDS, COMPILED_SECONDS = 60.0, 60.0, 120.0
"""Seconds that a row may take; FlexAttention compiles for a minute."""
MEASURED_SECONDS, SERVER_SECONDS = 60.0, 30.0
"""Seconds of a measured run, which ends it by itself, and of its server, which starts for some."""
SEED: Final = 19
MEMORY_RUNS: Final = 60
"""Measured bytes; a fifth of them is what a calibration is fitted to."""
FIRST = {"checks": 40, "peers": 5, "length": 20, "memory": 20, "dry runs": 10}
"""Rows of each part that come before the calibration, which takes minutes."""
LENGTHS: Final[dict[Device, tuple[int, ...]]] = {
    "cuda": tuple(1 << n for n in range(12, 21)),
    "cpu": (256, 512, 1024),
}
DENSE: Final[dict[Device, tuple[dict[str, Any], ...]]] = {
    "cuda": (
        {"seq": 8192, "batch": 2, "heads": 16, "head_dim": 128, "causal": True},
        {"seq": 8192, "batch": 2, "heads": 16, "head_dim": 128, "causal": True, "mode": "training"},
        {"seq": 8192, "batch": 2, "heads": 32, "kv_heads": 8, "head_dim": 128, "causal": True},
        {"seq": 1024, "batch": 8, "heads": 16, "head_dim": 64},
        {"seq": 16_384, "heads": 32, "head_dim": 64, "causal": True, "mode": "training"},
        {"seq": 128, "heads": 8, "head_dim": 64},
        {"seq": 32_768, "heads": 32, "kv_heads": 8, "head_dim": 128, "causal": True, "mode": "training"},
        {"seq": 4096, "batch": 4, "heads": 16, "head_dim": 256},
        {"seq": 4096, "batch": 4, "heads": 16, "head_dim": 64, "dtype": "float32"},
    ),
    "cpu": ({"seq": 256, "heads": 2, "head_dim": 32, "dtype": "float32"},),
}
SPARSE: Final = ("local_window", "dilated_sparse, 3 branches", "adaptive")
SHARED: Final[dict[str, Any]] = {"heads": 8, "head_dim": 64, "causal": True}


@dataclass
class Tools:
    """What rows are made with; each begins when it is first used."""

    device: Device
    worker: Worker = field(default_factory=Worker)
    _batches: dict[bool, Batch] = field(default_factory=dict)

    def batch(self, timed: bool) -> Batch:
        """The server that measures bytes, or that times."""
        if timed not in self._batches:
            options: dict[str, Any] = {"timeout": MEASURED_SECONDS}
            if timed:
                options |= {"memory": False, "runs": REPETITIONS, "reference": True}
            self._batches[timed] = Batch(self.device, **options)
        return self._batches[timed]

    def end(self) -> None:
        """Ends all processes."""
        self.worker.end()
        for batch in self._batches.values():
            batch.__exit__()
        self._batches.clear()


@dataclass(frozen=True)
class PlannedRow:
    """One row that there is to be."""

    part: Subject
    name: str
    seconds: float
    """Seconds that it may take."""
    make: Callable[[Tools], Row]
    about: Row = field(default_factory=dict)
    """What the row is about, as the page needs it."""

    @property
    def label(self) -> str:
        return f"{self.part}: {self.name}"


def steps(device: Device, card: gpus.Gpu | None) -> list[PlannedRow]:
    """All steps on a device; `card`: what the GPU is known as, if it is."""
    parts: dict[str, list[PlannedRow]] = {
        "checks": list(_checks(device)),
        "peers": list(_peers(device)),
        "length": list(_lengths(device)),
        "memory": list(_memory(device)),
        "dry runs": [] if card is None else list(_dry(card)),
    }
    first = [parts[name][:count] for name, count in FIRST.items()]
    rest = [parts[name][count:] for name, count in FIRST.items()]
    return list(chain(*first, _calibration(device), *rest))


def _plain(config: AttentionConfig, workload: Workload) -> Row:
    """Both as arguments for another process, and for the data."""
    return {"config": config.model_dump(mode="json"), "workload": workload.model_dump(mode="json")}


def _asks(function: str, module: str, **arguments: Any) -> Callable[[Tools], Row]:
    return lambda tools: tools.worker.ask(f"studies.gpu.{module}", function, device=tools.device, **arguments)


def _checks(device: Device) -> Iterator[PlannedRow]:
    for name, config, workload in checks.cases():
        compiled = config.backend == "flex"
        yield PlannedRow(
            "checks",
            name,
            COMPILED_SECONDS if compiled else CHECK_SECONDS,
            _asks("check", "checks", **_plain(config, workload)),
        )


def _peers(device: Device) -> Iterator[PlannedRow]:
    default: dict[str, Any] = {} if device == "cpu" else {"dtype": "bfloat16"}
    for sizes in DENSE[device]:
        workload = Workload(**{**default, **sizes})
        kv = f":{workload.groups}" if workload.groups != workload.heads else ""
        name = (
            f"dense, {workload.batch} x {workload.seq:,} tokens, {workload.heads}{kv} heads x "
            f"{workload.head_dim}, {workload.dtype}{', causal' * workload.causal}, {workload.mode}"
        )
        make = _asks("dense", "timings", workload=workload.model_dump(mode="json"))
        yield PlannedRow("peers", name, COMPILED_SECONDS, make, {"kind": "dense"})
    if device == "cpu":  # where FlexAttention compiles C++ for a minute
        return
    for step in ("forward", "training"):
        for pattern in SPARSE:
            if step == "training" and pattern == "adaptive":
                continue
            given = {
                "pattern": pattern,
                "dtype": "bfloat16",
                "block": 128,
                "kept": 9,
                "seq": 16_384,
                "step": step,
            }
            yield PlannedRow(
                "peers", f"{pattern}, {step}", COMPILED_SECONDS, _asks("blocks", "timings", **given), given
            )


def _lengths(device: Device) -> Iterator[PlannedRow]:
    """Attentions by length, in inference and then in training; the shorter first, for all."""
    named = one_of_each()
    dtype: dict[str, Any] = {"dtype": "float32" if device == "cpu" else "bfloat16"}
    modes: tuple[Mode, ...] = ("inference", "training")
    for mode in modes:
        for seq in LENGTHS[device]:
            for name in ("dense", "local_window", "dilated", "dilated_sparse", "adaptive"):
                workload = Workload(seq=seq, mode=mode, **{**SHARED, **dtype})
                yield PlannedRow(
                    "length",
                    f"{name}, {seq:,} tokens, {mode}",
                    ROW_SECONDS,
                    _asks("length", "timings", **_plain(named[name], workload)),
                    {"attention": name, "seq": seq, "mode": mode},
                )


def _memory(device: Device) -> Iterator[PlannedRow]:
    """Those that a calibration is fitted to and those held out, by turns."""
    fitted, held_out = plan_runs(device, SEED, MEMORY_RUNS)
    share = len(held_out) // len(fitted)
    turns = [held_out[n * share : (n + 1) * share] for n in range(len(fitted) - 1)]
    turns.append(held_out[(len(fitted) - 1) * share :])
    for number, (one, others) in enumerate(zip(fitted, turns, strict=True)):
        yield _measured("memory", f"fitted {number}", one, timed=False)
        for place, other in enumerate(others):
            yield _measured("memory", f"held out {number}.{place}", other, timed=False)


def _calibration(device: Device) -> Iterator[PlannedRow]:
    """Three that seconds are fitted to, then one held out, so that some of both are there at any time."""
    fitted, held_out = plan_timed(device, SEED)
    threes = [fitted[n : n + 3] for n in range(0, len(fitted), 3)]
    for number, (three, other) in enumerate(zip_longest(threes, held_out)):
        for place, one in enumerate(three or ()):
            yield _measured("calibration", f"fitted {number}.{place}", one, timed=True)
        if other is not None:
            yield _measured("calibration", f"held out {number}", other, timed=True)


def _measured(part: Subject, name: str, sample: Sample, *, timed: bool) -> PlannedRow:
    def make(tools: Tools) -> Row:
        return row_of(tools.batch(timed).measure(*sample))

    described = f"{name}: {sample.config.variant}, {sample.workload.seq:,} tokens, {sample.workload.mode}"
    return PlannedRow(
        part, described, MEASURED_SECONDS + SERVER_SECONDS, make, {"held_out": name.startswith("held out")}
    )


def row_of(measurement: Measurement) -> Row:
    """A measurement as a row, with what is predicted of its bytes; of a card that is not known, or where the
    library refuses to plan, nothing is."""
    row: Row = {
        "outcome": measurement.kind,
        "measurement": measurement.model_dump(mode="json", exclude_defaults=True),
    }
    if measurement.message:
        row["message"] = measurement.message[:300]
    place = measurement.environment
    try:
        on: str | gpus.Gpu = "cpu"
        if measurement.device != "cpu":
            on = gpus.of_device(place.device or "", place.device_bytes)
        told = estimate(
            measurement.config, measurement.workload, on, threads=place.threads if on == "cpu" else None
        )
    except ConfigError as error:
        return row | {"unpredicted": str(error)[:300]}
    return row | {
        "predicted": {
            "allocated": told.allocated,
            "reserved": told.reserved,
            "device": told.device,
            "upper": told.upper,
        }
    }


def recorded_dry_runs(card: gpus.Gpu) -> Iterator[Row]:
    """Cases that were run dry on a card whose kernels take the same: of the same compute capability and as
    many multiprocessors. Their inputs fit."""
    path = DATA / "accuracy.cuda-dry.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    alike = {
        other.key
        for other in gpus.known()
        if (other.capability, other.sm_count) == (card.capability, card.sm_count)
    }
    for row in rows:
        if row["outcome"] == OK and row["card"] in alike and row["measured"]["device"] < card.usable_bytes:
            yield row


def _dry(card: gpus.Gpu) -> Iterator[PlannedRow]:
    for recorded in recorded_dry_runs(card):
        sample = Sample(AttentionConfig(**recorded["config"]), Workload(**recorded["workload"]))
        step = _measured("dry runs", f"{recorded['case']} on {recorded['card']}", sample, timed=False)
        yield PlannedRow(
            step.part,
            step.name,
            step.seconds,
            partial(_beside, recorded, step.make),
            {"card": recorded["card"]},
        )


def _beside(recorded: Row, make: Callable[[Tools], Row], tools: Tools) -> Row:
    return make(tools) | {"dry": recorded["measured"]}


def known_card(facts: Row) -> gpus.Gpu | None:
    """The card that a device is, if it is known."""
    if facts["kind"] == "cpu":
        return None
    try:
        return gpus.of_device(facts["device"], facts["device_bytes"])
    except AttentionPlannerError:
        return None
