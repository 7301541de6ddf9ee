"""The exchange of heads gives each rank what one device computes, and its gradients: to the bit where parts
are not merged. Where they are, the last bit depends on where in a vector a number lies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conformance import HEADS, IMPLEMENTATIONS, adaptive, changed, module_of, output_gradient, qkv
from featured import numbered
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import AttentionConfig, MultiheadConfig, ShardingConfig, build
from attention.sharding.module import ShardedAttention

MERGED = ("dilated-2", "dilated-3", "dilated-4", "dilated-repeated", "dilated-uncovered", "global_local")
"""Begins of the names of attentions that merge parts of their keys."""
ROUNDING = 2e-15
BY_HEADS = ShardingConfig(exchange="heads", timeout_s=20)


def shared(config: AttentionConfig, sharding: ShardingConfig = BY_HEADS) -> tuple[nn.Module, nn.Module]:
    """(the module of one device, that of this rank), of equal parameters."""
    twin = module_of(config)
    module = build(changed(config, sharding=sharding))
    assert isinstance(module, nn.Module)
    module.load_state_dict(twin.state_dict())
    return twin, module


def summed(x: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of a parameter, over the ring."""
    total = torch.zeros_like(like) if x is None else x.clone()
    dist.all_reduce(total)
    return total


def differences(twin: nn.Module, module: Any, case: dict[str, Any], rounding: float = 0.0) -> list[str]:
    """What of output and gradients is not that of one device, to the bit or to some rounding."""
    case = dict(case)
    seq, causal, lengths = case.pop("seq"), case.pop("causal"), case.pop("documents", None)
    sinks = torch.randn(case.get("heads", HEADS), dtype=torch.float64) if case.pop("sinks", False) else None
    if sinks is not None:
        dist.broadcast(sinks, 0)
    documents = None if lengths is None else numbered(lengths)
    inputs = qkv(seq, **case)
    grad = output_gradient(inputs[0])
    results = []
    for one, share in ((twin, lambda x: x), (module, module.shard)):
        leaves = [share(x).detach().clone().requires_grad_() for x in inputs]
        extra = None if sinks is None else sinks.to(inputs[0].dtype).clone().requires_grad_()
        one.zero_grad()
        out = one(*leaves, causal, documents=documents, sinks=extra)
        out.backward(share(grad))
        gradients = [extra] if extra is not None else []
        gradients += one.parameters()
        results.append([out.detach(), *(x.grad for x in leaves), *((x.grad, x) for x in gradients)])
    names = ["out", "dq", "dk", "dv", *(f"parameter {n}" for n in range(len(results[0]) - 4))]
    wrong = []
    for name, whole, part in zip(names, *results, strict=True):
        if isinstance(whole, tuple):
            (whole, _), part = whole, summed(*part)
        else:
            whole = module.shard(whole)
        assert whole.shape == part.shape
        apart = float((whole - part).abs().max()) if whole.numel() else 0.0
        if not apart <= rounding:
            wrong.append(f"{name} of {case}: {apart}")
    return wrong


def equal_to_one_device(
    rank: int, names: list[str], cases: list[dict[str, Any]], exact: bool = False
) -> list[str]:
    """What is not, of all these attentions: to some rounding, or, if `exact` and nothing is merged, to the
    bit."""
    wrong = []
    for name in names:
        twin, module = shared(IMPLEMENTATIONS[name])
        assert isinstance(module, ShardedAttention)
        for case in cases:
            merged = name.startswith(MERGED) or case.get("sinks") or case.get("documents")
            bar = 0.0 if exact and not merged else ROUNDING
            if case.get("dtype", torch.float64) != torch.float64:
                bar *= 2**29
            wrong += [f"{name}: {text}" for text in differences(twin, module, case, bar)]
    return wrong


def check(ranks: Any, world: int, names: list[str], cases: list[dict[str, Any]], exact: bool = False) -> None:
    assert ranks(world).run(equal_to_one_device, names, cases, exact) == [[]] * world


@pytest.mark.parametrize(
    "world, names",
    [
        pytest.param(2, list(IMPLEMENTATIONS), marks=pytest.mark.slow),
        (4, ["dense", "dilated-4-beyond-heads", "global_local-token", "adaptive"]),
        pytest.param(4, list(IMPLEMENTATIONS), marks=pytest.mark.slow),
    ],
)
def test_heads_of_the_whole_sequence_are_those_of_one_device(ranks, world: int, names: list[str]):
    """Of 203 tokens, of fewer than ranks, and of several batch items with grouped heads."""
    cases: list[dict[str, Any]] = [
        {"seq": 203, "causal": True},
        {"seq": 3, "causal": False, "batch": 2},
        {"seq": 61, "causal": False, "batch": 2, "kv_heads": max(world, 2)},
    ]
    check(ranks, world, names, cases, exact=len(names) == len(IMPLEMENTATIONS))


def test_offsets_of_dilated_heads_are_those_of_all_heads(ranks):
    """Ranks of 2 heads of 6 in three, and rates that 2 is no multiple of."""
    cases: list[dict[str, Any]] = [
        {"seq": 75, "causal": causal, "heads": 6, "kv_heads": kv_heads}
        for causal in (False, True)
        for kv_heads in (3, 6)
    ]
    cases.append({"seq": 3, "causal": False, "heads": 6})  # where heads are beyond the tokens
    check(ranks, 3, ["dilated-3-odd", "dilated-4-beyond-heads"], cases)


