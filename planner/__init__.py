"""The part that decides: workload and budget in, an attention that fits out. Importing it loads no torch; the
module of a name is imported when the name is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.answers.dry_run import DryRun
    from planner.answers.recommendation import Recommendation
    from planner.answers.shared import SharedEstimate, Sharing
    from planner.answers.tuned import Tuned
    from planner.api import calibrate, estimate, predict_time, recommend, tune
    from planner.calibration import Calibration, Prediction
    from planner.measuring.measure import Measurement, measure
    from planner.memory.estimate import MemoryEstimate, max_sequence
    from planner.programs.run import dry_run
    from planner.quality.profiles import Profile
    from planner.question.space import Space
    from planner.search.relax import NothingFitsError
    from planner.workload import Workload

__all__ = [
    "Calibration",
    "DryRun",
    "Measurement",
    "MemoryEstimate",
    "NothingFitsError",
    "Prediction",
    "Profile",
    "Recommendation",
    "SharedEstimate",
    "Sharing",
    "Space",
    "Tuned",
    "Workload",
    "calibrate",
    "dry_run",
    "estimate",
    "max_sequence",
    "measure",
    "predict_time",
    "recommend",
    "tune",
]

_HOMES = {
    "Calibration": "planner.calibration",
    "DryRun": "planner.answers.dry_run",
    "Measurement": "planner.measuring.measure",
    "MemoryEstimate": "planner.memory.estimate",
    "NothingFitsError": "planner.search.relax",
    "Prediction": "planner.calibration",
    "Profile": "planner.quality.profiles",
    "Recommendation": "planner.answers.recommendation",
    "SharedEstimate": "planner.answers.shared",
    "Sharing": "planner.answers.shared",
    "Space": "planner.question.space",
    "Tuned": "planner.answers.tuned",
    "Workload": "planner.workload",
    "calibrate": "planner.api",
    "dry_run": "planner.programs.run",
    "estimate": "planner.api",
    "max_sequence": "planner.memory.estimate",
    "measure": "planner.measuring.measure",
    "predict_time": "planner.api",
    "recommend": "planner.api",
    "tune": "planner.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    member = getattr(import_module(_HOMES[name]), name)
    globals()[name] = member
    return member
