"""What decides: workload and budget in, an attention that fits out. Importing it loads no torch; what a
name needs is imported when the name is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# At once, because these modules would otherwise take their functions' names when imported.
from planner.calibrate import calibrate
from planner.measure import Measurement, measure
from planner.workload import Workload

if TYPE_CHECKING:
    from planner.calibration import Calibration
    from planner.memory.estimate import MemoryEstimate, estimate, max_sequence

__all__ = [
    "Calibration",
    "Measurement",
    "MemoryEstimate",
    "Workload",
    "calibrate",
    "estimate",
    "max_sequence",
    "measure",
]

_HOMES = {
    "Calibration": "planner.calibration",
    "MemoryEstimate": "planner.memory.estimate",
    "estimate": "planner.memory.estimate",
    "max_sequence": "planner.memory.estimate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
