"""What only a GPU can show: the CUDA kernels, the compiled backend, memory that runs out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conformance import (
    HEAD_DIM,
    HEADS,
    IMPLEMENTATIONS,
    changed,
    check_float64,
    check_low_precision,
    in_little_room,
    module_of,
    output_gradient,
    qkv,
)
from tolerance import assert_as_exact_as_naive, forward_and_gradients, largest_score, naive_attention

from attention import AttentionConfig, OutOfMemoryError, SparsePatternConfig, UnavailableError, build
from attention.ops import cudnn, flex, kernels
from attention.ops.program import Gather
from attention.ops.scratch import Scratch
from attention.ops.sinks import GatherSink, Part
from attention.out_of_memory import with_emergency_release
from attention.pool import BufferPool, Buffers
from attention.reference import reference_attention
from attention.sizes.shape import Shape
from attention.sizes.whole_calls import CUDNN_CAPABILITIES

if not torch.cuda.is_available():  # said once, and not of each of a thousand tests
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu

DENSE = AttentionConfig(variant="dense")
FLASH = SimpleNamespace(forward=kernels.windowed, backward=kernels.windowed_backward)
every = pytest.mark.parametrize("config", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def _plain_float32():
    """float32 products in float32, so that the naive attention sets an honest bar."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def supported(dtype):
    # torch calls bfloat16 supported where it is emulated, which attention refuses.
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")


def as_sdpa(config):
    return changed(config, backend="sdpa")


# Every implementation by fused SDPA


@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("seq", [1, 17, 150])
@dtypes
@every
def test_sdpa_is_as_exact_as_a_naive_attention(config, dtype, seq, kv_heads, causal):
    supported(dtype)
    module = module_of(in_little_room(as_sdpa(config)), device="cuda")
    check_low_precision(module, *qkv(seq, batch=2, kv_heads=kv_heads, dtype=dtype, device="cuda"), causal)


@causal_or_not
@every
def test_float64_equals_the_oracle(config, causal):
    module = module_of(in_little_room(as_sdpa(config)), device="cuda")
    check_float64(module, *qkv(101, batch=2, kv_heads=2, device="cuda"), causal)


