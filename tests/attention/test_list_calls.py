"""Attention over lists of blocks as few kernel calls: against the oracle with a kernel that is played by its
definition (`flash.py`). On a GPU `test_gpu.py` runs them as they are."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from conformance import (
    IMPLEMENTATIONS,
    LEAST_WORKSPACE,
    adaptive,
    cases,
    changed,
    check_float64,
    check_low_precision,
    module_of,
    patterned,
    qkv,
)
from flash import flash_attention
from hypothesis import assume, given, settings

from attention.ops import execute
from attention.sizes import list_calls as sizes

LISTS = {
    name: changed(config, backend="sdpa")
    for name, config in IMPLEMENTATIONS.items()
    if name.startswith(("adaptive", "dilated_sparse"))
}
LISTS["adaptive, all blocks"] = adaptive(1.0)
LISTS["adaptive, blocks of one"] = adaptive(0.2, block=1)
LISTS["adaptive, blocks of 32"] = adaptive(0.5, block=32)
LISTS["dilated_sparse, segments of one"] = patterned("dilated_sparse", [(1, 1)], sparsity_ratio=0.5)
LISTS["dilated_sparse, apart"] = patterned("dilated_sparse", [(6, 3), (2, 2)], sparsity_ratio=0.5)
LISTS = {name: changed(config, backend="sdpa") for name, config in LISTS.items()}
config_by_config = pytest.mark.parametrize("config", LISTS.values(), ids=LISTS.keys())
causal_or_not = pytest.mark.parametrize("causal", [False, True])

TILE = execute._forward_tile


@pytest.fixture(autouse=True)
def no_tiles():
    with mock.patch.object(execute, "_forward_tile", side_effect=AssertionError("a tile")):
        yield


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 7, 17, 33, 50, 64])
@config_by_config
def test_float64_is_the_oracle(config, seq, kv_heads, causal):
    with flash_attention():
        check_float64(module_of(config), *qkv(seq, batch=2, kv_heads=kv_heads), causal)


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("room", [1, 4_000, 40_000])
@pytest.mark.parametrize("seq", [17, 64])
@config_by_config
def test_small_parts_and_lists_that_are_cut_make_the_same(config, seq, room, kv_heads, causal):
    with flash_attention(), mock.patch.object(sizes, "part_room", return_value=room):
        module = module_of(changed(config, workspace_bytes=LEAST_WORKSPACE))
        check_float64(module, *qkv(seq, batch=2, kv_heads=kv_heads), causal)


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seq", [50, 64])
@config_by_config
def test_low_precision_is_as_near_as_a_naive_attention(config, seq, dtype, causal):
    with flash_attention():
        check_low_precision(module_of(config), *qkv(seq, batch=2, kv_heads=2, dtype=dtype), causal)


@settings(max_examples=10)
@given(cases())
def test_random_cases_are_the_oracle(case):
    pattern = case["config"].pattern
    assume(case["config"].variant == "adaptive" or (pattern and pattern.pattern_type == "dilated_sparse"))
    sizes = {name: case[name] for name in ("batch", "heads", "kv_heads", "head_dim")}
    with flash_attention():
        config = changed(case["config"], backend="sdpa")
        check_float64(module_of(config), *qkv(case["seq"], **sizes), case["causal"])


@causal_or_not
@pytest.mark.parametrize("seq", [50, 64])
def test_a_scorer_learns_as_from_tiles(seq, causal):
    config = LISTS["adaptive"]
    q, k, v = qkv(seq, batch=2, kv_heads=2)

    def gradients() -> list[torch.Tensor]:
        module = module_of(config)
        module(q, k, v, is_causal=causal).square().sum().backward()
        return [parameter.grad for parameter in module.parameters()]

    with mock.patch.object(execute, "_forward_tile", TILE):
        expected = gradients()
    with flash_attention():
        torch.testing.assert_close(gradients(), expected, rtol=0, atol=1e-12)


@causal_or_not
def test_inputs_that_lie_otherwise_are_taken(causal):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(50, batch=2, kv_heads=2))
    for name in ("dilated_sparse-3", "adaptive"):
        with flash_attention():
            check_float64(module_of(LISTS[name]), q, k, v, causal)


def test_the_result_is_the_same_each_time():
    config = LISTS["dilated_sparse-3"]
    inputs = qkv(64, kv_heads=2, dtype=torch.bfloat16)

    def run() -> list[torch.Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        out = module_of(config)(q, k, v, is_causal=True)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    with flash_attention():
        assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))
