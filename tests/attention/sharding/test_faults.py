"""What goes wrong on one rank is an error on all of them, in time: a refusal before anything is exchanged, or
a DistributedError within the timeout and a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from conformance import qkv
from ranks import Ranks

from attention import (
    AttentionConfig,
    AttentionPlannerError,
    DistributedError,
    InputError,
    MultiheadConfig,
    ShardingConfig,
    UnavailableError,
    build,
)
from attention.sharding import transport
from attention.sharding.transport import Transport

TIMEOUT = 2.0


def module_of(timeout_s: float = TIMEOUT, **fields: Any) -> Any:
    sharding = ShardingConfig(**{"exchange": "heads", "timeout_s": timeout_s, **fields})
    return build(AttentionConfig(variant="dense", sharding=sharding))


def inputs_of(module: Any, seq: int = 16, **sizes: Any) -> list[torch.Tensor]:
    return [module.shard(x) for x in qkv(seq, **sizes)]


# Refusals: on all ranks, of one class, and the ring goes on.


def changed(x: list[torch.Tensor], rank: int, how: str) -> tuple[list[Any], dict[str, Any]]:
    """What the last of three ranks gives otherwise than the others."""
    q, k, v = x
    if rank != 2:
        return x, {}
    other: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "dtype": ([q.float(), k.float(), v.float()], {}),
        "batch": ([torch.cat([part, part]) for part in x], {}),
        "heads": ([q[:, :, :3], k[:, :, :3], v[:, :, :3]], {}),
        "causal": (x, {"is_causal": True}),
        "gradients": ([q, k.clone().requires_grad_(), v], {}),
        "tokens": ([part[:, :-1] for part in x], {}),
        "sinks": (x, {"sinks": torch.zeros(6, dtype=torch.float64)}),
        "documents": (x, {"documents": torch.arange(16)[None] // 4}),
        "a mask": (x, {"attn_mask": q}),
        "an unknown argument": (x, {"window": 3}),
        "no tensor": ([None, k, v], {}),
        "weights": (x, {"return_attention_weights": True}),
        "fewer queries": ([q[:, 1:], k, v], {}),
        "another device": ([part.to("meta") for part in x], {}),
    }
    return other[how]


class Refusal(NamedTuple):
    own: type[Exception]
    """On the rank that differs."""
    text: str
    of_others: str


REFUSALS = {
    "dtype": Refusal(InputError, "dtype: float64 on ranks [0, 1], float32 on ranks [2]", ""),
    "batch": Refusal(InputError, "batch: 1 on ranks [0, 1], 2 on ranks [2]", ""),
    "heads": Refusal(InputError, "heads: 6 on ranks [0, 1], 3 on ranks [2]", ""),
    "causal": Refusal(InputError, "is_causal: False on ranks [0, 1], True on ranks [2]", ""),
    "gradients": Refusal(InputError, "need gradients: none on ranks [0, 1], k on ranks [2]", ""),
    "tokens": Refusal(InputError, "a sequence of 15 tokens is shared by ranks of [5, 5, 5] tokens", ""),
    "sinks": Refusal(InputError, "sinks: False on ranks [0, 1], True on ranks [2]", ""),
    "documents": Refusal(InputError, "documents: none on ranks [0, 1], ", ""),
    "a mask": Refusal(UnavailableError, "attn_mask", "ranks [2] refused"),
    "an unknown argument": Refusal(TypeError, "'window'", "ranks [2] refused"),
    "no tensor": Refusal(InputError, "q must be a tensor", "ranks [2] refused"),
    "weights": Refusal(UnavailableError, "return_attention_weights=True: not taken", "ranks [2] refused"),
    "fewer queries": Refusal(UnavailableError, "fewer queries than keys", "ranks [2] refused"),
    "another device": Refusal(AttentionPlannerError, "meta", "ranks [2] refused"),
}


def refused(rank: int, names: list[str]) -> list[tuple[type, str]]:
    module = module_of(timeout_s=20)
    module.transport.sent.clear()
    # Of 16 tokens the first rank has 6 and the others 5; without the last, 15 would be 5 each.
    errors = []
    for name in names:
        inputs, options = changed(inputs_of(module, heads=6), rank, name)
        with pytest.raises((AttentionPlannerError, TypeError)) as info:
            module(*inputs, **options)
        errors.append((info.type, str(info.value)))
    assert not module.transport.sent
    assert module(*inputs_of(module, heads=6)).isfinite().all()
    return errors


def test_what_one_rank_gives_otherwise_is_refused_on_all_before_anything_is_exchanged(ranks):
    results = ranks(3).run(refused, list(REFUSALS))
    for number, (name, refusal) in enumerate(REFUSALS.items()):
        for rank, errors in enumerate(results):
            kind, text = errors[number]
            own = rank == 2 or not refusal.of_others
            assert issubclass(kind, refusal.own if own else InputError), name
            assert (refusal.text if own else refusal.of_others) in text, name


def refused_by_all(rank: int) -> list[str]:
    """What every rank gives wrongly in the same way."""
    module = module_of(timeout_s=20)
    texts = []
    for inputs, options in (
        (inputs_of(module, heads=4, kv_heads=1), {}),
        ([x[:, :0] for x in inputs_of(module)], {}),
        (inputs_of(module), {"documents": torch.zeros(1, 17, dtype=torch.int64)}),
        ([*inputs_of(module)[:2], None], {}),
    ):
        with pytest.raises(InputError) as info:
            module(*inputs, **options)
        texts.append(str(info.value))
    q, k, _ = inputs_of(module, heads=4, kv_heads=1)
    for bad, text in (((q, k), "kv_heads=1"), ((q[0], k), r"got \(8, 4, 16\) and")):
        with pytest.raises(InputError, match=text):
            module.traffic(*bad)
    of_cuda = mock.patch.object(transport, "backends", return_value={"cuda": "nccl"})
    with of_cuda, mock.patch.object(module.transport, "devices", object()):
        for call in (lambda: module(*inputs_of(module)), lambda: module.gather(torch.ones(1, 8))):
            with pytest.raises(InputError, match=r"on cpu cannot be sent .* cuda:nccl"):
                call()
    with pytest.raises(InputError, match="takes a tensor"):
        module.gather(torch.ones(3))
    with pytest.raises(InputError, match=r"ranks of \[8, 8\] tokens, got \[16, 0\]"):
        module.gather(torch.ones(1, 16 * (1 - rank)))
    with pytest.raises(InputError, match="differ"):
        module.gather(torch.ones(1, 8, 1 + rank))
    assert not module.transport.failure
    return texts


def test_what_no_rank_can_serve_is_refused_with_what_would_do(ranks):
    for grouped, empty, documents, _ in ranks(2).run(refused_by_all):
        assert "got kv_heads=1 (of 4 heads) and 2 ranks; use ring_size=1, or exchange='keys'" in grouped
        assert "at least 1 token" in empty
        assert (
            "documents must be those of the whole sequence, [1, 16] on every rank, got [1, 17]" in documents
        )


def multihead_refused(rank: int) -> str:
    """Projections refuse on one rank: the others hear of it."""
    width = MultiheadConfig(embed_dim=32, num_heads=4)
    sharding = ShardingConfig(exchange="heads", timeout_s=20)
    module: Any = build(AttentionConfig(variant="dense", multihead=width, sharding=sharding))
    x = module.shard(torch.randn(1, 3, 32))
    with pytest.raises(InputError) as info:
        module(x, x, x[..., : 32 - 16 * rank])
    module.float()(x, x, x)
    alone = torch.randn(1, 1 - rank, 32)  # a single token, and a rank without any
    assert module(alone, alone, alone)[0].shape == alone.shape
    return str(info.value)


def test_what_a_projection_refuses_is_refused_on_all(ranks):
    first, second = ranks(2).run(multihead_refused)
    assert "ranks [1] refused" in first
    assert "value must be [batch, seq, 32]" in second


def unequal_configs(rank: int) -> str:
    module = module_of(timeout_s=20, travel="float32" if rank else "auto")
    with pytest.raises(InputError) as info:
        module(*inputs_of(module))
    return str(info.value)


def test_configs_that_differ_are_refused_on_all(ranks):
    assert all("config: " in text for text in ranks(2).run(unequal_configs))


# Faults: each in a group of its own, which it ends.


Outcome = tuple[float, BaseException | None]
"""What a rank saw of a fault: after how many seconds it raised what."""


def outcome(run: Any) -> Outcome:
    begun = time.monotonic()
    try:
        run()
    except (DistributedError, ZeroDivisionError) as error:
        return time.monotonic() - begun, error
    return time.monotonic() - begun, None


def megabytes(transport: Transport) -> None:
    """A call that exchanges messages of 16 MiB."""
    x, others = torch.ones(1 << 22), [torch.empty(1 << 22) for _ in transport.peers]
    transport.agree([0])
    sends = [(peer, x) for peer in transport.peers]
    transport.exchange(sends, list(zip(transport.peers, others, strict=True)), "exchanging much").wait()


def faulty_call(rank: int, fault: str, large: bool, victim: int) -> Outcome:
    """A call in which the victim does not do its part, once ranks agreed on it, or does not come."""
    module = module_of()
    x = inputs_of(module, heads=3)
    module(*x)
    if large:
        megabytes(module.transport)
    if rank == victim and fault == "absent":
        return 0.0, None
    if rank == victim:
        exchange = module.transport.exchange

        def fail(*args: Any) -> Any:
            pending = exchange(*args) if fault == "kill" else None
            if fault == "raise":
                raise ZeroDivisionError("of its own")
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            return pending

        module.transport.exchange = fail
    result = outcome(lambda: megabytes(module.transport) if large else module(*x))
    with pytest.raises(DistributedError, match="the ring is closed"):
        module(*x)
    return result


SLOW = pytest.mark.slow
FAULTS = [
    pytest.param("kill", False, 1, "file", id="kill"),
    pytest.param("absent", False, 1, "file", id="absent"),
    pytest.param("raise", False, 1, "file", id="raise", marks=SLOW),
    pytest.param("kill", True, 1, "file", id="kill in large messages", marks=SLOW),
    pytest.param("stop", False, 1, "file", id="stop", marks=SLOW),
    pytest.param("stop", True, 2, "file", id="stop in large messages", marks=SLOW),
    pytest.param("kill", False, 0, "tcp", id="kill the store's host", marks=SLOW),
    pytest.param("stop", False, 0, "tcp", id="stop the store's host", marks=SLOW),
]


@pytest.mark.parametrize("fault, large, victim, store", FAULTS)
def test_a_rank_that_fails_is_one_error_on_all_others_in_time(fault, large, victim, store):
    with Ranks(3, store) as group:
        group.start(faulty_call, fault, large, victim)
        results = group.results(TIMEOUT + 8, {victim} if fault == "stop" else ())
    others = {rank: result for rank, result in enumerate(results) if rank != victim}
    for rank, result in others.items():
        assert isinstance(result, tuple), result
        seconds, error = result
        assert isinstance(error, DistributedError), error
        assert seconds <= TIMEOUT + 1
        assert error.rank == rank
        assert f"rank {rank}, {error.step}, after" in str(error)
        assert error.peers
        assert error.nbytes > 0
        if fault == "raise":
            assert f"rank {victim} raised ZeroDivisionError" in str(error)
        elif store == "file":  # beside others, maybe, that do not know yet
            assert victim in error.missing
    if fault == "raise":
        assert isinstance(results[victim][1], ZeroDivisionError)
    if store != "file":  # nobody can be asked, and one of them at least waited for the host
        assert any(victim in error.missing for _, error in others.values())


def output_in_no_loss(rank: int) -> Outcome:
    """The first rank's output is in no loss, so that its backward pass never runs."""
    module = module_of()
    x = [part.requires_grad_() for part in inputs_of(module)]
    out = module(*x)
    if rank == 0:
        return 0.0, None
    return outcome(lambda: out.sum().backward())


