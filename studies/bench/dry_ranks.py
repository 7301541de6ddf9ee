"""Ranks that share a sequence, each on a card of its own that is not there: random cases of them, and what
each rank takes. What ranks agree on goes over gloo, NCCL's messages carry nothing.
"""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist

from attention.config import AttentionConfig, ExchangeKind, ShardingConfig
from planner.measuring.call import call_of
from planner.measuring.choices import choose_by_spread
from planner.workload import Workload
from studies.bench.featured import featured
from studies.bench.records import Row

WORLDS: Final = (2, 2, 3, 4, 4, 8)
FEATURED: Final = 0.2
"""Share of the cases with documents, sinks or both."""


def shared(
    config: AttentionConfig, workload: Workload, rng: random.Random
) -> tuple[AttentionConfig, Workload]:
    """A case shared by ranks in some way, with as many more heads as an exchange of these needs."""
    exchanges: tuple[ExchangeKind, ...] = ("auto", "keys", "keys", "heads")
    if config.variant == "adaptive":
        exchanges = ("auto", "heads")
    world, exchange = rng.choice(WORLDS), rng.choice(exchanges)
    zigzag = config.variant == "dense" and rng.random() < 0.5
    updates: dict[str, Any] = {
        "sharding": ShardingConfig(
            exchange=exchange,
            shards="zigzag" if zigzag else "contiguous",
            travel=rng.choice(("auto", "auto", "float32")),
        )
    }
    windowed = config.pattern and config.pattern.pattern_type in ("local_window", "global_local")
    if config.pattern and windowed and rng.random() < 0.5:
        updates["pattern"] = config.pattern.model_copy(update={"edges": "token"})
    workload = workload.model_copy(update={"weights": False})
    if rng.random() < FEATURED:
        workload = featured(config, workload, rng).model_copy(update={"queries": None})
    if (exchange == "heads" or config.variant == "adaptive") and workload.groups % world:
        heads, groups = workload.heads * world, workload.groups * world
        workload = workload.model_copy(update={"heads": heads, "kv_heads": groups})
        if config.adaptive:
            updates["adaptive"] = config.adaptive.model_copy(update={"num_heads": heads})
        if config.multihead:
            sizes = {"num_heads": heads, "kv_heads": groups, "embed_dim": heads * workload.head_dim}
            updates["multihead"] = config.multihead.model_copy(update=sizes)
    return config.model_copy(update=updates), workload.model_copy(update={"gpus": world})


def peaks(config: Row, workload: Row) -> list[Row]:
    """What each rank of a case takes, in order. Run in a dry run that has not used its card."""
    world = workload["gpus"]
    forks = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, forks) as pool:
        run = partial(rank_peaks, config=config, workload=workload, store=f"file://{folder}/store")
        return list(pool.map(run, range(world)))


def rank_peaks(rank: int, config: Row, workload: Row, store: str) -> Row:
    """Bytes of a first and of a second call of one rank, whose process this is."""
    asked = Workload(**workload)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=rank, world_size=asked.gpus)
    choose_by_spread()
    device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    call = call_of(AttentionConfig(**config), asked, device)
    row: Row = {}
    for name in ("allocated", "warm"):
        torch.cuda.reset_peak_memory_stats(device)
        call()
        row[name] = torch.cuda.max_memory_allocated(device)
        row.setdefault("reserved", torch.cuda.max_memory_reserved(device))
        call.drop_gradients()
    return row | {"device": total - free + row["reserved"], "torch": torch.__version__.partition("+")[0]}
