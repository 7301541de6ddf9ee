"""Plans against the runs that they describe: a change to one that forgets the other fails here."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import cycle, islice
from statistics import median

import pytest
import torch
from edges import WINDOWED, by_token

from attention import inputs
from planner.fitting.samples import PLAIN, Sample, samples
from planner.measuring.call import call_of
from planner.measuring.footprint import footprints
from planner.memory import machines
from planner.memory.dispatch import plan_of
from planner.memory.machines import this_cpu

CPU = torch.device("cpu")
CASES = 24
TOKEN_CASES = 12
GROUPED_CASES = 12
WORK, STEPS = 1e7, 12
"""Small, so that all cases together take seconds."""
MANY, LARGE = 200, 3e7
"""Of the slow suite."""
SLACK = 4096
"""Bytes that a small tensor or two take, e.g. lists of blocks."""


@cache
def found() -> list[Sample]:
    return list(islice(samples(77, longest=4096, work=WORK, steps=STEPS, kinds=PLAIN), CASES))


@cache
def token_samples() -> list[Sample]:
    return list(islice(samples(78, longest=4096, work=WORK / 4, steps=STEPS, kinds=WINDOWED), TOKEN_CASES))


@cache
def peaks(number: int) -> tuple[int, int]:
    return peaks_of(found()[number], 1 + number % 2)


def peaks_of(sample: Sample, threads: int) -> tuple[int, int]:
    """(predicted, measured) bytes of a first call."""
    config, workload = sample
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call = call_of(config, workload, CPU)
        call.start_cold()
        [cold] = footprints([call], CPU)
        call.start_cold()
    finally:
        torch.set_num_threads(usual)
    machine = replace(this_cpu(workload.dtype), threads=threads)
    return plan_of(config, workload, machine).peak()[1], call.nbytes + cold.peak


def check(sample: Sample, predicted: int, measured: int) -> None:
    off = predicted - measured
    assert off <= max(SLACK, 0.01 * measured), (off, measured, *sample)
    assert off >= -max(SLACK, 0.005 * measured), (off, measured, *sample)


@pytest.mark.parametrize("number", range(CASES))
def test_a_plan_says_what_its_run_allocates(number: int):
    check(found()[number], *peaks(number))


@pytest.mark.parametrize("number", range(TOKEN_CASES))
def test_a_plan_of_a_window_that_ends_at_the_token_is_right_to_the_byte(number: int):
    config, workload = token_samples()[number]
    predicted, measured = peaks_of(Sample(by_token(config, number * 37 % 61 - 30), workload), 1 + number % 2)
    assert predicted == measured


@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no-groups"])
def test_a_plan_of_grouped_heads_says_what_its_run_allocates(groups, monkeypatch):
    """Whether torch's kernel takes fewer kv heads than heads, as from 2.9 on, or not."""
    monkeypatch.setattr(inputs, "cpu_takes_groups", lambda: groups)
    monkeypatch.setattr(machines, "cpu_takes_groups", lambda: groups)
    drawn = samples(79, longest=4096, work=WORK / 2, steps=STEPS, kinds=PLAIN)
    grouped = (
        Sample(config, workload.model_copy(update={"heads": 6, "kv_heads": kv_heads}))
        for (config, workload), kv_heads in zip(drawn, cycle((1, 2, 3)))
        if config.multihead is None and config.adaptive is None
    )
    for sample in islice(grouped, GROUPED_CASES):
        check(sample, *peaks_of(sample, 2))


def test_most_plans_are_right_to_the_byte():
    assert median(abs(predicted - measured) for predicted, measured in map(peaks, range(CASES))) == 0


@pytest.mark.slow
def test_many_plans_of_windows_that_end_at_the_token_say_what_their_runs_allocate(seed: int):
    drawn = samples(seed, longest=4096, work=LARGE, steps=STEPS, kinds=WINDOWED)
    for number, (config, workload) in enumerate(islice(drawn, MANY)):
        sample = Sample(by_token(config, number * 37 % 61 - 30), workload)
        check(sample, *peaks_of(sample, 1 + number % 2))


@pytest.mark.slow
def test_many_plans_say_what_their_runs_allocate(seed: int):
    drawn = samples(seed, longest=4096, work=LARGE, steps=STEPS, kinds=PLAIN)
    for number, sample in enumerate(islice(drawn, MANY)):
        check(sample, *peaks_of(sample, 1 + number % 2))
