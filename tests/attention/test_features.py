"""Every attention with every feature that it takes equals the oracle, and keeps what is hidden hidden: the
last queries of a sequence, documents and padding, learned sinks. What it does not take, it refuses."""

from __future__ import annotations

import math
import random
from unittest import mock

import pytest
import torch
from conformance import IMPLEMENTATIONS, KV_HEADS, configs, in_little_room, module_of, output_gradient
from featured import call_of, calls, check_float64, check_low_precision, run
from hypothesis import given, settings

from attention import AttentionConfig, UnavailableError, inputs
from attention.features import NAMES, UNKNOWN, together, unfit_feature

SEQ = 77
CUT = {name: config for name, config in IMPLEMENTATIONS.items() if config.variant != "adaptive"}
"""What takes documents and fewer queries."""

# Lengths of documents of three batch items.
DOCUMENTS = {
    "none": None,
    "one": ((77,),) * 3,
    "padding": ((13, 64), (60, 17), (5, 67, 5)),
    "tokens": ((1,) * 77, (76, 1), (1, 76)),
    "packed": ((3, 1, 29, 1, 1, 22, 12, 8), (8, 16, 53), (39, 38)),
}
QUERIES = (77, 1, 7, 17, 76)

SOME = [
    "dense",
    "dilated-3-odd",
    "dilated-uncovered",
    "local_window",
    "global_local-token",
    "dilated_sparse-3",
]

every = pytest.mark.parametrize("name", CUT)
some = pytest.mark.parametrize("config", [CUT[name] for name in SOME], ids=SOME)
causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
sinks_or_not = pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])


def module(config, little_room=False):
    return module_of(in_little_room(config, pool="on") if little_room else config)


# The table


def drawn(name, documents, number):
    """A call over documents, whose other sizes are drawn by these."""
    rng = random.Random(f"{name} {documents} {number}")
    batch = rng.choice([1, 2, 3])
    lengths = DOCUMENTS[documents]
    return {
        "queries": rng.choice(QUERIES),
        "batch": batch,
        "causal": rng.random() < 0.5,
        "lengths": None if lengths is None else lengths[:batch],
        "sinks": rng.random() < 0.5,
        "kv_heads": rng.choice(KV_HEADS),
    }


def check_table(name, documents, numbers):
    for number in numbers:
        attention = module(CUT[name], little_room=number % 2)
        with mock.patch.object(inputs, "cpu_takes_groups", lambda groups=number % 3: bool(groups)):
            check_float64(attention, call_of(SEQ, **drawn(name, documents, number)))


def check_table_in_low_precision(name, documents, numbers):
    for number in numbers:
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number % 3]
        call = call_of(SEQ, **drawn(name, documents, number), dtype=dtype)
        check_low_precision(module(CUT[name], little_room=number % 2), call)


@pytest.mark.parametrize("documents", DOCUMENTS)
@every
def test_float64_equals_the_oracle(name, documents):
    check_table(name, documents, [len(name) + len(documents)])


@pytest.mark.slow
@pytest.mark.parametrize("documents", DOCUMENTS)
@every
def test_float64_equals_the_oracle_in_many_calls(name, documents, seed):
    check_table(name, documents, range(20 * seed, 20 * seed + 20))


@pytest.mark.parametrize("documents", ["none", "padding", "packed"])
@every
def test_low_precision_is_as_exact_as_a_naive_attention(name, documents):
    number = len(name) + len(documents)  # each type, with little room and with more
    check_table_in_low_precision(name, documents, [number])


@pytest.mark.slow
@pytest.mark.parametrize("documents", DOCUMENTS)
@every
def test_low_precision_is_as_exact_as_a_naive_attention_in_many_calls(name, documents, seed):
    check_table_in_low_precision(name, documents, range(12 * seed, 12 * seed + 12))


@causal_or_not
@pytest.mark.parametrize("name", ["adaptive", "adaptive-own-block"])
def test_adaptive_takes_sinks(name, causal):
    check_float64(module(IMPLEMENTATIONS[name]), call_of(SEQ, batch=2, causal=causal, sinks=True))


