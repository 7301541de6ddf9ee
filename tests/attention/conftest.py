"""Tests here run on one thread: their tensors are small, and where several threads share busy cores
each parallel region waits for one that is not running (measured: 50 ms for 10 us of work)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
