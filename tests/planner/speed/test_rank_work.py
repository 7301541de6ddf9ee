"""What ranks compute and exchange, against the tiles of their parts and the bytes that they send."""

from collections import Counter
from functools import cache

import pytest

from attention import AdaptiveConfig, AttentionConfig, MultiheadConfig, ShardingConfig, SparsePatternConfig
from attention.layout import build_layout
from attention.ops.program import Gather
from attention.programs import tiles_of
from attention.sharding.plan import keys_plan
from attention.sharding.shards import shards_of
from attention.sharding.traffic import traffic
from planner.configs import columns_of
from planner.memory.dispatch import shape_of
from planner.memory.machines import Cpu, Cuda
from planner.ranks.ring import exchange_of
from planner.speed.calls import Calls
from planner.speed.rank_work import work_of_rank
from planner.speed.work import cpu_kernel, forward, gpu_kernel, work_of
from planner.workload import Workload

CPU, KERNEL = Cpu(2, dtype="float32"), cpu_kernel(2)


def sparse(kind, **fields):
    branches = {"segment_lengths": (1024, 4096), "dilation_rates": (1, 4)} if kind == "dilated_sparse" else {}
    fields.setdefault("block_size", 64)
    pattern = SparsePatternConfig(pattern_type=kind, **fields)
    return AttentionConfig(variant="block_sparse", pattern=pattern, **branches)


CONFIGS = {
    "dense": AttentionConfig(variant="dense"),
    "window": sparse("local_window", local_window_size=256),
    "token window": sparse("local_window", local_window_size=200, edges="token"),
    "global": sparse("global_local", local_window_size=256, global_tokens=100),
    "lists": sparse("dilated_sparse", sparsity_ratio=0.1),
    "dilated": AttentionConfig(
        variant="dilated", segment_lengths=(256, 1024, 4096), dilation_rates=(1, 4, 16)
    ),
    "annuli": AttentionConfig(
        variant="dilated", segment_lengths=(512, 2048, 16_384), dilation_rates=(1, 2, 8)
    ),
}


def by(config, **fields):
    return config.model_copy(update={"sharding": ShardingConfig(**fields)})


CASES = {name: by(config, exchange="keys") for name, config in CONFIGS.items()} | {
    "zigzag": by(CONFIGS["dense"], exchange="keys", shards="zigzag"),
    "travel": by(CONFIGS["window"], exchange="keys", travel="float32"),
    "heads": by(CONFIGS["dense"], exchange="heads"),
    "adaptive": AttentionConfig(
        variant="adaptive",
        pattern=SparsePatternConfig(block_size=64, sparsity_ratio=0.1),
        adaptive=AdaptiveConfig(num_heads=8, head_dim=32),
    ),
}


def task(**fields):
    sizes = {"seq": 4096, "batch": 2, "heads": 8, "kv_heads": 4, "head_dim": 32, "dtype": "float32"}
    return Workload(**{**sizes, "gpus": 4, "mode": "training", **fields})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fields", [{}, {"seq": 4000, "dtype": "bfloat16"}, {"documents": (1500, 96, 2500)}])
def test_the_bytes_of_all_steps_are_the_traffic(name, causal, fields):
    config, workload = CASES[name], task(causal=causal, **fields)
    if name == "zigzag" and not causal:
        return
    shards = shards_of(config, workload.seq, 4)
    for rank in range(4):
        work = work_of_rank(config, workload, CPU, KERNEL, rank)
        expected = traffic(
            config,
            shards,
            rank,
            causal,
            batch=2,
            heads=8,
            kv_heads=4,
            head_dim=32,
            itemsize=workload.itemsize,
            training=True,
            exchange=exchange_of(config, workload),
            documents=(workload.documents,) if workload.documents else None,
        )
        for steps, peers in zip((work.forward, work.backward), expected, strict=True):
            sent, received = Counter(), Counter()
            for step in steps:
                for exchange in step.exchanges:
                    for peer, (one, other) in exchange.items():
                        sent[peer] += one
                        received[peer] += other
            assert {peer: (sent[peer], received[peer]) for peer in sent} == peers


def rank_plan(config, workload, machine, rank):
    shards = shards_of(config, workload.seq, workload.gpus)
    own = workload.model_copy(update={"seq": int(shards.tokens(rank)), "gpus": 1})
    shape = shape_of(columns_of(config, own.seq), own, machine)
    shape = shape._replace(seq=workload.seq, causal=workload.causal)
    layout = cache(lambda: build_layout(config, workload.seq, workload.causal))
    make = tiles_of(config, shape._replace(windows="none"), layout)
    return keys_plan(config, shape, shards, rank, make, None)


