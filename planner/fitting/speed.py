"""Fits seconds a unit of work to timed runs, and says how far that is off on others. Imports no torch.

measured_i ~ sum_j units_ij x_j with every x_j >= 0, by least squares of relative errors: a call of 5 ms
counts as much as one of 500. Runs that are far off count less (Huber's weights), and where the runs say
little about a unit the documented default, scaled to this device, fills in. Python's part of the time is the
same for all dtypes; a CPU's backward computes 16 bits in single precision, so that dtypes share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from attention.errors import AttentionPlannerError
from attention.sizes.arrays import Floats
from planner import gpus
from planner.calibration import Costs, Rates, SpeedFit
from planner.configs import columns_of
from planner.fitting.samples import Sample
from planner.fitting.speed_runs import LONGER, timing_samples
from planner.measuring.measure import Device, Measurement, check_timed
from planner.memory.dispatch import goes_apart
from planner.memory.machines import Cpu, Cuda, Machine, this_cpu, units_of
from planner.speed.call_time import kernel_of
from planner.speed.rates import HOST, default_cpu_rates, default_rates, with_double
from planner.speed.seconds import seconds_of, utilisation
from planner.speed.work import Work, work_of

RUNS: Final = 168
"""Timed runs of a calibration: four of each kind, dtype and mode."""
HELD_OUT_SHARE: Final = 4
"""One run in so many is held out."""
PRIOR: Final = 0.03
"""Weight of a default beside a run's of 1."""
ROUNDS: Final = 8
"""Rounds of reweighting."""
SIDES: Final = 4
"""Rounds of telling what a GPU's runs waited for."""
SHARED: Final = (*HOST, "scored", "ranked", "gated")
"""Units whose cost does not depend on the dtype."""


def plan_speed(device: Device, seed: int, runs: int) -> tuple[list[Sample], list[Sample]]:
    """(runs to fit to, held-out runs of other draws, every second one longer)."""
    held_out = runs // HELD_OUT_SHARE
    apart = timing_samples(device, seed + 1_000_003, longer=LONGER)
    return speed_runs(device, seed, runs - held_out), list(islice(apart, held_out))


def speed_runs(device: Device, seed: int, runs: int) -> list[Sample]:
    """`runs` samples to time on a device, over all that seconds depend on."""
    return list(islice(timing_samples(device, seed), runs))


def machine_of(measurement: Measurement) -> Machine:
    """The machine that a measurement is of; a CPU's, as far as it does not say, is taken to be this one."""
    where = measurement.environment
    if measurement.device == "cpu":
        here = this_cpu(measurement.workload.dtype)
        units = here.units if where.capability is None else units_of(where.capability)
        return replace(here, threads=where.threads or here.threads, units=units)
    card = gpus.of_device(where.device or "", where.device_bytes)
    return Cuda(card.capability, cudnn=where.kernel == "cudnn")


STEPS: Final[tuple[Literal["forward", "backward"], ...]] = ("forward", "backward")


class _Row(NamedTuple):
    """A timed run."""

    measurement: Measurement
    work: Work


class Coefficient(NamedTuple):
    """The unit of work that a coefficient belongs to."""

    step: Literal["forward", "backward"]
    dtype: str
    """Empty if all dtypes share it."""
    name: str


def fit(measurements: Sequence[Measurement]) -> Rates:
    """Rates of the device that was measured; AttentionPlannerError if no run gave seconds, ConfigError for
    dry runs."""
    for measurement in measurements:
        check_timed(measurement.device)
    good = [m for m in measurements if m.kind == "ok"]
    if not good:
        raise AttentionPlannerError(f"no speed to fit: none of {len(measurements)} timed runs gave seconds")
    start = defaults_for(good[0])
    rows = [_Row(m, _work(m, start)) for m in good]
    matrix, units = _units(rows)
    seconds = np.array([m.seconds for m in good])
    expected = np.array([_cost(start, unit) for unit in units])
    coefficients = expected
    # A GPU's host and device run side by side: which of them a run waited for follows from the costs.
    for _ in range(1 if start.device == "cpu" else SIDES):
        waited = matrix if start.device == "cpu" else _waited(matrix, units, coefficients)
        scale = float(np.median(seconds / np.maximum(waited @ expected, 1e-12)))
        coefficients = _fitted(waited / seconds[:, None], expected * scale)
    return _rates(start, dict(zip(units, coefficients, strict=True)), rows)


