"""Least memory of candidates that ranks share, beside their plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner.gpus import find
from planner.memory.estimate import machine_of
from planner.memory.rank_peaks import rank_peaks
from planner.memory.sharded import fullest_rank
from planner.question.space import Space
from planner.ranks.ring import exchanges_heads
from planner.search.candidates import grid
from planner.workload import Workload

H100 = machine_of(find("h100-sxm"), "bfloat16", None)
CPU = machine_of("cpu", "float32", 2)
SIZES = {"heads": 8, "kv_heads": 4, "head_dim": 64}


def peak_of(ranked):
    return ranked.plan.peak()[1]


def slowly(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


def some(workload, machine, count, seed):
    """A few candidates of each kind, as columns each."""
    generator = np.random.default_rng(seed)
    windows = machine.windows(workload.head_dim, workload.itemsize)
    parts = [part for part in grid(Space(), workload, windows=windows) if part.backend == "auto"]
    for part in parts:
        yield part.take(np.sort(generator.choice(len(part), min(count, len(part)), replace=False)))


@pytest.mark.parametrize(
    "machine, task",
    [
        (H100, {"seq": 1 << 20, "gpus": 8, "mode": "training", "causal": True, "dtype": "bfloat16"}),
        slowly(H100, {"seq": 300_000, "gpus": 3, "mode": "inference", "dtype": "bfloat16"}),
        slowly(H100, {"seq": 1 << 19, "gpus": 16, "batch": 2, "mode": "training", "dtype": "bfloat16"}),
        (CPU, {"seq": 1 << 18, "gpus": 4, "mode": "training", "causal": True, "dtype": "float32"}),
    ],
)
def test_it_is_at_most_that_of_the_plan_and_by_heads_that(machine, task):
    workload = Workload(**SIZES, **task)
    shares = []
    for columns in some(workload, machine, 1, task["gpus"]):
        found = rank_peaks(columns, workload, machine)
        for at in range(len(columns)):
            config = columns.config(at, workload)
            rank = fullest_rank(config, workload, machine, peak_of)
            peak = rank.plan.peak()[1]
            assert found.least[at] <= peak, config
            assert found.peers[at] <= rank.peers, config
            shares.append(found.least[at] / peak)
            if exchanges_heads(columns):
                assert found.least[at] == peak, config
    assert np.median(shares) > 0.6


def test_it_is_the_same_of_one_candidate_and_of_many():
    workload = Workload(seq=1 << 20, gpus=8, causal=True, mode="training", dtype="bfloat16", **SIZES)
    for columns in some(workload, H100, 4, 0):
        lengths = np.full(len(columns), workload.seq)
        many = rank_peaks(replace(columns, seq=lengths), workload, H100)
        one = [rank_peaks(columns.take(slice(at, at + 1)), workload, H100) for at in range(len(columns))]
        assert many.least.tolist() == [int(each.least[0]) for each in one]
        assert many.peers.tolist() == [int(each.peers[0]) for each in one]


def test_where_each_gpu_has_its_own_sequences_it_is_that_of_one():
    workload = Workload(seq=1 << 16, gpus=4, batch=8, dtype="bfloat16", **SIZES)
    alone = [part for part in some(workload, H100, 1, 0) if part.sharding.ring_size == 1]
    assert alone
    for columns in alone:
        peak = fullest_rank(columns.config(0, workload), workload, H100, peak_of).plan.peak()[1]
        assert rank_peaks(columns, workload, H100).least.tolist() == [peak]
