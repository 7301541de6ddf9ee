"""The seconds of a call with the range that they are probably in. Imports no torch, and of one device's call
no NumPy."""

from __future__ import annotations

from typing import Any

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner import gpus
from planner.answers.shared import SharedEstimate, refuse_idle_links
from planner.calibration import Calibration, Prediction
from planner.memory.estimate import MemoryEstimate, machine_of
from planner.memory.launches import launches_of
from planner.memory.machines import Machine
from planner.ranks.links import network_of
from planner.ranks.ring import refuse_sharing
from planner.speed.call_time import TimeRange, seconds_and_range
from planner.speed.rates import default_rates, speed_fit_of
from planner.workload import Workload, refuse_features


def predicted_time(
    config: AttentionConfig,
    workload: Workload,
    device: str | gpus.Gpu,
    *,
    link: str | None = None,
    node: int | None = None,
    calibration: Calibration | None = None,
    threads: int | None = None,
) -> Prediction:
    """See `planner.api.predict_time`."""
    refuse_features(config, workload)
    refuse_sharing(config, workload)
    card = gpus.find(device) if isinstance(device, str) and device != "cpu" else device
    options = {"calibration": calibration, "threads": threads}
    if workload.gpus == 1:
        refuse_idle_links(link, node)
        return of_one(config, workload, card, machine_of(card, workload.dtype, threads), options)  # type: ignore[arg-type]
    from planner.speed.rates import speed_rates_of
    from planner.speed.timeline import longest_rank

    machine = machine_of(card, workload.dtype, threads)  # type: ignore[arg-type]
    network = network_of(workload.gpus, card, link, node)  # type: ignore[arg-type]
    rates = speed_rates_of(card, workload, options)
    rates.costs("forward", workload.dtype)
    seconds = longest_rank(config, workload, machine, rates, network).seconds
    return of_many(config, workload, card, machine, options, seconds)


def of_one(
    config: AttentionConfig, workload: Workload, card: Any, machine: Machine, options: dict[str, Any]
) -> Prediction:
    """The prediction of a call of one device. `options`: of `planner.estimate`."""
    found, source = _seconds(config, workload, card, machine, options)
    counted = launches_of(config, workload, machine)
    launches = None if counted is None else int(counted.number)
    return Prediction(**found._asdict(), launches=launches, source=source)


def of_many(
    config: AttentionConfig,
    workload: Workload,
    card: Any,
    machine: Machine,
    options: dict[str, Any],
    seconds: float,
) -> Prediction:
    """That of a call which takes ranks so long: as sure, relative to it, as the call of one device is."""
    one, source = _seconds(config, workload.model_copy(update={"gpus": 1}), card, machine, options)
    return Prediction(**one.around(seconds)._asdict(), source=source)


def _seconds(
    config: AttentionConfig, workload: Workload, card: Any, machine: Machine, options: dict[str, Any]
) -> tuple[TimeRange, str]:
    fit = speed_fit_of(card, workload, options)
    of_card = card if isinstance(card, gpus.Gpu) else None
    rates = fit.rates if fit is not None else default_rates(of_card or machine)
    return seconds_and_range(config, workload, machine, rates, of_card, fit), rates.source


def with_time(
    estimate: MemoryEstimate,
    device: str | gpus.Gpu,
    *,
    calibration: Calibration | None = None,
    threads: int | None = None,
    dry: bool = False,
) -> MemoryEstimate:
    """The estimate with its call's seconds, where they can be predicted; of a dry run it has none. Options:
    as the estimate was made with."""
    config, workload = estimate.config, estimate.workload
    if dry or workload.weights:
        return estimate
    card = gpus.find(device) if isinstance(device, str) and device != "cpu" else device
    machine = machine_of(card, workload.dtype, threads)  # type: ignore[arg-type]
    options = {"calibration": calibration, "threads": threads}
    try:
        if not isinstance(estimate, SharedEstimate):
            time = of_one(config, workload, card, machine, options)
        elif estimate.sharing.seconds:
            time = of_many(config, workload, card, machine, options, estimate.sharing.seconds)
        else:
            return estimate
    except ConfigError:  # of a card or dtype whose speed nobody knows
        return estimate
    return estimate.model_copy(update={"time": time})
