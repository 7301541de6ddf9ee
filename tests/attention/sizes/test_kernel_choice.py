"""Which kernel runs and why, as people are told."""

import subprocess
import sys

import pytest
import torch

from attention import AttentionConfig, SparsePatternConfig, build
from attention.inputs import shape_of
from attention.sizes.kernel_choice import kernel_choice
from planner import estimate
from planner.workload import Workload

DENSE = AttentionConfig(variant="dense")
WINDOW = AttentionConfig(
    variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window", block_size=64)
)
SPARSE = AttentionConfig(
    variant="block_sparse", pattern=SparsePatternConfig(), segment_lengths=(1024,), dilation_rates=(1,)
)


@pytest.mark.parametrize(
    "card, dtype, head_dim, kernel, why",
    [
        ("rtx4090", "bfloat16", 128, "flash attention, 1 call", "128 channels on compute capability 8.9"),
        ("rtx4090", "float32", 128, "memory-efficient attention, 1 call", "does not take float32"),
        ("rtx4090", "float16", 200, "memory-efficient attention, 1 call", "does not train 200 channels"),
        ("a100-sxm4-80gb", "float16", 200, "flash attention, 1 call", "16 bits"),
        ("a100-sxm4-80gb", "float16", 300, "memory-efficient attention, 1 call", "up to 256 channels"),
        ("gtx1080", "float16", 64, "memory-efficient attention, 1 call", "needs compute capability 8.0"),
        ("gtx1080", "float64", 64, "plain matrix products, 1 call", "no fused kernel takes float64"),
        ("cpu", "float32", 64, "torch's fused attention for CPUs, 1 call", "the tensors are on a CPU"),
    ],
)
def test_an_estimate_says_which_kernel_and_why(card, dtype, head_dim, kernel, why):
    said = estimate(DENSE, Workload(seq=4096, dtype=dtype, head_dim=head_dim), card).kernel
    assert said.startswith(kernel)
    assert why in said


def test_what_is_not_whole_says_so():
    workload = Workload(seq=4096, dtype="bfloat16", heads=8, kv_heads=2)
    assert "flash attention, 1 call:" in estimate(DENSE, workload, "h100-sxm").kernel
    assert "flash attention, 3 calls:" in estimate(WINDOW, workload, "h100-sxm").kernel
    assert "compiled FlexAttention" in estimate(SPARSE, workload, "h100-sxm").kernel
    by_views = SPARSE.model_copy(update={"backend": "sdpa"})
    assert "flash attention, 1 call:" in estimate(by_views, workload, "h100-sxm").kernel
    narrow = workload.model_copy(update={"dtype": "float32"})
    assert "efficient attention, tile by tile" in estimate(by_views, narrow, "h100-sxm").kernel


@pytest.mark.parametrize("config", [DENSE, WINDOW, SPARSE])
def test_a_module_says_of_tensors_what_an_estimate_says_of_sizes(config):
    for kv_heads in (8, 2):
        workload = Workload(seq=256, dtype="float32", kv_heads=kv_heads)
        q, k = (torch.zeros(1, 256, heads, 64) for heads in (8, kv_heads))
        assert str(build(config).kernels(q, k, k)) == estimate(config, workload).kernel


def test_a_build_without_flash_attention_says_so():
    q = torch.zeros(1, 8, 2, 16, dtype=torch.float16)
    shape = shape_of(q, q, DENSE, False)
    chosen = kernel_choice(DENSE, shape, (8, 0), flex=False, flash_is_built=False)
    assert chosen.kernel == "efficient"
    assert "without flash attention" in chosen.why


def test_it_imports_no_torch():
    code = "import sys, attention.sizes.kernel_choice; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
