"""How far predictions for GPUs were from dry runs, and the margin that follows from it. Imports no torch.

A dry run is torch's own CUDA build over a stand-in for CUDA's libraries (`planner.standin`): its allocator
and its operators' host code are real, kernels are not run. Some draws of random cases set the margin, others
check it; all are named in `planner/data/dry-runs.json`, which `python -m studies.bench.dry --write` writes.
What a context and a display take is no part of it: those are figures with sources of their own.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field

from attention.config import AttentionConfig, Value, as_tuple
from planner.calibration import OUTSIDE, Bound, Domain, Names, installed_torch
from planner.workload import Workload

PATH: Final = Path(__file__).parents[1] / "data" / "dry-runs.json"
CHECKED: Final = "checked by dry runs: allocator and operators real, kernels not run"
SEGMENT: Final = 2 << 20
"""A small segment of the caching allocator: one more or fewer is a matter of a few hundred bytes."""
SEGMENTS: Final = 2
"""So many are added to a prediction beside its margin."""
FLOAT64: Final = 2
"""Times that attention in float64 may hold what is predicted: it is made of plain products, of which each
frees what the next cannot always take, and the replay does not follow every one. Most seen: 1.72 times."""


class DryCases(Value):
    """A draw of random cases, as `studies.bench.dry.cases` has them."""

    seed: int
    cases: Annotated[int, Field(ge=1)]
    """Those that ran."""
    exceeded: Annotated[int, Field(ge=0)]
    """Those that took more than the upper bound."""


Draws = Annotated[tuple[DryCases, ...], BeforeValidator(as_tuple), Field(min_length=1)]


class Checked(Value):
    """Two disjoint sets of dry runs."""

    torch: str
    cards: Names
    domain: Domain
    """What there is in both sets."""
    margin: Annotated[float, Field(ge=0)]
    """Share of a prediction that is added to it, beside the segments: none of `set_by` is above that."""
    set_by: Draws
    checked_by: Draws


class DryRuns(Checked):
    """Those of one GPU."""

    ranks: Checked
    """Those of ranks that share a sequence, held to the bound of the one that needs most."""


@cache
def dry_runs() -> DryRuns:
    """Those that came with this package."""
    return DryRuns.from_json(PATH.read_bytes())


def dry_upper(reserved: Any, outside: Any, runs: Checked, dtype: str) -> Any:
    """The upper bound of what a card loses, for a prediction or an array of them: of what the allocator
    holds, and of what lies outside, which is a figure of its own and no part of what was checked."""
    times = FLOAT64 if dtype == "float64" else 1
    return reserved * times * (1 + runs.margin) + SEGMENTS * SEGMENT + outside


def dry_bound(config: AttentionConfig, workload: Workload, reserved: int, outside_bytes: int) -> Bound:
    """The upper bound of a prediction for a GPU that nobody calibrated; wider outside of what was run dry."""
    runs: Checked = dry_runs() if workload.gpus == 1 else dry_runs().ranks
    notes = []
    upper = float(dry_upper(reserved, outside_bytes, runs, workload.dtype))
    outside = runs.domain.misses(config, workload)
    said = CHECKED
    if outside:
        wider = runs.model_copy(update={"margin": 0.01 + runs.margin * OUTSIDE})
        upper = float(dry_upper(reserved, outside_bytes, wider, workload.dtype))
        said = "outside what was run dry: a wider margin"
        notes.append(f"not among what was run dry: {', '.join(outside)}")
    here = installed_torch()
    if here is not None and here.partition("+")[0] != runs.torch:
        notes.append(f"the dry runs were of torch {runs.torch}, torch {here} is installed")
    return Bound(math.ceil(upper), said, tuple(notes))
