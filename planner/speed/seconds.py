"""Seconds of a call of each candidate, in training with its backward. Imports no torch.

seconds = sum over passes of (sum over kinds of work of units x seconds a unit)

Units are closed forms of what the library runs (`planner/speed/work.py`), seconds a unit are fitted to this
device's runs or documented defaults (`planner/speed/rates.py`). Of a GPU the host's part (launches, Python)
and the device's run side by side, and the longer one counts.

columns = Columns("block_sparse", "local_window", seq=131072, block_size=sizes, window=windows)
seconds(columns, workload, machine, rates)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from attention.config import AttentionConfig
from attention.sizes.arrays import Amount, Floats
from planner.calibration import Rates
from planner.configs import Columns, columns_of
from planner.memory.dispatch import goes_apart
from planner.memory.machines import Cuda, Machine
from planner.speed.call_time import check, kernel_of, pass_seconds
from planner.speed.rates import default_rates
from planner.speed.work import Work, multiply_adds, work_of
from planner.workload import Workload

AT_ONCE = 8192
"""Candidates that are evaluated together: few enough that their arrays stay in the cache."""


def seconds(columns: Columns, workload: Workload, machine: Machine, rates: Rates) -> Floats:
    """[len(columns)], seconds of a warm call; `workload.seq` is not read.

    ConfigError if the rates are of the other kind of device or lack the dtype, and for workloads that ask for
    the weights, which nobody has timed.
    """
    return _each(columns, workload, machine, rates, _predicted)


def seconds_of(config: AttentionConfig, workload: Workload, machine: Machine, rates: Rates) -> float:
    """Seconds of a warm call of one config; see `seconds`."""
    return float(seconds(columns_of(config, workload.seq), workload, machine, rates)[0])


def utilisation(columns: Columns, workload: Workload, machine: Machine, rates: Rates) -> Floats:
    """[len(columns)], the time at the speed of light in the predicted time, 0 to 1 where rates are right.

    The speed of light: 4 D FLOPs a pair of query and key that the kernels compute, and 10 D in backward, at
    the peak rate, or the bytes of q, k, v and out (in training, of their gradients too) at the memory's
    bandwidth, whichever takes longer.
    """
    return _each(columns, workload, machine, rates, _light) / seconds(columns, workload, machine, rates)


def _each(columns: Columns, workload: Workload, machine: Machine, rates: Rates, figure: Any) -> Floats:
    """figure(part, workload, machine, rates, apart) of all candidates, by parts that are computed alike."""
    check(workload, machine, rates)
    figures = np.empty(len(columns))
    for start in range(0, len(figures), AT_ONCE):
        part = columns if len(figures) <= AT_ONCE else columns.take(slice(start, start + AT_ONCE))
        into = figures[start : start + AT_ONCE]
        apart = np.broadcast_to(np.asarray(goes_apart(part, workload, machine), bool), len(into))
        for chosen in (False, True):
            mask = apart == chosen
            if mask.all():
                into[:] = figure(part, workload, machine, rates, chosen)
            elif mask.any():
                into[mask] = figure(part.take(np.flatnonzero(mask)), workload, machine, rates, chosen)
    return figures


def _predicted(columns: Columns, workload: Workload, machine: Machine, rates: Rates, apart: bool) -> Amount:
    work = work_of(columns, workload, machine, kernel_of(rates), apart=apart)
    total = pass_seconds(work.forward, rates.costs("forward", workload.dtype), rates)
    if work.backward is not None:
        total = total + pass_seconds(work.backward, rates.costs("backward", workload.dtype), rates)
    return total


def _light(columns: Columns, workload: Workload, machine: Machine, rates: Rates, apart: bool) -> Amount:
    # With one worker none is idle, and every kernel has as much to compute.
    if isinstance(machine, Cuda):
        machine = replace(machine, cudnn=False)
    work: Work = work_of(columns, workload, machine, kernel_of(rates)._replace(workers=1), apart=apart)
    computing = 4 * multiply_adds(work.forward) / rates.peak[workload.dtype]
    nbytes = work.forward["tokens"] * workload.itemsize
    if work.backward is not None:
        # A CPU's 16-bit backward computes in single precision.
        narrow = rates.device == "cpu" and workload.itemsize == 2
        peak = rates.peak.get("float32" if narrow else workload.dtype, rates.peak[workload.dtype])
        computing = computing + 10 * multiply_adds(work.backward) / peak
        nbytes = nbytes * 2
    return np.maximum(computing, nbytes / rates.bandwidth)


__all__ = ["Rates", "default_rates", "seconds", "seconds_of", "utilisation"]
