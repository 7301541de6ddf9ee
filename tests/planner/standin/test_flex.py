"""FlexAttention compiles and launches with every block on every card, and takes what its plan says."""

from __future__ import annotations

import random
from pathlib import Path

import pydantic
import pytest

from attention import AttentionConfig, SparsePatternConfig
from planner.gpus import find
from planner.memory.allocator import replay
from planner.memory.allocator_settings import AllocatorSettings
from planner.memory.dispatch import plan_of
from planner.memory.machines import Cuda
from planner.workload import Workload

pytestmark = [pytest.mark.slow, pytest.mark.dry]

CARDS = ["a100-sxm4-80gb", "rtx3090", "rtx4090", "h100-sxm", "b200", "rtx5090"]


def windowed(block, **fields):
    pattern = SparsePatternConfig(pattern_type="local_window", block_size=block, local_window_size=3 * block)
    return AttentionConfig(variant="block_sparse", pattern=pattern, backend="flex", **fields)


def run(dry, card, config, workload, **how):
    arguments = {
        "config": config.model_dump(mode="json"),
        "workload": workload.model_dump(mode="json"),
        "packages": str(Path(pydantic.__file__).parents[1]),
    }
    end = dry.run("dry_flex", "run", arguments | how, gpu=find(card))
    assert end.kind == "ok", end.value
    return end.value


def planned(card, config, workload):
    plan = plan_of(config, workload, Cuda(find(card).capability))
    return replay(list(plan.events()), AllocatorSettings()).peak_allocated


@pytest.mark.parametrize("dtype, head_dim", [("float16", 64), ("bfloat16", 256), ("float32", 80)])
@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("card", CARDS)
def test_it_compiles_and_launches(card, block, dtype, head_dim, dry):
    workload = Workload(
        seq=1152, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype, mode="training", causal=True
    )
    found = run(dry, card, windowed(block), workload)
    assert found == pytest.approx(planned(card, windowed(block), workload), rel=0.001)


def test_the_plan_is_what_it_takes(dry, seed):
    """Kernels left out: what is allocated does not depend on them."""
    draw = random.Random(seed)
    for _ in range(40):
        heads = draw.choice([1, 2, 3, 4, 8])
        workload = Workload(
            seq=draw.randint(1, 9000),
            batch=draw.choice([1, 2, 3]),
            heads=heads,
            kv_heads=draw.choice([1, heads]),
            head_dim=draw.choice([16, 40, 64, 80, 128, 192, 256]),
            dtype=draw.choice(["float16", "bfloat16", "float32"]),
            mode=draw.choice(["inference", "training"]),
            causal=draw.random() < 0.5,
        )
        config = windowed(draw.choice([16, 32, 64, 128, 256]))
        found = run(dry, "rtx4090", config, workload, compiled=False)
        most = planned("rtx4090", config, workload)
        # Under a causal mask, rows of full blocks are one shorter than the plan has them.
        assert most - 8 * 512 <= found <= most or found == pytest.approx(most, rel=0.001), (config, workload)
