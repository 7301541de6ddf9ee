"""Seconds of one call and the range in which they probably are. Imports no torch, and NumPy only with arrays.

A range is made of what is known of each part: of a measured device the errors of its calibration's held-out
runs; of a GPU's kernels those of published measurements that their fit did not see (`python -m
studies.bench.published_fit`); of all else judgement.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from attention.config import AttentionConfig
from attention.errors import ConfigError
from attention.sizes.arrays import Amount, maximum
from planner.calibration import Costs, Rates, SpeedFit
from planner.configs import columns_of
from planner.gpus import Gpu
from planner.memory.dispatch import goes_apart
from planner.memory.machines import Cpu, Machine
from planner.speed.gpu_kernels import KERNELS, Direction, range_of
from planner.speed.rates import HOST
from planner.speed.work import Kernel, Totals, cpu_kernel, gpu_kernel, work_of
from planner.workload import Workload

JUDGED: Final = (0.5, 2.0)
"""(low, high) in units of what is predicted, where nothing was measured: judgement."""
COVERED: Final = 0.8
"""Share of calls whose seconds are to be within the range."""
LEAST_RUNS: Final = 9
"""Held-out runs of a calibration from which its errors are a range."""


class TimeRange(NamedTuple):
    """Seconds of a call with their range."""

    seconds: float
    low: float
    high: float

    def around(self, seconds: float) -> TimeRange:
        """Other seconds, as sure relative to them: those of ranks that share the call."""
        times = seconds / self.seconds
        return TimeRange(seconds, self.low * times, self.high * times)


def seconds_and_range(
    config: AttentionConfig,
    workload: Workload,
    machine: Machine,
    rates: Rates,
    card: Gpu | None = None,
    fit: SpeedFit | None = None,
) -> TimeRange:
    """Seconds of a warm call of one config. `card`: the GPU whose documented defaults the rates are; `fit`:
    the calibration that they are of. ConfigError as of `planner.speed.seconds.seconds`."""
    check(workload, machine, rates)
    columns = columns_of(config, workload.seq)
    apart = bool(goes_apart(columns, workload, machine))
    work = work_of(columns, workload, machine, kernel_of(rates), apart=apart)
    measured = None if fit is None else measured_range(fit)
    total = low = high = 0.0
    steps: tuple[tuple[Direction, Totals | None], ...] = (
        ("forward", work.forward),
        ("backward", work.backward),
    )
    for step, totals in steps:
        if totals is None:
            continue
        for kernel, seconds in _parts(totals, rates.costs(step, workload.dtype), rates).items():
            ends = measured or _known_range(kernel, step, card, workload.dtype)
            total, low, high = total + seconds, low + seconds * ends[0], high + seconds * ends[1]
    return TimeRange(total, low, high)


def measured_range(fit: SpeedFit) -> tuple[float, float] | None:
    """(low, high) of measured / predicted of most held-out runs of a calibration; None of too few."""
    ratios = sorted(1 / (1 + error) for error in fit.errors if error > -1)
    if len(ratios) < LEAST_RUNS:
        return None
    left_out = int((1 - COVERED) / 2 * (len(ratios) + 1))
    return min(ratios[left_out - 1], 1.0), max(ratios[-left_out], 1.0)


def _known_range(kernel: str, step: Direction, card: Gpu | None, dtype: str) -> tuple[float, float]:
    if card is None or kernel not in KERNELS or kernel == "plain":
        return JUDGED
    return range_of(kernel, step, card, dtype)


def _parts(total: Totals, costs: Costs, rates: Rates) -> dict[str, float]:
    """Seconds of a pass that its call waits for, by kernel, and "" for all else."""
    host = sum(cost * total[name] for name, cost in costs.items() if name in HOST)
    parts: dict[str, Any] = {"": 0.0}
    for name, cost in costs.items():
        if name not in HOST:
            kernel = name.partition(".")[0] if "." in name else ""
            parts[kernel] = parts.get(kernel, 0.0) + cost * total[name]
    if rates.device == "cpu":
        parts[""] += host
    elif host > sum(parts.values()):
        parts = {"": host}
    return {kernel: float(seconds) for kernel, seconds in parts.items() if seconds}


def pass_seconds(total: Totals, costs: Costs, rates: Rates) -> Amount:
    """Seconds of a pass's totals, or of a part of them, at the costs of that pass."""
    host: Amount = 0
    device: Amount = 0
    for name, cost in costs.items():
        if name in HOST:
            host = host + cost * total[name]
        else:
            device = device + cost * total[name]
    return host + device if rates.device == "cpu" else maximum(host, device)


def kernel_of(rates: Rates) -> Kernel:
    """How the rates' device cuts a call."""
    return (cpu_kernel if rates.device == "cpu" else gpu_kernel)(rates.workers)


def check(workload: Workload, machine: Machine, rates: Rates) -> None:
    """ConfigError where the seconds of such calls are not predicted with these rates."""
    if workload.weights:
        raise ConfigError("the speed of weights=True is not predicted; leave weights out, or measure it")
    if isinstance(machine, Cpu) != (rates.device == "cpu"):
        kind = "a CPU" if isinstance(machine, Cpu) else "a GPU"
        raise ConfigError(
            f"the rates are of {rates.device}, the machine is {kind}; give rates of that machine"
        )
