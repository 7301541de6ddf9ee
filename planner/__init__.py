"""What decides: workload and budget in, an attention that fits out."""

from planner.measure import Measurement, measure
from planner.workload import Workload

__all__ = ["Measurement", "Workload", "measure"]
