"""Registered in transformers, our attention gives what its eager attention gives under its own masks: sliding
windows, packed sequences, padding, learned sinks, caches. Tiny random models, in double precision but for the
softmax, which transformers computes in single. Skips itself where transformers is not installed."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from tolerance import relative_error

from attention import AttentionConfig, SparsePatternConfig, build

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SEQ, WINDOW, BAR = 41, 7, 2e-6
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS = {
    "mistral": ("Mistral", SIZES),
    "gemma3": ("Gemma3", SIZES | ALTERNATING),
    "gpt_oss": ("GptOss", SIZES | ALTERNATING | {"num_local_experts": 2, "num_experts_per_tok": 2}),
}
every = pytest.mark.parametrize("name", MODELS)

given = {}
"""The documents of the call that is being made, which a mask would tell the models' own attentions."""


@cache
def attention_of(scale, window):
    """Our attention of a layer."""
    if window is None:
        return build(AttentionConfig(variant="dense", scale=scale))
    pattern = SparsePatternConfig(
        pattern_type="local_window", block_size=4, local_window_size=window - 1, edges="token"
    )
    return build(AttentionConfig(variant="block_sparse", pattern=pattern, scale=scale))


def ours(module, query, key, value, mask, scaling, dropout=0.0, sliding_window=None, s_aux=None, **_):
    assert mask is None
    assert not dropout
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    documents = given.get("documents")
    if documents is not None:  # of the keys that the layer's cache still has
        documents = documents[:, documents.shape[1] - k.shape[1] :]
    out = attention_of(scaling, sliding_window)(q, k, v, is_causal=True, documents=documents, sinks=s_aux)
    return out, None


@cache
def model_of(name):
    transformers.AttentionInterface.register("ours", ours)
    transformers.AttentionMaskInterface.register("ours", lambda *_, **__: None)
    kind, sizes = MODELS[name]
    config = f"{kind}{'Text' if kind == 'Gemma3' else ''}Config"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, config)(**sizes)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # others take no double precision
    return model.eval()


@cache
def in_single(name):
    """The model in single precision: where a query sees nothing, their mask of the lowest number is minus
    infinity to a softmax in single precision, and their padding NaN."""
    return copy.deepcopy(model_of(name)).float()


def logits(model, implementation, ids, documents=None, **arguments):
    """Of a model with an attention; `documents`: what the mask says, for ours."""
    model.set_attn_implementation(implementation)
    given["documents"] = documents
    try:
        return model(ids, use_cache=False, **arguments).logits
    finally:
        given.clear()


def tokens(batch=2, seq=SEQ):
    return torch.randint(1, 50, (batch, seq), generator=torch.Generator().manual_seed(1))


def both(model, ids, documents=None, ours_has=(), **arguments):
    """(theirs, ours); arguments named in `ours_has` are for both, the others for theirs alone."""
    shared = {key: value for key, value in arguments.items() if key in ours_has}
    with torch.no_grad():
        return logits(model, "eager", ids, **arguments), logits(model, "ours", ids, documents, **shared)


@every
def test_windows_and_sinks_are_theirs(name):
    theirs, found = both(model_of(name), tokens())
    assert relative_error(found, theirs) <= BAR


@every
def test_packed_sequences_are_documents(name):
    """Told by position ids as theirs are, and each as if it were alone. (Of gpt-oss only that: transformers
    5.24 does not look at position ids there, and lets its documents see each other.)"""
    lengths, ids, model = (5, 1, 19, 16), tokens(1), model_of(name)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = (position_ids == 0).cumsum(-1)
    theirs, found = both(model, ids, documents, ("position_ids",), position_ids=position_ids)
    if name != "gpt_oss":
        assert relative_error(found, theirs) <= BAR
    with torch.no_grad():
        alone = torch.cat([logits(model, "eager", part) for part in ids.split(lengths, 1)], 1)
    assert relative_error(found, alone) <= BAR
    whole = both(model, ids, None, ("position_ids",), position_ids=position_ids)[1]
    assert relative_error(whole, alone) > 1e-3  # without documents it is another


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_a_document(name, side):
    mask = torch.ones(2, SEQ, dtype=torch.int64)
    mask[1, slice(0, 6) if side == "left" else slice(-6, None)] = 0
    theirs, found = both(in_single(name), tokens(), mask, attention_mask=mask)
    assert relative_error(found[mask > 0], theirs[mask > 0]) <= 20 * BAR


@every
def test_training_steps_are_alike(name):
    """Loss and the gradients of all parameters, gpt-oss's sinks among them."""
    steps = []
    for implementation in ("eager", "ours"):
        model = model_of(name)
        model.zero_grad()
        loss = logits(model, implementation, tokens()).log_softmax(-1)[..., 3].mean()
        loss.backward()
        steps.append(
            (
                loss.detach(),
                {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None},
            )
        )
    (loss, grads), (our_loss, our_grads) = steps
    assert relative_error(our_loss, loss) <= BAR
    assert grads.keys() == our_grads.keys()
    assert any("sinks" in key for key in grads) == (name == "gpt_oss")
    for key, grad in grads.items():
        assert relative_error(our_grads[key], grad) <= 20 * BAR, key


@every
@pytest.mark.parametrize("chunks", [(20, *(1,) * 21), (9, 9, 9, 14), (1,) * 41])
@pytest.mark.parametrize("padded", [False, True])
def test_caches_give_what_the_whole_sequence_gives(name, chunks, padded):
    """Prefill at once or in chunks, and decoding; sliding layers' caches hold their window alone."""
    ids, mask = tokens(), torch.ones(2, SEQ, dtype=torch.int64)
    if padded:
        mask[1, :6] = 0
    model = in_single(name) if padded else model_of(name)
    theirs = both(model, ids, mask, attention_mask=mask)[0]
    model.set_attn_implementation("ours")
    past, begin, parts = transformers.DynamicCache(config=model.config), 0, []
    for size in chunks:
        end = begin + size
        given["documents"] = mask[:, :end] if padded else None
        with torch.no_grad():
            result = model(ids[:, begin:end], past_key_values=past, use_cache=True)
        parts.append(result.logits)
        past, begin = result.past_key_values, end
    given.clear()
    found = torch.cat(parts, 1)
    assert relative_error(found[mask > 0], theirs[mask > 0]) <= (20 * BAR if padded else BAR)