def tiled(part):
    """The calls of a part's tiles, and how many those are."""
    calls, tiles = [], list(part.program.tiles(0, part.program.shape))
    for tile in tiles:
        for call in tile.calls:
            span, keys = call.queries[0], call.keys
            calls.append(
                Calls(
                    1,
                    span.batch,
                    span.heads,
                    span.length,
                    keys.length,
                    len(call.queries),
                    groups=min(span.heads, part.program.shape.kv_heads),
                    causal=int(call.mask == "causal"),
                    later=int(tile.merge and not call.first),
                    step=0 if isinstance(keys, Gather) or not keys.overlaps else keys.batch_step,
                    unit=keys.size if isinstance(keys, Gather) else 0,
                )
            )
    return calls, len(tiles)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_work_is_nearly_that_of_the_tiles(name, causal):
    config, workload = CASES[name], task(causal=causal, seq=16_384, batch=1, mode="inference")
    for rank in range(4):
        plan = rank_plan(config, workload, CPU, rank)
        exact = Counter()
        for part in plan.all_parts():
            totals = forward(*tiled(part), part.program.shape, KERNEL)
            exact.update({at: totals[at] for at in ("work", "launches", "tiles")})
        work = work_of_rank(config, workload, CPU, KERNEL, rank)
        close = Counter()
        for step in work.forward:
            close.update({at: step.totals[at] for at in ("work", "launches", "tiles")})
        assert close["work"] == pytest.approx(exact["work"], rel=0.1)
        assert close["tiles"] == pytest.approx(exact["tiles"], rel=0.1)
        assert exact["launches"] / 2 <= close["launches"] <= 2 * exact["launches"]


@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu_parts_are_the_whole_calls_of_one_gpu(name):
    workload = task(seq=65_536, batch=1, dtype="bfloat16")
    # One multiprocessor, of which none is idle.
    machine, kernel = Cuda((9, 0), 132), gpu_kernel(1)
    columns = columns_of(CONFIGS[name], workload.seq)
    twin = work_of(columns, workload, machine, kernel, apart=False)
    works = [work_of_rank(CASES[name], workload, machine, kernel, rank) for rank in range(4)]
    for which, total in ((1, twin.forward), (2, twin.backward)):
        every = [step.totals for work in works for step in work[which]]
        assert sum(one["work"] for one in every) == pytest.approx(total["work"], rel=0.05)
        assert not any(one["tiles"] for one in every)
        assert sum(one["launches"] for one in every) <= 32 * total["launches"]


@pytest.mark.parametrize("causal", [False, True])
def test_launches_of_longnet_grow_with_its_branches_and_not_with_the_ranks(causal):
    """16 times as many ranks, 2 branches more; what adjoins is one part."""
    launches = []
    for world, count in ((16, 4), (256, 6)):
        config = AttentionConfig(
            variant="dilated",
            segment_lengths=tuple(2048 * 4**n for n in range(count)),
            dilation_rates=tuple(4**n for n in range(count)),
        )
        workload = task(seq=8192 * world, batch=1, dtype="bfloat16", gpus=world, causal=causal)
        work = work_of_rank(
            by(config, exchange="keys"), workload, Cuda((9, 0), 132), gpu_kernel(132), world - 1
        )
        launches.append([sum(step.totals["launches"] for step in steps) for steps in work[1:]])
    assert all(many < 4 * few for few, many in zip(*launches, strict=True))


def test_a_stage_goes_on_while_the_one_before_it_is_computed():
    workload = task(seq=16_384, batch=1, dtype="bfloat16")
    work = work_of_rank(CASES["dense"], workload, Cuda((9, 0), 132), gpu_kernel(132), 1)
    for steps in (work.forward, work.backward):
        assert [len(step.exchanges) for step in steps[:3]] == [1, 1, 1 + (steps is work.backward)]


def test_ranks_of_heads_compute_their_heads_and_wait_for_what_they_exchange():
    config, workload = CASES["heads"], task()
    work = work_of_rank(config, workload, CPU, KERNEL, 2)
    share = workload.model_copy(update={"heads": 2, "kv_heads": 1, "gpus": 1})
    twin = work_of(columns_of(config, workload.seq), share, CPU, KERNEL, apart=True)
    assert [bool(step.exchanges) for step in work.forward] == [True, True, True, False, True]
    assert [bool(step.exchanges) for step in work.backward] == [True, False, True, True, True]
    assert (work.forward[3].totals, work.backward[1].totals) == (twin.forward, twin.backward)
    assert not any(step.totals["work"] for step in work.forward if step.exchanges)


def test_ranks_between_projections_project_their_own_tokens():
    outer = MultiheadConfig(embed_dim=256, num_heads=8, kv_heads=4)
    config = CASES["window"].model_copy(update={"multihead": outer})
    whole = work_of(columns_of(config, 4096), task(), CPU, KERNEL, apart=False)
    works = [work_of_rank(config, task(), CPU, KERNEL, rank) for rank in range(4)]
    for which, total in ((1, whole.forward), (2, whole.backward)):
        assert sum(step.totals["matmul"] for work in works for step in work[which]) == total["matmul"]
    again = config.model_copy(update={"multihead": outer.model_copy(update={"checkpoint": True})})
    one = work_of_rank(again, task(), CPU, KERNEL, 0)
    assert one.backward[: len(one.forward)] == one.forward


def test_rings_of_one_exchange_nothing():
    config = by(CONFIGS["window"], ring_size=1)
    work = work_of_rank(config, task(batch=8), CPU, KERNEL, 0)
    twin = work_of(columns_of(config, 4096), task(batch=2), CPU, KERNEL, apart=False)
    assert [step.totals["work"] for step in work.forward if step.totals["work"]] == [twin.forward["work"]]
    assert not any(step.exchanges for step in (*work.forward, *work.backward))
