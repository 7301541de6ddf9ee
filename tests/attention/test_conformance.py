"""Every implementation equals the oracle and keeps the promises of an attention."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from conformance import (
    BLOCK,
    HEAD_DIM,
    HEADS,
    IMPLEMENTATIONS,
    KV_HEADS,
    adaptive,
    cases,
    changed,
    check_float64,
    check_low_precision,
    chosen,
    counts,
    dilated,
    in_little_room,
    module_of,
    output_gradient,
    patterned,
    qkv,
)
from hypothesis import assume, given, settings
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from attention import AttentionConfig, OutOfMemoryError, UnavailableError, build, inputs, reference_attention
from attention.layout import count_active

every = pytest.mark.parametrize("config", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
low_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
sixteen_bits = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
room = pytest.mark.parametrize("little_room", [False, True], ids=["roomy", "little-room"])

LENGTHS = [1, 7, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 61, 118]


def gradients(module, inputs, causal, grad=None):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = module(*leaves, is_causal=causal)
    return out.detach(), *torch.autograd.grad(out, leaves, output_gradient(out) if grad is None else grad)


def assert_same_bits(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


# Closeness


@pytest.mark.pairwise
@room
@causal_or_not
@pytest.mark.parametrize("seq", sorted(set(LENGTHS)))
@every
def test_float64_equals_the_oracle_forward_and_backward(config, seq, causal, little_room):
    module = module_of(in_little_room(config, pool="on") if little_room else config)
    check_float64(module, *qkv(seq, batch=2), causal)


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("groups", [True, False], ids=["groups", "no-groups"])
@every
def test_query_heads_share_kv_heads(config, kv_heads, groups, causal, monkeypatch):
    """Whether torch's kernel takes fewer kv heads than heads, as from 2.9 on, or not."""
    monkeypatch.setattr(inputs, "cpu_takes_groups", lambda: groups)
    check_float64(module_of(in_little_room(config)), *qkv(77, batch=2, kv_heads=kv_heads), causal)


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("seq", [1, 17, 150])
@low_precision
@every
def test_low_precision_is_as_exact_as_a_naive_attention(config, dtype, seq, kv_heads, causal):
    module = module_of(in_little_room(config))
    check_low_precision(module, *qkv(seq, batch=2, kv_heads=kv_heads, dtype=dtype), causal)


@pytest.mark.pairwise
@causal_or_not
@low_precision
@every
def test_low_precision_stays_exact_with_large_scores(config, dtype, causal):
    q, k, v = qkv(100, dtype=torch.float64)
    check_low_precision(module_of(config), *(x.to(dtype) for x in (6 * q, 3 * k, v)), causal)


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name", ["dilated-2", "dilated-3-odd", "dilated-4-beyond-heads", "dilated_sparse-far", "global_local"]
)
def test_parts_are_merged_by_shares_that_add_up_to_one_whatever_the_scores(name, dtype, causal):
    """Scores around a million: a log-sum-exp in single precision is good to 0.06 there, and shares that are
    each taken from one did not add up (outputs off by up to 50%)."""
    config = in_little_room(IMPLEMENTATIONS[name])
    q, k, v = (x.to(dtype) for x in qkv(150))
    q, k = 1000 * q, 1000 * k
    found = module_of(config)(q, k, v, is_causal=causal).double()
    exact = reference_attention(q, k, v, config, causal)
    torch.testing.assert_close(found, exact, rtol=0, atol=4 * torch.finfo(dtype).eps * float(v.abs().max()))


@pytest.mark.pairwise
@causal_or_not
@sixteen_bits
@pytest.mark.parametrize("name", ["dense", "global_local"])
def test_gradients_of_shared_keys_survive_many_tiles(name, dtype, causal):
    """Every tile of queries adds to dk and dv of the same keys: sums kept in 16 bits lose what is added
    late. Output gradients of one sign, because sums that cancel show less."""
    module = module_of(in_little_room(IMPLEMENTATIONS[name]))
    q, k, v = qkv(1000, kv_heads=1, dtype=dtype)
    check_low_precision(module, q, k, v, causal, grad=1 + output_gradient(q))