def test_an_output_that_is_in_no_loss_ends_the_backward_pass_of_the_others():
    with Ranks(2) as group:
        error = group.run(output_in_no_loss)[1][1]
    assert isinstance(error, DistributedError)
    assert error.peers == (0,)
    assert error.step == "agreeing on the call"


def layers_mixed_up(rank: int) -> str:
    """Two layers, of which one rank has only the first in its loss, and the other only the second."""
    module = module_of(timeout_s=20)
    outputs = [module(*[x.clone().requires_grad_() for x in inputs_of(module)]) for _ in range(2)]
    with pytest.raises(InputError) as info:
        outputs[rank].sum().backward()
    return str(info.value)


def test_gradients_of_different_calls_are_not_exchanged(ranks):
    for text in ranks(2).run(layers_mixed_up):
        assert "number of the call: " in text
        assert "on ranks [0], " in text


def forward_meets_backward(rank: int) -> str:
    module = module_of(timeout_s=20)
    x = [part.requires_grad_() for part in inputs_of(module)]
    out = module(*x)
    with pytest.raises(InputError) as info:
        module(*x) if rank else out.sum().backward()
    return str(info.value)


def test_a_forward_pass_does_not_meet_a_backward_pass(ranks):
    for text in ranks(2).run(forward_meets_backward):
        assert "pass: backward on ranks [0], forward on ranks [1]" in text


