"""The plan of an adaptive attention against every allocation of a call, and over arrays against ints."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from attention import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.sizes.adaptive import Scorer, active_of_choice, choosing_sizes, gate_sizes, learning_sizes
from attention.sizes.shape import Shape
from planner.measuring.call import call_of
from planner.measuring.footprint import footprints
from planner.memory.dispatch import plan_of
from planner.memory.machines import this_cpu
from planner.workload import Workload

SLACK = 4096
OVER, UNDER = 0.04, 0.005
"""Over: causal rows of a short last block are counted as whole ones."""


def measured(config: AttentionConfig, workload: Workload) -> int:
    call = call_of(config, workload, torch.device("cpu"))
    call.start_cold()
    (cold,) = footprints([call], torch.device("cpu"))
    return call.nbytes + cold.peak


def sample(rng: random.Random, mode: str) -> tuple[AttentionConfig, Workload]:
    heads, dim = rng.choice([1, 2, 4]), rng.choice([8, 16, 64])
    workload = Workload(
        seq=rng.choice([1, 7, 100, 256, rng.randint(2, 800)]),
        batch=rng.choice([1, 2]),
        heads=heads,
        kv_heads=rng.choice([n for n in (1, 2, 4) if heads % n == 0]),
        head_dim=dim,
        dtype=rng.choice(["float16", "bfloat16", "float32", "float64"]),
        mode=mode,
        causal=rng.random() < 0.5,
    )
    config = AttentionConfig(
        variant="adaptive",
        pattern=SparsePatternConfig(
            block_size=rng.choice([16, 32, 64, 128]), sparsity_ratio=rng.choice([0.05, 0.3, 1.0])
        ),
        adaptive=AdaptiveConfig(num_heads=heads, head_dim=dim, score_dim=rng.choice([None, 8, dim + 5])),
        workspace_bytes=rng.choice([1 << 20, 1 << 22, 1 << 24]),
        pool=rng.choice(["auto", "off", "on"]),
    )
    return config, workload


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_peak_is_what_a_call_allocates(mode):
    rng, errors = random.Random(5), []
    for _ in range(10):
        config, workload = sample(rng, mode)
        found, peak = (
            plan_of(
                config, workload, replace(this_cpu(workload.dtype), threads=torch.get_num_threads())
            ).peak()[1],
            measured(config, workload),
        )
        error = found - peak
        assert -max(SLACK, UNDER * peak) <= error <= max(SLACK, OVER * peak), (config, workload, found, peak)
        errors.append(abs(error) / peak)
    assert sorted(errors)[len(errors) // 2] <= 0.001


def test_weights_are_part_of_it():
    config, workload = sample(random.Random(1), "training")
    workload = workload.model_copy(update={"seq": 300, "weights": True})
    found, peak = (
        plan_of(config, workload, replace(this_cpu(workload.dtype), threads=torch.get_num_threads())).peak()[
            1
        ],
        measured(config, workload),
    )
    assert found == pytest.approx(peak, abs=SLACK)


@pytest.mark.parametrize("sizes_of", [choosing_sizes, learning_sizes, gate_sizes])
def test_sizes_over_arrays_are_those_of_ints(sizes_of):
    cases = [(1, 16, 1), (100, 16, 3), (5000, 64, 79), (70000, 128, 5)]

    def sizes(seq, size, kept):
        shape = Shape(seq, 4, 2, 64, 2, False, 1 << 20, 1024, packs=False, widens=True)
        scorer = Scorer(size, kept, 32, 4, casts=True)
        return sizes_of(shape, size if sizes_of is gate_sizes else scorer)

    together = sizes(*(np.array(column) for column in zip(*cases, strict=True)))
    for n, case in enumerate(cases):
        assert {name: int(np.broadcast_to(x, 4)[n]) for name, x in together.items()} == sizes(*case)


def test_active_blocks_of_a_choice():
    assert active_of_choice(5, 2, False) == 10
    assert active_of_choice(5, 2, True) == 9
    assert active_of_choice(3, 3, True) == 6
