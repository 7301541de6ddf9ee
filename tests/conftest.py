"""What every test gets: Hypothesis profiles, and GPU tests that skip themselves."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# `conformance` is a plain module that tests import; without this its asserts would report nothing.
pytest.register_assert_rewrite("conformance")

# No deadline: times on a shared machine say nothing about correctness. In CI the examples are the
# same on every run, so that a red build can be repeated.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device; ask torch only if there are any."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
