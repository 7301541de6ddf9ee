"""Documents are read once for a tensor, as long as nobody writes to it."""

from __future__ import annotations

import gc
import threading
from unittest import mock

import pytest
import torch

from attention import AttentionConfig, InputError, SparsePatternConfig, build, reference_attention
from attention import documents as documents_module
from attention.documents import MOST_KEPT, document_lengths


@pytest.fixture(autouse=True)
def readings():
    """The times that the numbers of a tensor are read, with none remembered before."""
    documents_module._kept.clear()
    with mock.patch.object(documents_module, "_lengths", wraps=documents_module._lengths) as read:
        yield read


def numbers(*rows, dtype=torch.int64):
    return torch.tensor(rows, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_lengths_are_those_of_runs(dtype):
    found = document_lengths(numbers([5, 5, 0, 0, 0, 9], [1, 2, 3, 4, 5, 6], dtype=dtype), 2, 6)
    assert found == ((2, 3, 1), (1,) * 6)


def test_numbers_may_be_anything_whole():
    big = 2**62
    assert document_lengths(numbers([-1, -1, big, big + 1]), 1, 4) == ((2, 1, 1),)
    assert document_lengths(numbers([7, 7, 7]), 1, 3) == ((3,),)
    assert document_lengths(numbers([7]), 1, 1) == ((1,),)


def test_a_tensor_is_read_once(readings):
    documents = numbers([0, 0, 1], [0, 1, 1])
    for _ in range(5):
        assert document_lengths(documents, 2, 3) == ((2, 1), (1, 2))
    assert readings.call_count == 1
    assert document_lengths(documents.clone(), 2, 3) == ((2, 1), (1, 2))
    assert readings.call_count == 2


@pytest.mark.parametrize("through", ["itself", "a view", "its base"])
def test_a_tensor_that_was_written_to_is_read_again(readings, through):
    base = numbers([0, 0, 1, 1], [0, 0, 0, 1])
    documents = base[:, 1:] if through == "its base" else base
    before = document_lengths(documents, 2, documents.shape[1])
    if through == "a view":
        documents[:, -1:].fill_(5)
    else:
        base[:, -1] = 5
    after = document_lengths(documents, 2, documents.shape[1])
    assert readings.call_count == 2
    assert before != after


def test_tensors_that_are_gone_are_forgotten_and_none_is_taken_for_another(readings):
    for n in range(50):
        documents = torch.zeros(1, 8, dtype=torch.int64)
        documents[:, n % 7 + 1 :] = 1
        assert document_lengths(documents, 1, 8) == ((n % 7 + 1, 7 - n % 7),)
        del documents
        gc.collect()
    assert readings.call_count == 50
    assert len(documents_module._kept) == 1


def test_few_are_remembered(readings):
    alive = [numbers([0] * n + [1] * 3) for n in range(1, 4 * MOST_KEPT)]
    for documents in alive:
        document_lengths(documents, 1, documents.shape[1])
    assert len(documents_module._kept) == MOST_KEPT
    document_lengths(alive[-1], 1, alive[-1].shape[1])
    assert readings.call_count == len(alive)
    document_lengths(alive[0], 1, alive[0].shape[1])
    assert readings.call_count == len(alive) + 1


def test_under_inference_mode_they_are_read_each_time(readings):
    with torch.inference_mode():
        documents = numbers([0, 1, 1])
        for _ in range(3):
            assert document_lengths(documents, 1, 3) == ((1, 2),)
        assert readings.call_count == 3
        documents[0, 1] = 0
        assert document_lengths(documents, 1, 3) == ((2, 1),)


def test_threads_may_read_at_the_same_time():
    failures = []

    def read(offset):
        try:
            for n in range(200):
                documents = numbers([0] * (n % 5 + 1) + [1] * offset)
                assert document_lengths(documents, 1, n % 5 + 1 + offset) == ((n % 5 + 1, offset),)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            failures.append(error)

    threads = [threading.Thread(target=read, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# In attention


PATTERN = SparsePatternConfig(block_size=4, pattern_type="local_window", local_window_size=9, edges="token")
CONFIG = AttentionConfig(variant="block_sparse", pattern=PATTERN)


def tensors(batch=3, seq=20):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, seq, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_all_layers_of_a_step_read_them_once(readings):
    layers, inputs = [build(CONFIG) for _ in range(4)], tensors()
    documents = numbers(*[[0] * 7 + [1] * 13] * 3)
    for step in range(3):
        if step:
            documents.fill_(0)
            documents[:, step * 3 :] = 1
        for layer in layers:
            out = layer(*inputs, True, documents=documents)
        torch.testing.assert_close(out, reference_attention(*inputs, CONFIG, True, documents=documents))
    assert readings.call_count == 3


@pytest.mark.parametrize("stored", ["expanded", "transposed", "every other"])
def test_documents_may_be_stored_in_any_way(stored):
    inputs = tensors()
    documents = numbers([0] * 7 + [1] * 13)
    if stored == "expanded":
        documents = documents.expand(3, -1)
    elif stored == "transposed":
        documents = documents.expand(3, -1).t().contiguous().t()
    else:
        documents = documents.expand(3, -1).repeat_interleave(2, 1)[:, ::2]
    assert not documents.is_contiguous()
    found = build(CONFIG)(*inputs, True, documents=documents)
    torch.testing.assert_close(found, reference_attention(*inputs, CONFIG, True, documents=documents))


# What is refused

BAD = {
    "a list": ([[0, 1, 1]], "a tensor of whole numbers, one a token; got list"),
    "floats": (torch.zeros(1, 3), "whole numbers, one a token; got torch.float32"),
    "bools": (torch.zeros(1, 3, dtype=torch.bool), "got torch.bool"),
    "rank 1": (numbers([0, 1, 1])[0], "[batch, seq] of k, [1, 3], a number for each token; got [3]"),
    "another batch": (numbers([0, 1, 1], [0, 1, 1]), "got [2, 3]"),
    "of the queries alone": (numbers([0]), "got [1, 1]"),
    "a mask of pairs": (torch.zeros(1, 1, 3, 3, dtype=torch.int64), "got [1, 1, 3, 3]"),
    "not grouped": (numbers([0, 1, 0]), "in batch item 0 there is 0, then others, then 0 again"),
    "without values": (torch.zeros(1, 3, dtype=torch.int64, device="meta"), "hold no numbers"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_documents_that_say_nothing_are_refused(bad):
    documents, message = bad
    with pytest.raises(InputError) as caught:
        document_lengths(documents, 1, 3)
    assert message in str(caught.value)


def test_no_tokens_are_no_documents():
    """The tensors that they are of are refused elsewhere."""
    assert document_lengths(torch.zeros(2, 0, dtype=torch.int64), 2, 0) == ((), ())
    assert document_lengths(torch.zeros(0, 2, dtype=torch.int64), 0, 2) == ()