@pytest.mark.pairwise
@causal_or_not
@sixteen_bits
@pytest.mark.parametrize("seq", [300, 1000])
def test_low_precision_stays_exact_with_diffuse_scores(seq, dtype, causal):
    """All weights near 1 / keys: exp(s - lse) of a rounded s - lse is off by the same factor everywhere."""
    q, k, v = qkv(seq, dtype=torch.float64)
    module = module_of(AttentionConfig(variant="dense"))
    check_low_precision(module, *(x.to(dtype) for x in (q / 20, k, v)), causal)


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2])
@every
def test_gradcheck(config, kv_heads, causal):
    heads, head_dim = (HEADS, HEAD_DIM) if config.adaptive else (2, 3)
    module = module_of(config).requires_grad_(False)
    inputs = [x.requires_grad_() for x in qkv(19, heads=heads, kv_heads=kv_heads, head_dim=head_dim)]
    assert torch.autograd.gradcheck(lambda *x: module(*x, is_causal=causal), inputs, fast_mode=True)


def check_random(case):
    config, causal = case.pop("config"), case.pop("causal")
    check_float64(module_of(config), *qkv(**case), causal)


@settings(max_examples=30)
@given(case=cases())
def test_random_configs_equal_the_oracle(case):
    check_random(case)


@pytest.mark.slow
@settings(max_examples=1000)
@given(case=cases())
def test_many_random_configs_equal_the_oracle(case):
    check_random(case)


@pytest.mark.slow
@settings(max_examples=300)
@given(case=cases())
def test_random_configs_are_as_exact_as_naive_in_bfloat16(case):
    # Backward takes out * grad, summed over channels, of an out that is rounded, as torch's fused kernels do:
    # of one channel that is one product, whose error nothing averages (seen: 7 times the naive one's).
    assume(case["head_dim"] > 1)
    config, causal = case.pop("config"), case.pop("causal")
    check_low_precision(module_of(config), *qkv(**case, dtype=torch.bfloat16), causal)


@pytest.mark.slow
@causal_or_not
@low_precision
@every
def test_low_precision_at_a_thousand_tokens(config, dtype, causal):
    check_low_precision(module_of(in_little_room(config)), *qkv(1021, kv_heads=2, dtype=dtype), causal)


# Causality


