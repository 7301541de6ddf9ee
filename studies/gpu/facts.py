"""Where rows come from: device, driver, versions, code."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import torch

from attention.errors import UnavailableError
from studies.bench.records import Row, environment, machine


def facts(device: str) -> Row:
    """The machine of a device. UnavailableError if there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            "there is no CUDA device that this torch can use; try --device cpu, or `planner dry-run`"
        )
    where = torch.device(device)
    found = environment(where) | {
        "kind": device,
        "machine": machine(where),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "device_bytes": None,
        "capability": None,
        "driver": None,
        "power_limit": None,
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(where)
        found |= {
            "device_bytes": card.total_memory,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            **_told_by_the_driver(),
        }
    return found


def _told_by_the_driver() -> Row:
    """Driver and power limit as nvidia-smi has them, None without it."""
    names = ("driver", "power_limit")
    if shutil.which("nvidia-smi") is None:
        return dict.fromkeys(names)
    command = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(names)
    values = [value.strip() for value in text.splitlines()[0].split(",")]
    return dict(zip(names, values, strict=True))
