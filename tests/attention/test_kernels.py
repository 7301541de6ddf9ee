"""Masks as the memory-efficient kernel is given them."""

import pytest
import torch

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
