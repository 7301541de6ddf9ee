"""A CUDA build of torch for tests that are marked `dry`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from attention.errors import UnavailableError
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
