"""What holds for a call of any module: it runs between compiled parts, says what it cannot do, and runs
out of memory in one way."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conformance import IMPLEMENTATIONS, changed, module_of, output_gradient, qkv
from torch.utils._python_dispatch import TorchDispatchMode

from attention import (
    AttentionConfig,
    ConfigError,
    InputError,
    MultiheadConfig,
    OutOfMemoryError,
    UnavailableError,
    build,
    create_dilated_attention,
)

KINDS = ["dense", "dilated-2", "local_window", "global_local", "dilated_sparse-3", "adaptive"]


def featured(name, seq=37):
    """`called` with learned sinks and documents, and for what takes no documents with sinks alone. Sinks are
    the last of the inputs."""
    module, inputs, call = called(name, seq)
    documents = torch.tensor([[3] * 10 + [1] * (seq - 10)])
    given = {} if "adaptive" in name else {"documents": documents}
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]).requires_grad_()

    def featured_call(module, *x, **options):
        return call(module, *x[:-1], sinks=x[-1], **given, **options)

    return module, [*inputs, sinks], featured_call


def called(name, seq=37):
    """(module, inputs, call(module, *inputs) -> a tensor) of a kind, `multihead` and `multihead adaptive`
    among them, on inputs that want gradients."""
    kind, multihead = name.removeprefix("multihead "), name.startswith("multihead")
    config = IMPLEMENTATIONS["local_window" if kind == "multihead" else kind]
    if not multihead:
        inputs = [x.requires_grad_() for x in qkv(seq, kv_heads=2, dtype=torch.float32)]
        return module_of(config), inputs, lambda module, *x, **options: module(*x, is_causal=True, **options)
    module = build(changed(config, multihead=MultiheadConfig(embed_dim=64, num_heads=4)))
    x = torch.randn(1, seq, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return module, [x], lambda module, x, **options: module(x, x, x, is_causal=True, **options)[0]


# Under torch.compile


# Dynamo looks at what a compiled part gets from between the parts.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "name, backend",
    [*((name, "eager") for name in [*KINDS, "multihead", "multihead adaptive"]), ("multihead", "aot_eager")],
)
def test_a_compiled_module_is_the_module_from_the_first_call_on(name, backend):
    """Layouts were built under tracing, which failed until a cache held them."""
    torch.compiler.reset()
    module, inputs, call = called(name)
    compiled = torch.compile(lambda *x: call(module, *x) * 2, backend=backend)
    for _ in range(2):
        out, eager = compiled(*inputs), call(module, *inputs) * 2
        assert torch.equal(out, eager)
        grad = torch.ones_like(out)
        ours, theirs = (torch.autograd.grad(x, inputs, grad) for x in (out, eager))
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", [*KINDS, "multihead"])
def test_a_compiled_module_takes_documents_and_sinks(name):
    torch.compiler.reset()
    module, inputs, call = featured(name)
    compiled = torch.compile(lambda *x: call(module, *x) * 2, backend="eager")
    for _ in range(2):
        out, eager = compiled(*inputs), call(module, *inputs) * 2
        assert torch.equal(out, eager)
        ours, theirs = (torch.autograd.grad(x, inputs, torch.ones_like(x)) for x in (out, eager))
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_module_decodes():
    torch.compiler.reset()
    module, (q, k, v), _ = called("local_window")
    compiled = torch.compile(lambda *x: module(*x, is_causal=True) * 2, backend="eager")
    for end in range(30, 34):
        step = (q[:, end - 1 : end], k[:, :end], v[:, :end])
        assert torch.equal(compiled(*step), module(*step, is_causal=True) * 2)


def test_the_choice_and_the_loss_of_a_scorer_run_under_compile():
    torch.compiler.reset()
    module, (q, k, v), _ = called("adaptive")
    blocks = module.select(q, k, True)
    assert torch.equal(torch.compile(lambda: module.select(q, k, True), backend="eager")(), blocks)
    over = torch.compile(lambda: module.over(q, k, v, blocks, True), backend="eager")()
    assert torch.equal(over, module.over(q, k, v, blocks, True))
    loss = torch.compile(lambda: module.scorer_loss(q, k, True), backend="eager")()
    assert torch.equal(loss, module.scorer_loss(q, k, True))


# What it cannot do


@pytest.mark.parametrize("name", [*KINDS, "multihead"])
def test_torch_func_is_refused_by_name(name):
    module, inputs, call = called(name)
    batched = [x.detach()[None] for x in inputs]
    with pytest.raises(UnavailableError, match=r"vmap"):
        torch.func.vmap(lambda *x: call(module, *x))(*batched)
    with pytest.raises(UnavailableError, match=r"torch\.func"):
        torch.func.grad(lambda *x: call(module, *x).sum())(*(x.detach() for x in inputs))


@pytest.mark.parametrize("name", ["dense", "global_local", "adaptive", "multihead"])
def test_export_is_refused_by_name(name):
    module, inputs, _ = called(name)
    inputs = tuple(x.detach() for x in (inputs * 3)[:3])
    with pytest.raises(UnavailableError, match="export"):
        torch.export.export(module, inputs, strict=False)


@pytest.mark.parametrize("name", [*KINDS, "multihead", "multihead adaptive"])
def test_a_second_derivative_is_refused_and_a_graph_for_it_is_not(name):
    module, inputs, call = called(name)
    leaves = [*inputs, *(x for x in module.parameters() if x.requires_grad)]
    usual = torch.autograd.grad(call(module, *inputs).square().sum(), leaves)
    grads = torch.autograd.grad(call(module, *inputs).square().sum(), leaves, create_graph=True)
    for x, y in zip(grads, usual, strict=True):
        assert torch.equal(x, y)
    with pytest.raises(UnavailableError, match="double backward"):
        sum(x.sum() for x in grads).backward()


@pytest.mark.parametrize("name", ["dense", "global_local", "adaptive"])
def test_a_second_derivative_through_sinks_is_refused(name):
    module, inputs, call = featured(name)
    grads = torch.autograd.grad(call(module, *inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(UnavailableError, match="double backward"):
        grads[-1].sum().backward()


@pytest.mark.parametrize("value", [None, "yes", 1, 0, np.True_, torch.tensor(True), torch.zeros(3)])
@pytest.mark.parametrize("name", ["dense", "adaptive"])
def test_is_causal_is_true_or_false(name, value):
    module, inputs, _ = called(name)
    with pytest.raises(InputError, match="is_causal must be True or False"):
        module(*inputs, is_causal=value)
    if name == "adaptive":
        with pytest.raises(InputError, match="is_causal must be True or False"):
            module.select(*inputs[:2], value)


@pytest.mark.parametrize("name", ["dense", "adaptive"])
def test_a_device_that_is_not_there_is_refused_when_a_module_is_built(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(UnavailableError, match="CUDA devices"):
            build(IMPLEMENTATIONS[name], device)
    with pytest.raises(UnavailableError, match="runs on 'cpu' and 'cuda', got device 'mps'"):
        build(IMPLEMENTATIONS[name], "mps")
    with pytest.raises(ConfigError, match="device must be"):
        build(IMPLEMENTATIONS[name], "graphics")
    with pytest.raises(UnavailableError, match=re.escape("'cuda'")):
        create_dilated_attention(segment_lengths=[8], dilation_rates=[1], device="cuda")
    assert build(AttentionConfig(variant="dense"), "cpu").config.variant == "dense"


# Out of memory


class Starving(TorchDispatchMode):
    """From its operator number `limit` on a CPU has no memory left, `times` times."""

    def __init__(self, limit, times=1 << 30):
        super().__init__()
        self.limit, self.times, self.count = limit, times, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Views and what is written in place take no memory.
        self.count += any(each.alias_info is None for each in function._schema.returns)
        if self.count > self.limit and self.times:
            self.times -= 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")
        return function(*args, **(kwargs or {}))


def places(run, how_many=6):
    """Operators of a run spread over it, the last among them."""
    with Starving(1 << 30) as counting:
        run()
    return sorted({counting.count * n // how_many for n in range(how_many)} | {counting.count - 1})


def assert_ends_well(run):
    """Wherever memory runs out: once, and the result is the same; for good, and it is the project's error."""
    expected = run()
    for place in places(run):
        with Starving(place, times=1):
            found = run()
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
        with Starving(place), pytest.raises(OutOfMemoryError):
            run()


