"""A CUDA build of torch for tests that are marked `dry`; one answer of the models for tests that tune."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from attention.errors import UnavailableError
from planner.search import tune as tuning
from planner.standin.install import torch_for
from planner.standin.interpreter import interpreter
from planner.standin.torch_build import TorchBuild


@pytest.fixture(scope="session")
def dry_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TorchBuild, str | None]]:
    """This Python's own build, or the private one of `planner dry-run --install` with its folder; what it
    compiles is kept apart."""
    try:
        build = torch_for(interpreter(sys.executable))
    except UnavailableError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        yield build


@pytest.fixture(scope="session")
def answers() -> dict[str, object]:
    """What the models recommended, by what they were asked."""
    return {}


@pytest.fixture
def asked_once(answers: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the models recommend before tuning is the same each time, and takes longest."""
    answered = tuning.answered

    def remembered(*given: object, **asked: object) -> object:
        key = repr((given, asked, os.environ.get("XDG_DATA_HOME")))
        if key not in answers:
            answers[key] = answered(*given, **asked)
        return answers[key]

    monkeypatch.setattr(tuning, "answered", remembered)
