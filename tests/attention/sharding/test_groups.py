"""Which ranks share a sequence follows from the group and from ring_size, or is refused on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from attention import AttentionConfig, ConfigError, ShardingConfig, build
from attention.module import Attention
from attention.sharding.groups import ring_of


def rings(rank: int) -> list[Any]:
    """The ranks of each ring, by ring_size, and that layers share them."""
    of_all = ring_of(None, ShardingConfig())
    assert of_all is not None
    assert ring_of(dist.group.WORLD, ShardingConfig(ring_size=4)) is of_all
    assert ring_of(None, ShardingConfig(timeout_s=7)) is not of_all
    pair = ring_of(None, ShardingConfig(ring_size=2))
    assert pair is not None
    numbers = [row[0] for row in pair.agree([rank])]
    assert numbers == list(pair.ranks)
    assert ring_of(None, ShardingConfig(ring_size=1)) is None
    return [of_all.ranks, pair.ranks, pair.rank]


def test_consecutive_ranks_form_rings_that_layers_share(ranks):
    four = (0, 1, 2, 3)
    assert ranks(4).run(rings) == [[four, (0, 1), 0], [four, (0, 1), 1], [four, (2, 3), 0], [four, (2, 3), 1]]


def meshed(rank: int) -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    along = [ring_of(mesh[name], ShardingConfig()) for name in ("dp", "cp")]
    with pytest.raises(ConfigError, match=r"2 dimensions \('dp', 'cp'\); pass .* such as mesh\[\"cp\"\]"):
        ring_of(mesh, ShardingConfig())
    some = dist.new_group([1, 3])
    if rank in (1, 3):
        odd = ring_of(some, ShardingConfig())
        assert odd is not None
        assert (odd.ranks, odd.rank) == ((1, 3), rank // 2)
    else:
        with pytest.raises(ConfigError, match="process_group must be"):
            ring_of(some, ShardingConfig())
    return [transport.ranks for transport in along if transport]


def test_a_ring_is_along_one_dimension_of_a_mesh(ranks):
    assert ranks(4).run(meshed) == [[(0, 2), (0, 1)], [(1, 3), (0, 1)], [(0, 2), (2, 3)], [(1, 3), (2, 3)]]


def refused(rank: int) -> list[str]:
    texts = []
    for group, sharding in ((None, ShardingConfig(ring_size=3)), ("cp", ShardingConfig())):
        with pytest.raises(ConfigError) as info:
            build(AttentionConfig(variant="dense", sharding=sharding), process_group=group)
        texts.append(str(info.value))
    alone = build(AttentionConfig(variant="dense", sharding=ShardingConfig(ring_size=1)))
    assert type(alone) is Attention
    return texts


def test_what_is_no_group_or_no_ring_is_refused_on_all_ranks(ranks):
    for size, group in ranks(4).run(refused):
        assert "ring_size=3 and 4 ranks; use one of 1, 2, 4, or None" in size
        assert "a DeviceMesh of one dimension or None, got str" in group


def paired(rank: int) -> float:
    """Rings of two are data-parallel to each other: their sequences have nothing to do with each other."""
    config = AttentionConfig(variant="dense", sharding=ShardingConfig(ring_size=2, exchange="heads"))
    module: Any = build(config)
    whole = torch.full((1, 9 + rank // 2, 2, 4), float(rank // 2))
    out = module(*[module.shard(whole)] * 3)
    return float(out.unique())


def test_rings_are_data_parallel_to_each_other(ranks):
    assert ranks(4).run(paired) == [0.0, 0.0, 1.0, 1.0]
