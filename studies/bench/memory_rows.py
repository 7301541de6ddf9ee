"""Memory in the rows of several studies: predicted for a card, and predicted and measured where the study
runs."""

from __future__ import annotations

from typing import Final

from attention.config import AttentionConfig
from planner import gpus
from planner.measuring.server import Batch
from planner.memory.cuda_process import blas_workspace
from planner.memory.estimate import MemoryEstimate, estimate
from planner.workload import Workload
from studies.bench.records import Row

CARD: Final = "gtx1080"
"""The card of the original project."""
MIB: Final = 1 << 20
"""Bytes of what the original project calls MB."""


def predicted(config: AttentionConfig, workload: Workload, device: str = CARD) -> Row:
    """Bytes at the peak, by component and together; allocated with cuBLAS's workspace, which the seeds'
    processes had from products before."""
    planned = estimate(config, workload, device)
    found, there = _shares(planned), any(line.name == "cuBLAS workspace" for line in planned.lines)
    workspace = 0 if there else int(blas_workspace(gpus.find(device).capability).bytes)
    inside = found["components"]
    inside["workspace"] = inside.get("workspace", 0) + workspace
    return {**found, "allocated": found["allocated"] + workspace}


def measured(config: AttentionConfig, workload: Workload, batch: Batch) -> Row:
    """Predicted bytes at the peak where the batch runs, and the measured bytes of a first (`cold`) and a
    second (`warm`) call; these are None if it did not run, and `outcome` says why."""
    measurement = batch.measure(config, workload)
    place = measurement.environment
    on: str | gpus.Gpu = "cpu"
    if measurement.device != "cpu":
        on = gpus.of_device(place.device or measurement.device, place.device_bytes)
    return {
        **_shares(estimate(config, workload, on, threads=place.threads)),
        "outcome": measurement.message or measurement.kind,
        "cold": measurement.allocated,
        "warm": measurement.allocated_warm,
    }


def place(row: Row) -> str:
    """The device of a row, for people: `CPU`, `GTX 1080`."""
    name: str = row["on"].removeprefix("NVIDIA ").removeprefix("GeForce ")
    return "CPU" if name == "cpu" else name


def mib(count: float) -> str:
    """Bytes in MiB, the unit of the original project, without its name."""
    size = count / MIB
    return f"{size:,.1f}" if size >= 1 else f"{size:.2g}"


def _shares(prediction: MemoryEstimate) -> Row:
    inside = {name: count for name, count in prediction.components.items() if name != "context"}
    rounding = prediction.allocated - sum(inside.values())
    return {
        "on": prediction.on,
        "allocated": prediction.allocated,
        "reserved": prediction.reserved,
        "upper": prediction.upper,
        "components": inside | ({"rounding": rounding} if rounding else {}),
    }
