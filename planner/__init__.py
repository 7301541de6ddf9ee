"""What decides: workload and budget in, an attention that fits out. Importing it loads no torch; what a
name needs is imported when the name is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# At once, because these modules would otherwise take their functions' names when imported.
from planner.calibrate import calibrate
from planner.measure import Measurement, measure
from planner.recommend import recommend
from planner.tune import tune
from planner.workload import Workload

if TYPE_CHECKING:
    from planner.calibration import Calibration
    from planner.memory.estimate import MemoryEstimate, estimate, max_sequence
    from planner.quality.profiles import Profile
    from planner.recommendation import Recommendation
    from planner.search.relax import NothingFitsError
    from planner.search.space import Space
    from planner.tuning import Tuned

__all__ = [
    "Calibration",
    "Measurement",
    "MemoryEstimate",
    "NothingFitsError",
    "Profile",
    "Recommendation",
    "Space",
    "Tuned",
    "Workload",
    "calibrate",
    "estimate",
    "max_sequence",
    "measure",
    "recommend",
    "tune",
]

_HOMES = {
    "Calibration": "planner.calibration",
    "MemoryEstimate": "planner.memory.estimate",
    "NothingFitsError": "planner.search.relax",
    "Profile": "planner.quality.profiles",
    "Recommendation": "planner.recommendation",
    "Space": "planner.search.space",
    "Tuned": "planner.tuning",
    "estimate": "planner.memory.estimate",
    "max_sequence": "planner.memory.estimate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
