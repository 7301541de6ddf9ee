"""What only two GPUs can show: the exchanges over NCCL. Nobody has run these yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conformance import IMPLEMENTATIONS, changed, module_of, output_gradient, qkv
from ranks import Ranks

from attention import InputError, ShardingConfig, build

pytestmark = pytest.mark.gpu
WORLD = 2
BACKENDS = "cpu:gloo,cuda:nccl"
BAR = 1e-4
"""Of float32 on cards whose products may be in TF32."""


@pytest.fixture(scope="module")
def cards() -> Iterator[Ranks]:
    if torch.cuda.device_count() < WORLD:
        pytest.skip(f"needs {WORLD} GPUs")
    with Ranks(WORLD, backend=BACKENDS) as group:
        yield group


def differences(rank: int, name: str, exchange: str) -> list[str]:
    """What a rank's output and gradients have otherwise than those of one card; bytes that are not
    `traffic`."""
    config, device = IMPLEMENTATIONS[name], f"cuda:{rank}"
    twin = module_of(config, device)
    module: Any = build(changed(config, sharding=ShardingConfig(exchange=exchange, timeout_s=60)), device)
    module.load_state_dict(twin.state_dict())
    wrong = []
    for seq, causal, batch in ((203, True, 1), (3, False, 2), (1024, True, 2)):
        inputs = qkv(seq, batch=batch, dtype=torch.float32, device=device)
        grad = output_gradient(inputs[0])
        results = []
        for one, share in ((twin, lambda x: x), (module, module.shard)):
            leaves = [share(x).detach().clone().requires_grad_() for x in inputs]
            module.transport.sent.clear()
            out = one(*leaves, causal)
            out.backward(share(grad))
            results.append([out.detach(), *(x.grad for x in leaves)])
        wrong += [
            f"{what} of {seq} tokens"
            for what, whole, part in zip(("out", "dq", "dk", "dv"), *results, strict=True)
            if part.numel() and (module.shard(whole) - part).abs().max() > BAR
        ]
        traffic = module.traffic(*(module.shard(x) for x in inputs[:2]), causal)
        said = sum(sent for part in traffic for sent, _ in part.values())
        if said != sum(module.transport.sent.values()):
            wrong.append(f"bytes of {seq} tokens")
    whole = torch.arange(50, device=device)[None]
    if not torch.equal(module.gather(module.shard(whole)), whole):
        wrong.append("gathered")
    torch.cuda.synchronize()
    return wrong


@pytest.mark.parametrize("exchange", ["keys", "heads"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_two_cards_compute_what_one_does(cards: Ranks, name: str, exchange: str):
    if name.startswith("adaptive") and exchange == "keys":
        pytest.skip("its blocks are chosen from all of q and k")
    assert cards.run(differences, name, exchange) == [[]] * WORLD


def refused(rank: int) -> str:
    config = changed(IMPLEMENTATIONS["dense"], sharding=ShardingConfig(exchange="heads", timeout_s=60))
    module: Any = build(config, process_group=dist.new_group(backend="nccl"))
    with pytest.raises(InputError) as info:
        module(*[module.shard(x) for x in qkv(8)])
    return str(info.value)


def test_tensors_of_the_cpu_in_a_group_of_nccl_are_refused(cards: Ranks):
    assert all("tensors on cpu cannot be sent" in text for text in cards.run(refused))
