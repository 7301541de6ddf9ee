"""Attention as whole calls: as programs without tensors, and against the oracle with a kernel that is played
by its definition (`flash.py`). On a GPU `test_gpu.py` runs them as they are."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from conformance import cases, changed, check_float64, check_low_precision, in_little_room, module_of, qkv
from flash import flash_attention
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from whole_cases import WHOLE, met, shape_of

from attention.reference import multiplicity
from attention.sections import CutProgram
from attention.sizes import whole_calls as sizes
from attention.sizes.whole_calls import CallPart, backward_cut, forward_cut, whole_calls

config_by_config = pytest.mark.parametrize("config", WHOLE.values(), ids=WHOLE.keys())
causal_or_not = pytest.mark.parametrize("causal", [False, True])


kernel_by_kernel = pytest.mark.parametrize("windows", ["any", "causal"])


@pytest.mark.pairwise
@kernel_by_kernel
@causal_or_not
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (12, 1), (3, 3)])
@pytest.mark.parametrize("seq", [1, 7, 17, 64, 100])
@config_by_config
def test_calls_meet_the_pairs_that_the_oracle_counts(config, seq, heads, causal, windows):
    shape = shape_of(seq, *heads, causal=causal, windows=windows)
    calls = whole_calls(config, shape)
    if windows == "causal":
        for call in calls:
            if call.reverses(shape):
                assert (call.left, call.queries) == (0, call.keys)
            else:
                assert call.left is None or call.right == 0
            assert call.heads(shape) == call.kv_heads(shape) or not call.exists
    expected = multiplicity(config, seq, shape.heads, causal).numpy()
    np.testing.assert_array_equal(met(calls, shape, forward_cut), expected)
    np.testing.assert_array_equal(met(calls, shape, backward_cut), expected)
    few = met(calls, shape, lambda call, _: CallPart(2, 1, 3 if call.can_slice(shape) else 1 << 62))
    np.testing.assert_array_equal(few, expected)


@pytest.mark.pairwise
@kernel_by_kernel
@causal_or_not
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (12, 1), (3, 3)])
@pytest.mark.parametrize("seq, queries", [(2, 1), (7, 3), (17, 1), (64, 32), (100, 1), (100, 37), (100, 99)])
@config_by_config
def test_calls_of_fewer_queries_meet_their_pairs(config, seq, queries, heads, causal, windows):
    causal = causal and not (queries == 1 and config.pattern is None)
    shape = shape_of(seq, *heads, causal=causal, windows=windows, origin=seq - queries)
    calls = whole_calls(config, shape)
    if windows == "causal":
        for call in calls:
            if call.reverses(shape):
                assert call.left == 0
                assert call.queries == call.keys or not call.exists
            else:
                assert call.left is None or call.right == 0
    causal = causal or (queries == 1 and config.pattern is None)
    expected = multiplicity(config, seq, shape.heads, causal).numpy()[:, -queries:]
    np.testing.assert_array_equal(met(calls, shape, forward_cut), expected)
    np.testing.assert_array_equal(met(calls, shape, backward_cut), expected)
    few = met(calls, shape, lambda call, _: CallPart(2, 1, 3 if call.can_slice(shape) else 1 << 62))
    np.testing.assert_array_equal(few, expected)


@causal_or_not
@config_by_config
@pytest.mark.parametrize("most", [1, 3, 10, 64])
def test_no_slice_asks_for_more_than_the_one_before_it(config, causal, most):
    shape = shape_of(100, causal=causal, windows="causal")
    for call in whole_calls(config, shape):
        if call.exists and call.can_slice(shape):
            for queries, keys in call.spans(shape):
                slices = [(some.length, seen.length) for some, seen in call.slices(queries, keys, most)]
                assert sum(count for count, _ in slices) == queries.length
                for (count, seen), (fewer, less) in pairwise(slices):
                    assert fewer <= count
                    assert less <= seen


@causal_or_not
@config_by_config
def test_the_output_is_of_one_call_where_that_covers_all(config, causal):
    shape = shape_of(96, causal=causal)
    first = next(call for call in whole_calls(config, shape) if call.exists)
    touched = met([first], shape, forward_cut).any(axis=2)
    assert bool(first.covers(shape)) == (touched.all() and first.first and first.period == 1)


def test_parts_of_long_calls_take_what_they_may():
    for config in WHOLE.values():
        for causal in (False, True):
            shape = shape_of(131_072, 32, 8, causal, head_dim=128, workspace=16 << 20)
            floor = 2 * shape.seq * (shape.token_bytes + shape.kv_token_bytes)
            for call in whole_calls(config, shape):
                cut = forward_cut(call, shape)
                heads = cut.kv_heads * (call.heads(shape) // call.kv_heads(shape))
                part = cut.views * call.queries * heads * shape.head_dim * shape.itemsize
                least = part // max(cut.views, cut.kv_heads)
                if call.exists and not call.covers(shape) and least < floor // 32:
                    assert part <= floor // 32 + (48 << 20), (config, call)


@pytest.fixture
def small_parts():
    """Kernels get a view or two, or one kv head, at a time."""
    with mock.patch.object(sizes, "_cut", return_value=CallPart(2, 1)):
        yield


@pytest.mark.pairwise
@kernel_by_kernel
@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 17, 50])
@config_by_config
def test_float64_is_the_oracle(config, seq, kv_heads, causal, windows):
    with flash_attention(windows):
        check_float64(module_of(config), *qkv(seq, batch=2, kv_heads=kv_heads), causal)


@pytest.mark.pairwise
@kernel_by_kernel
@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq, queries", [(2, 1), (17, 16), (50, 1), (50, 16), (64, 32)])
@config_by_config
def test_fewer_queries_are_the_oracle(config, seq, queries, kv_heads, causal, windows):
    q, k, v = qkv(seq, batch=2, kv_heads=kv_heads)
    with flash_attention(windows), mock.patch.object(CutProgram, "tiles", side_effect=AssertionError):
        check_float64(module_of(config), q[:, -queries:].clone(), k, v, causal)


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("seq", [17, 50])
@config_by_config
def test_small_parts_make_the_same(config, seq, causal, small_parts):
    with flash_attention():
        check_float64(module_of(config), *qkv(seq, batch=2, kv_heads=2), causal)


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@config_by_config
def test_low_precision_is_as_near_as_a_naive_attention(config, dtype, causal):
    with flash_attention():
        check_low_precision(module_of(config), *qkv(50, batch=2, kv_heads=2, dtype=dtype), causal)


@settings(max_examples=25)
@given(cases(), st.sampled_from(["any", "causal"]))
def test_random_cases_are_the_oracle(case, windows):
    assume(case["config"].variant != "adaptive")
    sizes = {name: case[name] for name in ("batch", "heads", "kv_heads", "head_dim")}
    with flash_attention(windows):
        config = changed(case["config"], backend="sdpa")
        check_float64(module_of(config), *qkv(case["seq"], **sizes), case["causal"])


@causal_or_not
@config_by_config
def test_weights_are_as_tiles_have_them(config, causal):
    q, k, v = qkv(50, kv_heads=2)
    module = module_of(in_little_room(config))
    _, expected = module(q, k, v, is_causal=causal, return_attention_weights=True)
    with flash_attention():
        _, weights = module(q, k, v, is_causal=causal, return_attention_weights=True)
    torch.testing.assert_close(weights.to_dense(), expected.to_dense(), rtol=0, atol=1e-12)


def test_inputs_that_lie_otherwise_are_taken():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(64, batch=2, kv_heads=2))
    for config in (WHOLE["dense"], WHOLE["dilated-1"], WHOLE["global_local"]):
        with flash_attention():
            check_float64(module_of(config), q, k, v, True)


def test_no_layout_is_made():
    config = WHOLE["local_window"]
    module = module_of(config)
    with flash_attention(), mock.patch.object(type(module), "_layout", side_effect=AssertionError):
        module(*qkv(77))
