"""Answers to make pages of."""

from __future__ import annotations

import random

import pytest

import planner
from attention import AttentionConfig
from planner.answers.recommendation import Recommendation
from planner.answers.tuned import Tuned
from planner.answers.verified import Verified
from planner.measuring.measure import Environment, Measurement
from planner.question.space import Space

SPACE = Space(block_sizes=(64, 128), branches=(1, 2))
HERE = Environment(python="3.11", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")


@pytest.fixture(scope="session")
def recommended() -> Recommendation:
    """For a card, without a length."""
    return planner.recommend("1GB", causal=True, reserve="100MB", space=SPACE, trials=1, dtype="float32")


@pytest.fixture(scope="session")
def verified(recommended: Recommendation) -> tuple[Verified, ...]:
    """One pick that ran and one that did not."""
    found = recommended.memory
    ran = Verified(
        role="answer",
        kind="ok",
        message=None,
        upper=found.upper,
        allocated=found.upper - 10**6,
        predicted=recommended.seconds,
        seconds=1.25 * recommended.seconds,
    )
    return ran, ran.model_copy(
        update={
            "role": "widest",
            "kind": "oom",
            "message": "memory ran out",
            "allocated": None,
            "seconds": None,
        }
    )


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Eight trials, of which one ran out of memory."""
    seen: list[AttentionConfig] = []

    def measure(config, workload):
        seen.append(config)
        given = {"config": config, "workload": workload, "device": "cpu", "runs": 1, "environment": HERE}
        if len(seen) == 3:
            return Measurement(kind="oom", message="memory ran out", **given)
        seconds = random.Random(config.to_json()).uniform(0.01, 1)
        return Measurement(kind="ok", seconds=seconds, allocated=1 << 20, **given)

    storage = str(tmp_path_factory.mktemp("tuned") / "trials.journal")
    return planner.tune("500MB", 4096, space=SPACE, trials=8, measure=measure, storage=storage, heads=2)
