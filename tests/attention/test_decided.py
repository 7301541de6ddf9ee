"""What is decided once for all calls of some sizes: little Python from the second on, nothing stale."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conformance import IMPLEMENTATIONS, dilated, module_of, output_gradient, patterned, qkv

from attention import AttentionConfig, InputError, build
from attention.decided import MOST

KINDS = ["dense", "dilated-2", "local_window", "global_local", "dilated_sparse-3", "adaptive"]
DENSE = AttentionConfig(variant="dense")
WINDOW = patterned("local_window", local_window_size=16)


def python_calls(run):
    """How many Python functions `run` calls."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "config, most",
    [(DENSE, 35), (dilated([(16, 1)]), 35), (WINDOW, 110)],
    ids=["dense", "one branch", "window"],
)
def test_the_second_call_of_some_sizes_runs_little_python(config, most, causal):
    """29, 29 and 93 at most when this was written, where the first runs 64, 77 and 926 at least."""
    module, inputs = build(config), qkv(16, dtype=torch.float32)
    with torch.no_grad():
        first = python_calls(lambda: module(*inputs, is_causal=causal))
        second = python_calls(lambda: module(*inputs, is_causal=causal))
    assert second <= most < first


@pytest.mark.parametrize("name", KINDS)
def test_later_calls_are_as_the_first_forward_and_backward(name):
    module, inputs = module_of(IMPLEMENTATIONS[name]), [x.requires_grad_() for x in qkv(37, batch=2)]
    results = []
    for _ in range(3):
        with torch.no_grad():
            inference = module(*inputs, is_causal=True)
        out = module(*inputs, is_causal=True)
        results.append((inference, out, *torch.autograd.grad(out, inputs, output_gradient(out))))
    for later in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(later, results[0], strict=True))


@pytest.mark.parametrize(
    "is_causal", [0, 1, np.bool_(True), None, torch.tensor(True)], ids=lambda value: type(value).__name__
)
def test_what_equals_a_good_argument_is_refused_after_good_calls(is_causal):
    """Numbers are equal to bools, and have their hashes."""
    module, inputs = build(DENSE), qkv(16)
    for good in (False, True):
        module(*inputs, is_causal=good)
    with pytest.raises(InputError, match="is_causal must be True or False"):
        module(*inputs, is_causal=is_causal)
    with pytest.raises(InputError, match="return_attention_weights must be True or False"):
        module(*inputs, return_attention_weights=1)


def test_sinks_that_are_no_tensor_are_refused_after_good_calls():
    module, inputs = build(DENSE), qkv(16)
    documents = torch.tensor([[0] * 7 + [1] * 9]).expand(len(inputs[0]), -1)
    module(*inputs, documents=documents)
    with pytest.raises(InputError, match="sinks must be a tensor"):
        module(*inputs, documents=documents, sinks=[0.0] * inputs[0].shape[2])


def test_what_differs_from_a_good_call_in_one_tensor_is_refused():
    module, (q, k, v) = build(DENSE), qkv(16)
    module(q, k, v)
    for bad, what in (
        (v.float(), "dtype"),
        (v[:, :15], "equally many tokens"),
        (v[..., :1], "head_dim"),
        (v.to("meta"), "device"),
    ):
        with pytest.raises(InputError, match=what):
            module(q, k, bad)
    for bad in (v.numpy(), None):
        with pytest.raises(InputError, match="must be a tensor"):
            module(q, k, bad)


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_pickles_decide_anew(name):
    module, inputs = module_of(IMPLEMENTATIONS[name]), qkv(37)
    expected = module(*inputs)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not other.decisions._kept
        assert torch.equal(other(*inputs), expected)


def test_a_module_whose_config_changes_computes_by_the_new_one():
    module, inputs = build(DENSE), qkv(64)
    module(*inputs)
    module.config = WINDOW
    assert torch.equal(module(*inputs), build(WINDOW)(*inputs))


def test_only_the_last_sizes_are_remembered():
    module = build(WINDOW)
    for seq in range(1, MOST + 9):
        module(*qkv(seq))
    assert len(module.decisions._kept) == MOST


def test_threads_share_what_is_decided():
    module = build(WINDOW)
    inputs = [qkv(seq) for seq in (16, 17, 48, 61)] * 8
    expected = [build(WINDOW)(*each) for each in inputs[:4]] * 8
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda each: module(*each), inputs))
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
