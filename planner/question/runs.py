"""What is run here by default: how often, and for how long."""

from __future__ import annotations

from typing import Final

TUNING_TRIALS: Final = 30
"""Configs that tuning measures."""
TRIAL_TIMEOUT: Final = 120.0
"""Seconds a trial may take."""
TRIAL_RUNS: Final = 3
"""Warm calls of a trial, of whose times the median counts."""
CALIBRATION_RUNS: Final = 140
"""Enough that 99% of held-out runs is less than all of them."""
