"""Masks as the memory-efficient kernel is given them, and whether a kernel is trusted with windows."""

import pytest
import torch
from flash import flash_attention, flash_kernels

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