def check_random(config, case, dtype=torch.float64):
    call = call_of(**case, dtype=dtype)
    (check_float64 if dtype == torch.float64 else check_low_precision)(module_of(config), call)


@settings(max_examples=25)
@given(config=configs(), case=calls(90))
def test_random_calls_equal_the_oracle(config, case):
    check_random(config, case)


@pytest.mark.slow
@settings(max_examples=3000)
@given(config=configs(), case=calls(200))
def test_many_random_calls_equal_the_oracle(config, case):
    check_random(config, case)


@pytest.mark.slow
@settings(max_examples=500)
@given(config=configs(), case=calls(200, head_dims=(8, 16)))
def test_random_calls_are_as_exact_as_naive_in_bfloat16(config, case):
    check_random(config, case, torch.bfloat16)


# What is hidden


def spoiled(x, where, value):
    """A copy of x [B, S, H, D] in which the tokens `where` [B, S] hold a value."""
    return torch.where(where[:, :, None, None], torch.full_like(x, value), x)


def assert_same(found, expected, value):
    """Bit for bit where a value is finite. Of others whole tiles, and backward as a whole, are computed again
    without masks."""
    if math.isfinite(value):
        assert torch.equal(found, expected)
    else:
        bar = 1e-4 if found.dtype == torch.float32 else 0.03
        torch.testing.assert_close(
            found, expected, rtol=bar, atol=bar * max(1.0, float(expected.abs().max()))
        )


def unseen(call):
    """[B, S], tokens that no query is to see: those of documents without queries."""
    seq, queries = call.k.shape[1], call.q.shape[1]
    of_queries = call.documents[:, seq - queries :]
    return (call.documents[:, :, None] != of_queries[:, None]).all(-1)


@pytest.mark.pairwise
@causal_or_not
@sinks_or_not
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@some
def test_documents_without_queries_change_no_bit(config, dtype, value, sinks, causal):
    """Whatever their keys and values hold, and whether there are gradients or not."""
    lengths = ((13, 5, 40, 19), (1, 57, 1, 18))
    call = call_of(SEQ, 18, batch=2, causal=causal, lengths=lengths, sinks=sinks, kv_heads=2, dtype=dtype)
    hidden, attention = unseen(call), module(config, True)
    assert hidden.sum() == (77 - 19) + (77 - 18)
    plain, grads = run(attention, call)
    wild = call._replace(k=spoiled(call.k, hidden, value), v=spoiled(call.v, hidden, value))
    out, wild_grads = run(attention, wild)
    assert torch.equal(out, plain)
    for x, y in zip(wild_grads, grads, strict=True):
        assert torch.equal(x, y)
    assert (grads[1][hidden] == 0).all()
    assert (grads[2][hidden] == 0).all()
    with torch.no_grad():
        assert torch.equal(attention(*wild[:3], causal, documents=call.documents, sinks=call.sinks), plain)


@pytest.mark.pairwise
@causal_or_not
@sinks_or_not
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 9.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoils", [0, 2, 4])
@some
def test_a_document_is_not_changed_by_another(config, spoils, dtype, value, sinks, causal):
    """Outputs of the others by not a bit: where one document has queries, keys and values that are not
    finite, its own outputs are not, and no others. Gradients too; those that are not finite anywhere are
    computed anew without masks, which is to rounding the same."""
    lengths = ((13, 5, 40, 1, 18), (8, 8, 35, 2, 24))
    call = call_of(SEQ, batch=2, causal=causal, lengths=lengths, sinks=sinks, kv_heads=2, dtype=dtype)
    other = torch.stack(
        [torch.repeat_interleave(torch.arange(5), torch.tensor(item)) == spoils for item in lengths]
    )
    attention = module(config, True)
    plain, grads = run(attention, call)
    wild = call._replace(
        q=spoiled(call.q, other, value), k=spoiled(call.k, other, value), v=spoiled(call.v, other, value)
    )
    out, wild_grads = run(attention, wild)
    assert torch.equal(out[~other], plain[~other])
    for x, y in zip(wild_grads[:3], grads[:3], strict=True):
        assert_same(x[~other], y[~other], value)


