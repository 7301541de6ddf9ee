"""What `planner tune` answers. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator

from attention.config import AttentionConfig, Value, as_tuple
from planner.answers.recommendation import Quality
from planner.memory.estimate import MemoryEstimate
from planner.workload import Workload


class Trial(Value):
    """One config that was measured."""

    number: int
    config: AttentionConfig
    kind: str
    """How the run ended: see `Measurement.kind`; `over`, if it ran and took more memory than the budget."""
    message: str | None = None
    seconds: float | None = None
    predicted: float
    """Predicted seconds."""
    allocated: int | None = None
    """Bytes at the peak: on a GPU what the card lost, where the driver tells."""
    upper: int
    """The upper bound: bytes that the run is predicted not to exceed."""
    launches: int | None = None
    """Kernels that a call launches on a GPU; see `MemoryEstimate`."""

    @property
    def good(self) -> bool:
        """Whether it ran within the budget."""
        return self.kind == "ok"


class Tuned(Value):
    """The answer of tuning: the fastest config that was measured, and all trials."""

    schema_version: Literal[1] = 1
    versions: dict[str, str | None]
    """Versions of packages; this and the fields below are those of the recommendation that tuning began
    with."""
    calibration: str
    seed: int
    command: str
    config: AttentionConfig
    workload: Workload
    on: str
    budget: int
    reserve: int
    memory: MemoryEstimate
    """The memory that is predicted for the best config."""
    quality: Quality
    best: Trial
    analytic: Trial
    """The config that the models alone recommend, measured."""
    trials: Annotated[tuple[Trial, ...], BeforeValidator(as_tuple)]
    """All trials that were measured, in order."""
    kept: int
    """Trials of an earlier run."""
    storage: str
    study: str
    interrupted: bool = False

    @property
    def speedup(self) -> float:
        """How many times as fast the best config is as the analytic pick."""
        if not self.analytic.seconds or not self.best.seconds:
            return math.inf
        return self.analytic.seconds / self.best.seconds
