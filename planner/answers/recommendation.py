"""What `planner recommend` answers. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BeforeValidator

from attention.config import AttentionConfig, Value, as_tuple
from planner.memory.estimate import MemoryEstimate
from planner.question.asked import Objective
from planner.workload import Workload

if TYPE_CHECKING:
    import torch

Role = Literal["fastest", "balanced", "widest", ""]


class Quality(Value):
    """What a config still attends to."""

    profile: str
    """Name of the attention profile."""
    mass: float
    """Share of dense attention's mass under it."""
    layers: int | None
    """Until the last token can hear of all that causality permits; None: never."""


class Pick(Value):
    """One config with its figures."""

    role: Role = ""
    config: AttentionConfig
    seq: int
    upper: int
    """Bytes that are not exceeded."""
    seconds: float
    mass: float
    layers: int | None


class Without(Value):
    """What the answer would be without one constraint."""

    constraint: str
    gain: float
    """By how much better: 0.25 is 25% of the objective."""
    pick: Pick


class Step(Value):
    """The answer with one dimension changed by a step."""

    dimension: str
    before: str
    after: str
    seconds: float
    upper: int
    mass: float
    layers: int | None
    failed: Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
    """Constraints that it would not meet."""


class Why(Value):
    """The reasons."""

    binding: str | None
    """The constraint without which the answer would be better by most; None if none keeps it back."""
    without: Annotated[tuple[Without, ...], BeforeValidator(as_tuple)]
    runner_up: Pick | None
    """The best of another shape: not the same attention with another workspace or backend."""
    behind: float | None
    """By how much of the objective it is behind."""
    steps: Annotated[tuple[Step, ...], BeforeValidator(as_tuple)]


SCHEMA_VERSION: Final = 1


Picks = Annotated[tuple[Pick, ...], BeforeValidator(as_tuple)]


class Search(Value):
    """What was looked at."""

    grid: int
    """Candidates of the grid, all evaluated."""
    fit: int
    """Of those what fits the budget."""
    passed: int
    """Of those what passes the gates of mass and time."""
    trials: int
    """Of Optuna, over the full space."""
    gain: float
    """By how much of the objective the answer is better than the grid's exact optimum: 0 where it is it."""


class Recommendation(Value):
    """The answer."""

    schema_version: Literal[1] = SCHEMA_VERSION
    versions: dict[str, str | None]
    """Of this package and those that the answer depends on."""
    calibration: str
    """What memory and seconds rest on."""
    seed: int
    command: str = ""
    """What repeats it."""
    objective: Objective
    config: AttentionConfig
    workload: Workload
    on: str
    """The device."""
    budget: int
    """Bytes."""
    reserve: int
    """Bytes of it kept for others."""
    memory: MemoryEstimate
    seconds: float
    """Of one call, in training with its backward; predicted."""
    quality: Quality
    why: Why
    alternatives: Picks
    """Three to choose from: fastest, balanced, widest."""
    pareto: Picks
    """What nothing surpasses in memory, time and mass together, fastest first."""
    search: Search

    def build(self, device: str | torch.device | None = None) -> torch.nn.Module:
        """The attention as a module. Imports torch."""
        from attention.factories import build

        return build(self.config, device)
