"""The fused CPU attention's bytes: against what torch's profiler counts, and what it packs by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from attention.ops import kernels
from planner.measuring.footprint import footprints
from planner.memory.cpu_kernels import backward_bytes, dense, forward_bytes
from planner.memory.machines import this_cpu

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS = ["heads first", "tokens first", "windows"]
BIASES = ["none", "rows", "square", "whole", "float32"]
# Around every size at which the kernel changes its blocks.
QUERIES = [1, 2, 31, 32, 33, 100, 191, 192, 193, 300, 767, 768, 770]
KEYS = [1, 2, 3, 31, 64, 200, 511, 512, 513, 700, 1025]
DIMS = [1, 3, 5, 8, 12, 16, 24, 33]
CASES, MANY = 15, 150
"""Of each dtype and number of threads, in the fast suite and in the slow one."""


def tensor(layout: str, views: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[N, H, length, D]; windows overlap, and skip heads."""
    if layout == "heads first":
        return torch.randn(views, heads, length, dim).to(dtype)
    if layout == "tokens first":
        return torch.randn(views, length, heads, dim).to(dtype).transpose(1, 2)
    step = length // 2 + 1
    x = torch.randn(step * views + length, heads + 1, dim).to(dtype)
    token, head, channel = x.stride()
    return x.as_strided((views, heads, length, dim), (step * token, head, token, channel))


def mask(
    kind: str, views: int, heads: int, queries: int, keys: int, dtype: torch.dtype
) -> torch.Tensor | None:
    match kind:
        case "rows":
            return torch.zeros(views, 1, 1, keys, dtype=dtype).expand(views, 1, queries, keys)
        case "square":
            return torch.zeros(queries, keys, dtype=dtype)
        case "whole":  # a slice of the keys of a larger mask that is expanded
            larger = torch.zeros(views, 1, 1, keys + 5, dtype=dtype).expand(views, heads, queries, keys + 5)
            return larger[..., 2:-3]
        case "float32":
            return torch.zeros(views, heads, queries, keys, dtype=torch.promote_types(dtype, torch.float32))
    return None


def random_case(rng: random.Random, dtype: torch.dtype, threads: int):
    """(run forward, run backward, the arguments of forward_bytes, of backward_bytes) of a random call."""
    views, heads = rng.randint(1, 3), rng.randint(1, 4)
    kv_heads = heads if kernels.matrix_unit(dtype) else rng.choice([n for n in (1, 2, 3, 4) if not heads % n])
    queries, keys, dim = rng.choice(QUERIES), rng.choice(KEYS), rng.choice(DIMS)
    kind = rng.choice(BIASES)
    causal = kind == "none" and rng.random() < 0.5
    keys = queries if causal else keys
    q, grad = (tensor(rng.choice(LAYOUTS), views, heads, queries, dim, dtype) for _ in range(2))
    k, v = (tensor(rng.choice(LAYOUTS), views, kv_heads, keys, dim, dtype) for _ in range(2))
    bias = mask(kind, views, heads, queries, keys, dtype)
    options = {"scale": 0.3, "causal": causal, "bias": bias}
    out, lse = kernels.forward(q, k, v, **options)
    if rng.random() < 0.5:  # as the rows of a larger result
        out = tensor("windows", views, heads, queries, dim, dtype)
    sizes = {
        "views": views,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "head_dim": dim,
        "itemsize": dtype.itemsize,
        "threads": threads,
    }
    return (
        lambda: kernels.forward(q, k, v, **options),
        lambda: kernels.backward(grad, q, k, v, out, lse, **options),
        {**sizes, "causal": causal, "packs": kernels.matrix_unit(dtype), "float16": dtype == torch.float16},
        {**sizes, "kv_heads": kv_heads, "dense_grad": dense(grad.shape, grad.stride())},
    )


def check(cases, backward: bool = True) -> None:
    """Every call of `cases`, counted together, leaves and reaches what is said of it."""
    runs, said = [], []
    for forward, back, *both in cases:
        runs += [forward, back] if backward else [forward]
        named = [("forward", forward_bytes), ("backward", backward_bytes)][: 1 + backward]
        said += [(call, sizes, formula(**sizes)) for (call, formula), sizes in zip(named, both, strict=False)]
    for found, (call, sizes, (result, scratch)) in zip(footprints(runs, CPU), said, strict=True):
        assert (found.kept, found.peak) == (result, result + scratch), (call, sizes)


