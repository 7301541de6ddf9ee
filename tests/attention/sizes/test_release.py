"""What the installed torch has, by its release."""

from __future__ import annotations

import pytest
import torch

from attention.sizes import release


@pytest.fixture(autouse=True)
def nothing_cached():
    release.torch_release.cache_clear()
    yield
    release.torch_release.cache_clear()


def test_the_release_is_that_of_the_torch_that_is_imported():
    assert release.torch_release() == tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.mark.parametrize(
    "version, groups", [("2.6.0", False), ("2.8.0+cu126", False), ("2.9.0", True), ("2.13.0+cpu", True)]
)
def test_groups_come_with_torch_2_9(version, groups, monkeypatch):
    monkeypatch.setattr(release, "version", lambda name: version)
    assert release.cpu_takes_groups() is groups