@pytest.mark.pairwise
@pytest.mark.parametrize("boundary", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 31, 64, 77, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every
def test_no_output_depends_on_later_keys_and_values(config, dtype, boundary):
    """For adaptive too: its choice for a block reads earlier keys and the block's queries, and the
    block's own keys are kept whatever they are."""
    module = module_of(in_little_room(config))
    q, k, v = qkv(101, batch=2, dtype=dtype)
    before = module(q, k, v, is_causal=True)
    k[:, boundary:], v[:, boundary:] = 9 * torch.randn_like(k[:, boundary:]), 9.0
    after = module(q, k, v, is_causal=True)
    assert torch.equal(after[:, :boundary], before[:, :boundary])
    assert not torch.equal(after, before)


@pytest.mark.parametrize("boundary", [1, 13, 5 * BLOCK])
@every
def test_no_output_depends_on_later_tokens(config, boundary):
    """Queries included. An adaptive block chooses by the mean of all its queries, so there only
    tokens of later blocks are promised to change nothing."""
    if config.variant == "adaptive":
        boundary = -(-boundary // BLOCK) * BLOCK
    module = module_of(config)
    inputs = qkv(101, dtype=torch.float32)
    before = module(*inputs, is_causal=True)
    for x in inputs:
        x[:, boundary:] += 3.0
    assert torch.equal(module(*inputs, is_causal=True)[:, :boundary], before[:, :boundary])


@every
def test_no_gradient_flows_from_an_output_to_later_tokens(config):
    boundary = 43
    leaves = [x.requires_grad_() for x in qkv(90, dtype=torch.bfloat16)]
    out = module_of(config)(*leaves, is_causal=True)
    grads = torch.autograd.grad(out[:, :boundary].float().sum(), leaves)
    assert all((grad[:, boundary:] == 0).all() for grad in grads)
    assert grads[2][:, :boundary].any()


# Relations


FULL = {
    "dilated": dilated([(200, 1)]),
    "dilated-twice": dilated([(200, 1), (500, 1)]),  # every pair counts twice, which cancels
    "local_window": patterned("local_window", local_window_size=10**6),
    "global_local": patterned("global_local", local_window_size=1, global_tokens=10**6),
    "dilated_sparse": patterned("dilated_sparse", [(100, 1)], sparsity_ratio=1.0),
    "adaptive": adaptive(1.0),
}


@room
@causal_or_not
@pytest.mark.parametrize("config", FULL.values(), ids=FULL.keys())
def test_a_full_pattern_equals_dense(config, causal, little_room):
    inputs = qkv(75, batch=2, kv_heads=2)
    found = gradients(module_of(in_little_room(config) if little_room else config), inputs, causal)
    for x, y in zip(found, gradients(build(AttentionConfig(variant="dense")), inputs, causal), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every
def test_batch_items_do_not_know_each_other(config, dtype, causal):
    module = module_of(in_little_room(config))
    inputs = qkv(93, batch=2, kv_heads=2, dtype=dtype)
    together = gradients(module, inputs, causal)
    for b in range(2):
        item = slice(b, b + 1)
        grad = output_gradient(inputs[0])[item]
        alone = gradients(module, [x[item] for x in inputs], causal, grad)
        assert_same_bits(alone, [x[item] for x in together])


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every
def test_later_calls_equal_the_first_bit_for_bit(config, dtype, causal):
    """With a pool and caches that fill and are used, and with neither."""
    inputs = qkv(70, batch=2, kv_heads=2, dtype=dtype)
    first, *others = (
        gradients(module, inputs, causal)
        for calls, kept in (
            (3, {"pool": "on", "pool_bytes": 1 << 28}),
            (2, {"pool": "off", "cache_entries": 0}),
        )
        for module in [module_of(in_little_room(config, **kept))]
        for _ in range(calls)
    )
    for other in others:
        assert_same_bits(other, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every
def test_the_number_of_threads_changes_no_bit(config, dtype):
    module = module_of(in_little_room(config))
    inputs = qkv(70, batch=2, kv_heads=2, dtype=dtype)
    expected = gradients(module, inputs, True)
    torch.set_num_threads(2)
    try:
        found = gradients(module, inputs, True)
    finally:
        torch.set_num_threads(1)
    assert_same_bits(found, expected)


def test_a_pool_is_used_again():
    module = build(in_little_room(IMPLEMENTATIONS["dilated_sparse-3"], pool="on", pool_bytes=1 << 27))
    inputs = qkv(90, dtype=torch.float32)
    module(*inputs)
    before = module.scratch.pool.stats
    module(*inputs)
    after = module.scratch.pool.stats
    assert (after.lent_bytes, after.misses) == (0, before.misses)
    assert after.hits > before.hits


@every
def test_inputs_are_never_modified(config):
    inputs = qkv(70, batch=2, kv_heads=2, dtype=torch.bfloat16)
    kept = [x.clone() for x in inputs]
    grad = output_gradient(inputs[0])
    kept_grad = grad.clone()
    gradients(module_of(in_little_room(config)), inputs, True, grad)
    assert_same_bits([*inputs, grad], [*kept, kept_grad])


# Strides


def heads_first(x):
    """The same values stored as [B, H, S, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_first(x):
    """The same values with the channels not adjacent."""
    return x.transpose(1, 3).contiguous().transpose(1, 3)


def inside_another(x):
    """The same values as a slice in the middle of a larger tensor."""
    room = x.new_full((x.shape[0] + 1, x.shape[1] + 5, x.shape[2] + 2, x.shape[3] + 3), torch.nan)
    room[1:, 2:-3, 1:-1, :-3] = x
    return room[1:, 2:-3, 1:-1, :-3]


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [heads_first, channels_first, inside_another])
@every
def test_storage_order_does_not_matter(config, stored, dtype, causal):
    """To rounding: a processor may multiply rows that do not begin at aligned addresses in another order."""
    module = module_of(in_little_room(config))
    inputs = qkv(67, batch=2, kv_heads=2, dtype=dtype)
    other = [stored(x) for x in inputs]
    assert not any(x.is_contiguous() for x in other)
    grad = output_gradient(inputs[0])
    found, expected = gradients(module, other, causal, stored(grad)), gradients(module, inputs, causal, grad)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@every
def test_slices_of_a_packed_projection_give_the_same(config):
    module = module_of(config)
    packed = torch.cat(qkv(50, batch=2, dtype=torch.float32), dim=2).requires_grad_()
    found = module(*packed.split(HEADS, dim=2))
    grad = output_gradient(found)
    (packed_grad,) = torch.autograd.grad(found, packed, grad)
    expected = gradients(module, packed.detach().split(HEADS, dim=2), False, grad)
    assert_same_bits([found, packed_grad], [expected[0], torch.cat(expected[1:], dim=2)])


@causal_or_not
@every
def test_expanded_gradients_and_inputs_give_the_same(config, causal):
    module = module_of(in_little_room(config))
    q, k, v = qkv(45, dtype=torch.float32, kv_heads=1)
    expanded = [q, *(x.expand(-1, -1, HEADS, -1) for x in (k, v))]
    leaves = [x.detach().requires_grad_() for x in expanded]
    out = module(*leaves, is_causal=causal)
    found = torch.autograd.grad(out.sum(), leaves)
    plain = [x.contiguous() for x in expanded]
    assert_same_bits([out, *found], gradients(module, plain, causal, torch.ones_like(q)))


# Rows without keys


@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@room
def test_rows_without_keys_are_zero_and_never_nan(dtype, causal, little_room):
    config = IMPLEMENTATIONS["dilated-uncovered"]
    module = module_of(in_little_room(config) if little_room else config)
    leaves = [x.requires_grad_() for x in qkv(101, batch=2, dtype=dtype)]
    out, weights = module(*leaves, is_causal=causal, return_attention_weights=True)
    empty = (counts(module, *leaves[:2], causal) == 0).all(-1).T  # [S, H]
    assert empty.any()
    assert (out[:, empty] == 0).all()
    assert (weights.to_dense().transpose(1, 2)[:, empty] == 0).all()
    for grad in torch.autograd.grad(out.float().square().sum(), leaves):
        assert grad.isfinite().all()
        assert (grad[:, empty] == 0).all()


# Weights


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("seq", [1, 9, 75])
@every
def test_weights_are_what_the_output_is_made_of(config, seq, kv_heads, causal):
    module = module_of(in_little_room(config))
    q, k, v = qkv(seq, batch=2, kv_heads=kv_heads)
    out, weights = module(q, k, v, causal, return_attention_weights=True)
    dense = weights.to_dense()
    m = counts(module, q, k, causal).expand_as(dense)
    assert weights.shape == dense.shape == (2, HEADS, seq, seq)
    assert not weights.block_values.requires_grad
    assert (dense[m == 0] == 0).all()
    torch.testing.assert_close(dense.sum(-1), (m > 0).any(-1).double(), rtol=1e-12, atol=1e-12)
    values = v.repeat_interleave(HEADS // kv_heads, dim=2).transpose(1, 2)
    torch.testing.assert_close((dense @ values).transpose(1, 2), out, rtol=1e-11, atol=1e-12)
    assert torch.equal(out, module(q, k, v, causal))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every
def test_weights_are_of_the_inputs_dtype(config, dtype):
    module = module_of(config)
    q, k, v = qkv(75, dtype=dtype)
    out, weights = module(q, k, v, True, return_attention_weights=True)
    assert weights.block_values.dtype == dtype
    found = (weights.to_dense().double() @ v.double().transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found, out.double(), rtol=0, atol=20 * torch.finfo(dtype).eps)


@causal_or_not
@every
def test_weights_take_memory_of_active_blocks_alone(config, causal):
    module = module_of(config)
    q, k, v = qkv(150, batch=2, dtype=torch.float32)
    _, weights = module(q, k, v, causal, return_attention_weights=True)
    size = weights.block_size
    layout = chosen(module, q, k, causal)
    if layout is None:
        active = count_active(config, 150, causal)
        assert weights.block_indices.shape == (active, 2)
    else:
        active = int((layout[0, 0] >= 0).sum())
        assert weights.block_indices.shape == (2, HEADS, active, 2)
    assert weights.block_values.shape == (2, HEADS, active, size, size)
    assert weights.block_values.untyped_storage().nbytes() == 2 * HEADS * active * size * size * 4


@pytest.mark.parametrize("dtype, name", [(torch.float32, "16,000"), (torch.float64, "32,000")])
def test_weights_that_cannot_fit_are_refused_before_anything_is_allocated(dtype, name):
    q = torch.zeros(1, 2_000_000, 1, 1, dtype=dtype)
    module = build(AttentionConfig(variant="dense"))
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record,
        pytest.raises(OutOfMemoryError, match=rf"would take {name},000,000,000 bytes") as caught,
    ):
        module(q, q, q, return_attention_weights=True)
    assert caught.value.requested == 2_000_000**2 * dtype.itemsize
    assert caught.value.available < caught.value.requested
    assert sum(max(event.self_cpu_memory_usage, 0) for event in record.key_averages()) == 0


def test_a_dense_matrix_that_cannot_fit_is_refused():
    module = build(patterned("local_window", local_window_size=8))
    q = torch.zeros(1, 2_000_000, 1, 1)
    _, weights = module(q, q, q, return_attention_weights=True)
    assert weights.block_values.nbytes < 1e9
    with pytest.raises(OutOfMemoryError, match=r"\[1, 1, 2000000, 2000000\] would take 16,000,000,000,000"):
        weights.to_dense()


# What is kept, and modes


def saved_bytes(run):
    """Bytes of the distinct tensors that `run` saves for backward."""
    saved = {}

    def pack(x):
        saved[x.data_ptr(), x.shape] = x.nbytes
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        kept = run()
    del kept
    return sum(saved.values())


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 4])
@every
def test_only_q_k_v_out_and_lse_are_saved_for_backward(config, kv_heads, dtype):
    module = module_of(in_little_room(config)).requires_grad_(False)
    inputs = [x.requires_grad_() for x in qkv(150, batch=2, kv_heads=kv_heads, dtype=dtype)]
    lse = 2 * 150 * HEADS * max(dtype.itemsize, 4)
    expected = sum(x.nbytes for x in inputs) + inputs[0].nbytes + lse
    assert saved_bytes(lambda: module(*inputs, is_causal=True)) == expected


@every
def test_inference_mode_equals_training_and_spoils_nothing_for_it(config):
    """What evaluation leaves in pool and caches must serve a training step after it."""
    module = module_of(in_little_room(config, pool="on"))
    inputs = qkv(90, dtype=torch.float32)
    with torch.inference_mode():
        found = [module(*inputs, is_causal=True) for _ in range(2)]
    expected = gradients(module, inputs, True)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[0], expected[0])
    with torch.inference_mode():
        assert torch.equal(module(*inputs, is_causal=True), found[0])


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@every
def test_gradients_of_some_inputs_alone_are_the_same(config, wanted):
    module = module_of(config).requires_grad_(False)
    inputs = qkv(40, kv_heads=2)
    out, *expected = gradients(module, inputs, False)
    leaves = [x.clone().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
    module(*leaves).backward(output_gradient(out))
    for leaf, grad, w in zip(leaves, expected, wanted, strict=True):
        assert torch.equal(leaf.grad, grad) if w else leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every
def test_second_derivatives_are_refused_rather_than_wrong(config, dtype):
    module = module_of(config).requires_grad_(False)
    leaves = [x.requires_grad_() for x in qkv(20, dtype=dtype)]

    def second():
        loss = module(*leaves).float().square().sum()
        (grad,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
        return torch.autograd.grad(grad.float().sum(), leaves[:1])

    with pytest.raises(UnavailableError, match="no second derivative"):
        second()


@every
def test_scale_is_of_the_config(config):
    q, k, v = qkv(40)
    module = module_of(changed(config, scale=0.25))
    scaled = q * 0.25 * math.sqrt(HEAD_DIM)
    plain = changed(config, scale=None)
    expected = reference_attention(scaled, k, v, plain, False, chosen(module, q, k, False))
    torch.testing.assert_close(module(q, k, v), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every
def test_runs_in_another_process_give_the_same_bits(config, dtype, tmp_path):
    inputs = qkv(300, dtype=dtype, kv_heads=2)
    here = gradients(module_of(config), inputs, True)
    torch.save((config.to_json(), inputs, here), tmp_path / "here.pt")
    code = (
        "import sys, torch; from conformance import *; from test_conformance import *;"
        "text, inputs, here = torch.load(sys.argv[1]);"
        "assert_same_bits(gradients(module_of(AttentionConfig.from_json(text)), inputs, True), here)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "here.pt")], check=True, env=environment)


def test_lengths_and_rates_beyond_the_sequence_mean_the_same_as_ones_just_as_large():
    huge = module_of(
        AttentionConfig(variant="dilated", segment_lengths=[8, 2**40], dilation_rates=[1, 2**40])
    )
    large = module_of(AttentionConfig(variant="dilated", segment_lengths=[8, 64], dilation_rates=[1, 64]))
    q, k, v = qkv(40, dtype=torch.float64)
    out, weights = huge(q, k, v, return_attention_weights=True)
    same, same_weights = large(q, k, v, return_attention_weights=True)
    assert torch.equal(out, same)
    assert torch.equal(weights.to_dense(), same_weights.to_dense())
