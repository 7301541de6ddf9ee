"""`planner.calibrate`: this device's own figures. Imports no torch, and all it needs only when called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from planner.calibrating import Progress
    from planner.calibration import Calibration
    from planner.measure import Device

RUNS: Final = 140
"""Enough that 99% of held-out runs is less than all of them."""


def calibrate(
    device: Device = "cpu",
    *,
    seed: int = 0,
    runs: int = RUNS,
    progress: Progress | None = None,
    path: str | Path | None = None,
    threads: int | None = None,
    speed: bool = True,
) -> Calibration:
    """Measures `runs` runs on this machine, each in a process of its own, and saves what they tell. With
    `speed`, `planner.speed.fit.RUNS` more are timed.

    The runs follow from `seed` and `runs`. `path`: None for where `planner.estimate` looks first. Beside it,
    in `*.records.jsonl`, each run is kept as it ends, so that the same call goes on where an interrupted
    one stopped; that file goes when all is done. `threads`: of the CPU's operators.

    ConfigError for arguments that cannot be right, UnavailableError where there is no such device,
    AttentionPlannerError if nothing could be measured, or what was measured not be kept.
    """
    from planner.calibrating import calibrated

    return calibrated(
        device, seed=seed, runs=runs, progress=progress, path=path, threads=threads, speed=speed
    )