@pytest.mark.parametrize("name", [*KINDS, "multihead", "multihead adaptive"])
def test_a_call_runs_out_of_memory_in_one_way_forward(name):
    module, inputs, call = called(name)
    assert_ends_well(lambda: [call(module, *inputs)])


@pytest.mark.parametrize("name", [*KINDS, "multihead"])
def test_a_call_with_features_runs_out_of_memory_in_one_way(name):
    """Sinks are added to an output in place: what is done again is done from the beginning."""
    module, inputs, call = featured(name)
    assert_ends_well(lambda: [call(module, *inputs)])
    with torch.no_grad():
        assert_ends_well(lambda: [call(module, *inputs)])


@pytest.mark.parametrize("name", KINDS)
def test_a_call_with_features_runs_out_of_memory_in_one_way_backward(name):
    module, inputs, call = featured(name)
    leaves = [*inputs, *module.parameters()]
    out = call(module, *inputs)
    grad = output_gradient(out)
    assert_ends_well(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))


@pytest.mark.parametrize("name", KINDS)
def test_a_call_for_weights_runs_out_of_memory_in_one_way(name):
    module, inputs, call = called(name)

    def run():
        out, weights = call(module, *inputs, return_attention_weights=True)
        return out, weights.block_values

    assert_ends_well(run)


@pytest.mark.parametrize("name", KINDS)
def test_a_call_runs_out_of_memory_in_one_way_backward(name):
    """(Backward of a multihead attention begins with an operator of torch's own.)"""
    module, inputs, call = called(name)
    leaves = [*inputs, *module.parameters()]
    out = call(module, *inputs)
    grad = output_gradient(out)
    assert_ends_well(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))


@pytest.mark.parametrize("method", ["select", "over", "scorer_loss"])
def test_what_a_scorer_does_runs_out_of_memory_in_one_way(method):
    module, (q, k, v), _ = called("adaptive")
    arguments = (q, k, v, module.select(q, k, True)) if method == "over" else (q, k)
    assert_ends_well(lambda: [getattr(module, method)(*arguments, True)])
