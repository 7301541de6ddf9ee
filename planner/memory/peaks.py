"""Memory peaks of many candidates at once, by the very plans that one config has. Imports no torch.

columns = Columns("block_sparse", "local_window", seq=131072, block_size=sizes, window=windows)
peaks(columns, workload, machine)
"""

from __future__ import annotations

from typing import Final

import numpy as np

from attention.errors import ConfigError
from attention.sizes.arrays import Ints
from planner.configs import Columns
from planner.memory.dispatch import goes_apart, planned
from planner.memory.machines import Machine
from planner.workload import Workload

AT_ONCE: Final = 8192
"""Candidates that are evaluated together: few enough that a plan's arrays stay in the cache."""


def peaks(columns: Columns, workload: Workload, machine: Machine) -> Ints:
    """Bytes at the peak of each candidate: what `plan_of` has for its config. `workload.seq` is not read.

    Refused are workloads that ask for the weights: how many there are is counted for one config at a time.
    """
    if workload.weights:
        raise ConfigError("weights=True is for one config at a time; use planner.estimate")
    peaks = np.empty(len(columns), np.int64)
    for start in range(0, len(peaks), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        peaks[part] = _together(columns.take(part), workload, machine)
    return peaks


def _together(columns: Columns, workload: Workload, machine: Machine) -> Ints:
    """Peaks of few candidates, those that are one kernel call apart from those that are tiles."""
    goes = np.broadcast_to(np.asarray(goes_apart(columns, workload, machine), bool), len(columns))
    peaks = np.empty(len(columns), np.int64)
    for apart in (True, False):
        which = np.flatnonzero(goes == apart)
        if which.size:
            some = columns if which.size == len(columns) else columns.take(which)
            peaks[which] = planned(some, workload, machine, apart=apart).peaks()
    return peaks
