"""Attention of whole calls can be captured in a CUDA graph: it waits for nothing and copies nothing from the
host. Torch's operators take what cuDNN's attention is given."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from attention import AttentionConfig, SparsePatternConfig
from planner.gpus import find
from planner.workload import Workload

pytestmark = [pytest.mark.slow, pytest.mark.dry]

PACKAGES = str(Path(pydantic.__file__).parents[1])
CONFIGS = {
    "dense": AttentionConfig(variant="dense"),
    "dilated": AttentionConfig(variant="dilated", segment_lengths=(256, 1000), dilation_rates=(1, 4)),
} | {
    f"{kind}, {edges}": AttentionConfig(
        variant="block_sparse",
        pattern=SparsePatternConfig(
            pattern_type=kind, block_size=64, local_window_size=128, global_tokens=64, edges=edges
        ),
    )
    for kind in ("local_window", "global_local")
    for edges in ("block", "token")
}


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("card", ["rtx4090", "h100-sxm"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_whole_calls_are_captured(config, card, mode, dry):
    workload = Workload(seq=1040, heads=4, kv_heads=2, dtype="bfloat16", causal=True, mode=mode)
    arguments = {
        "config": config.model_dump(mode="json"),
        "workload": workload.model_dump(mode="json"),
        "packages": PACKAGES,
    }
    end = dry.run("dry_attention", "run", arguments, gpu=find(card))
    assert (end.kind, end.value) == ("ok", True)


def test_torch_takes_what_cudnns_attention_is_given(dry):
    end = dry.run("dry_attention", "cudnn_over_nothing", {"packages": PACKAGES}, gpu=find("h100-sxm"))
    assert (end.kind, end.value) == ("ok", [[0, heads, 1024, 64] for heads in (4, 2, 2)])
