"""The plan of a rank whose parts are whole calls is what it allocates: kernels here return results and
compute nothing, and messages that do not come are waited for by nobody."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from rank_threads import layout_for, plan_for
from torch import Tensor

from attention import AttentionConfig, ShardingConfig, SparsePatternConfig
from attention.ops import kernels
from attention.pool import buffers_for
from attention.sharding.keys import keys_attention, keys_problem
from attention.sharding.shards import shards_of
from planner.measuring.footprint import footprint
from planner.memory.cuda_kernels import Stage, ragged_backward, ragged_forward
from planner.memory.machines import Bytes, Cuda, KernelCall
from planner.memory.sharded import rank_plan
from planner.workload import Workload


class Bare(Cuda):
    """A GPU whose kernels take nothing beside their results and a log-sum-exp in one piece, of every type."""

    def windows(self, head_dim: int, itemsize: int) -> Any:
        return "any"

    def forward(self, call: KernelCall) -> Bytes:
        rows = call.views * call.heads * call.queries
        return Bytes((rows * call.head_dim * call.itemsize, rows * 4), ())

    def backward(self, call: KernelCall) -> Bytes:
        each = call.views * call.head_dim * call.itemsize
        keys = each * call.kv_heads * call.keys
        rows = 4 * call.views * call.heads * call.queries
        return Bytes((each * call.heads * call.queries, keys, keys), (), (rows * (1 - call.whole),))


def result(x: Tensor) -> Tensor:
    """Room for a result that is like x [N, H, T, D], which lies in memory as [N, T, H, D]."""
    n, h, t, d = x.shape
    return torch.empty(n, t, h, d, dtype=x.dtype).transpose(1, 2)


def windowed(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> tuple[Tensor, Tensor]:
    return result(q), torch.empty(q.shape[:3])


def windowed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **masks: Any
) -> Any:
    lse = lse.contiguous()
    return result(q), result(k), result(v)


def scratch(lines: Stage) -> list[Tensor]:
    return [torch.empty(int(line.bytes), dtype=torch.uint8) for line in lines]


def ragged(q: Tensor, k: Tensor, v: Tensor, sequences: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, taken = torch.empty(q.shape), scratch(ragged_forward(q.shape[0])[1:])
    del taken
    return out, torch.empty(q.shape[1], q.shape[0])


def ragged_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
    results = tuple(torch.empty(x.shape) for x in (q, k, v))
    taken = scratch(ragged_backward(q.shape[0], len(rest[2].queries) - 1, q.shape[2]))
    del taken
    return results


@contextmanager
def bare_kernels():
    played: dict[str, Any] = {"windowed": windowed, "windowed_backward": windowed_backward}
    played |= {"ragged": ragged, "ragged_backward": ragged_gradients, "windows_of": lambda x: "any"}
    with mock.patch.multiple(kernels, **played):
        yield


class Sent:
    """Messages that are never received, held until they are waited for."""

    def __init__(self, *messages: Sequence[tuple[int, Tensor]]) -> None:
        self.messages = [list(some) for some in messages]

    def wait(self) -> None:
        self.messages.clear()


class NoExchange:
    def exchange(self, sends: Sequence[Any], receives: Sequence[Any], step: str) -> Sent:
        return Sent(sends, receives)

    def whole(self, step: str) -> Any:
        return nullcontext()


def sparse(kind: str, **fields: Any) -> AttentionConfig:
    branches = {"segment_lengths": (512, 2048), "dilation_rates": (1, 4)} if kind == "dilated_sparse" else {}
    pattern = SparsePatternConfig(pattern_type=kind, block_size=64, **fields)
    return AttentionConfig(variant="block_sparse", pattern=pattern, **branches)


CONFIGS = {
    "dense": AttentionConfig(variant="dense"),
    "zigzag": AttentionConfig(variant="dense", sharding=ShardingConfig(shards="zigzag")),
    "window": sparse("local_window", local_window_size=300),
    "global": sparse("global_local", local_window_size=256, global_tokens=100),
    "token global": sparse("global_local", local_window_size=301, global_tokens=100, edges="token"),
    "dilated": AttentionConfig(
        variant="dilated", segment_lengths=(256, 1024, 4096), dilation_rates=(1, 4, 16)
    ),
    "annuli": AttentionConfig(variant="dilated", segment_lengths=(500, 2048), dilation_rates=(1, 2)),
}


def measured(config: AttentionConfig, workload: Workload, rank: int) -> int:
    """The peak of a rank's training step, with what it is given."""
    shards = shards_of(config, workload.seq, workload.gpus)
    sizes = [(workload.batch, count, workload.head_dim) for count in (workload.heads, workload.groups)]
    q, k = (torch.empty(b, workload.seq, count, dim, device="meta") for b, count, dim in sizes)
    trains = workload.mode == "training"
    plan = plan_for(config, shards, rank, q, k, workload.causal)
    inputs = [
        torch.zeros(workload.batch, int(shards.tokens(rank)), count, workload.head_dim, requires_grad=trains)
        for count in (workload.heads, workload.groups, workload.groups)
    ]
    grad = torch.zeros_like(inputs[0]) if trains else None
    problem = keys_problem(plan, config, layout_for(config, q, workload.causal), 1.0, buffers_for(config))

    def run() -> Any:
        out = keys_attention(*inputs, None, problem, NoExchange())
        if grad is not None:
            out.backward(grad)
        return out

    given = sum(x.nbytes for x in inputs) + (0 if grad is None else grad.nbytes)
    return footprint(run, torch.device("cpu")).peak + given


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_takes_what_is_planned_for_it(name, causal):
    sharding = CONFIGS[name].sharding or ShardingConfig()
    config = CONFIGS[name].model_copy(
        update={"workspace_bytes": 1 << 16, "sharding": sharding.model_copy(update={"exchange": "keys"})}
    )
    sizes = {"heads": 8, "kv_heads": 4, "head_dim": 16, "dtype": "float32", "causal": causal}
    for rank, mode in enumerate(("training", "inference", "training")):
        workload = Workload(seq=3000, gpus=3, mode=mode, **sizes)
        with bare_kernels():
            taken = measured(config, workload, rank)
        planned = rank_plan(config, workload, Bare((9, 0), 132), rank).plan.peak()[1]
        assert planned == taken


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq", [4096, 3000])
def test_ranks_that_fetch_of_several_peers_at_a_time_take_what_is_planned(seq, causal):
    config = AttentionConfig(
        variant="dilated",
        segment_lengths=(128, 512, 2048, 8192),
        dilation_rates=(1, 4, 16, 32),
        workspace_bytes=1 << 16,
        sharding=ShardingConfig(exchange="keys"),
    )
    sizes = {"heads": 8, "kv_heads": 4, "head_dim": 16, "dtype": "float32", "causal": causal}
    for rank, mode in ((0, "training"), (5, "inference"), (9, "training")):
        workload = Workload(seq=seq, gpus=12, mode=mode, **sizes)
        with bare_kernels():
            taken = measured(config, workload, rank)
        assert rank_plan(config, workload, Bare((9, 0), 132), rank).plan.peak()[1] == taken


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq", [3072, 4000])
def test_lists_take_no_more_than_is_planned(seq, causal):
    config = sparse("dilated_sparse", sparsity_ratio=0.1).model_copy(
        update={"workspace_bytes": 1 << 16, "sharding": ShardingConfig(exchange="keys")}
    )
    sizes = {"heads": 8, "kv_heads": 4, "head_dim": 16, "dtype": "float32", "causal": causal}
    for rank, mode in enumerate(("training", "inference", "training")):
        workload = Workload(seq=seq, gpus=3, mode=mode, **sizes)
        with bare_kernels():
            taken = measured(config, workload, rank)
        planned = rank_plan(config, workload, Bare((9, 0), 132), rank).plan.peak()[1]
        assert taken <= planned <= 1.05 * taken