def check_random(rng: random.Random, dtype: torch.dtype, threads: int, cases: int) -> None:
    torch.manual_seed(threads)
    # A 16-bit backward is never called (docs/design.md), and where oneDNN makes its products, not described.
    name = str(dtype).removeprefix("torch.")
    check([random_case(rng, dtype, threads) for _ in range(cases)], this_cpu(name).products is None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_profiler_counts_the_same(dtype, threads):
    check_random(random.Random(f"{dtype} {threads}"), dtype, threads, CASES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_profiler_counts_the_same_of_many(dtype, threads, seed):
    check_random(random.Random(f"{dtype} {threads} {seed}"), dtype, threads, MANY)


def test_a_mask_is_copied_only_for_its_last_stride():
    """What forward_bytes says of masks: a last stride of 0 is read in place, one of 2 is copied."""
    q = torch.randn(2, 2, 40, 8)
    sizes = {"views": 2, "heads": 2, "queries": 40, "keys": 40, "head_dim": 8, "itemsize": 4}
    biases = [torch.zeros(40, 1), torch.zeros(2, 1, 1, 80)[..., ::2]]
    runs = [lambda bias=bias: kernels.forward(q, q, q, scale=1.0, bias=bias) for bias in biases]
    expected = sum(forward_bytes(**sizes, threads=torch.get_num_threads()))
    copy = 2 * 40 * 40 * 4
    assert [found.peak for found in footprints(runs, CPU)] == [expected, expected + copy]


def test_dense_is_what_torch_says_of_the_transposed_view():
    rng = random.Random(0)
    outcomes = set()
    for _ in range(500):
        sizes = [rng.choice([1, 1, 2, 3]) for _ in range(4)]
        x = tensor(rng.choice(LAYOUTS), *sizes, torch.float32)
        outcomes.add(x.transpose(1, 2).is_contiguous())
        assert dense(x.shape, x.stride()) == x.transpose(1, 2).is_contiguous()
    assert outcomes == {True, False}


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_arrays_give_what_ints_give(itemsize, causal, float16, packs):
    rng = np.random.default_rng(1)
    names = {"views": range(1, 5), "heads": range(1, 9), "queries": QUERIES, "keys": KEYS, "head_dim": DIMS}
    arrays = {name: rng.choice(np.array(values), 200) for name, values in names.items()}
    ready = rng.random(200) < 0.5
    plain = {"itemsize": itemsize, "threads": 6}
    packing = {"causal": causal, "packs": packs, "float16": float16}
    forward = forward_bytes(**arrays, **plain, **packing)
    kv_heads = 1 + arrays["heads"] % 2
    backward = backward_bytes(**arrays, kv_heads=kv_heads, **plain, dense_grad=ready)
    for i in range(200):
        ints = {name: int(values[i]) for name, values in arrays.items()}
        one = forward_bytes(**ints, **plain, **packing)
        assert one == (forward[0][i], forward[1][i])
        two = backward_bytes(**ints, kv_heads=int(kv_heads[i]), **plain, dense_grad=bool(ready[i]))
        assert two == (backward[0][i], backward[1][i])
        assert {type(count) for count in one + two} == {int}
    assert {count.dtype for count in forward + backward} == {np.dtype(np.int64)}


def test_arrays_broadcast():
    queries = np.array([[1], [300], [800]])
    keys = np.array([5, 513])
    sizes = {"views": 2, "heads": 4, "head_dim": 16, "itemsize": 2, "threads": 2}
    assert forward_bytes(queries=queries, keys=keys, **sizes)[1].shape == (3, 2)
    assert backward_bytes(queries=queries, keys=keys, kv_heads=2, **sizes)[0].shape == (3, 2)
    assert dense((2, 4, queries, 16), (64 * queries, 16, 64, 1)).tolist() == [[True]] * 3


# What a matrix unit packs, worked out from the source by hand.


def packing(**sizes: int) -> int:
    """Bytes that packing adds to a forward call."""
    return forward_bytes(**sizes, packs=True)[1] - forward_bytes(**sizes)[1]


PACKED = {"views": 1, "heads": 4, "queries": 256, "keys": 65, "head_dim": 5, "itemsize": 2, "threads": 2}


def test_packed_keys_and_values_are_padded_to_even_sizes():
    keys, values = 4 * 65 * 6, 4 * 66 * 5
    queries, transposed = 2 * 64 * 6, 2 * 65 * 5
    weights = 2 * 64 * 1  # one column more, for each thread's 64 queries
    assert packing(**PACKED) == 2 * (keys + values + queries + transposed + weights)
    even = PACKED | {"keys": 64, "head_dim": 6}
    assert packing(**even) == 2 * (2 * 4 * 64 * 6 + 2 * 64 * 6)


def test_only_the_last_block_of_keys_can_be_odd():
    assert packing(**PACKED | {"keys": 513, "head_dim": 6}) == 2 * 6 * (4 * 513 + 4 * 514 + 2 * 512)


@pytest.mark.parametrize(
    "change", [{"keys": 63}, {"queries": 63}, {"itemsize": 4}, {"itemsize": 8}, {"threads": 1000}], ids=str
)
def test_little_work_and_wide_types_are_not_packed(change):
    # 32 heads, so that each of 1000 threads has too little: one block of 64 queries, half of 4 x 32.
    assert packing(**PACKED | {"heads": 32} | change) == 0


def test_float16_packs_sooner():
    little = PACKED | {"keys": 16, "queries": 16}
    assert packing(**little) == 0
    plain = forward_bytes(**little, float16=True)
    assert forward_bytes(**little, packs=True, float16=True)[1] > plain[1]


def test_a_causal_call_counts_the_keys_that_queries_can_see():
    much = PACKED | {"queries": 64, "keys": 4096, "threads": 2}
    # 2 blocks of 32 queries x 4 heads over 2 threads: each multiplies 128 rows by 4096 keys, by 64 if causal,
    # and has to reach 4 x 4 heads x 4096 keys.
    assert packing(**much) > 0
    assert packing(**much, causal=True) == 0