def _waited(matrix: Floats, units: Sequence[Coefficient], costs: Floats) -> Floats:
    """The units of each pass that take longer at these costs, of the host or of the device; 0 of the
    others."""
    waited = matrix.copy()
    for step in STEPS:
        host = np.array([unit.step == step and unit.name in HOST for unit in units])
        device = np.array([unit.step == step for unit in units]) & ~host
        waits_for_host = matrix @ (costs * host) > matrix @ (costs * device)
        waited[np.ix_(waits_for_host, device)] = 0
        waited[np.ix_(~waits_for_host, host)] = 0
    return waited


def held_out_errors(rates: Rates, measurements: Iterable[Measurement]) -> Floats:
    """(predicted - measured) / measured of each run that gave seconds, in their order."""
    errors = [
        seconds_of(m.config, m.workload, machine_of(m), rates) / m.seconds - 1
        for m in measurements
        if m.kind == "ok" and m.seconds
    ]
    return np.array(errors)


def speed_fit(fitted: Sequence[Measurement], held_out: Sequence[Measurement]) -> SpeedFit:
    """Rates fitted to runs, with their errors on the held-out ones."""
    together = steady([*fitted, *held_out])
    fitted, held_out = together[: len(fitted)], together[len(fitted) :]
    rates = fit(fitted)
    apart = [m for m in held_out if m.kind == "ok"]
    errors = held_out_errors(rates, apart)
    measured = np.array([m.seconds for m in apart])
    return SpeedFit(
        rates=rates,
        fitted=sum(m.kind == "ok" for m in fitted),
        held_out=len(apart),
        errors=tuple(sorted(errors.tolist())),
        median_error=float(np.median(np.abs(errors))) if len(errors) else 0.0,
        rank_correlation=rank_correlation(measured * (1 + errors), measured),
        noise=float(median(m.spread or 0.0 for m in apart)) if apart else 0.0,
    )


