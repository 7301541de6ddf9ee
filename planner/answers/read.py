"""Answers that commands printed as JSON, read back. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from attention.errors import ConfigError
from planner.answers.recommendation import Recommendation
from planner.answers.tuned import Tuned
from planner.answers.verified import Verified
from planner.files import read_json


class Answer(NamedTuple):
    """An answer as it was read from a file."""

    found: Recommendation | Tuned
    verified: tuple[Verified, ...] = ()
    """The picks of a recommendation as they ran, where they did."""


def read_answer(path: Path) -> Answer:
    """The answer that `planner recommend` or `planner tune` printed into a file; ConfigError for anything
    else."""
    data = read_json(path)
    try:
        return _answer(data, path)
    except ConfigError as error:
        message = str(error)
        raise ConfigError(f"{path}: {message[:400]}{'...' * (len(message) > 400)}") from None


def _answer(data: Any, path: Path) -> Answer:
    fields = data.keys() if isinstance(data, dict) else set()
    if {"best", "trials"} <= fields:
        return Answer(Tuned.model_validate(data))
    if not {"config", "pareto"} <= fields:
        raise ConfigError(
            "this is no recommendation and nothing that tuning found; `planner recommend --format json` and "
            "`planner tune --format json` print such"
        )
    ran = data.pop("verified", [])
    if not isinstance(ran, list):
        raise ConfigError(f"verified: expected a list, got {type(ran).__name__}")
    return Answer(Recommendation.model_validate(data), tuple(map(Verified.model_validate, ran)))
