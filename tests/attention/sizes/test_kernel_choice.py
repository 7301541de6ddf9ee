"""Which kernel runs and why, as people are told."""

import subprocess
import sys

import pytest
import torch

from attention import AttentionConfig, SparsePatternConfig, build
from attention.errors import ConfigError
from attention.inputs import shape_of
from attention.sizes.kernel_choice import kernel_choice
from attention.sizes.whole_calls import CUDNN_TOKENS, has_flash
from planner import estimate, recommend
from planner.question.space import Space
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
        ("h100-sxm", "bfloat16", 128, "cuDNN's attention, 1 call", "9.0, where torch takes it before flash"),
        ("b200", "float16", 100, "cuDNN's attention, 1 call", "100 channels on compute capability 10.0"),
        ("h100-sxm", "bfloat16", 136, "flash attention, 1 call", "16 bits"),
        ("rtx5090", "bfloat16", 128, "flash attention, 1 call", "12.0"),
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
    assert "cuDNN's attention, 1 call:" in estimate(DENSE, workload, "h100-sxm").kernel
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


def on_hopper(config, seq=4096, **fields):
    workload = Workload(seq=seq, dtype="bfloat16", causal=True, **fields)
    return estimate(config, workload, "h100-sxm")


def test_short_calls_and_windows_are_flash_attentions():
    assert on_hopper(DENSE, seq=CUDNN_TOKENS).kernel.startswith("cuDNN's attention")
    assert on_hopper(DENSE, seq=CUDNN_TOKENS - 1).kernel.startswith("flash attention")
    lengths = {"segment_lengths": (1024, 4096), "dilation_rates": (1, 2)}
    dilated = AttentionConfig(variant="dilated", **lengths)
    assert "short calls" not in on_hopper(dilated).kernel
    assert on_hopper(dilated, seq=4196).kernel.endswith("flash attention for short calls and windows")
    assert on_hopper(WINDOW).kernel.startswith("flash attention")


def test_without_cudnn_or_asked_for_flash_attention_it_is_that():
    workload = Workload(seq=4096, dtype="bfloat16")
    flash = DENSE.model_copy(update={"backend": "flash"})
    asked = estimate(flash, workload, "h100-sxm")
    dry = estimate(DENSE, workload, "h100-sxm", dry=True)
    assert (
        asked.kernel
        == dry.kernel
        == "flash attention, 1 call: 16 bits and 64 channels on compute capability 9.0"
    )
    assert asked.allocated == dry.allocated < estimate(DENSE, workload, "h100-sxm").allocated
    assert asked.notes == dry.notes


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("seq", [512, 32_768])
def test_what_cudnn_may_take_of_itself_is_a_line_that_says_so(seq, mode):
    workload = Workload(seq=seq, dtype="bfloat16", mode=mode)
    found = estimate(DENSE, workload, "h100-sxm")
    (line,) = (line for line in found.lines if "cuDNN" in line.name)
    assert line.name.endswith("cuDNN workspace (allowance)")
    assert line.source.startswith("judgement")
    assert line.bytes == min(32 << 20, workload.floor)
    assert found.allocated - estimate(DENSE, workload, "h100-sxm", dry=True).allocated == line.bytes
    assert "nobody has measured" in found.notes[-1]


def test_who_activated_another_flash_attention_is_told_so():
    shape = shape_of(*(torch.zeros(1, 4096, 2, 64, dtype=torch.float16),) * 2, DENSE, False)
    shape = shape._replace(windows="any")
    for activated, kernel, called in (
        ("FA3", "flash 3", "FlashAttention 3, activated in torch"),
        ("FA4", "flash 4", "FlashAttention 4, activated in torch"),
        ("another", "flash", "flash attention"),
    ):
        chosen = kernel_choice(DENSE, shape, (9, 0), flex=False, activated=activated)
        assert chosen.kernel == kernel
        assert str(chosen).startswith(f"{called}, 1 call: {activated} is active; 16 bits")
    assert kernel_choice(DENSE, shape, (7, 5), flex=False, activated="FA3").kernel == "efficient"


@pytest.mark.parametrize(
    "backend, config, card, fields, why",
    [
        ("cudnn", DENSE, "rtx4090", {}, "compute capability 9.0 and 10.x, and this is 8.9"),
        ("cudnn", DENSE, "h100-sxm", {"head_dim": 256}, "up to 128 channels, not 256"),
        ("cudnn", DENSE, "h100-sxm", {"dtype": "float32"}, "float16 and bfloat16 alone"),
        ("cudnn", WINDOW, "h100-sxm", {}, "no windows"),
        ("cudnn", SPARSE, "h100-sxm", {}, "no lists of blocks"),
        ("cudnn", DENSE, "cpu", {}, "on CUDA only"),
        ("flash", SPARSE, "h100-sxm", {}, "no lists of blocks"),
        ("flash", DENSE, "t4", {}, "needs compute capability 8.0, and this is 7.5"),
        ("flash", DENSE, "rtx4090", {"head_dim": 200}, "200 channels with compute capability 8.9"),
        ("flash", DENSE, "a100-sxm4-80gb", {"head_dim": 264}, "264 channels"),
    ],
)
def test_a_kernel_that_is_not_there_is_refused_by_name(backend, config, card, fields, why):
    asked = config.model_copy(update={"backend": backend})
    refused = f"backend='{backend}' cannot run this on .*{why}.*; use backend='auto'"
    with pytest.raises(ConfigError, match=refused):
        estimate(asked, Workload(**{"seq": 1024, "dtype": "float16", **fields}), card)


def test_the_search_keeps_to_a_kernel_that_is_asked_for():
    question = {"seq": 16_384, "trials": 0, "dtype": "bfloat16"}
    kinds = {"cudnn": {"dense", "dilated"}, "flash": {"dense", "dilated", "local_window", "global_local"}}
    for backend, allowed in kinds.items():
        space = Space(backend=backend)
        assert set(space.kinds) == allowed
        answer = recommend(gpu="h100-sxm", space=space, **question)
        assert answer.config.backend == backend
        with pytest.raises(ConfigError, match=f"backend='{backend}' cannot run on Tesla T4.*this is 7.5"):
            recommend(gpu="t4", space=space, **question)
    for device, why in (("t4", "this GPU has 7.5"), ("cpu", "on CUDA only")):
        with pytest.raises(ConfigError, match=f"backend='flex' cannot run on .*{why}"):
            recommend(gpu=device, space=Space(backend="flex"), vram="1GB", **question | {"dtype": "float32"})


def test_it_imports_no_torch():
    code = "import sys, attention.sizes.kernel_choice; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 3, 200])
def test_calls_are_those_that_are_made_where_queries_are_fewer(queries, causal, monkeypatch):
    """None where they are tiles: a causal chunk is a triangle and what comes before it."""
    from attention.ops import kernels

    made, forward = [], kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *x, **options: made.append(1) or forward(*x, **options))
    q, k, v = (torch.randn(1, tokens, 2, 16) for tokens in (queries, 200, 200))
    module = build(DENSE)
    module(q, k, v, causal)
    assert module.kernels(q, k, v, causal).calls in (len(made), None)
    assert (module.kernels(q, k, v, causal).calls is None) == (len(made) > 1)


@pytest.mark.parametrize("capability", [(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)])
def test_cards_between_those_with_little_shared_memory_are_refused_by_torch_as_they_are(capability):
    assert [has_flash(capability, channels, 2) for channels in (192, 200, 224, 232)] == [
        True,
        False,
        False,
        True,
    ]
    assert has_flash((9, 0), 200, 2)