def test_documents_and_sinks_are_those_of_the_whole(ranks):
    cases: list[dict[str, Any]] = [
        {"seq": 90, "causal": True, "sinks": True},
        {"seq": 90, "causal": False, "batch": 2, "documents": [[40, 50], [90]]},
        {"seq": 90, "causal": True, "sinks": True, "documents": [[1, 64, 25]]},
    ]
    check(ranks, 2, ["dense", "dilated-3-odd", "global_local", "local_window-token"], cases)
    check(ranks, 2, ["adaptive"], cases[:1])


def test_other_dtypes_are_those_of_one_device(ranks):
    cases = [
        {"seq": 130, "causal": causal, "dtype": dtype}
        for dtype, causal in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True))
    ]
    check(ranks, 2, ["dense", "dilated-1", "local_window", "adaptive"], cases)
    check(ranks, 2, ["dilated-2", "global_local"], cases[2:])


def zigzag(rank: int) -> list[str]:
    twin, module = shared(AttentionConfig(variant="dense"), BY_HEADS.model_copy(update={"shards": "zigzag"}))
    cases = [{"seq": seq, "causal": True, "batch": 2} for seq in (3, 50)]
    return [wrong for case in cases for wrong in differences(twin, module, case)]


def test_zigzag_shards_are_put_in_order(ranks):
    assert ranks(2).run(zigzag) == [[]] * 2


def together(rank: int) -> None:
    """Sharding a tensor, gathering it again, and positions."""
    for sharding in (BY_HEADS, BY_HEADS.model_copy(update={"shards": "zigzag"})):
        module: Any = shared(AttentionConfig(variant="dense"), sharding)[1]
        for seq in (1, 2, 50):
            whole = torch.arange(2 * seq * 3).view(2, seq, 3)
            own = module.shard(whole)
            assert torch.equal(own, whole[:, module.positions(seq)])
            assert own.is_contiguous()
            assert torch.equal(module.gather(own), whole)
            assert torch.equal(module.gather(own[..., 0]), whole[..., 0])


@pytest.mark.parametrize("world", [2, 3])
def test_shards_are_gathered_to_what_they_were(ranks, world: int):
    ranks(world).run(together)


def no_gradients(rank: int) -> None:
    """Ranks agree on who needs gradients, and those alone travel."""
    module: Any = shared(AttentionConfig(variant="dense"))[1]
    q, k, v = (module.shard(x) for x in qkv(20))
    with torch.inference_mode():
        assert not module(q, k, v).requires_grad
    out = module(q, k.requires_grad_(), v)
    module.transport.sent.clear()
    out.sum().backward()
    own, half = q[:, :, :2].nbytes, k.nbytes // 2
    assert dict(module.transport.sent) == {1 - rank: own + half}
    assert k.grad is not None
    # Once more, of a loss in which this rank's output counts nothing.
    (module(q, k, v).sum() * 0).backward()
    assert copy.deepcopy(module).transport is module.transport


def test_gradients_travel_where_they_are_wanted(ranks):
    ranks(2).run(no_gradients)


def multihead(rank: int, text: str) -> None:
    twin, module = shared(AttentionConfig.from_json(text))
    seq = 37
    x, _, _ = qkv(seq, heads=1, head_dim=twin.config.multihead.embed_dim, dtype=torch.float64)
    x = x[:, :, 0]
    for one in (twin, module):
        one.double()
        for parameter in one.parameters():
            parameter.data.div_(8)
    results = []
    for one, share in ((twin, lambda x: x), (module, module.shard)):
        y = share(x).detach().clone().requires_grad_()
        out, weights = one(y, y, y, is_causal=True)
        assert weights is None
        out.backward(share(torch.ones_like(x)))
        results.append((out.detach(), y.grad, [p.grad for p in one.parameters()]))
    (out, dx, parameters), (own, own_dx, own_parameters) = results
    torch.testing.assert_close(own, module.shard(out), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own_dx, module.shard(dx), rtol=1e-12, atol=1e-12)
    for whole, part in zip(parameters, own_parameters, strict=True):
        torch.testing.assert_close(summed(part, whole), whole, rtol=1e-12, atol=1e-12)
    flat, _ = module(*[module.shard(x)[0]] * 3, is_causal=True)
    torch.testing.assert_close(flat, own[0], rtol=0, atol=0)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "config", [AttentionConfig(variant="dense"), adaptive(0.4)], ids=["dense", "adaptive"]
)
def test_projections_are_local_and_their_gradients_sum_to_those_of_one_device(
    ranks, config: AttentionConfig, checkpointed: bool
):
    width = MultiheadConfig(embed_dim=64, num_heads=4, checkpoint=checkpointed)
    ranks(2).run(multihead, changed(config, multihead=width).to_json())


def checkpointed(rank: int) -> None:
    """A checkpoint of the attention by itself computes it anew, exchange and all."""
    module: Any = shared(AttentionConfig(variant="dense"))[1]
    grads = []
    for wrap in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        leaves = [module.shard(x).clone().requires_grad_() for x in qkv(21)]
        for _ in range(2):
            wrap(module, *leaves).sum().backward()
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_a_checkpoint_exchanges_again(ranks):
    ranks(2).run(checkpointed)
