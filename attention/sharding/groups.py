"""Which ranks share a sequence: from a process group, or a mesh of one dimension, to the transport of a
ring."""

from __future__ import annotations

import hashlib
import weakref
from collections import Counter
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from attention.config import ShardingConfig
from attention.errors import ConfigError, DistributedError
from attention.sharding.transport import Transport, backends

# Layers share what ranks keep open for each other.
_open: weakref.WeakKeyDictionary[Any, dict[tuple[int, float], Transport]] = weakref.WeakKeyDictionary()

_serials: weakref.WeakKeyDictionary[Any, Counter[tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""How many rings of these ranks were opened in a job: the same number on all of them."""


def ring_of(process_group: Any, sharding: ShardingConfig) -> Transport | None:
    """The transport of this rank's ring; None where it is alone: nothing is initialised, the group has one
    rank, or rings have one.

    `process_group`: a group, a DeviceMesh of one dimension, or None for the default group. The first call for
    a group is collective: all of its ranks make it, and those for several groups in the same order. Rings are
    the group's consecutive ranks, `ring_size` each.
    """
    group = group_of(process_group)
    if group is None:
        return None
    world = dist.get_world_size(group)
    size = sharding.ring_size or world
    if world == 1:
        return None
    if world % size:
        raise ConfigError(
            f"ring_size must divide the ranks of the process group, got ring_size={size} and {world} ranks; "
            f"use one of {', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}, or None for all"
        )
    if size == 1:
        return None
    transports = _open.setdefault(group, {})
    key = (size, sharding.timeout_s)
    transport = transports.get(key)
    if transport is None or transport.failure is not None:
        transport = transports[key] = _opened(group, size, sharding.timeout_s)
    return transport


def group_of(process_group: Any) -> dist.ProcessGroup | None:
    """The group that is meant; None for a world of one without any."""
    if not dist.is_available() or not dist.is_initialized():
        if process_group is None:
            return None
        raise ConfigError(
            f"process_group is a {type(process_group).__name__}, but torch.distributed is not initialised; "
            "call torch.distributed.init_process_group first"
        )
    if process_group is None:
        return dist.group.WORLD
    if isinstance(process_group, DeviceMesh):
        names = process_group.mesh_dim_names
        if process_group.ndim != 1:
            dimensions = f"{process_group.ndim} dimensions ({', '.join(map(repr, names or ()))})"
            raise ConfigError(
                f"a sequence is shared along one dimension of a mesh, got a DeviceMesh of {dimensions}; pass "
                'the one whose ranks share a sequence, such as mesh["cp"]'
            )
        return process_group.get_group()
    if not isinstance(process_group, dist.ProcessGroup):
        raise ConfigError(
            "process_group must be a torch.distributed process group, a DeviceMesh of one dimension or None, "
            f"got {type(process_group).__name__}"
        )
    return process_group


def _opened(group: dist.ProcessGroup, size: int, timeout_s: float) -> Transport:
    """A ring's transport: gloo of its own, so that nobody else's messages are in its order and what breaks
    there breaks nothing else; and the group itself for devices, because each communicator of NCCL takes
    hundreds of megabytes.

    It is no group that torch knows: the names of those depend on how many a rank has made before, and ranks
    of one ring may have made some with others."""
    rank = dist.get_rank(group)
    if rank < 0:
        raise ConfigError("this rank is not in the process group; build the attention on its ranks alone")
    first = rank - rank % size
    ranks = tuple(dist.get_process_group_ranks(group)[first : first + size])
    opened = _serials.setdefault(dist.group.WORLD, Counter())
    opened[ranks] += 1
    name = hashlib.sha256(f"{ranks} {opened[ranks]}".encode()).hexdigest()[:16]
    store = PrefixStore(f"attention/{name}", _get_default_store())
    try:
        own = dist.ProcessGroupGloo(
            PrefixStore("gloo", store), rank - first, size, timeout=timedelta(seconds=timeout_s)
        )
    except RuntimeError as error:
        me = dist.get_rank()
        others = tuple(rank for rank in ranks if rank != me)
        raise DistributedError(
            f"rank {me}: ranks {list(ranks)} did not come together within {timeout_s:g} s to build a sharded "
            f"attention; all of them build the same ones in the same order ({error})",
            rank=me,
            peers=others,
            missing=others,
            step="building",
            nbytes=0,
            seconds=timeout_s,
        ) from error
    on_devices = any(kind != "cpu" and name != "gloo" for kind, name in backends(group).items())
    return Transport(own, ranks, store, timeout_s, group if on_devices else None)
