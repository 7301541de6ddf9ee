"""What decides: workload and budget in, an attention that fits out. Importing it loads no torch; what a
name needs is imported when the name is first used."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.calibrate import calibrate
    from planner.calibration import Calibration
    from planner.measure import Measurement, measure
    from planner.memory.estimate import MemoryEstimate, estimate, max_sequence
    from planner.quality.profiles import Profile
    from planner.recommend import recommend
    from planner.recommendation import Recommendation
    from planner.search.relax import NothingFitsError
    from planner.search.space import Space
    from planner.tune import tune
    from planner.tuning import Tuned
    from planner.workload import Workload

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
    "Measurement": "planner.measure",
    "MemoryEstimate": "planner.memory.estimate",
    "NothingFitsError": "planner.search.relax",
    "Profile": "planner.quality.profiles",
    "Recommendation": "planner.recommendation",
    "Space": "planner.search.space",
    "Tuned": "planner.tuning",
    "Workload": "planner.workload",
    "calibrate": "planner.calibrate",
    "estimate": "planner.memory.estimate",
    "max_sequence": "planner.memory.estimate",
    "measure": "planner.measure",
    "recommend": "planner.recommend",
    "tune": "planner.tune",
}


class _Package(ModuleType):
    """Importing `planner.measure` binds the module to its name here, where the function is meant."""

    def __setattr__(self, name: str, value: Any) -> None:
        of_equal_name = name in _HOMES and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if of_equal_name else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
