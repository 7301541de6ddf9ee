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
    """As `Measurement.kind`; `over`, if it ran and took more memory than the budget."""
    message: str | None = None
    seconds: float | None = None
    predicted: float
    """Seconds."""
    allocated: int | None = None
    """Bytes at the peak: on a GPU what the card lost, where the driver tells."""
    upper: int
    """Bytes predicted not to be exceeded."""

    @property
    def good(self) -> bool:
        """Whether it ran within the budget."""
        return self.kind == "ok"


class Tuned(Value):
    """What tuning found."""

    schema_version: Literal[1] = 1
    versions: dict[str, str | None]
    """As a recommendation has them, and so with what follows."""
    calibration: str
    seed: int
    command: str
    config: AttentionConfig
    workload: Workload
    on: str
    budget: int
    reserve: int
    memory: MemoryEstimate
    """Predicted for the best."""
    quality: Quality
    best: Trial
    analytic: Trial
    """What the models alone recommend, measured."""
    trials: Annotated[tuple[Trial, ...], BeforeValidator(as_tuple)]
    """All that were measured, in order."""
    kept: int
    """Of them those of an earlier run."""
    storage: str
    study: str
    interrupted: bool = False

    @property
    def speedup(self) -> float:
        """How many times as fast as the analytic pick."""
        if not self.analytic.seconds or not self.best.seconds:
            return math.inf
        return self.analytic.seconds / self.best.seconds
