"""Runs on this machine: how often and for how long by default, and at most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

TUNING_TRIALS: Final = 30
"""Configs that tuning measures."""
TRIAL_TIMEOUT: Final = 120.0
"""Seconds a trial may take."""
TRIAL_RUNS: Final = 3
"""Warm calls of a trial, of whose times the median counts."""
CALIBRATION_RUNS: Final = 140
"""Enough that 99% of held-out runs is less than all of them."""
MAXIMUM_TRIALS: Final = 100_000
MAXIMUM_TIMEOUT: Final = 1e6
"""Seconds, of any run: twelve days."""

OnStep = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what comes next)."""
