"""Options of a recommendation, their defaults, and the gates that an answer passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypedDict

from attention.errors import ConfigError

if TYPE_CHECKING:
    from planner.calibration import Calibration
    from planner.gpus import Gpu
    from planner.memory.cuda_process import Display
    from planner.quality.profiles import Profile
    from planner.question.space import Space
    from planner.workload import Dtype, Mode

MOST_LAYERS: Final = 1 << 20
"""The largest number of layers of a model that may be asked for."""
LAYERS: Final = 12
"""Layers of a model, within which the last token must reach every token that causality permits."""
MIN_MASS: Final = 0.8
"""Minimum share of dense attention's mass, 0 to 1; docs/explanation/quality.md says why."""
TRIALS: Final = 24
"""Trials of Optuna after the grid."""

Sampler = Literal["tpe", "random", "nsga2", "nsga3", "cmaes", "qmc", "gp", "brute"]
NEEDED: Final[dict[str, tuple[str, ...]]] = {"cmaes": ("cmaes",), "qmc": ("scipy",), "gp": ("scipy", "torch")}
"""Packages that samplers need and Optuna does not install."""

OnTrial = Callable[[int, int], None]
"""Called with (trials done, trials in all) before each."""
Objective = Literal["speed", "seq", "quality"]


class Asked(TypedDict, total=False):
    """Keyword arguments of `planner.recommend` beside memory and length; all have defaults."""

    objective: Literal["speed", "seq", "quality"] | None
    """What is optimised: "speed" (default with a length), "seq" (default without), "quality"."""
    gpu: str | Gpu | None
    """"cpu", or a card as `planner gpus` lists them; None for a generic card of that memory."""
    batch: int
    heads: int
    kv_heads: int | None
    head_dim: int
    dtype: Dtype
    mode: Mode
    causal: bool
    queries: int | None
    """Tokens that ask, the last of the sequence: 1 to decode with a cache. None for all."""
    documents: tuple[int, ...] | None
    """Lengths of the documents packed into a sequence, which fix its length: `seq` may be left out."""
    sinks: bool
    """Whether each head has a learned sink."""
    gpus: int
    """Cards that share the call (1), each with this memory; `seq` and `batch` are of all together."""
    link: str | None
    """What joins them: "nvlink4", or for nodes of `node` GPUs "nvlink4,ndr"; None for the card's."""
    node: int | None
    layers: int | None
    """Layers of the model (12), within which the last token must reach every token that causality permits;
    None for no such gate."""
    min_mass: float | None
    """Minimum share of dense attention's mass, 0 to 1 (0.8); None for no such gate."""
    max_seconds: float | None
    """Maximum predicted seconds of a call; None for no such gate."""
    profile: str | Profile | None
    """How dense attention's mass is spread over distance: a preset's name or a profile; None for the
    default."""
    reserve: str | int
    """Bytes of the budget that are kept for the rest of the model, e.g. "1.5GB"."""
    space: Space | None
    """The search space; None for all of it."""
    trials: int
    """Trials of Optuna after the grid."""
    sampler: Sampler
    seed: int
    storage: str | None
    """A journal file or a URL of Optuna's, where trials are kept and continued from."""
    study: str | None
    """The name of the trials in the storage."""
    progress: OnTrial | None
    calibration: Calibration | None
    allocator: str
    display: Display
    others_bytes: int
    context_bytes: int | None
    threads: int | None


@dataclass(frozen=True)
class Gates:
    """The constraints on a config besides its memory; None turns a gate off."""

    layers: int | None = LAYERS
    """Layers of the model, within which the last token reaches every token that causality permits."""
    min_mass: float | None = MIN_MASS
    """Minimum share of dense attention's mass, 0 to 1, under the profile."""
    max_seconds: float | None = None
    """Maximum predicted seconds of one call."""

    def __post_init__(self) -> None:
        if self.layers is not None and (type(self.layers) is not int or not 1 <= self.layers <= MOST_LAYERS):
            raise ConfigError(f"layers must be a whole number from 1 to {MOST_LAYERS:,}, got {self.layers!r}")
        if self.min_mass is not None and not 0 <= self.min_mass <= 1:
            raise ConfigError(f"min_mass must be from 0 to 1, got {self.min_mass!r}")
        if self.max_seconds is not None and not 0 < self.max_seconds < math.inf:
            raise ConfigError(f"max_seconds must be a number above 0, got {self.max_seconds!r}")
