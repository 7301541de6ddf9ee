"""Documents as one call of flash attention, held to the oracle with a kernel that is played by its definition
(`flash.py`)."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from conformance import module_of, output_gradient, patterned, qkv
from flash import flash_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_exact, forward_and_gradients

from attention import AttentionConfig
from attention.ops import document_calls
from attention.ops.document_calls import _sequences
from attention.reference import reference_attention
from attention.sections import CutProgram
from attention.sizes.whole_calls import CallPart

ONE_CALL = {
    "dense": AttentionConfig(variant="dense"),
    "window": patterned("local_window", local_window_size=6, edges="token"),
    "wide window": patterned("local_window", local_window_size=1000, edges="token"),
}
config_by_config = pytest.mark.parametrize("config", ONE_CALL.values(), ids=ONE_CALL.keys())
causal_or_not = pytest.mark.parametrize("causal", [False, True])


def numbered(*items: list[int]) -> torch.Tensor:
    """Documents of these lengths, for each batch item."""
    return torch.stack([torch.arange(len(item)).repeat_interleave(torch.tensor(item)) for item in items])


def check(config, causal, documents, *, queries=None, heads=4, kv_heads=2, sinks=None):
    """Forward and gradients are the oracle's, in one call."""
    batch, seq = documents.shape
    q, k, v = qkv(seq, batch=batch, heads=heads, kv_heads=kv_heads)
    q = q[:, -(queries or seq) :].clone()
    module = module_of(config)
    options = {"documents": documents, "sinks": sinks}
    with flash_attention(), mock.patch.object(CutProgram, "tiles", side_effect=AssertionError):
        ours = forward_and_gradients(
            lambda *x: module(*x, is_causal=causal, **options), (q, k, v), output_gradient(q)
        )
    theirs = forward_and_gradients(
        lambda *x: reference_attention(*x, config, causal, **options), (q, k, v), output_gradient(q)
    )
    assert_exact(ours, theirs)


@causal_or_not
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 2, 11, 29, 30])
@config_by_config
def test_documents_are_the_oracle(config, queries, kv_heads, causal):
    documents = numbered([10, 1, 19], [30], [1, 1, 1, 26, 1])
    check(config, causal, documents, queries=queries, kv_heads=kv_heads)


@config_by_config
def test_documents_with_sinks_are_the_oracle(config):
    check(config, True, numbered([10, 20]), sinks=torch.randn(4, dtype=torch.float64))


@config_by_config
def test_documents_of_a_token_each_are_the_oracle(config):
    check(config, True, numbered([1, 1, 1]), queries=2)


@config_by_config
@causal_or_not
def test_some_kv_heads_at_a_time_make_the_same(config, causal):
    with mock.patch.object(document_calls, "backward_cut", return_value=CallPart(1, 2)):
        check(config, causal, numbered([10, 7], [17]), heads=6, kv_heads=3)


@settings(max_examples=25)
@given(
    st.sampled_from(list(ONE_CALL.values())),
    st.booleans(),
    st.integers(1, 3).flatmap(
        lambda batch: st.integers(2, 20).flatmap(
            lambda seq: st.tuples(
                st.just(seq),
                st.integers(1, seq),
                st.lists(
                    st.lists(st.booleans(), min_size=seq - 1, max_size=seq - 1),
                    min_size=batch,
                    max_size=batch,
                ),
            )
        )
    ),
)
def test_random_documents_are_the_oracle(config, causal, drawn):
    _, queries, edges = drawn
    documents = torch.tensor([[0, *item] for item in edges]).long().cumsum(1)
    check(config, causal, documents, queries=queries)


def test_other_attentions_of_documents_are_tiles():
    documents = numbered([10, 20])
    q, k, v = qkv(30, kv_heads=2)
    for kind, edges, tokens in (("local_window", "block", 1), ("global_local", "token", 3)):
        config = patterned(kind, local_window_size=6, edges=edges, global_tokens=tokens)
        with flash_attention(), mock.patch.object(document_calls, "forward", side_effect=AssertionError):
            out = module_of(config)(q, k, v, documents=documents)
        torch.testing.assert_close(
            out, reference_attention(q, k, v, config, documents=documents), rtol=0, atol=1e-12
        )


def test_the_efficient_kernel_has_tiles_for_documents():
    config, documents = ONE_CALL["dense"], numbered([10, 20])
    q, k, v = qkv(30, kv_heads=2)
    with flash_attention("causal"), mock.patch.object(document_calls, "forward", side_effect=AssertionError):
        out = module_of(config)(q, k, v, documents=documents)
    expected = reference_attention(q, k, v, config, documents=documents)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_where_documents_begin_is_made_once_for_all_layers():
    _sequences.cache_clear()
    documents = numbered([3, 5], [8])
    q, k, v = qkv(8, batch=2)
    with flash_attention():
        for config in ONE_CALL.values():
            with torch.inference_mode():
                module_of(config)(q, k, v, documents=documents)
    assert _sequences.cache_info().misses == 1
    with flash_attention():  # what inference made serves training
        module_of(ONE_CALL["dense"])(q.requires_grad_(), k, v, documents=documents).sum().backward()
    assert _sequences.cache_info().misses == 1


def test_queries_of_documents_are_of_their_ends():
    _sequences.cache_clear()
    sequences = _sequences(((3, 5), (8,)), 4, torch.device("cpu"))
    assert sequences.queries.tolist() == [0, 0, 4, 8]
    assert sequences.keys.tolist() == [0, 3, 8, 16]
    assert (sequences.most_queries, sequences.most_keys) == (4, 8)
