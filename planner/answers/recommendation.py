"""What `planner recommend` answers. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BeforeValidator

from attention.config import AttentionConfig, Value, as_tuple
from planner.answers.shared import SharedEstimate
from planner.memory.estimate import MemoryEstimate
from planner.question.asked import Objective
from planner.workload import Workload

if TYPE_CHECKING:
    import torch

Role = Literal["fastest", "balanced", "widest", ""]


class Quality(Value):
    """How much of dense attention a config still has: mass and reach."""

    profile: str
    """Name of the attention profile."""
    mass: float
    """Share of dense attention's mass under it."""
    layers: int | None
    """Layers after which the last token can depend on every token that causality permits; None: never."""


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
    launches: int | None = None
    """Kernels that a call launches on a GPU; see `MemoryEstimate`."""


class Without(Value):
    """The answer that there would be without one constraint."""

    constraint: str
    gain: float
    """The share of the objective by which that answer is better: 0.25 is 25%."""
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
    """The reasons for an answer."""

    binding: str | None
    """The constraint without which the answer would be better by most; None if none keeps it back."""
    without: Annotated[tuple[Without, ...], BeforeValidator(as_tuple)]
    runner_up: Pick | None
    """The best of another shape: not the same attention with another workspace or backend."""
    behind: float | None
    """The share of the objective by which the runner-up is worse than the answer."""
    steps: Annotated[tuple[Step, ...], BeforeValidator(as_tuple)]


SCHEMA_VERSION: Final = 1


Picks = Annotated[tuple[Pick, ...], BeforeValidator(as_tuple)]


class Search(Value):
    """How many candidates the search looked at."""

    grid: int
    """Candidates of the grid, all evaluated."""
    fit: int
    """Candidates of the grid that fit the budget."""
    passed: int
    """Candidates that fit and pass the gates of mass and time."""
    trials: int
    """Optuna's trials, over the full space."""
    gain: float
    """The share of the objective by which the answer is better than the grid's exact optimum; 0 where it is
    that optimum."""


class Recommendation(Value):
    """The answer of `planner.recommend`: a config that fits, with its figures, its reasons and the choice.

    On disk, `planner recommend --verify` adds one more key, `verified`; see `planner.answers.verified`.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    versions: dict[str, str | None]
    """Versions of this package and of those that the answer depends on."""
    calibration: str
    """The calibration or the defaults that memory and seconds are predicted from."""
    seed: int
    command: str = ""
    """The command that repeats this answer."""
    objective: Objective
    config: AttentionConfig
    workload: Workload
    on: str
    """The device: `cpu`, or a card's name."""
    budget: int
    """Bytes of the budget of each device, the reserve included."""
    reserve: int
    """Bytes of it kept for others."""
    memory: SharedEstimate | MemoryEstimate
    """Where GPUs share the call, of the one that needs most, with how they share it."""
    seconds: float
    """Predicted seconds of one call, in training with its backward pass."""
    quality: Quality
    why: Why
    alternatives: Picks
    """Three to choose from: fastest, balanced, widest."""
    pareto: Picks
    """Candidates on the Pareto front of memory, time and mass, fastest first."""
    search: Search

    def build(self, device: str | torch.device | None = None) -> torch.nn.Module:
        """The attention as a module. Imports torch."""
        from attention.factories import build

        return build(self.config, device)
