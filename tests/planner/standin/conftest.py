"""A process of dry runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from planner.gpus import find as find_gpu
from planner.standin.torch_build import TorchBuild
from planner.standin.zygote import Zygote

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def dry(dry_build: tuple[TorchBuild, str | None]) -> Iterator[Zygote]:
    """A process of dry runs that finds the modules of this folder."""
    torch, ahead = dry_build
    with Zygote(find_gpu("rtx4090"), torch=torch, ahead=ahead, path=[HERE]) as zygote:
        yield zygote
