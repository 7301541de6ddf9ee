"""The plan of a rank is what it allocates on a GPU: ranks are processes of a dry run here, each with a card
of its own, and their messages carry nothing."""

from __future__ import annotations

import pytest

from attention import AttentionConfig, ShardingConfig, SparsePatternConfig
from planner.workload import Workload
from studies.bench.dry import DryCase, measured_ranks, predicted

pytestmark = [pytest.mark.slow, pytest.mark.dry]

KEYS = ShardingConfig(exchange="keys", timeout_s=60)
WINDOW = SparsePatternConfig(pattern_type="local_window", local_window_size=256, edges="token")
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 64, "mode": "training", "causal": True}
CASES = {
    "zigzag": DryCase(
        AttentionConfig(variant="dense", sharding=KEYS.model_copy(update={"shards": "zigzag"})),
        Workload(seq=2050, batch=2, gpus=2, **SIZES),
        "h100-pcie",
    ),
    "window": DryCase(
        AttentionConfig(variant="block_sparse", pattern=WINDOW, sharding=KEYS),
        Workload(seq=1 << 20, gpus=4, **SIZES),
        "a100-sxm4-80gb",
    ),
    "heads": DryCase(
        AttentionConfig(variant="dense", sharding=ShardingConfig(exchange="heads", timeout_s=60)),
        Workload(seq=1001, batch=3, gpus=2, dtype="float32", **SIZES),
        "t4",
    ),
    "more ranks than tokens": DryCase(
        AttentionConfig(variant="dense", sharding=KEYS), Workload(seq=2, gpus=3, **SIZES), "gtx1080"
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ranks_take_what_is_planned(case, dry):
    rows = measured_ranks(case, dry)
    assert [row.get("message") for row in rows] == [""] * case.workload.gpus
    found = [predicted(case, rank) for rank in range(len(rows))]
    assert [(x.allocated, x.reserved) for x in found] == [(row["allocated"], row["reserved"]) for row in rows]
    most = predicted(case)
    assert most.reserved == max(x.reserved for x in found)
    assert all(row["device"] <= most.upper for row in rows)
