"""`planner.tune`: the fastest attention by measurement, on the device that is here. Imports no torch, and
all that it needs only when called.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from planner.measure import Device
    from planner.search.refine import Sampler
    from planner.tuning import Measure, Progress, Tuned

TRIALS: Final = 30
TIMEOUT: Final = 120.0
"""Seconds a trial may take."""
RUNS: Final = 3
"""Warm calls of a trial, of whose times the median counts."""


def tune(
    vram: str | int,
    seq: str | int,
    *,
    device: Device = "cpu",
    trials: int = TRIALS,
    timeout: float = TIMEOUT,
    runs: int = RUNS,
    sampler: Sampler = "tpe",
    seed: int = 0,
    storage: str | None = None,
    study: str | None = None,
    measure: Measure | None = None,
    records: str | Path | None = None,
    learn: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **asked: Any,
) -> Tuned:
    """Measures up to `trials` configs on this device and returns the fastest that runs within `vram` and, as
    predicted, passes the gates; never one slower than what the models alone recommend.

    `timeout`: seconds for a trial. `storage`, `study`: where trials are kept; by default in the user's data
    folder, under a name that the question has. `measure`: in place of running, e.g. recorded runs. `records`:
    a file that every measurement is added to. `learn`: correct the calibration's speeds by what was measured,
    for predictions from then on. `asked`: as `planner.recommend` takes it. Ctrl-C ends it early
    with what there is, once something was measured.
    """
    from planner.tuning import tuned

    return tuned(
        vram, seq, device=device, trials=trials, timeout=timeout, runs=runs, sampler=sampler, seed=seed,
        storage=storage, study=study, measure=measure, records=records, learn=learn,
        progress=progress, asked=asked,
    )  # fmt: skip
