"""Counting allocations: exact sizes on the CPU, peak and what is kept apart."""

import torch

from planner.measuring.footprint import footprint

CPU = torch.device("cpu")
MIB = 1 << 20


def test_peak_counts_what_lived_together_and_kept_what_remained():
    def run() -> torch.Tensor:
        first = torch.empty(MIB, dtype=torch.uint8)
        second = torch.empty(2 * MIB, dtype=torch.uint8)
        del first, second
        return torch.empty(MIB, dtype=torch.uint8)

    found = footprint(run, CPU)
    assert (found.peak, found.kept) == (3 * MIB, MIB)
    assert found.largest[:3] == (2 * MIB, MIB, MIB)


def test_nothing_allocated_is_zero():
    assert footprint(lambda: None, CPU).peak == 0


def test_a_kernels_own_scratch_is_counted():
    q = torch.randn(1, 8, 2048, 64, dtype=torch.bfloat16)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert footprint(lambda: attend(q, q, q), CPU).peak > q.nbytes