@causal_or_not
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seq", [1000, 1024])
@dtypes
@pytest.mark.parametrize("name", ["dense", "dilated-3-odd", "local_window", "dilated_sparse-3"])
def test_sdpa_at_usual_sizes(name, dtype, seq, head_dim, causal):
    supported(dtype)
    module = module_of(as_sdpa(IMPLEMENTATIONS[name]), device="cuda")
    check_low_precision(module, *qkv(seq, kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda"), causal)


@pytest.mark.parametrize("head_dim", [1, 3, 20, 256, 264])
@pytest.mark.parametrize("name", ["dense", "dilated-2", "dilated_sparse-3"])
@dtypes
def test_any_head_dim_runs(name, dtype, head_dim):
    supported(dtype)
    module = module_of(as_sdpa(IMPLEMENTATIONS[name]), device="cuda")
    check_low_precision(module, *qkv(100, head_dim=head_dim, dtype=dtype, device="cuda"), True)


@dtypes
@every
def test_outputs_are_the_same_bits_each_time(config, dtype):
    supported(dtype)
    module = module_of(in_little_room(as_sdpa(config)), device="cuda").requires_grad_(False)
    inputs = qkv(300, batch=2, kv_heads=1, dtype=dtype, device="cuda")
    first, *others = (module(*inputs, is_causal=True) for _ in range(4))
    assert all(torch.equal(out, first) for out in others)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dtypes
@pytest.mark.parametrize("name", ["dense", "dilated-3-odd", "global_local", "dilated_sparse-3"])
def test_gradients_are_the_same_bits_each_time_when_torch_is_told_to(name, dtype, deterministic):
    """The fused kernels' own dq is a sum by atomics unless torch is asked for determinism."""
    supported(dtype)
    module = module_of(in_little_room(as_sdpa(IMPLEMENTATIONS[name])), device="cuda")
    inputs = qkv(300, batch=2, kv_heads=1, dtype=dtype, device="cuda")
    grad = output_gradient(inputs[0])
    first, *others = (
        forward_and_gradients(lambda *x: module(*x, is_causal=True), inputs, grad)[1] for _ in range(4)
    )
    assert all(torch.equal(x, y) for other in others for x, y in zip(other, first, strict=True))


@dtypes
@pytest.mark.parametrize("per_head", [False, True], ids=["shared lists", "lists of each head"])
def test_gathered_gradients_are_added_up_in_the_same_order_each_time(dtype, per_head):
    """Without being told: every view lists the same blocks, so that all additions meet."""
    supported(dtype)
    views, heads, kv_heads, size = 64, 4, 2, 16
    lists = np.arange(5) * np.ones((views, heads, 1) if per_head else (views, 1), np.int64)
    keys = Gather(lists.astype(np.int64), size, heads)
    shape = Shape(5 * size - 3, heads, kv_heads, 32, dtype.itemsize, False, 1 << 24, 64, False, False)
    room = dict.fromkeys(("dk of a call", "dv of a call", "slab", "wide slab"), 1 << 20)
    found = heads if per_head else kv_heads
    like = torch.empty(views, found, 5 * size, 32, dtype=dtype, device="cuda")
    parts = [output_gradient(like, seed) for seed in (1, 2)]
    results = []
    for _ in range(5):
        dk, dv = (torch.zeros(5 * size - 3, kv_heads, 32, dtype=dtype, device="cuda") for _ in range(2))
        with Scratch(BufferPool(0), dk.device, room) as scratch:
            sink = GatherSink(keys, dk, dv, shape, scratch)
            sink.add(Part(slice(None), slice(None), slice(None), *parts))
            sink.finish()
        results.append((dk, dv))
    assert all(torch.equal(x, y) for other in results for x, y in zip(other, results[0], strict=True))
    total = parts[0].double().sum(0)
    total = total.unflatten(0, (kv_heads, -1)).sum(1).transpose(0, 1)[: 5 * size - 3]
    torch.testing.assert_close(results[0][0].double(), total, rtol=0.01, atol=20 * torch.finfo(dtype).eps)


@dtypes
@every
def test_no_output_depends_on_later_keys_and_values(config, dtype):
    supported(dtype)
    module = module_of(in_little_room(as_sdpa(config)), device="cuda")
    q, k, v = qkv(101, batch=2, dtype=dtype, device="cuda")
    before = module(q, k, v, is_causal=True)
    k[:, 43:], v[:, 43:] = 9.0, -9.0
    assert torch.equal(module(q, k, v, is_causal=True)[:, :43], before[:, :43])


@every
def test_weights_are_what_the_output_is_made_of(config):
    module = module_of(config, device="cuda")
    q, k, v = qkv(75, batch=2, dtype=torch.float32, device="cuda")
    out, weights = module(q, k, v, True, return_attention_weights=True)
    found = (weights.to_dense() @ v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5)


@every
def test_modules_equal_themselves_on_the_cpu(config):
    inputs = qkv(101, batch=2, kv_heads=2, dtype=torch.float32)
    expected = module_of(as_sdpa(config))(*inputs)
    found = module_of(as_sdpa(config), device="cuda")(*(x.cuda() for x in inputs))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


# Block-sparse by compiled FlexAttention


def patterned(pattern_type, branches=(), block=64, **fields):
    return AttentionConfig(
        variant="block_sparse",
        backend="flex",
        pattern=SparsePatternConfig(pattern_type=pattern_type, block_size=block, **fields),
        segment_lengths=[n * block for n, _ in branches],
        dilation_rates=[r for _, r in branches],
    )


PATTERNS = {
    "local_window": patterned("local_window", local_window_size=256),
    "global_local": patterned("global_local", local_window_size=128, global_tokens=70),
    "dilated_sparse": patterned("dilated_sparse", [(8, 1), (16, 3)], sparsity_ratio=0.4),
    "blocks of 16": patterned("local_window", block=16, local_window_size=64),
    "blocks of 128": patterned("local_window", block=128, local_window_size=256),
    "blocks of 256": patterned("dilated_sparse", [(2, 1), (4, 2)], block=256, sparsity_ratio=0.6),
}
every_pattern = pytest.mark.parametrize("config", PATTERNS.values(), ids=PATTERNS.keys())


@pytest.mark.filterwarnings("ignore")  # inductor's own
@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, HEADS])
@pytest.mark.parametrize("seq", [1024, 1000, 1152, 100])
@dtypes
@every_pattern
def test_flex_is_as_exact_as_a_naive_attention(config, dtype, seq, kv_heads, causal):
    inputs = qkv(seq, kv_heads=kv_heads, head_dim=64, dtype=dtype, device="cuda")
    if why := flex.unfit(config, inputs[0]):
        with pytest.raises(UnavailableError, match="backend='flex' cannot serve this"):
            build(config)(*inputs)
        pytest.skip(why)
    check_low_precision(build(config), *inputs, causal)


