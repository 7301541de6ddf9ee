"""The pool stays within its bound and lends nothing twice; out of memory frees it, then says it clearly."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention import pool as pool_module
from attention.config import AttentionConfig
from attention.errors import AttentionPlannerError, InputError, OutOfMemoryError
from attention.ops.scratch import Scratch
from attention.out_of_memory import with_emergency_release
from attention.pool import BufferPool, Buffers, buffers_for, free_bytes
from attention.sizes.arena import POOL_FROM_TOKENS, bucket_bytes

CPU = torch.device("cpu")
KIB = 1024
ABSURD = 1 << 60


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def filled_buffers() -> Buffers:
    """Buffers that hold 8 KiB in the pool and 64 bytes in each cache."""
    buffers = Buffers(switch="on", pool_bytes=1 << 20, cache_entries=4, cache_bytes=1 << 20)
    with buffers.pool.lend((8 * KIB,), torch.uint8, CPU):
        pass
    for cache in (buffers.layouts, buffers.indices, buffers.masks):
        for _ in range(2):
            cache.get("key", lambda: torch.zeros(8, dtype=torch.int64))
    return buffers


# --- buckets ---


@given(st.integers(0, 1 << 50))
def test_a_bucket_holds_its_request_and_wastes_less_than_a_fifteenth(nbytes):
    bucket = bucket_bytes(nbytes)
    assert bucket >= nbytes
    assert bucket == 4096 or bucket < nbytes * 16 / 15
    assert bucket_bytes(bucket) == bucket


def test_there_are_sixteen_buckets_per_power_of_two():
    assert sorted({bucket_bytes(n) for n in range(4097, 16385)}) == [
        *range(4096 + 256, 8193, 256),
        *range(8192 + 512, 16385, 512),
    ]


# --- the pool ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5, 7), (2, 4097)])
@pytest.mark.parametrize("bound", [None, 0, 1 << 20])
def test_a_tensor_has_the_shape_and_dtype_asked_for_new_or_used(shape, dtype, bound):
    pool = BufferPool(bound)
    for _ in range(2):
        with pool.lend(shape, dtype, CPU) as tensor:
            assert (tensor.shape, tensor.dtype, tensor.device) == (shape, dtype, CPU)
            assert tensor.is_contiguous()
            tensor.fill_(1)
            assert bool((tensor == 1).all())


def test_a_buffer_serves_any_shape_and_dtype_of_its_class():
    pool = BufferPool(1 << 20)
    with pool.lend((1000,), torch.float32, "cpu") as first:
        where = address(first)
    with pool.lend((4, 500), torch.float16, "cpu") as second:
        assert address(second) == where
    with pool.lend((2000,), torch.float32, "cpu") as larger:
        assert address(larger) != where
    assert (pool.stats.hits, pool.stats.misses) == (1, 2)
    assert pool.stats.buckets == ((4096, 1), (8192, 1))


def test_a_pool_that_is_off_holds_nothing_and_wastes_nothing():
    pool = BufferPool(0)
    for size in (0, 5000):
        with pool.lend((size,), torch.uint8, CPU) as tensor:
            assert tensor.untyped_storage().nbytes() == size
            assert pool.stats.lent_bytes == size
    assert (pool.stats.held_bytes, pool.stats.lent_bytes, pool.stats.buckets) == (0, 0, ())


def test_a_buffer_larger_than_the_bound_evicts_nothing():
    pool = BufferPool(8 * KIB)
    for size in (4 * KIB, 16 * KIB):
        with pool.lend((size,), torch.uint8, CPU):
            pass
    assert pool.stats.buckets == ((4 * KIB, 1),)


def test_trim_frees_the_least_recently_used_first():
    pool = BufferPool(1 << 20)
    for size in (4 * KIB, 8 * KIB, 16 * KIB):
        pool.give(pool.take((size,), torch.uint8, CPU))
    pool.give(pool.take((4 * KIB,), torch.uint8, CPU))
    assert pool.trim(20 * KIB) == 8 * KIB
    assert pool.stats.buckets == ((4 * KIB, 1), (16 * KIB, 1))
    assert pool.trim() == 20 * KIB


def test_without_a_bound_of_its_own_a_pool_follows_the_free_memory(monkeypatch):
    pool = BufferPool()
    for free, held in ((64 * KIB, 8 * KIB), (1 << 30, 16 * KIB), (40 * KIB, 4 * KIB), (0, 0)):
        if held < pool.stats.held_bytes:  # noticed when the pool grows; trimming makes it start over
            pool.trim()
        monkeypatch.setattr(pool_module, "free_bytes", lambda device: free)  # noqa: B023
        taken = [pool.take((4 * KIB,), torch.uint8, CPU) for _ in range(4)]
        for tensor in taken:
            pool.give(tensor)
        assert pool.stats.held_bytes == held


@pytest.mark.parametrize("bound", [None, 0, 1 << 20])
def test_only_what_is_lent_can_be_given_and_only_once(bound):
    pool = BufferPool(bound)
    taken = pool.take((10,), torch.float32, CPU)
    with pytest.raises(InputError, match=r"shape \[7\] on cpu that is not lent"):
        pool.give(torch.empty(7))
    with pytest.raises(InputError, match="not lent"):
        BufferPool(bound).give(taken)
    pool.give(taken[2:4])
    with pytest.raises(InputError, match="given before"):
        pool.give(taken)


@pytest.mark.parametrize("bound", [0, 1 << 20])
def test_a_tensor_dropped_without_give_is_freed(bound):
    pool = BufferPool(bound)
    taken = pool.take((KIB,), torch.float32, CPU)
    view = taken[:2]
    del taken
    assert pool.stats.lent_bytes == 4 * KIB
    del view
    assert (pool.stats.lent_bytes, pool.stats.held_bytes) == (0, 0)


def test_a_buffer_given_back_not_to_be_kept_is_freed():
    pool = BufferPool(1 << 20)
    pool.give(pool.take((1000,), torch.float32, "cpu"), keep=False)
    assert pool.stats.held_bytes == pool.stats.lent_bytes == 0


def test_scratch_is_one_loan_of_known_size_and_gives_no_more_than_was_reserved():
    pool = BufferPool(1 << 20)
    with Scratch(pool, torch.device("cpu"), {"x": 1000, "y": 0, "z": 4000}) as scratch:
        assert pool.stats.lent_bytes == bucket_bytes(1024 + 4096)
        x, z = scratch.get("x", (250,), torch.float32), scratch.get("z", (10, 100), torch.float32)
        x.fill_(1)
        z.fill_(2)
        assert scratch.get("x", (5,), torch.float32).eq(1).all()
        for name, size in (("x", 251), ("y", 1), ("unknown", 1)):
            with pytest.raises(AssertionError, match=name):
                scratch.get(name, (size,), torch.float32)
    assert pool.stats.lent_bytes == 0
    with Scratch(pool, torch.device("cpu"), {}):
        assert pool.stats.lent_bytes == 0


def test_lend_gives_back_when_its_body_fails():
    pool = BufferPool(1 << 20)
    with pytest.raises(ZeroDivisionError), pool.lend((1,), torch.float32, CPU):
        raise ZeroDivisionError
    assert (pool.stats.lent_bytes, pool.stats.held_bytes) == (0, 4 * KIB)


def test_a_buffer_first_used_in_inference_mode_serves_training_later():
    pool = BufferPool(1 << 20)
    with torch.inference_mode(), pool.lend((4,), torch.float32, CPU) as tensor:
        tensor.fill_(2)
    scratch = pool.take((4,), torch.float32, CPU)
    assert pool.stats.hits == 1
    assert not scratch.is_inference()
    x = torch.ones(4, requires_grad=True)
    (x * scratch.fill_(3)).sum().backward()
    assert x.grad.tolist() == [3.0] * 4


SIZES = st.sampled_from([1, 4096, 5000, 6144, 9000, 20_000])
STEPS = st.one_of(
    st.tuples(st.just("take"), SIZES),
    st.tuples(st.sampled_from(["give", "drop"]), st.integers(0, 9)),
    st.tuples(st.just("trim"), st.sampled_from([0, 8192, 20_000])),
)


@given(bound=st.sampled_from([0, 4096, 20_000, 1 << 20]), steps=st.lists(STEPS, max_size=50))
def test_the_pool_does_what_one_ordered_list_does(bound, steps):
    pool = BufferPool(bound)
    lent: list[tuple[torch.Tensor, int]] = []
    free: list[int] = []  # bucket sizes, least recently used first
    hits = misses = peak = 0
    for step, argument in steps:
        if step == "take":
            bucket = bucket_bytes(argument) if bound else argument
            lent.append((pool.take((argument,), torch.uint8, CPU), bucket))
            found = bucket in free
            hits, misses = hits + found, misses + (not found)
            if found:
                free.remove(bucket)
            peak = max(peak, sum(free) + sum(size for _, size in lent))
        elif step == "trim":
            before = sum(free)
            while sum(free) > argument:
                free.pop(0)
            assert pool.trim(argument) == before - sum(free)
        elif lent:
            tensor, bucket = lent.pop(argument % len(lent))
            if step == "give":
                pool.give(tensor)
                free += [bucket] if bucket <= bound else []
                while sum(free) > bound:
                    free.pop(0)
            del tensor
        stats = pool.stats
        assert (stats.hits, stats.misses, stats.peak_bytes) == (hits, misses, peak)
        assert stats.held_bytes == sum(free) <= bound
        assert stats.lent_bytes == sum(size for _, size in lent)
        assert stats.buckets == tuple((size, free.count(size)) for size in sorted(set(free)))
        assert len({address(tensor) for tensor, _ in lent}) == len(lent)


def test_threads_never_share_a_buffer():
    pool = BufferPool(1 << 20)
    clashes = []

    def work(mine: int) -> None:
        for size in (100, 2000, 100, 3000) * 25:
            with pool.lend((size,), torch.int64, CPU) as tensor:
                tensor.fill_(mine)
                if not bool((tensor == mine).all()):
                    clashes.append(mine)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
    assert pool.stats.hits + pool.stats.misses == 400
    assert pool.stats.lent_bytes == 0


# --- what modules share ---


@pytest.mark.parametrize(
    "switch, seq, pooled",
    [
        ("auto", POOL_FROM_TOKENS - 1, False),
        ("auto", POOL_FROM_TOKENS, True),
        ("on", 1, True),
        ("off", 1 << 20, False),
    ],
)
def test_the_pool_turns_on_by_itself_from_4096_tokens(switch, seq, pooled):
    buffers = buffers_for(AttentionConfig(variant="dense", pool=switch, pool_bytes=1 << 20))
    pool = buffers.pool_for(seq)
    with pool.lend((1,), torch.float32, CPU):
        pass
    assert pool.stats.held_bytes == buffers.stats.pool.held_bytes == (4 * KIB if pooled else 0)


def test_configs_with_equal_settings_share_their_buffers_and_others_do_not():
    one = buffers_for(AttentionConfig(variant="dense"))
    assert buffers_for(AttentionConfig(variant="dilated", segment_lengths=[4], dilation_rates=[1])) is one
    for other in ({"pool": "on"}, {"pool_bytes": 1}, {"cache_entries": 1}, {"cache_bytes": 1}):
        assert buffers_for(AttentionConfig(variant="dense", **other)) is not one


def test_buffers_die_with_their_last_user():
    config = AttentionConfig(variant="dense", pool_bytes=12345)
    users = [buffers_for(config), buffers_for(config)]
    gone = weakref.ref(users[0])
    users.pop()
    assert gone() is not None
    users.clear()
    gc.collect()
    assert gone() is None


def test_copies_and_pickles_of_a_module_share_its_buffers():
    buffers = buffers_for(AttentionConfig(variant="dense", pool_bytes=54321))
    assert copy.deepcopy(buffers) is buffers
    assert pickle.loads(pickle.dumps(buffers)) is buffers


def test_caches_measure_tensors_layouts_and_tuples_of_them():
    class Layout:
        nbytes = 100

    buffers = Buffers(cache_entries=4, cache_bytes=1 << 20)
    kept = {"tensor": torch.zeros(3, dtype=torch.float64), "both": (Layout(), [torch.zeros(5)])}
    for key, value in kept.items():
        for _ in range(2):
            buffers.layouts.get(key, lambda: value)  # noqa: B023
    assert buffers.stats.layouts.bytes == 24 + 120


def test_indices_built_in_inference_mode_serve_training_later():
    buffers = Buffers(cache_entries=4, cache_bytes=1 << 20)

    def picked(x: torch.Tensor) -> torch.Tensor:
        return x.gather(0, buffers.indices.get("key", lambda: torch.arange(3)))

    with torch.inference_mode():
        for _ in range(2):
            picked(torch.zeros(3))
    picked(torch.zeros(3, requires_grad=True)).sum().backward()
    assert buffers.indices.stats.hits == 1


def test_release_frees_pool_and_caches():
    buffers = filled_buffers()
    assert buffers.release() == 8 * KIB + 3 * 64
    stats = buffers.stats
    assert (stats.pool.held_bytes, stats.layouts.bytes, stats.indices.bytes, stats.masks.bytes) == (0,) * 4


# --- out of memory ---


def test_free_bytes_are_known_on_the_cpu_and_unknown_elsewhere():
    assert 1 << 20 < free_bytes(CPU) < 1 << 50
    assert free_bytes(torch.device("meta")) is None


def test_free_bytes_fall_back_to_sysconf_and_then_to_none(monkeypatch):
    def missing(*args):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert 1 << 20 < free_bytes(CPU) < 1 << 50
    monkeypatch.delattr("os.sysconf")
    assert free_bytes(CPU) is None


@pytest.mark.parametrize("fraction, expected", [(1.0, 50 + 10), (0.5, 10 + 10), (0.1, 0 + 10)])
def test_free_bytes_on_cuda_count_the_allocators_unused_and_the_process_limit(
    monkeypatch, fraction, expected
):
    for name, value in {
        "mem_get_info": (50, 100),
        "memory_reserved": 40,
        "memory_allocated": 30,
        "get_per_process_memory_fraction": fraction,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value, raising=False)
    assert free_bytes(torch.device("cuda", 0)) == expected


def test_real_out_of_memory_releases_and_the_second_try_counts():
    buffers = filled_buffers()
    held = []

    def run() -> str:
        held.append(buffers.stats.pool.held_bytes + buffers.stats.masks.bytes)
        if len(held) == 1:
            torch.empty(ABSURD, dtype=torch.uint8)
        return "done"

    assert with_emergency_release(run, buffers, CPU) == "done"
    assert held == [8 * KIB + 64, 0]


def test_the_failed_run_keeps_no_tensor_when_the_second_starts():
    alive: list[weakref.ref[torch.Tensor]] = []

    def run() -> bool:
        if alive:
            return alive[0]() is None
        scratch = torch.zeros(4)
        alive.append(weakref.ref(scratch))
        torch.empty(ABSURD, dtype=torch.uint8)
        return False

    assert with_emergency_release(run, filled_buffers(), CPU)


def test_out_of_memory_twice_is_one_error_with_requested_and_available_bytes():
    calls = []

    def run() -> None:
        calls.append(1)
        torch.empty(ABSURD, dtype=torch.uint8)

    with pytest.raises(OutOfMemoryError, match=r"on cpu: requested 1\.00 EiB, available .*iB") as caught:
        with_emergency_release(run, filled_buffers(), CPU)
    error = caught.value
    assert len(calls) == 2
    assert error.requested == ABSURD
    assert 1 << 20 < error.available < 1 << 50
    assert isinstance(error, AttentionPlannerError)
    assert isinstance(error.__cause__, RuntimeError)
    assert error.__cause__.__context__ is None
    for advice in ("shorter sequence", "workspace_bytes", "pool='off'"):
        assert advice in str(error)


@pytest.mark.parametrize(
    "error, requested",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
            2 << 30,
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes. GPU 0"), 512),
        (torch.OutOfMemoryError("no figure"), None),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 77 bytes."), 77),
        (RuntimeError("CUDA error: out of memory"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (MemoryError("Unable to allocate 1.50 KiB for an array with shape (192,)"), 1536),
        (MemoryError(), None),
    ],
)
def test_every_platforms_wording_is_understood(error, requested):
    def run() -> None:
        raise error

    with pytest.raises(OutOfMemoryError) as caught:
        with_emergency_release(run, filled_buffers(), CPU)
    assert caught.value.requested == requested
    assert ("unknown number of bytes" in str(caught.value)) == (requested is None)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        ValueError("not enough memory: you tried to allocate 5 bytes"),
        OutOfMemoryError("said already", requested=1, available=0),
        KeyboardInterrupt(),
    ],
)
@pytest.mark.parametrize("fails_at", [1, 2])
def test_other_exceptions_pass_untouched(error, fails_at):
    buffers, calls = filled_buffers(), []

    def run() -> None:
        calls.append(1)
        if len(calls) == fails_at:
            raise error
        raise MemoryError

    with pytest.raises(type(error)) as caught:
        with_emergency_release(run, buffers, CPU)
    assert caught.value is error
    assert len(calls) == fails_at
    assert bool(buffers.stats.pool.held_bytes) == (fails_at == 1)


def test_cuda_returns_its_cached_blocks_before_the_second_try(monkeypatch):
    order = []

    def run() -> None:
        order.append("run")
        if len(order) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("empty_cache"))
    with_emergency_release(run, filled_buffers(), torch.device("cuda"))
    assert order == ["run", "empty_cache", "run"]
