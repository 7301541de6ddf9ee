"""Seconds of many candidates that ranks share, beside those of each, rank by rank."""

from __future__ import annotations

import numpy as np
import pytest

from planner.gpus import find
from planner.memory.estimate import machine_of
from planner.question.space import Space
from planner.ranks.links import network_of
from planner.ranks.ring import exchanges_heads
from planner.search.candidates import grid
from planner.speed.rank_seconds import rank_seconds
from planner.speed.rates import speed_rates_of
from planner.speed.timeline import longest_rank
from planner.workload import Workload

SIZES = {"heads": 8, "kv_heads": 4, "head_dim": 64}
WITHIN = 5
"""Times by which the two may differ, mostly where launches are what takes time."""


def slowly(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "device, task, links",
    [
        ("h100-sxm", {"seq": 1 << 20, "gpus": 8, "mode": "training", "causal": True}, {}),
        slowly("h100-sxm", {"seq": 300_000, "gpus": 3}, {"link": "pcie5"}),
        ("h100-sxm", {"seq": 1 << 20, "gpus": 16, "causal": True}, {"link": "nvlink4,ndr", "node": 8}),
        slowly("gtx1080", {"seq": 1 << 18, "gpus": 4, "batch": 2, "mode": "training"}, {}),
        ("cpu", {"seq": 1 << 18, "gpus": 4, "causal": True, "dtype": "float32"}, {}),
    ],
)
def test_they_are_near_those_of_the_longest_rank(device, task, links):
    workload = Workload(**SIZES, **task)
    card = device if device == "cpu" else find(device)
    machine = machine_of(card, workload.dtype, 2 if device == "cpu" else None)
    rates = speed_rates_of(card, workload, {})
    network = network_of(workload.gpus, card, **links)
    generator = np.random.default_rng(workload.gpus)
    windows = machine.windows(workload.head_dim, workload.itemsize)
    off = []
    for part in grid(Space(), workload, windows=windows):
        columns = part.take(generator.choice(len(part), 1))
        found = float(rank_seconds(columns, workload, machine, rates, network)[0])
        config = columns.config(0, workload)
        exact = longest_rank(config, workload, machine, rates, network).seconds
        if exchanges_heads(columns):
            assert found == pytest.approx(exact, rel=0.02), config
        off.append(found / exact)
        assert 1 / WITHIN < found / exact < WITHIN, config
    assert 0.8 < np.median(off) < 1.25
