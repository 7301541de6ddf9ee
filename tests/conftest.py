"""What every test gets: one thread, Hypothesis profiles, a seed that moves; GPU tests skip themselves."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from pairwise import pairwise

if TYPE_CHECKING:
    from shared_server import SharedServer

# `conformance` is a plain module that tests import; without this its asserts would report nothing.
pytest.register_assert_rewrite("conformance")

# Before torch is imported, here and in every process that a test starts: tensors are small, and where
# workers of pytest-xdist share the cores, a parallel region waits for a thread that is not running.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests that ask for more threads wait for each other without spinning (measured: a sixth of the time).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A job in the background of a script ignores interrupts, and so would what its tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What samples widely (slow tests) looks elsewhere on every run. Set here, so that all workers have it.
SEED = int(os.environ.setdefault("PLANNER_TEST_SEED", str(int(time.time()))))

# No deadline: times on a shared machine say nothing about correctness. In CI the examples are the
# same on every run, so that a red build can be repeated.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Another on every run, unless PLANNER_TEST_SEED is set; a test that fails shows it."""
    request.node.add_report_section("setup", "seed", f"repeat with PLANNER_TEST_SEED={SEED}")
    return SEED


@pytest.fixture(scope="session")
def server_of_all() -> Iterator[SharedServer]:
    from shared_server import SharedServer

    server = SharedServer()
    yield server
    server.close()


@pytest.fixture
def one_server(server_of_all: SharedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test measures for real, in batches and one by one, runs in forks of a server that is there
    already; that these measure what processes of their own do, planner/measuring/test_server.py says."""
    monkeypatch.setattr("planner.measuring.server._Server", lambda variables: server_of_all)
    # The module, whose name in its package is the function.
    monkeypatch.setattr(importlib.import_module("planner.measuring.measure"), "run", server_of_all.single)


MANY = 50
"""Modules that are worth a collection of garbage."""
loaded = 0


def pytest_collection_finish() -> None:
    """What collecting left lives as long as the run: collections of garbage in tests need not look at it."""
    global loaded
    gc.collect()
    gc.freeze()
    loaded = len(sys.modules)


def pytest_runtest_logstart() -> None:
    """Nor at what a test loaded: torch loads sympy and its compiler when they are first needed."""
    if loaded and len(sys.modules) >= loaded + MANY:
        pytest_collection_finish()


def pytest_report_header() -> str:
    return f"seed of tests that sample widely: PLANNER_TEST_SEED={SEED}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `pairwise` leaves to the slow suite; skip what needs a GPU where torch sees none."""
    tests: dict[object, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("pairwise"):
            tests.setdefault(item.function, []).append(item)
    for each in tests.values():
        # Combinations share the objects that they are made of.
        fast = pairwise([{name: id(value) for name, value in item.callspec.params.items()} for item in each])
        for number, item in enumerate(each):
            if number not in fast:
                item.add_marker("slow")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # asked only if there are any

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
