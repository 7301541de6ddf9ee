"""`planner.recommend`: which attention for this sequence within this memory. Imports no torch, and all that
it needs only when called.

recommend(vram="8GB", seq=131072).build()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, TypedDict, Unpack

if TYPE_CHECKING:
    from planner.calibration import Calibration
    from planner.gpus import Gpu
    from planner.memory.estimate import Display
    from planner.quality.profiles import Profile
    from planner.recommendation import Recommendation
    from planner.search.refine import Progress, Sampler
    from planner.search.space import Space
    from planner.workload import Dtype, Mode


LAYERS: Final = 12
"""Of a model, in which each token must hear of all."""
MIN_MASS: Final = 0.8
"""Least share of dense attention's mass; docs/explanation/quality.md says why."""
TRIALS: Final = 24
"""Of Optuna, after the grid."""


class Asked(TypedDict, total=False):
    """What may be said of a recommendation beside memory and length; all of it has defaults."""

    objective: Literal["speed", "seq", "quality"] | None
    """"speed" (default with a length), "seq" (default without), "quality"."""
    gpu: str | Gpu | None
    """"cpu", or a card as `planner gpus` lists them; None for a generic card of that memory."""
    batch: int
    heads: int
    kv_heads: int | None
    head_dim: int
    dtype: Dtype
    mode: Mode
    causal: bool
    layers: int | None
    """Of the model, in which each token must hear of all (12); None for no such gate."""
    min_mass: float | None
    """Least share of dense attention's mass (0.8); None for no such gate."""
    max_seconds: float | None
    """Most seconds of a call; None for no such gate."""
    profile: str | Profile | None
    """Where attention's mass lies: a preset's name or a profile; None for the default."""
    reserve: str | int
    """Bytes of the budget for what else is there, e.g. "1.5GB"."""
    space: Space | None
    """What may be chosen."""
    trials: int
    """Of Optuna, after the grid."""
    sampler: Sampler
    seed: int
    storage: str | None
    """Where trials are kept and gone on with: a journal file, or a URL of Optuna's."""
    study: str | None
    """Their name there."""
    progress: Progress | None
    calibration: Calibration | None
    allocator: str
    display: Display
    others_bytes: int
    context_bytes: int | None
    threads: int | None


def recommend(
    vram: str | int | None = None, seq: str | int | None = None, **asked: Unpack[Asked]
) -> Recommendation:
    """The attention for a sequence within a memory budget.

    `vram`: bytes, or text such as "8GB"; None for all of the card. `seq`: tokens; None for the longest that
    fits. `asked`: see `Asked`, and as `planner.estimate` takes them `calibration`, `allocator`, `display`,
    `others_bytes`, `context_bytes` and `threads`.

    `NothingFitsError` where nothing does, naming what would help.
    """
    from planner.recommendation import question

    return question(vram, seq, **asked).answer
