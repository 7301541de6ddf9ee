"""cuDNN's attention as its operators are asked for it, with operators that are played by their definition
(`played_cudnn.py`), and when it is taken. On a GPU `test_gpu.py` runs it as it is."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from conformance import check_float64, check_low_precision, module_of, output_gradient, qkv
from flash import flash_attention
from played_cudnn import cudnn_attention, cudnn_operators

import attention
from attention import AttentionConfig, SparsePatternConfig, UnavailableError
from attention.ops import cudnn, kernels
from attention.sizes.whole_calls import CUDNN_TOKENS, LEAST_KEYS

DENSE = AttentionConfig(variant="dense")
CONFIGS = {
    "dense": DENSE,
    "dilated": AttentionConfig(variant="dilated", segment_lengths=(16, 40, 64), dilation_rates=(1, 2, 4)),
    "global_local": AttentionConfig(
        variant="block_sparse",
        pattern=SparsePatternConfig(
            pattern_type="global_local", block_size=8, local_window_size=16, global_tokens=8
        ),
    ),
}
causal_or_not = pytest.mark.parametrize("causal", [False, True])
config_by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 17, 50, 80])
@config_by_config
def test_float64_is_the_oracle(config, seq, kv_heads, causal):
    with cudnn_attention() as counts:
        check_float64(module_of(config), *qkv(seq, batch=2, kv_heads=kv_heads), causal)
    assert bool(counts["forward"]) == bool(counts["backward"]) == (seq > 1)


@causal_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@config_by_config
def test_low_precision_is_as_near_as_a_naive_attention(config, dtype, causal):
    with cudnn_attention():
        check_low_precision(module_of(config), *qkv(50, batch=2, kv_heads=2, dtype=dtype), causal)


@causal_or_not
@pytest.mark.parametrize("head_dim", [4, 12, 20])
def test_channels_are_padded(head_dim, causal):
    with cudnn_attention():
        check_float64(module_of(DENSE), *qkv(40, kv_heads=2, head_dim=head_dim), causal)


def test_operands_that_lie_otherwise_are_copied():
    """Heads before tokens, keys expanded over heads, rows that begin at odd places."""
    q, k, v = qkv(64, batch=2, kv_heads=2)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(2, 64, 4, 20, dtype=x.dtype)[:, :, : x.shape[2], 1:17].copy_(x)

    cases = {
        "heads first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        "expanded": [q, *(x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v))],
        "shifted": list(map(shifted, (q, k, v))),
    }
    for name, tensors in cases.items():
        with cudnn_attention() as counts:
            check_float64(module_of(DENSE), *tensors, True)
        assert counts["backward"], name


def test_a_gradient_that_lies_otherwise_is_copied():
    q, k, v = (x.requires_grad_() for x in qkv(40, kv_heads=2))
    expected = torch.autograd.grad(module_of(DENSE)(q, k, v).sum(), (q, k, v))
    with cudnn_attention():
        found = torch.autograd.grad(module_of(DENSE)(q, k, v).sum(), (q, k, v))  # strides of zero
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@config_by_config
def test_either_kernel_goes_back_from_the_other(config):
    """Its log-sum-exp is flash attention's, and the other way round."""
    expected, found = [], []
    for ahead, behind in itertools.product((flash_attention, cudnn_attention), repeat=2):
        q, k, v = (x.requires_grad_() for x in qkv(50, kv_heads=2))
        with ahead():
            out = module_of(config)(q, k, v)
        # The shape that forward was given goes with it, so that backward is made to choose anew.
        with behind() as counts, pytest.MonkeyPatch.context() as patch:
            if ahead is cudnn_attention and behind is flash_attention:
                patch.setattr("attention.ops.whole_calls.by_cudnn", lambda call, shape: 0)
            grads = torch.autograd.grad(out, (q, k, v), output_gradient(out))
        (found if counts else expected).append(grads)
    for one in (*found, *expected):
        for x, y in zip(one, expected[0], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


def test_short_calls_and_windows_are_flash_attentions():
    q, k, v = qkv(96, kv_heads=2)
    with cudnn_attention(least=64) as counts:
        module_of(CONFIGS["global_local"])(q, k, v)
        assert not any(counts.values())
        module_of(DENSE)(*(x[:, :60] for x in (q, k, v)))
        assert not any(counts.values())
        module_of(DENSE)(q, k, v)
        assert counts["forward"] == 1


def test_a_window_is_refused():
    q, k, v = (x.transpose(1, 2) for x in qkv(16))
    for left, right, keys in ((3, 0, 16), (None, 1, 16), (None, 0, 12)):
        with cudnn_operators(), pytest.raises(ValueError, match="no windows"):
            cudnn.forward(q, k[:, :, :keys], v[:, :, :keys], scale=1.0, left=left, right=right)


# When it is taken


@pytest.fixture
def card(monkeypatch):
    """A Hopper whose torch takes cuDNN's attention first, on a CPU; returns what may be changed of it."""
    card = SimpleNamespace(capability=(9, 0), choice=3, capturing=False, activated=None)
    monkeypatch.delenv(kernels.TRUST, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: card.capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: card.choice)
    monkeypatch.setattr(kernels, "flash_is_built", lambda: True)
    monkeypatch.setattr(cudnn, "activated_flash", lambda: card.activated)
    monkeypatch.setattr(cudnn, "_RIGHT", {})
    return card


class OnCuda:
    """A tensor on a CPU that says it is on a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.device = SimpleNamespace(type="cuda")

    def __getattr__(self, name: str):
        return getattr(self.tensor, name)


def taken(backend: str = "auto", head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> int:
    q = OnCuda(torch.zeros(1, 1024, 4, head_dim, dtype=dtype))
    return cudnn.takes_from(q, q, True, backend)


def agreeing(monkeypatch, agrees: bool = True) -> None:
    monkeypatch.setattr(cudnn, "_agrees", lambda x: agrees)


def test_it_is_taken_where_torch_takes_it_and_it_agrees(card, monkeypatch):
    agreeing(monkeypatch)
    assert taken() == taken("sdpa") == CUDNN_TOKENS
    assert taken("flash") == 0
    assert taken(head_dim=160) == taken(dtype=torch.float32) == taken(dtype=torch.float64) == 0
    card.choice = 1
    assert taken() == 0
    card.choice, card.activated = 3, "FA3"
    assert taken() == 0
    card.activated, card.capability = None, (8, 9)
    assert taken() == 0
    card.capability = (10, 0)
    assert taken() == CUDNN_TOKENS
    agreeing(monkeypatch, False)
    assert taken() == 0


def test_asked_for_it_takes_what_it_can(card, monkeypatch):
    agreeing(monkeypatch)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *_: None)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda params: True)
    card.choice, card.activated = 1, "FA3"
    assert taken("cudnn") == LEAST_KEYS
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert taken("cudnn") == 0


def probed(dtype: torch.dtype = torch.bfloat16, channels: int = 16) -> bool:
    return cudnn._agrees(torch.zeros(1, 1, 1, channels, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [16, 64, 128])
def test_one_small_call_of_each_kind_decides(dtype, channels, card):
    with cudnn_operators() as counts:
        assert probed(dtype, channels)
        assert probed(dtype, channels - 3)
        assert counts == {"forward": 2, "backward": 2}


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_one_that_is_wrong_or_missing_is_not_taken(name, card, monkeypatch):
    right = getattr(cudnn, name)

    def of_the_other_mask(*tensors, scale, left, right):
        turned = None if right == 0 else 0 if tensors[-1].shape[2] == 40 else right
        return getattr(cudnn, f"_{name}")(*tensors, scale=scale, left=left, right=turned)

    def of_another_scale(*tensors, scale, left, right):
        return getattr(cudnn, f"_{name}")(*tensors, scale=scale * 1.3, left=left, right=right)

    def missing(*tensors, **options):
        raise RuntimeError("PyTorch was not compiled with cuDNN")

    monkeypatch.setattr(cudnn, f"_{name}", right, raising=False)
    with cudnn_operators():
        for wrong in (of_the_other_mask, of_another_scale, missing):
            cudnn._RIGHT.clear()
            monkeypatch.setattr(cudnn, name, wrong)
            assert not probed()


def test_under_capture_it_is_taken_if_it_agreed_before(card):
    with cudnn_operators() as counts:
        card.capturing = True
        assert not probed()
        assert not any(counts.values())
        card.capturing = False
        assert probed()
        card.capturing = True
        assert probed()


def test_memory_that_runs_out_decides_nothing(card, monkeypatch):
    def out_of_memory(*tensors, **options):
        raise torch.OutOfMemoryError

    with cudnn_operators():
        with monkeypatch.context() as patch:
            patch.setattr(cudnn, "forward", out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                probed()
        assert probed()


def test_what_cudnn_refuses_says_what_leaves_it_out(card, monkeypatch):
    q, k, v = (x.transpose(1, 2) for x in qkv(16))
    with pytest.raises(RuntimeError) as raised:  # no operator for a CPU
        cudnn.forward(q, k, v, scale=1.0, left=None, right=None)
    assert "backend='flash'" in raised.value.__notes__[0]


# Asked for by name


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_on_a_cpu_it_is_refused(backend):
    config = DENSE.model_copy(update={"backend": backend})
    with pytest.raises(UnavailableError, match=f"backend='{backend}'.*on CUDA only; use backend='auto'"):
        attention.build(config)(*qkv(8))
