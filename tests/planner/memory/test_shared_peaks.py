"""Peaks of candidates that ranks share, in closed form, are above those of the plans of one."""

from __future__ import annotations

import numpy as np
import pytest

from attention import AttentionConfig, ShardingConfig, SparsePatternConfig
from planner import gpus
from planner.configs import Columns, columns_of
from planner.memory.estimate import machine_of
from planner.memory.sharded import fullest_rank
from planner.memory.shared_peaks import shared_peaks, unit_of
from planner.workload import Workload


def windowed(kind: str, **fields) -> AttentionConfig:
    pattern = SparsePatternConfig(pattern_type=kind, block_size=64, local_window_size=512, **fields)
    lists = kind == "dilated_sparse"
    branches = {"segment_lengths": (512, 2048), "dilation_rates": (1, 4)} if lists else {}
    return AttentionConfig(variant="block_sparse", pattern=pattern, **branches)


CONFIGS = {
    "dense": AttentionConfig(variant="dense"),
    "dilated": AttentionConfig(
        variant="dilated", segment_lengths=(256, 1024, 4096), dilation_rates=(1, 2, 4)
    ),
    "local_window": windowed("local_window"),
    "token_window": windowed("local_window", edges="token"),
    "global_local": windowed("global_local", global_tokens=64),
    "dilated_sparse": windowed("dilated_sparse", sparsity_ratio=0.05),
}
MOST = 2.6
"""Times that a bound may be of a plan, of sequences as short as these: scratch counts three times there."""


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("exchange", ["keys", "heads"])
def test_bounds_are_above_the_plans_of_the_fullest_rank(name, exchange):
    fields = {"sharding": ShardingConfig(exchange=exchange), "workspace_bytes": 1 << 20}
    config = CONFIGS[name].model_copy(update=fields)
    for number, (world, dtype) in enumerate(((2, "float32"), (4, "bfloat16"), (3, "float32"))):
        for mode in ("inference", "training"):
            kv_heads = world if exchange == "heads" else 2
            workload = Workload(
                seq=16_384 - 100 * number,
                heads=2 * kv_heads,
                kv_heads=kv_heads,
                head_dim=64,
                dtype=dtype,
                mode=mode,
                causal=number != 1,
                gpus=world,
            )
            for machine in (machine_of("cpu", dtype, 1), machine_of(gpus.find("h100-sxm"), dtype, None)):
                exact = fullest_rank(config, workload, machine).plan.peak()[1]
                (bound,) = shared_peaks(
                    columns_of(config, workload.seq), workload, machine, world, exchange=exchange
                )
                assert exact <= bound <= MOST * exact, (world, dtype, mode, machine)


@pytest.mark.parametrize("name", ["dense", "local_window", "token_window"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_bounds_of_long_sequences_are_near(name, mode):
    config = CONFIGS[name].model_copy(update={"sharding": ShardingConfig(exchange="keys")})
    sizes = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    workload = Workload(seq=1 << 20, gpus=8, mode=mode, causal=True, **sizes)
    machine = machine_of(gpus.find("h100-sxm"), "bfloat16", None)
    exact = fullest_rank(config, workload, machine).plan.peak()[1]
    (bound,) = shared_peaks(columns_of(config, workload.seq), workload, machine, 8, exchange="keys")
    assert exact <= bound <= 1.15 * exact


def test_candidates_together_are_what_they_are_alone():
    sizes, windows = np.array([32, 64, 128]), np.array([128, 1000, 4096])
    columns = Columns("block_sparse", "local_window", seq=65_536, block_size=sizes, window=windows)
    workload = Workload(seq=65_536, heads=8, kv_heads=2, dtype="bfloat16", mode="training", causal=True)
    machine = machine_of(gpus.find("h100-sxm"), "bfloat16", None)
    together = shared_peaks(columns, workload, machine, 8, exchange="keys")
    for at, peak in enumerate(together.tolist()):
        alone = columns_of(columns.config(at, workload), 65_536)
        assert shared_peaks(alone, workload, machine, 8, exchange="keys").tolist() == [peak]


def test_units_are_those_of_the_shards():
    from attention.sharding.shards import shards_of

    lengths = np.array([1024, 4096, 65_536]), np.array([8192, 16_384, 3])
    columns = Columns("dilated", seq=65_536, lengths=lengths, rates=(np.ones(3, int), np.ones(3, int)))
    workload = Workload(seq=65_536)
    for world in (2, 3, 8):
        units = np.broadcast_to(unit_of(columns, world), 3).tolist()
        assert units == [shards_of(columns.config(n, workload), 65_536, world).unit for n in range(3)]