@pytest.mark.pairwise
@sinks_or_not
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 9.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("boundary", [60, 64, 75])
@some
def test_no_output_depends_on_the_future(config, boundary, packed, dtype, value, sinks):
    lengths = ((30, 47), (40, 37)) if packed else None
    call = call_of(SEQ, 21, batch=2, causal=True, lengths=lengths, sinks=sinks, kv_heads=2, dtype=dtype)
    later = (torch.arange(SEQ) >= boundary).expand(2, -1)
    before = slice(0, boundary - (SEQ - 21))
    attention, grad = module(config, True), output_gradient(call.q)
    grad[:, before.stop :] = 0
    plain, grads = run(attention, call, grad)
    wild = call._replace(k=spoiled(call.k, later, value), v=spoiled(call.v, later, value))
    out, wild_grads = run(attention, wild, grad)
    assert_same(out[:, before], plain[:, before], value)
    assert_same(wild_grads[0][:, before], grads[0][:, before], value)
    if value == 9.0:  # else the later queries' gradients are not finite, of whichever keys they see
        for x, y in zip(wild_grads[1:3], grads[1:3], strict=True):
            assert torch.equal(x[:, :boundary], y[:, :boundary])
            assert (x[:, boundary:] == 0).all()


# Relations


@pytest.mark.pairwise
@causal_or_not
@sinks_or_not
@pytest.mark.parametrize("name", ["dense", "local_window-token", "local_window-token-narrow"])
def test_a_document_is_a_sequence_of_its_own(name, sinks, causal):
    """Where the pattern does not know where it begins: dense, and windows that end at the token."""
    config = CUT[name]
    lengths, begin = ((30, 1, 46),), 0
    call = call_of(SEQ, causal=causal, lengths=lengths, sinks=sinks, kv_heads=2)
    out, attention = run(module(config), call)[0], module(config)
    for length in lengths[0]:
        q, k, v = (x[:, begin : begin + length] for x in call[:3])
        torch.testing.assert_close(
            out[:, begin : begin + length], attention(q, k, v, causal, sinks=call.sinks), rtol=0, atol=1e-13
        )
        begin += length


@pytest.mark.pairwise
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@some
def test_batch_items_with_documents_do_not_know_each_other(config, dtype, causal):
    lengths = ((30, 47), (77,), (9, 60, 8))
    call = call_of(SEQ, 50, batch=3, causal=causal, lengths=lengths, kv_heads=2, dtype=dtype)
    attention = module(config, True)
    out, grads = run(attention, call)
    grad = output_gradient(call.q)
    for b in range(3):
        item = slice(b, b + 1)
        q, k, v = (x[item] for x in call[:3])
        alone = call._replace(q=q, k=k, v=v, documents=call.documents[item])
        own, own_grads = run(attention, alone, grad[item])
        torch.testing.assert_close(own, out[item])
        for x, y in zip(own_grads, grads, strict=True):
            torch.testing.assert_close(x, y[item])


@some
def test_one_document_is_none_bit_for_bit(config):
    call = call_of(SEQ, batch=2, causal=True, lengths=((77,), (77,)), kv_heads=2, dtype=torch.float32)
    attention = module(config)
    out, grads = run(attention, call)
    expected, expected_grads = run(attention, call._replace(documents=None))
    assert torch.equal(out, expected)
    assert all(torch.equal(x, y) for x, y in zip(grads, expected_grads, strict=True))


