"""A plugin of pytest for `test_gpu.py` in a dry run, where kernels do nothing: what compares values compares
shapes, dtypes and devices instead, every test launches kernels, and none leaves memory behind.

    pytest -p walked tests/attention/test_gpu.py
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tolerance
import torch
from torch import Tensor

from attention import adaptive, reference
from attention.sizes.shape import Shape

MOST_LEFT = 1 << 30
"""Bytes of the card that may be allocated after a test: libraries' workspaces, and what modules of
parametrized tests keep."""
MOST_RESIDENT = 4 << 30
"""Bytes that the process may take in the end."""
WITHOUT = {
    "test_the_kernel_is_chosen_by_dtype_and_capability",
    "test_memory_that_runs_out_is_one_clear_error_after_one_more_try",
}
"""Tests that may launch nothing."""


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors could be equal, for all that is known in a dry run."""
    return (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


def assert_alike(found: Tensor, expected: Tensor, **_: object) -> None:
    assert alike(found, expected)


def assert_results(ours: tuple[Tensor, Sequence[Tensor]], *others: object) -> None:
    """Output and gradients are shaped as the first of the others that has any."""
    expected = next(other for other in others if isinstance(other, tuple))
    for found, like in zip((ours[0], *ours[1]), (expected[0], *expected[1]), strict=True):
        assert (found.shape, found.device) == (like.shape, like.device)
        assert found.dtype == ours[0].dtype


def check(module, q, k, v, causal, grad=None) -> None:
    """A call and its backward, without the naive and the exact one that it would be compared with."""
    grad = torch.ones_like(q) if grad is None else grad
    out, grads = tolerance.forward_and_gradients(lambda *x: module(*x, is_causal=causal), (q, k, v), grad)
    assert alike(out, q)
    assert all(alike(x, y) for x, y in zip(grads, (q, k, v), strict=True))


def with_choices(choose):
    """What chooses blocks, its choice written over: that of a kernel that did not run is any numbers, and
    what is done with them on the host depends on them. Here it is each row's own block and those before."""

    def chosen(*arguments: object) -> Tensor:
        blocks = choose(*arguments)
        shape = next(x for x in arguments if isinstance(x, Shape))
        *_, rows, kept = blocks.shape
        own = np.arange(rows)[:, None]
        first = np.maximum(own - kept + 1, 0)
        lists = first + np.arange(kept)
        if shape.causal:
            lists[lists > own] = -1
        return blocks.copy_(torch.from_numpy(lists).expand(blocks.shape).contiguous())

    return chosen


def launches() -> int:
    """Kernels launched so far in this process."""
    library = ctypes.CDLL("libstandin.so")
    size = library.standin_report(None, ctypes.c_size_t(0)) + 4096
    text = ctypes.create_string_buffer(size)
    library.standin_report(text, ctypes.c_size_t(size))
    return int(json.loads(text.value)["launches"])


def pytest_configure() -> None:
    """Before any module of tests is imported, and takes names from these."""
    import conformance

    tolerance.assert_as_exact_as_naive = tolerance.assert_exact = assert_results
    conformance.assert_as_exact_as_naive = conformance.assert_exact = assert_results
    conformance.check_low_precision = conformance.check_float64 = check
    adaptive.chosen_blocks = with_choices(adaptive.chosen_blocks)
    pairs = adaptive.chosen_pairs  # which reads counts that a kernel made
    adaptive.chosen_pairs = lambda blocks: pairs(blocks.cpu()).to(blocks.device)
    # It goes through the tokens that are not finite: as many as the memory says that a kernel would have
    # written their number into, which took 23 GB of RAM once.
    reference._over = lambda factors, x, visible: factors @ x
    torch.testing.assert_close = assert_alike
    torch.equal = alike


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Iterator[None]:
    before = launches()
    yield  # a test that skips itself or fails ends here
    assert launches() > before or item.function.__name__ in WITHOUT
    if torch.cuda.memory_allocated() > MOST_LEFT:
        gc.collect()
    assert torch.cuda.memory_allocated() <= MOST_LEFT


def pytest_sessionfinish(session: pytest.Session) -> None:
    resident = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(f"\n{launches()} kernels, at most {resident / 1e9:.2f} GB of RAM")
    if resident > MOST_RESIDENT:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
