"""What rows come to: how far predictions of bytes are off, and a calibration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, Final

from attention.errors import AttentionPlannerError
from planner.fitting.calibrate import calibration_of, key_of, with_speed
from planner.measuring.measure import Measurement
from studies.bench.records import OK, Row
from studies.gpu.worker import short

LEAST: Final = 8
"""Runs of each kind that a calibration is made of at least."""
PARTS: Final = ("checks", "peers", "length", "memory", "dry runs", "calibration")


SAME: Final = ("code", "torch", "driver")
"""What a row has to be of to count as made with what is here now."""


def is_current(content: Row, row: Row) -> bool:
    """Whether a row was made with what the file's environment says."""
    return all(row[name] == content["environment"][name] for name in SAME)


def current(content: Row) -> list[Row]:
    """Those rows, in the order of the data."""
    return [row for row in content["rows"].values() if is_current(content, row)]


def of_part(rows: Iterable[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def calibrated(content: Row) -> Row:
    """The calibration that the measured rows make, as data under `calibration`; or why there is none, under
    `none`."""
    rows = current(content)
    bytes_, timed = (of_part(rows, name) for name in ("memory", "calibration"))
    fitted, held_out = _measurements(bytes_)
    if min(len(fitted), len(held_out)) < LEAST:
        return {"none": f"{len(bytes_)} runs of bytes are too few, of each kind {LEAST} are wanted"}
    start = fitted[0]
    try:
        key = key_of(content["environment"]["kind"], start)
        calibration = calibration_of(key, start, fitted, held_out, content["command"])
        ahead, apart = _measurements(timed)
        if min(len(ahead), len(apart)) >= LEAST:
            calibration = with_speed(calibration, ahead, apart)
    except (AttentionPlannerError, ValueError, ArithmeticError) as error:
        return {"none": f"{type(error).__name__}: {short(error)}"}
    return {"calibration": calibration.model_dump(mode="json")}


def _measurements(rows: Sequence[Row]) -> tuple[list[Measurement], list[Measurement]]:
    """(runs to fit to, held-out ones) that ran."""
    there = [row for row in rows if row["outcome"] == OK]
    sides: tuple[Any, ...] = (False, True)
    fitted, held_out = (
        [Measurement(**row["measurement"]) for row in there if row["held_out"] is side] for side in sides
    )
    return fitted, held_out


def off(row: Row, name: str, beside: str = "predicted") -> float:
    """The relative error of bytes: what was predicted, or taken in a dry run, beside what was measured."""
    return float(row[beside][name] / row["measurement"][name] - 1)


def bytes_summary(rows: Sequence[Row], beside: str) -> Row:
    """How near bytes come to those measured, over the rows that have both."""
    there = [row for row in rows if row["outcome"] == OK and beside in row]
    names = [name for name in ("allocated", "reserved") if all(row["measurement"].get(name) for row in there)]
    summary: Row = {"cases": len(there)}
    for name in names if there else ():
        errors = [off(row, name, beside) for row in there]
        summary[name] = {
            "exact": sum(error == 0 for error in errors) / len(errors),
            "within 1%": sum(abs(error) <= 0.01 for error in errors) / len(errors),
            "median": median(map(abs, errors)),
            "least": min(errors),
            "most": max(errors),
        }
    return summary


def taken(row: Row) -> int:
    """Bytes that a bound is held to: what the card lost, on a CPU what was allocated."""
    measured = row["measurement"]
    names = ("device_peak", "reserved", "allocated")
    return int(next(measured[name] for name in names if measured.get(name)))


def above_the_bound(rows: Sequence[Row]) -> list[Row]:
    """Rows that took more than their upper bound."""
    there = [row for row in rows if row["outcome"] == OK and "predicted" in row]
    return [row for row in there if taken(row) > row["predicted"]["upper"]]