def steady(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The runs with their seconds as if the device had always been as fast as it was in the median: a
    machine that others use too is slower at times, and then its reference call is as well."""
    references = [m.reference for m in measurements if m.reference]
    if not references:
        return list(measurements)
    usual = median(references)
    return [
        m.model_copy(update={"seconds": m.seconds * usual / m.reference}) if m.seconds and m.reference else m
        for m in measurements
    ]


def corrected(rates: Rates, measurements: Sequence[Measurement]) -> Rates:
    """The rates times, dtype by dtype, how many times as long as predicted the measured runs took (the
    median); AttentionPlannerError if no run gave seconds."""
    ratios: dict[str, list[float]] = {}
    for m in measurements:
        if m.kind == "ok" and m.seconds:
            guess = seconds_of(m.config, m.workload, machine_of(m), rates)
            ratios.setdefault(m.workload.dtype, []).append(m.seconds / guess)
    if not ratios:
        raise AttentionPlannerError(f"nothing to learn from: none of {len(measurements)} runs gave seconds")
    factors = {dtype: float(median(each)) for dtype, each in ratios.items()}
    summary = ", ".join(f"{dtype} x {factors[dtype]:.3f} by {len(ratios[dtype])} runs" for dtype in factors)
    steps: dict[str, Any] = {
        step: {
            dtype: {name: cost * factors.get(dtype, 1.0) for name, cost in costs.items()}
            for dtype, costs in getattr(rates, step).items()
        }
        for step in STEPS
    }
    return rates.model_copy(update={**steps, "source": f"{rates.source}; {summary}"})


def rank_correlation(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation; 0 where there is nothing to correlate."""
    if len(a) < 2:
        return 0.0
    first, second = (np.argsort(np.argsort(x)).astype(np.float64) for x in (a, b))
    correlation = float(np.corrcoef(first, second)[0, 1])
    return min(max(correlation, -1.0), 1.0)


def defaults_for(measurement: Measurement) -> Rates:
    """The documented rates of the device that was measured."""
    machine = machine_of(measurement)
    if isinstance(machine, Cpu):
        return default_cpu_rates(machine)
    where = measurement.environment
    return default_rates(gpus.of_device(where.device or "", where.device_bytes))


def _work(m: Measurement, rates: Rates) -> Work:
    machine, columns = machine_of(m), columns_of(m.config, m.workload.seq)
    apart = bool(goes_apart(columns, m.workload, machine))
    return work_of(columns, m.workload, machine, kernel_of(rates), apart=apart)


def _units(rows: Sequence[_Row]) -> tuple[Floats, list[Coefficient]]:
    """([runs, units], the units that occur)."""
    columns: dict[Coefficient, Floats] = {}
    for index, (m, work) in enumerate(rows):
        shares = m.device == "cpu"
        for step in STEPS:
            totals = getattr(work, step) or {}
            for name, count in totals.items():
                if not count:
                    continue
                common = name in SHARED or (step == "backward" and shares and name != "matmul")
                unit = Coefficient(step, "" if common else m.workload.dtype, name)
                columns.setdefault(unit, np.zeros(len(rows)))[index] += count
    return np.stack(list(columns.values()), axis=1), list(columns)


def _cost(rates: Rates, unit: Coefficient) -> float:
    """A default for a unit; of a shared one, float32's."""
    by_dtype: dict[str, Costs] = getattr(rates, unit.step)
    costs = by_dtype.get(unit.dtype or "float32") or next(iter(by_dtype.values()))
    return costs.get(unit.name, 0.0)


def _fitted(relative: Floats, expected: Floats) -> Floats:
    """x >= 0 with relative @ x ~ 1, robustly, and a little towards what is `expected`."""
    positive = expected > 0
    size = np.where(positive, expected, 1.0)
    prior = PRIOR * np.eye(len(expected))[positive]
    scaled, target = relative * size, np.ones(len(relative))
    weights = np.ones(len(relative))
    solution = np.ones(len(expected))
    for _ in range(ROUNDS):
        rows = np.concatenate([scaled * weights[:, None], prior])
        solution = nnls(rows, np.concatenate([target * weights, PRIOR * np.ones(len(prior))]))
        errors = np.abs(scaled @ solution - 1)
        bound = 1.5 * max(float(np.median(errors)), 0.01)
        weights = np.sqrt(np.minimum(1, bound / np.maximum(errors, 1e-12)))
    return solution * size


def nnls(a: Floats, b: Floats) -> Floats:
    """argmin |a x - b| over x >= 0, by Lawson and Hanson's active sets."""
    size = np.linalg.norm(a, axis=0)
    size[size == 0] = 1.0
    a = a / size
    n = a.shape[1]
    x, passive = np.zeros(n), np.zeros(n, bool)
    for _ in range(10 * n):
        slope = a.T @ (b - a @ x)
        if passive.all() or slope[~passive].max() < 1e-10:
            break
        passive[np.argmax(np.where(passive, -np.inf, slope))] = True
        while True:
            best = np.zeros(n)
            best[passive] = np.linalg.lstsq(a[:, passive], b, rcond=None)[0]
            negative = passive & (best <= 0)
            if not negative.any():
                break
            x = x + float((x[negative] / (x[negative] - best[negative])).min()) * (best - x)
            passive &= x > 1e-14
            x[~passive] = 0.0
        x = best
    solution: Floats = x / size
    return solution


def _rates(start: Rates, coefficients: dict[Coefficient, float], rows: Sequence[_Row]) -> Rates:
    """The rates of the dtypes that were run; units that no run had keep their default."""
    costs: dict[str, dict[str, Costs]] = {"forward": {}, "backward": {}}
    dtypes = sorted({row.measurement.workload.dtype for row in rows})
    for step, by_dtype in costs.items():
        for dtype in dtypes:
            default: Costs = getattr(start, step).get(dtype, {})
            fitted: Any = {
                unit.name: x
                for unit, x in coefficients.items()
                if unit.step == step and unit.dtype in ("", dtype)
            }
            by_dtype[dtype] = default | {name: float(x) for name, x in fitted.items()}
        if start.device == "cpu":
            with_double(by_dtype)
    where = rows[0].measurement.environment
    rates = start.model_copy(
        update={
            "source": f"measured on {where.device or start.device}, torch {where.torch}, {where.date}",
            **costs,
        }
    )
    return rates.model_copy(update={"peak": start.peak | _peaks(rates, rows)})


def _peaks(rates: Rates, rows: Sequence[_Row]) -> dict[str, float]:
    """A CPU's FLOP/s by dtype: the most that a run reached. A GPU's are known."""
    if rates.device != "cpu":
        return {}
    best: dict[str, float] = {}
    for m, _ in rows:
        if m.workload.mode == "inference" and m.config.multihead is None and m.seconds:
            columns, machine = columns_of(m.config, m.workload.seq), machine_of(m)
            share = utilisation(columns, m.workload, machine, rates)[0]
            reached = share * seconds_of(m.config, m.workload, machine, rates) / m.seconds
            best[m.workload.dtype] = max(
                best.get(m.workload.dtype, 0.0), reached * rates.peak[m.workload.dtype]
            )
    if "float32" in best:
        best["float64"] = best["float32"] / 2
    return best
