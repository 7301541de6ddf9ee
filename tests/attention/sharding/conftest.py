"""Groups of ranks, started when a test first wants one of so many, and kept for the tests that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(3).run(function, *args)` is what `function(rank, *args)` returns on each of three ranks."""
    groups: dict[int, Ranks] = {}

    def of(world: int) -> Ranks:
        if world not in groups or not groups[world].alive:
            groups[world] = Ranks(world)
        return groups[world]

    yield of
    for group in groups.values():
        group.close()
