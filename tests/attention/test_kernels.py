"""Masks as the memory-efficient kernel is given them, and whether a kernel is trusted with windows."""

import pytest
import torch
from flash import flash_attention, flash_kernels, ragged, windowed, windowed_backward

from attention.ops import kernels
from attention.ops.kernels import BIAS_ALIGNMENT, aligned_bias

N, H, T, K = 3, 4, 10, 13
MASKS = {
    "one for all": lambda: torch.randn(T, K),
    "a row a view": lambda: torch.randn(N, 1, 1, K).expand(N, H, T, K),
    "a row a view and head": lambda: torch.randn(N, H, 1, K).expand(N, H, T, K),
    "cut": lambda: torch.randn(N, 1, 1, K + 5)[..., 2 : K + 2].expand(N, 1, T, K),
    "each its own": lambda: torch.randn(N, H, T, K),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_what_it_was_with_aligned_rows_and_nothing_written_twice(name):
    torch.manual_seed(0)
    bias = MASKS[name]()
    q, k = torch.empty(N, H, T, 8), torch.empty(N, H, K, 8)
    found = aligned_bias(bias, q, k)
    assert found.shape == (N, H, T, K)
    assert torch.equal(found, bias.expand(N, H, T, K))
    assert found.stride(-1) == 1
    assert all(stride % BIAS_ALIGNMENT == 0 for stride in found.stride()[:-1])
    rows = bias.numel() // K
    for size, stride in zip(bias.shape[:-1], bias.stride()[:-1], strict=True):
        rows //= 1 if stride else size
    assert found.untyped_storage().nbytes() == rows * 16 * 4


@pytest.mark.parametrize("windows", ["any", "causal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_window_that_is_off_by_one_is_not_trusted(dtype, windows, monkeypatch):
    def right() -> bool:
        return kernels._windows_are_right.__wrapped__(torch.device("cpu"), dtype, windows)

    def shifted(function, **by):
        def run(*tensors, scale, left, right):
            edges = {"left": left + by.get("left", 0), "right": right + by.get("right", 0)}
            return function(*tensors, scale=scale, **edges)

        return run

    with flash_attention():
        assert right()
        for name in ("windowed", "windowed_backward"):
            for edge in ("left", "right"):
                for by in (1, -1):
                    with monkeypatch.context() as patch:
                        patch.setattr(kernels, name, shifted(getattr(kernels, name), **{edge: by}))
                        assert not right(), (name, edge, by)


@pytest.mark.parametrize("windows", ["any", "causal"])
def test_a_mask_aligned_to_the_start_is_not_trusted_with_fewer_queries(windows, monkeypatch):
    def right() -> bool:
        return kernels._few_queries_are_right.__wrapped__(torch.device("cpu"), torch.bfloat16, windows)

    def from_the_start(q, k, v, *, scale, left, right):
        return windowed(q, k[:, :, : q.shape[2]], v[:, :, : q.shape[2]], scale=scale, left=left, right=right)

    def without_masks(*tensors, scale, left, right):
        return ragged(*tensors, scale=scale)

    with flash_attention():
        assert right()
        monkeypatch.setattr(kernels, "windowed", from_the_start)
        assert not right()
        monkeypatch.setattr(kernels, "windowed", windowed)
        monkeypatch.setattr(kernels, "ragged", without_masks)
        assert right() == (windows == "causal")  # whose documents are tiles


def test_the_definition_is_computed_on_the_cpu_whatever_the_default_device_is(monkeypatch):
    monkeypatch.delenv(kernels.TRUST, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kernels, "choose", lambda x, biased: "flash")
    monkeypatch.setattr(kernels, "_windows_are_right", kernels._windows_are_right.__wrapped__)
    x = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
    with torch.device("meta"), flash_kernels():
        assert kernels.windows_of(x) == "any"


def test_a_build_without_the_kernel_has_no_windows(monkeypatch):
    def missing(*tensors, **options):
        raise RuntimeError("FlashAttention was not enabled for this build")

    monkeypatch.setattr(kernels, "windowed", missing)
    assert not kernels._windows_are_right.__wrapped__(torch.device("cpu"), torch.bfloat16, "any")


class EfficientKernel:
    """Plays the operators of torch's memory-efficient attention by their definition, on [N, T, H, D]."""

    def _edges(self, mask, window):
        assert mask in (0, 2)
        assert mask == 2 or window is None
        return None if window is None else window - 1, 0 if mask else None

    def _efficient_attention_forward(self, q, k, v, *rest, scale, window_size):
        left, right = self._edges(rest[6], window_size)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = windowed(q, k, v, scale=scale, left=left, right=right)
        return out.transpose(1, 2), lse

    def _efficient_attention_backward(self, *operands, scale, window_size):
        grad, q, k, v, out = (operands[place].transpose(1, 2) for place in (0, 1, 2, 3, 5))
        left, right = self._edges(operands[14], window_size)
        lse = operands[10][..., : q.shape[2]]
        grads = windowed_backward(grad, q, k, v, out, lse, scale=scale, left=left, right=right)
        return [x.transpose(1, 2) for x in grads]


@pytest.mark.parametrize("left, right", [(None, None), (None, 0), (5, 0), (0, None)])
def test_the_efficient_kernel_takes_each_mask(left, right, monkeypatch):
    """What a query sees from its place on is what it sees up to its place, in reverse order."""
    monkeypatch.setattr(kernels, "choose", lambda x, biased: "efficient")
    monkeypatch.setattr(kernels, "aten", EfficientKernel())
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, 3, 33, 12, dtype=torch.float64) for _ in range(4))
    expected = windowed(q, k, v, scale=0.3, left=left, right=right)
    found = kernels.windowed(q, k, v, scale=0.3, left=left, right=right)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    operands = (grad, q, k, v, *expected)
    torch.testing.assert_close(
        kernels.windowed_backward(*operands, scale=0.3, left=left, right=right),
        windowed_backward(*operands, scale=0.3, left=left, right=right),
        rtol=0,
        atol=1e-12,
    )


class _Handle:
    def remove(self) -> None: ...


@pytest.fixture
def activated():
    """Tells torch to take another flash attention, by name, until the test is over."""
    registry = torch.nn.attention
    if not hasattr(registry, "activate_flash_attention_impl"):
        pytest.skip("this torch has one flash attention")

    def activate(name: str) -> None:
        registry.register_flash_attention_impl(name, register_fn=_Handle)
        registry.activate_flash_attention_impl(name)

    names = registry._registry._FLASH_ATTENTION_IMPLS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry._registry, "_FLASH_ATTENTION_IMPLS", dict(names))
        yield activate
        registry.restore_flash_attention_impl(_raise_warn=False)


def test_another_flash_attention_is_held_against_the_definition_anew(monkeypatch, activated):
    monkeypatch.delenv(kernels.TRUST, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kernels, "choose", lambda x, biased: "flash")
    x = torch.zeros(1, 1, 1, 16, dtype=torch.float16)
    kernels._windows_are_right.cache_clear()

    def asserting(*tensors, **options):
        raise AssertionError("head_dim is not supported")  # as FlashAttention 4 does

    with flash_kernels():
        assert kernels.windows_of(x) == "any"
        assert kernels.activated_flash() is None
        activated("FA9")
        assert kernels.activated_flash() == "FA9"
        monkeypatch.setattr(kernels, "windowed_backward", asserting)
        assert kernels.windows_of(x) == "none"
        torch.nn.attention.restore_flash_attention_impl()
        assert kernels.windows_of(x) == "any"
    kernels._windows_are_right.cache_clear()


def test_a_torch_without_a_choice_has_its_own_flash_attention(monkeypatch):
    monkeypatch.delattr(torch.nn.attention, "current_flash_attention_impl", raising=False)
    assert kernels.activated_flash() is None
