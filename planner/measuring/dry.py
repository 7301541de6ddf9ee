"""Measurements on a card that is not there, `device="dry:h100-sxm"`. Imports no torch.

The measuring process is started with the stand-in for CUDA's libraries, runs with a CUDA build of torch, and
sees the card that a task names: bytes are torch's own, seconds there are none.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Final

from attention.errors import ConfigError
from planner import gpus
from planner.gpus import Gpu
from planner.standin.environment import card_variables, environment
from planner.standin.install import torch_for
from planner.standin.interpreter import interpreter

PREFIX: Final = "dry:"


def is_dry(device: str) -> bool:
    """Whether a device is a card that is not there."""
    return device.startswith(PREFIX)


def card_of(device: str) -> Gpu:
    """The card that a device names; ConfigError if it names none."""
    name = device.removeprefix(PREFIX)
    if not is_dry(device) or not name:
        raise ConfigError(f"a dry run's device is dry:NAME, as dry:rtx4090, got {device!r}")
    return gpus.find(name)


def named(device: str) -> str:
    """The device, a card by its key."""
    return PREFIX + card_of(device).key if is_dry(device) else device


@cache
def _started(settings: tuple[tuple[str, str], ...]) -> dict[str, str]:
    torch, ahead = torch_for(interpreter(sys.executable))
    # Any card does to start with: a task brings its own.
    return environment(gpus.known()[0], torch=torch, ahead=ahead, inherited=dict(settings))


def start_variables() -> dict[str, str]:
    """What a measuring process is started with; UnavailableError without a CUDA build of torch for this
    Python, naming what makes one."""
    return dict(_started(tuple(sorted(os.environ.items()))))


def task_variables(device: str, cap_bytes: int | None) -> dict[str, str]:
    """What a task sets before it looks for a card. `cap_bytes`: the memory of the card, None for what it
    reports; the planned context is taken from it at the start."""
    return card_variables(card_of(device), vram=cap_bytes)