@some
def test_sinks_of_minus_infinity_are_none(config):
    call = call_of(SEQ, batch=2, causal=True, sinks=True)
    attention = module(config)
    nothing = call._replace(sinks=torch.full_like(call.sinks, -torch.inf))
    out, grads = run(attention, nothing)
    expected, expected_grads = run(attention, call._replace(sinks=None))
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-15)
    for x, y in zip(grads, expected_grads, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    assert (grads[3] == 0).all()


# Decoding


def chunked(attention, call, size):
    """Outputs of a sequence computed from a cache, `size` queries at a time."""
    seq, parts = call.q.shape[1], []
    for begin in range(0, seq, size):
        end = min(begin + size, seq)
        documents = None if call.documents is None else call.documents[:, :end]
        parts.append(
            attention(
                call.q[:, begin:end],
                call.k[:, :end],
                call.v[:, :end],
                is_causal=True,
                documents=documents,
                sinks=call.sinks,
            )
        )
    return torch.cat(parts, dim=1)


CAUSAL_ALIKE = {name: config for name, config in CUT.items() if not name.startswith("dilated_sparse")}
"""Patterns whose causal rows do not depend on how long the sequence is."""


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 7, 64])
@pytest.mark.parametrize("config", CAUSAL_ALIKE.values(), ids=CAUSAL_ALIKE.keys())
def test_a_sequence_by_chunks_from_a_cache_is_the_sequence_at_once(config, size):
    seq = 130
    call = call_of(seq, batch=2, causal=True, sinks=True, lengths=((9, 121), (100, 30)), kv_heads=2)
    attention = module(config)
    with torch.no_grad():
        for one in (call, call._replace(documents=None, sinks=None)):
            at_once = attention(*one[:3], True, documents=one.documents, sinks=one.sinks)
            found = chunked(attention, one, size)
            torch.testing.assert_close(found, at_once, rtol=0, atol=1e-12)
    assert len(attention.decisions._kept) <= 32


@some
def test_a_token_at_a_time_equals_the_oracle(config):
    """Of a sequence of its own each time, for patterns that are of a whole length."""
    call = call_of(40, batch=2, causal=True, sinks=True, kv_heads=1)
    attention = module(config)
    for end in (1, 2, 8, 9, 33, 40):
        check_float64(
            attention, call._replace(q=call.q[:, end - 1 : end], k=call.k[:, :end], v=call.v[:, :end])
        )


def test_a_cache_may_be_a_view_of_a_larger_one():
    """As static caches are: heads before tokens, and room behind the last."""
    q, k, v, *_ = call_of(50, 1, batch=2, kv_heads=2)
    room = [torch.full((2, 2, 80, 16), torch.nan, dtype=torch.float64) for _ in "kv"]
    for store, x in zip(room, (k, v), strict=True):
        store[:, :, :50] = x.transpose(1, 2)
    views = [store[:, :, :50].transpose(1, 2) for store in room]
    for config in CUT.values():
        attention = module(config)
        assert torch.equal(attention(q, *views, True), attention(q, k, v, True))


# Refusals


def test_each_attention_takes_a_feature_or_says_why_not():
    for config in IMPLEMENTATIONS.values():
        for feature in NAMES:
            why = unfit_feature(config, feature)
            assert (why is None) == (config.variant != "adaptive" or feature in ("sinks", "weights"))
    for backend in ("flash", "cudnn"):
        config = AttentionConfig(variant="dense", backend=backend)
        assert all("whole sequences" in unfit_feature(config, each) for each in ("queries", "documents"))
        assert unfit_feature(config, "sinks") is None
    flex = AttentionConfig(variant="dense", backend="flex")
    assert all("FlexAttention" in unfit_feature(flex, each) for each in ("queries", "documents", "sinks"))


def test_weights_are_of_whole_sequences():
    for one in ("queries", "documents"):
        assert together(one, "weights")
        assert together("weights", one) == together(one, "weights")
    assert together("sinks", "weights") is None
    assert together("queries", "documents") is None


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("kind", ["dense", "dilated-2", "global_local", "adaptive"])
def test_arguments_of_other_attentions_are_refused_by_name(kind, name):
    call = call_of(9)
    with pytest.raises(UnavailableError, match=rf"does not take {name}=: \w"):
        module(IMPLEMENTATIONS[kind])(*call[:3], **{name: None})


def test_arguments_that_nobody_knows_are_type_errors():
    with pytest.raises(TypeError, match="unexpected argument 'colour'"):
        module(CUT["dense"])(*call_of(9)[:3], colour="red")
