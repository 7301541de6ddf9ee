"""Do the picks keep what was predicted of them? Measured on the device that is here. Imports no torch."""

from __future__ import annotations

from typing import Final

from attention.errors import ConfigError
from planner.answers.recommendation import Pick, Recommendation
from planner.answers.verified import Verified
from planner.measuring.measure import Device, Measurement
from planner.question.runs import OnStep

TIMEOUT: Final = 300.0
"""Seconds that one pick may take."""


def verify(
    recommendation: Recommendation, *, timeout: float = TIMEOUT, progress: OnStep | None = None
) -> list[Verified]:
    """Runs the answer and each pick once, in processes of their own.

    On the CPU if the answer is for it, else on the GPU that is here: ConfigError if that is another card.
    """
    from planner.measuring.server import Batch

    device: Device = "cpu" if recommendation.on == "cpu" else "cuda"
    answer = Pick(
        config=recommendation.config,
        seq=recommendation.workload.seq,
        upper=recommendation.memory.upper,
        seconds=recommendation.seconds,
        mass=recommendation.quality.mass,
        layers=recommendation.quality.layers,
        launches=recommendation.memory.launches,
    )
    different = {pick.config: pick for pick in reversed((answer, *recommendation.alternatives))}
    results = []
    with Batch(device, timeout=timeout, runs=3) as batch:
        for number, pick in enumerate(reversed(different.values())):
            if progress:
                progress(number, len(different), pick.role or "the answer")
            measured = batch.measure(
                pick.config, recommendation.workload.model_copy(update={"seq": pick.seq})
            )
            _same_card(recommendation, measured)
            results.append(_verified(pick, measured))
    return results


def _verified(pick: Pick, measured: Measurement) -> Verified:
    return Verified(
        role=pick.role or "answer",
        kind=measured.kind,
        message=measured.message,
        upper=pick.upper,
        allocated=measured.peak,
        predicted=pick.seconds,
        seconds=measured.seconds,
    )


def _same_card(recommendation: Recommendation, measured: Measurement) -> None:
    here = measured.environment.device
    if (
        measured.device == "cuda"
        and here
        and not recommendation.on.startswith("generic")
        and here != recommendation.on
    ):
        raise ConfigError(
            f"the answer is for {recommendation.on}, this card is {here}; pass --gpu with its name"
        )
