"""What the installed torch has, by its release. Imports no torch."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

GROUPS_FROM = (2, 9)
"""The first release whose attention for CPUs takes fewer kv heads than heads (pytorch/pytorch#157893)."""


@cache
def torch_release() -> tuple[int, int]:
    """(major, minor) of the installed torch; (0, 0) where there is none."""
    try:
        major, minor = re.findall(r"\d+", version("torch"))[:2]
    except PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


def cpu_takes_groups() -> bool:
    """Whether torch's attention for CPUs takes fewer kv heads than heads."""
    return torch_release() >= GROUPS_FROM