@pytest.mark.filterwarnings("ignore")
@every_pattern
def test_flex_lists_are_kept_and_no_wider_than_they_need(config):
    inputs = qkv(4096, head_dim=64, dtype=torch.float16, device="cuda")
    if why := flex.unfit(config, inputs[0]):
        pytest.skip(why)
    module = build(config)
    first = module(*inputs)
    assert torch.equal(module(*inputs), first)
    assert torch.equal(module(*inputs), first)
    assert module.scratch.indices.stats.hits >= 1
    assert module.scratch.indices.stats.bytes < 4 * 4 * 64 * 66 * 2


# The kernels


def reference_and_naive(q, k, v, grad, causal):
    m = torch.ones(q.shape[2], q.shape[1], q.shape[1], dtype=torch.float64, device=q.device)
    m = m.tril() if causal else m
    scale = 1 / math.sqrt(q.shape[3])
    naive = forward_and_gradients(lambda *x: naive_attention(*x, m, scale), (q, k, v), grad)
    doubles = [x.double() for x in (q, k, v)]
    exact = forward_and_gradients(lambda *x: reference_attention(*x, DENSE, causal), doubles, grad.double())
    return exact, naive


def merged(parts):
    """(out, lse) of parts over disjoint keys, each (out [N, H, T, D], lse [N, H, T])."""
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    out = sum(out.to(lse.dtype) * (part - lse).exp()[..., None] for out, part in parts)
    return out.to(parts[0][0].dtype), lse


KERNELS = [
    ("flash", torch.float16),
    ("flash", torch.bfloat16),
    ("efficient", torch.float16),
    ("efficient", torch.bfloat16),
    ("efficient", torch.float32),
    ("plain", torch.float64),
]


def forced(kernel, dtype, monkeypatch):
    """Every call goes to `kernel`; skips where this GPU does not have it."""
    supported(dtype)
    if kernel == "flash" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash needs compute capability 8.0")
    monkeypatch.setattr(kernels, "choose", lambda x, biased: kernel)


