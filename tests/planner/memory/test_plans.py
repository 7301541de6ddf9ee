"""Plans against the runs that they describe: a change to one that forgets the other fails here."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import islice
from statistics import median

import pytest
import torch

from planner._trial import _call
from planner.footprint import footprints
from planner.memory.configured import plan_of
from planner.memory.kernels import this_cpu
from planner.samples import PLAIN, Sample, samples

CPU = torch.device("cpu")
CASES = 64
WORK, STEPS = 3e7, 12
"""Small, so that all cases together take half a minute."""
SLACK = 4096
"""Bytes that a small tensor or two take, e.g. lists of blocks."""


@cache
def found() -> list[Sample]:
    return list(islice(samples(77, longest=4096, work=WORK, steps=STEPS, kinds=PLAIN), CASES))


@cache
def peaks(number: int) -> tuple[int, int]:
    """(predicted, measured) bytes of a first call."""
    config, workload = found()[number]
    threads, usual = 1 + number % 2, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call = _call(config, workload, CPU)
        call.start_cold()
        [cold] = footprints([call], CPU)
        call.start_cold()
    finally:
        torch.set_num_threads(usual)
    machine = replace(this_cpu(workload.dtype), threads=threads)
    return plan_of(config, workload, machine).peak()[1], call.nbytes + cold.peak


@pytest.mark.parametrize("number", range(CASES))
def test_a_plan_says_what_its_run_allocates(number: int):
    predicted, measured = peaks(number)
    config, workload = found()[number]
    off = predicted - measured
    assert off <= max(SLACK, 0.01 * measured), (off, measured, config, workload)
    assert off >= -max(SLACK, 0.005 * measured), (off, measured, config, workload)


def test_most_plans_are_right_to_the_byte():
    assert median(abs(predicted - measured) for predicted, measured in map(peaks, range(CASES))) == 0
