"""A CUDA build of torch to run dry: that of the Python that PLANNER_DRY_PYTHON names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from planner.gpus import find as find_gpu
from planner.standin.torch_build import TorchBuild, find
from planner.standin.zygote import Zygote

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def dry_torch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchBuild]:
    """The build, with a cache of its own for the stand-in, Inductor and Triton."""
    python = os.environ.get("PLANNER_DRY_PYTHON")
    if not python:
        pytest.skip("PLANNER_DRY_PYTHON names no Python with a CUDA build of torch")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        patch.delenv("PYTHONPATH", raising=False)
        yield find(python)


@pytest.fixture(scope="session")
def dry(dry_torch: TorchBuild) -> Iterator[Zygote]:
    """A process of dry runs that finds the modules of this folder."""
    with Zygote(find_gpu("rtx4090"), torch=dry_torch, path=[HERE]) as zygote:
        yield zygote