@pytest.mark.parametrize("biased", [False, True], ids=["cut", "cut and biased"])
@pytest.mark.parametrize("split", [1, 33, 64])
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("kernel, dtype", KERNELS)
def test_parts_of_the_keys_merge_to_the_whole_forward_and_backward(
    kernel, dtype, head_dim, split, biased, monkeypatch
):
    """Keys in two parts; biased: the second part also holds keys that a bias hides."""
    forced(kernel, dtype, monkeypatch)
    if kernel == "flash" and biased:
        pytest.skip("flash takes no bias")
    q, k, v = qkv(100, batch=2, head_dim=head_dim, dtype=dtype, device="cuda")
    grad, scale = output_gradient(q), 1 / math.sqrt(head_dim)
    heads_first = [x.transpose(1, 2) for x in (q, k, v, grad)]
    query, key, value, dout = heads_first
    parts = []
    for keys, hidden in ((slice(0, split), 0), (slice(split, None), 7 if biased else 0)):
        bias = None
        pieces = [x[:, :, keys] for x in (key, value)]
        if hidden:
            pieces = [torch.cat([x, x[:, :, :hidden]], dim=2) for x in pieces]
            bias = torch.zeros(1, 1, 1, pieces[0].shape[2], dtype=dtype, device="cuda")
            bias[..., -hidden:] = -torch.inf
            bias = bias.expand(2, HEADS, 100, -1)
        parts.append((*pieces, bias))
    found = [kernels.forward(query, a, b, scale=scale, bias=bias) for a, b, bias in parts]
    assert all(lse.shape == (2, HEADS, 100) and lse.dtype == kernels.lse_dtype(dtype) for _, lse in found)
    out, lse = merged(found)
    grads = [kernels.backward(dout, query, a, b, out, lse, scale=scale, bias=bias) for a, b, bias in parts]
    dq = sum(x[0].to(lse.dtype) for x in grads)
    dk, dv = (torch.cat([grads[0][i], grads[1][i][:, :, : 100 - split]], dim=2) for i in (1, 2))
    if biased:
        hidden_keys = grads[1][1][:, :, 100 - split :]
        assert torch.equal(hidden_keys, torch.zeros_like(hidden_keys))
    exact, naive = reference_and_naive(q, k, v, grad, causal=False)
    ours = (out.transpose(1, 2), [x.transpose(1, 2).to(dtype) for x in (dq, dk, dv)])
    assert_as_exact_as_naive(ours, naive, exact, largest_score(q, k, scale))


@pytest.mark.parametrize("seq", [1, 31, 32, 100])
@pytest.mark.parametrize("kernel, dtype", KERNELS)
def test_kernels_are_causal_from_the_first_key(kernel, dtype, seq, monkeypatch):
    forced(kernel, dtype, monkeypatch)
    q, k, v = qkv(seq, batch=2, dtype=dtype, device="cuda")
    grad, scale = output_gradient(q), 1 / math.sqrt(HEAD_DIM)
    args = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = kernels.forward(*args, scale=scale, causal=True)
    grads = kernels.backward(grad.transpose(1, 2), *args, out, lse, scale=scale, causal=True)
    exact, naive = reference_and_naive(q, k, v, grad, causal=True)
    ours = (out.transpose(1, 2), [x.transpose(1, 2) for x in grads])
    assert_as_exact_as_naive(ours, naive, exact, largest_score(q, k, scale))


def test_the_kernel_is_chosen_by_dtype_and_capability():
    modern = torch.cuda.get_device_capability() >= (8, 0)
    half, single, double = (
        torch.zeros(1, 1, 1, 64, dtype=t, device="cuda")
        for t in (torch.float16, torch.float32, torch.float64)
    )
    assert kernels.choose(half, biased=False) == ("flash" if modern else "efficient")
    assert kernels.choose(half, biased=True) == "efficient"
    assert kernels.choose(single, biased=False) == "efficient"
    assert kernels.choose(double, biased=False) == "plain"


@pytest.fixture
def hopper():
    """Skips where cuDNN's attention is not what torch prefers, or is switched off."""
    q = torch.zeros(1, 1024, 2, 64, dtype=torch.bfloat16, device="cuda")
    if torch.cuda.get_device_capability()[0] not in CUDNN_CAPABILITIES:
        pytest.skip("cuDNN's attention is for compute capability 9.0 and 10.x")
    if why := cudnn.unavailable(q, q, True):
        pytest.skip(why)


