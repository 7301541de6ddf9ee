"""The plan of a call that returns its weights against every allocation, and over arrays against ints."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from attention import AttentionConfig, SparsePatternConfig
from attention.sizes.shape import Shape
from attention.sizes.weights import weights_sizes
from planner.measuring.call import call_of
from planner.measuring.footprint import footprints
from planner.memory.dispatch import plan_of
from planner.memory.machines import this_cpu
from planner.workload import Workload

SLACK = 4096


def measured(config: AttentionConfig, workload: Workload) -> int:
    call = call_of(config, workload, torch.device("cpu"))
    call.start_cold()
    (cold,) = footprints([call], torch.device("cpu"))
    return call.nbytes + cold.peak


def sample(rng: random.Random, variant: str, mode: str) -> tuple[AttentionConfig, Workload]:
    heads = rng.choice([1, 2, 4])
    workload = Workload(
        seq=rng.choice([1, 7, 100, 256, rng.randint(2, 500)]),
        batch=rng.choice([1, 2]),
        heads=heads,
        kv_heads=rng.choice([n for n in (1, 2, 4) if heads % n == 0]),
        head_dim=rng.choice([8, 16, 64]),
        dtype=rng.choice(["float16", "bfloat16", "float32", "float64"]),
        mode=mode,
        causal=rng.random() < 0.5,
        weights=True,
    )
    lengths, rates = rng.choice([((128,), (1,)), ((64, 256), (1, 2)), ((128, 256, 512), (1, 2, 4))])
    pattern = SparsePatternConfig(
        pattern_type=rng.choice(["local_window", "global_local", "dilated_sparse"]),
        block_size=rng.choice([16, 32, 64]),
        local_window_size=128,
        sparsity_ratio=0.3,
    )
    config = AttentionConfig(
        variant=variant,
        pattern=pattern if variant == "block_sparse" else None,
        segment_lengths=() if variant == "dense" else lengths,
        dilation_rates=() if variant == "dense" else rates,
        workspace_bytes=rng.choice([1 << 20, 1 << 22, 1 << 24]),
        pool=rng.choice(["auto", "off", "on"]),
    )
    return config, workload


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("variant", ["dense", "dilated", "block_sparse"])
def test_the_peak_is_what_a_call_allocates(variant, mode):
    rng = random.Random(7)
    for _ in range(6):
        config, workload = sample(rng, variant, mode)
        found, peak = (
            plan_of(
                config, workload, replace(this_cpu(workload.dtype), threads=torch.get_num_threads())
            ).peak()[1],
            measured(config, workload),
        )
        assert found == pytest.approx(peak, abs=max(SLACK, 0.01 * peak)), (config, workload)
        assert found >= peak - max(SLACK, 0.005 * peak)


@pytest.mark.parametrize("branches", [0, 1, 3])
def test_sizes_over_arrays_are_those_of_ints(branches):
    cases = [(16, 1), (64, 100), (128, 90000)]

    def sizes(size, active):
        shape = Shape(5000, 4, 2, 64, 2, False, 1 << 20, 1024, packs=False, widens=True)
        return weights_sizes(shape, size, active, branches)

    together = sizes(*(np.array(column) for column in zip(*cases, strict=True)))
    for n, case in enumerate(cases):
        assert {name: int(np.broadcast_to(x, 3)[n]) for name, x in together.items()} == sizes(*case)
