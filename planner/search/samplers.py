"""Optuna's samplers by name. Imports Optuna, no torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import get_args

import optuna

from attention.errors import ConfigError
from planner.question.asked import NEEDED, Sampler

STARTUP, COLD_STARTUP = 10, 40
"""Trials that TPE wants before it models what is good, and from a cold start."""


def check_sampler(name: str) -> None:
    """ConfigError where there is no such sampler, or a package that it needs is missing: Optuna imports those
    when the first value is suggested, after all other work."""
    if name not in get_args(Sampler):
        raise ConfigError(f"sampler must be one of {', '.join(get_args(Sampler))}, got {name!r}")
    missing = [package for package in NEEDED.get(name, ()) if find_spec(package) is None]
    if missing:
        needed = " ".join(missing)
        raise ConfigError(
            f"sampler {name!r} needs {needed}, which is not installed: pip install {needed}, or choose tpe"
        )


def sampler_of(name: Sampler, seed: int, startup: int = STARTUP) -> optuna.samplers.BaseSampler:
    """A sampler; ConfigError where it cannot be had. `startup`: of TPE."""
    samplers = optuna.samplers
    makers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        # Dimension by dimension: kinds have dimensions of their own, and Optuna's joint model takes longer.
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=False, n_startup_trials=startup),
        "random": lambda: samplers.RandomSampler(seed=seed),
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed),
        "nsga3": lambda: samplers.NSGAIIISampler(seed=seed),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed),
        "qmc": lambda: samplers.QMCSampler(seed=seed),
        "gp": lambda: samplers.GPSampler(seed=seed),
        "brute": lambda: samplers.BruteForceSampler(seed=seed),
    }
    check_sampler(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return makers[name]()
