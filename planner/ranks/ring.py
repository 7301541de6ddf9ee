"""Which ranks share a sequence, and how. Imports no torch."""

from __future__ import annotations

from math import gcd
from typing import Any, Literal, NamedTuple

from attention.config import AttentionConfig, Backend, ShardingConfig
from attention.errors import ConfigError
from planner.configs import Columns
from planner.workload import Workload

_BY_KEYS: tuple[Backend, ...] = ("auto", "sdpa")
"""Backends that parts of a sequence run on."""


class Ring(NamedTuple):
    """The ranks that share a sequence."""

    world: int
    batch: int
    """Sequences of the fullest of the rings, which are data-parallel to each other."""


def ring_of(config: AttentionConfig | Columns, workload: Workload) -> Ring:
    """The ring of a config, or of candidates, on a workload: of all its GPUs, or of `ring_size` of them.
    ConfigError where that does not divide them."""
    size = sharding_of(config).ring_size
    if size is None or workload.gpus == 1:
        return Ring(workload.gpus, workload.batch)
    if workload.gpus % size:
        raise ConfigError(
            f"ring_size must divide the GPUs, got ring_size={size} and gpus={workload.gpus}; leave it out "
            "for one ring of all"
        )
    return Ring(size, -(-workload.batch // (workload.gpus // size)))


def sharding_of(config: AttentionConfig | Columns) -> ShardingConfig:
    """How a config shares a sequence: as it says, or by the defaults."""
    return config.sharding or ShardingConfig()


def shardings(columns: Columns, workload: Workload) -> tuple[ShardingConfig, ...]:
    """The ways to share a sequence that are worth trying for candidates, each of which says what it exchanges
    where there is something to exchange.

    Rings of all GPUs, and where the batch goes evenly into more, the smallest of those, which exchange
    least. Both exchanges where the ring takes them, adaptive attention in the largest ring that does. Zigzag
    for dense causal keys alone.
    """
    gpus = workload.gpus
    sizes = sorted({gpus, gpus // gcd(gpus, workload.batch)}, reverse=True)
    if columns.variant == "adaptive":
        sizes = sorted({gcd(size, workload.groups) for size in sizes}, reverse=True)
    found: list[ShardingConfig] = []
    for size in sizes:
        ring = None if size == gpus else size
        if size == 1:
            found.append(ShardingConfig(ring_size=ring))
            continue
        if columns.variant != "adaptive" and columns.backend in _BY_KEYS:
            found.append(ShardingConfig(ring_size=ring, exchange="keys"))
            if columns.variant == "dense" and workload.causal:
                found.append(ShardingConfig(ring_size=ring, exchange="keys", shards="zigzag"))
        if workload.groups % size == 0:
            found.append(ShardingConfig(ring_size=ring, exchange="heads"))
    return tuple(found)


def way_text(sharding: ShardingConfig) -> str:
    """How ranks share a sequence, in words: `keys, zigzag, in rings of 4`; `none` where each has its own."""
    if sharding.ring_size == 1:
        return "none"
    zigzag = ", zigzag" * (sharding.shards == "zigzag")
    rings = f", in rings of {sharding.ring_size:,}" if sharding.ring_size else ""
    return sharding.exchange + zigzag + rings


def share_of(columns: Columns, workload: Workload) -> Workload:
    """The call of one device that a rank's own kernels compute, its tokens aside: the sequences of its ring,
    and its heads where those are exchanged."""
    world, batch = ring_of(columns, workload)
    alone: dict[str, Any] = {"batch": batch, "gpus": 1}
    if world > 1 and exchanges_heads(columns):
        alone |= {"heads": workload.heads // world, "kv_heads": workload.groups // world}
    return workload.model_copy(update=alone)


def exchanges_heads(columns: Columns) -> bool:
    """Whether candidates exchange heads, of which `sharding` says what they exchange."""
    return columns.variant == "adaptive" or sharding_of(columns).exchange == "heads"


def refuse_sharing(config: AttentionConfig, workload: Workload) -> None:
    """ConfigError where ranks do not share such calls, as the library has it."""
    if workload.gpus == 1:
        return
    if workload.weights:
        raise ConfigError("weights=True is for one GPU: each rank would have some of them; leave out weights")
    if workload.query_tokens < workload.seq:
        raise ConfigError(
            "fewer queries than keys are for one GPU: a rank's queries and keys are the same tokens; leave "
            "out queries"
        )
    world = ring_of(config, workload).world
    heads = config.variant == "adaptive" or sharding_of(config).exchange == "heads"
    if heads and workload.groups % world:
        size = max(n for n in range(1, world + 1) if world % n == 0 and workload.groups % n == 0)
        instead = "" if config.variant == "adaptive" else ", or exchange='keys'"
        raise ConfigError(
            "an exchange of heads needs kv_heads that are a multiple of the ranks, got "
            f"kv_heads={workload.groups} and {world} ranks; use ring_size={size}{instead}"
        )


def exchange_of(config: AttentionConfig, workload: Workload) -> Literal["keys", "heads"]:
    """What the ranks of a ring exchange, as `attention.sharding.module` chooses it."""
    exchange = sharding_of(config).exchange
    if exchange != "auto":
        return exchange
    if config.variant == "adaptive":
        return "heads"
    # NumPy, which plans of one device do not need.
    from attention.sharding.shards import shards_of
    from attention.sharding.traffic import fewer_bytes

    return fewer_bytes(
        config,
        shards_of(config, workload.seq, ring_of(config, workload).world),
        workload.causal,
        heads=workload.heads,
        kv_heads=workload.groups,
        head_dim=workload.head_dim,
        itemsize=workload.itemsize,
    )


def likest(config: AttentionConfig, workload: Workload) -> Workload:
    """The call of one device that is most like that of the rank with most tokens: own heads of the whole
    sequence, or own tokens."""
    world, batch = ring_of(config, workload)
    alone: dict[str, Any] = {"batch": batch, "gpus": 1}
    if world == 1:
        return workload.model_copy(update=alone)
    if exchange_of(config, workload) == "heads":
        heads = {"heads": workload.heads // world, "kv_heads": workload.groups // world}
        return workload.model_copy(update=alone | heads)
    from attention.sharding.shards import shards_of

    tokens = int(shards_of(config, workload.seq, world).fullest)
    return workload.model_copy(update=alone | {"seq": tokens, "documents": None})
