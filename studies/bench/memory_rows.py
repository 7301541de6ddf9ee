"""What rows of several studies say of memory: predicted for a card, predicted and measured where the study
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
"""The card of the seeds."""
MIB: Final = 1 << 20
"""What the seeds call MB."""


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
    """The same where the batch runs, and beside it what a first and a second call were measured to allocate;
    None where it did not run, and `outcome` says why."""
    found = batch.measure(config, workload)
    place = found.environment
    on = "cpu" if found.device == "cpu" else place.device or found.device
    return {
        **_shares(estimate(config, workload, on, threads=place.threads)),
        "outcome": found.message or found.kind,
        "cold": found.allocated,
        "warm": found.allocated_warm,
    }


def place(row: Row) -> str:
    """Where a row's bytes are, for people: `CPU`, `GTX 1080`."""
    name: str = row["on"].removeprefix("NVIDIA ").removeprefix("GeForce ")
    return "CPU" if name == "cpu" else name


def mib(count: float) -> str:
    """Bytes in the unit of the seeds, without its name."""
    size = count / MIB
    return f"{size:,.1f}" if size >= 1 else f"{size:.2g}"


def _shares(found: MemoryEstimate) -> Row:
    inside = {name: count for name, count in found.components.items() if name != "context"}
    rounding = found.allocated - sum(inside.values())
    return {
        "on": found.on,
        "allocated": found.allocated,
        "reserved": found.reserved,
        "upper": found.upper,
        "components": inside | ({"rounding": rounding} if rounding else {}),
    }