def built_by_some(rank: int) -> Outcome:
    if rank == 1:
        return 0.0, None
    return outcome(lambda: module_of(timeout_s=1.0))


@SLOW
def test_an_attention_that_some_ranks_do_not_build_is_an_error_in_time():
    with Ranks(2) as group:
        error = group.run(built_by_some)[0][1]
    assert isinstance(error, DistributedError)
    assert error.missing == (1,)
    assert "did not come together within 1 s" in str(error)


PROGRAM = """
import os, signal, sys, time
import torch, torch.distributed as dist
from attention import AttentionConfig, DistributedError, ShardingConfig, build

dist.init_process_group("gloo")
sharding = ShardingConfig(exchange="heads", timeout_s=2)
module = build(AttentionConfig(variant="dense", sharding=sharding))
x = module.shard(torch.ones(1, 12, 3, 8))
module(x, x, x)
if dist.get_rank() == 1:
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
begun = time.monotonic()
try:
    module(x, x, x)
except DistributedError as error:
    print(f"rank {error.rank} waited {time.monotonic() - begun:.1f} s for {error.peers}", flush=True)
    raise
"""


@SLOW
@pytest.mark.parametrize("fault", ["kill", "absent"])
def test_torchrun_ends_with_an_error(tmp_path, fault: str):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    begun = time.monotonic()
    done = subprocess.run(
        [*launcher, str(program), fault],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode != 0
    assert time.monotonic() - begun < 45
    if fault == "absent":
        assert "for (1,)" in done.stdout
