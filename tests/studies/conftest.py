"""What tests of studies get: a scope whose runs take no time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention.config import AttentionConfig
from planner.measuring.measure import Environment, Measurement
from planner.memory.estimate import estimate
from planner.workload import Workload
from studies.bench.study import Scope

HERE = Environment(python="3.11", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")


class Runs:
    """Measures nothing: bytes are the predicted ones, and the n-th run takes n tenths of a second."""

    def __init__(self) -> None:
        self.count = 0

    def measure(self, config: AttentionConfig, workload: Workload) -> Measurement:
        self.count += 1
        return Measurement(
            config=config,
            workload=workload,
            device="cpu",
            kind="ok",
            runs=1,
            environment=HERE,
            allocated=estimate(config, workload, "cpu").allocated,
            seconds=self.count / 10,
            reference=0.05,
        )


class Small(Scope):
    """A quick scope of the CPU."""

    def batch(self, **_: Any) -> Any:
        return Runs()


@pytest.fixture
def scope() -> Scope:
    return Small(torch.device("cpu"), quick=True)