@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS])
@pytest.mark.parametrize("head_dim", [12, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cudnns_attention_is_as_exact_as_a_naive_one(dtype, head_dim, kv_heads, causal, hopper):
    config = changed(DENSE, backend="cudnn")
    inputs = qkv(150, batch=2, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device="cuda")
    check_low_precision(module_of(config, device="cuda"), *inputs, causal)
    dilated = AttentionConfig(
        variant="dilated", segment_lengths=(64, 150), dilation_rates=(1, 2), backend="cudnn"
    )
    check_low_precision(module_of(dilated, device="cuda"), *inputs, causal)


@causal_or_not
def test_cudnn_and_flash_attention_go_back_from_each_other(causal, hopper):
    q, k, v = (
        x.transpose(1, 2) for x in qkv(600, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
    )
    grad = output_gradient(q)
    options = {"scale": 0.125, "left": None, "right": 0 if causal else None}
    results = [one.forward(q, k, v, **options) for one in (cudnn, FLASH)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    grads = [
        behind.backward(grad, q, k, v, *ahead, **options) for ahead in results for behind in (cudnn, FLASH)
    ]
    for others in grads[1:]:
        for ours, theirs in zip(others, grads[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=5e-2)


def test_auto_takes_cudnns_attention_where_torch_does(hopper):
    q = torch.zeros(1, 1024, 2, 64, dtype=torch.bfloat16, device="cuda")
    chosen = torch._fused_sdp_choice(*(q.transpose(1, 2),) * 3, None, 0.0, True)
    first = chosen == torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value
    assert (build(DENSE).kernels(q, q, q, True).kernel == "cudnn") == first
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        assert build(DENSE).kernels(q, q, q, True).kernel == "flash"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_many_views_run_in_one_call():
    """65,536 views or more in one grid dimension is an invalid launch."""
    pattern = patterned("local_window", block=16, local_window_size=32)
    config = changed(as_sdpa(pattern), workspace_bytes=1 << 30)
    q, k, v = qkv(16 * 70_000, heads=1, head_dim=16, dtype=torch.float16, device="cuda")
    out = build(config)(q, k, v)
    tail = build(config)(*(x[:, -160:] for x in (q, k, v)))
    torch.testing.assert_close(out[:, -64:], tail[:, -64:], rtol=1e-2, atol=1e-3)


# Memory


def test_weights_that_cannot_fit_are_refused_before_anything_is_allocated():
    q = torch.zeros(1, 2_000_000, 1, 1, device="cuda")
    module = build(DENSE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with pytest.raises(OutOfMemoryError, match="would take 16,000,000,000,000 bytes"):
        module(q, q, q, return_attention_weights=True)
    assert torch.cuda.max_memory_allocated() == before


def test_memory_that_runs_out_is_one_clear_error_after_one_more_try():
    device = torch.device("cuda", torch.cuda.current_device())
    buffers = Buffers(switch="on", pool_bytes=1 << 28, cache_entries=4, cache_bytes=1 << 20)
    with buffers.pool.lend((1 << 20,), torch.float32, device):
        pass
    tries = []

    def run():
        tries.append(buffers.pool.stats.held_bytes)
        return torch.empty(1 << 50, dtype=torch.uint8, device=device)

    with pytest.raises(OutOfMemoryError, match="out of memory on cuda") as caught:
        with_emergency_release(run, buffers, device)
    assert len(tries) == 2
    assert tries[0] >= 4 << 20
    assert tries[1] == 0
    assert caught.value.requested == pytest.approx(1 << 50, rel=0.01)
    assert 0 < caught.value.available < 1 << 50


def test_scratch_stays_within_the_workspace():
    config = changed(as_sdpa(IMPLEMENTATIONS["dilated_sparse-3"]), workspace_bytes=1 << 22, pool="off")
    module = build(config)
    inputs = qkv(20_000, head_dim=64, dtype=torch.float16, device="cuda")
    module(*inputs)  # warm caches and libraries
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = module(*inputs)
    lse = out.numel() // out.shape[-1] * 4
    assert torch.cuda.max_memory_allocated() - before <= out.nbytes + lse + 2 * (1 << 22)
