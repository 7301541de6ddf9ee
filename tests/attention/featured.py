"""What calls may have beside q, k and v, for the checks of `test_features.py`: fewer queries than keys,
documents and learned sinks, at random and by table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from conformance import machine_with, output_gradient, qkv
from hypothesis import strategies as st
from tolerance import (
    GRADIENT_BAR,
    GRADIENT_FACTOR,
    allowed,
    assert_as_exact_as_naive,
    assert_exact,
    forward_and_gradients,
    gradient_errors,
    largest_score,
)
from torch import Tensor, nn

from attention.reference import multiplicity, reference_attention

Lengths = Sequence[Sequence[int]]
"""Of the documents of each batch item."""


class Call(NamedTuple):
    """The inputs of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    documents: Tensor | None = None
    sinks: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Call:
        """In another type; sinks stay as they are, unless it is float64."""
        q, k, v = (x.to(dtype) for x in (self.q, self.k, self.v))
        sinks = self.sinks if self.sinks is None or dtype != torch.float64 else self.sinks.double()
        return self._replace(q=q, k=k, v=v, sinks=sinks)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What there are gradients of."""
        return (self.q, self.k, self.v, *(() if self.sinks is None else (self.sinks,)))

    def options(self, sinks: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments beside the tensors; `sinks`: those, if there are any."""
        return {"documents": self.documents, "sinks": sinks[0] if sinks else None}


def numbered(lengths: Lengths) -> Tensor:
    """Documents of these lengths, numbered so that neither order nor size means anything."""
    rows = []
    for item in lengths:
        numbers = [(7 * n + 3) % (len(item) + 11) * (-1) ** n + 2 * n for n in range(len(item))]
        numbers = numbers if len(set(numbers)) == len(numbers) else list(range(len(item)))
        rows.append(torch.repeat_interleave(torch.tensor(numbers), torch.tensor(item)))
    return torch.stack(rows)


def call_of(
    seq: int,
    queries: int | None = None,
    *,
    batch: int = 1,
    causal: bool = False,
    lengths: Lengths | None = None,
    sinks: bool = False,
    seed: int = 0,
    **sizes: Any,
) -> Call:
    """A call of random tensors: the last `queries` of a sequence."""
    q, k, v = qkv(seq, batch=batch, seed=seed, **sizes)
    logits = None
    if sinks:
        generator = torch.Generator().manual_seed(seed + 100)
        logits = 2 * torch.randn(q.shape[2], generator=generator, dtype=torch.float64)
        logits = logits if q.dtype == torch.float64 else logits.float()
    documents = None if lengths is None else numbered(lengths)
    return Call(q[:, seq - (queries or seq) :], k, v, causal, documents, logits)


def run(module: nn.Module, call: Call, grad: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(out, gradients of what the call has)."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        out: Tensor = module(q, k, v, is_causal=call.causal, **call.options(sinks))
        return out

    return forward_and_gradients(attention, call.leaves, output_gradient(call.q) if grad is None else grad)


def exact(config: Any, call: Call, grad: Tensor, layout: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`run` of the oracle."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        return reference_attention(q, k, v, config, call.causal, layout, **call.options(sinks))

    return forward_and_gradients(attention, call.to(torch.float64).leaves, grad.double())


def choice(module: nn.Module, call: Call) -> Tensor | None:
    """The blocks that an adaptive module chooses; None of all others."""
    return module.select(call.q, call.k, call.causal) if module.config.variant == "adaptive" else None


def visible(module: nn.Module, call: Call) -> Tensor:
    """M of the call's queries, [B, H, Q, S]: the pattern's, within documents."""
    config, (seq, queries) = module.config, (call.k.shape[1], call.q.shape[1])
    m = multiplicity(config, seq, call.q.shape[2], call.causal)[None, :, seq - queries :]
    if call.documents is None:
        return m.expand(call.q.shape[0], -1, -1, -1)
    same = call.documents[:, seq - queries :, None] == call.documents[:, None]
    return m * same[:, None]


def naive(m: Tensor, scale: float, q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
    """Masked softmax((q k^T) scale + log m) v, every step in the dtype of q; sinks are one more column."""
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    key, value = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (key, value))
    empty = (m == 0).all(dim=-1, keepdim=True)
    scores = query @ key.transpose(-1, -2) * scale + m.log().masked_fill(empty, 0.0).to(q.dtype)
    if sinks:
        column = sinks[0].to(q.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : k.shape[1]].masked_fill(empty, 0.0)
    return (weights @ value).transpose(1, 2)


def check_float64(module: nn.Module, call: Call) -> None:
    """Forward and gradients equal the oracle to the float64 bars, those of sinks too; and without gradients
    the output is the same."""
    grad = output_gradient(call.q)
    out, grads = run(module, call, grad)
    with torch.no_grad():
        assert torch.equal(out, module(*call[:3], call.causal, documents=call.documents, sinks=call.sinks))
    expected, expected_grads = exact(module.config, call, grad, choice(module, call))
    assert_exact((out, grads[:3]), (expected, expected_grads[:3]))
    if call.sinks is not None:
        assert gradient_errors(grads[3:], expected_grads[3:])[0] <= GRADIENT_BAR


def check_low_precision(module: nn.Module, call: Call) -> None:
    """Forward and gradients are as near the oracle as the rule for their dtype asks; 16-bit types both as on
    a machine with a matrix unit for them and as on one without."""
    grad, m = output_gradient(call.q), visible(module, call)
    scale = module.config.scale or 1 / math.sqrt(call.q.shape[3])
    peer = forward_and_gradients(lambda *x: naive(m, scale, *x), call.leaves, grad)
    reference = exact(module.config, call, grad, None)
    scores = largest_score(call.q, call.k, scale)
    for unit in (False, True) if call.q.element_size() == 2 else (None,):
        with machine_with(unit):
            ours = run(module, call, grad)
        assert ours[0].dtype == call.q.dtype
        assert_as_exact_as_naive(*((x[0], x[1][:3]) for x in (ours, peer, reference)), scores)
        if call.sinks is not None:
            error, bar = (gradient_errors(x[1][3:], reference[1][3:])[0] for x in (ours, peer))
            assert ours[1][3].dtype == call.sinks.dtype
            # A sum over queries of out * grad, of an out that is rounded: its terms are larger than it.
            terms = float((reference[0] * grad.double()).abs().sum()) / call.q.shape[2]
            rounded = terms / max(float(reference[1][3].abs().max()), 1e-30)
            assert (
                error
                <= allowed(bar, GRADIENT_FACTOR, call.q.dtype, scores)
                + rounded * torch.finfo(call.q.dtype).eps
            )


# Random calls


@st.composite
def document_lengths(draw: st.DrawFn, seq: int) -> tuple[int, ...]:
    """Documents of a sequence: few of any length, many short ones, or padding and one."""
    most = draw(st.sampled_from([1, 2, 4, 12, seq]))
    inner = draw(st.sets(st.integers(1, seq - 1), max_size=most - 1)) if seq > 1 else ()
    return tuple(end - begin for begin, end in pairwise([0, *sorted(inner), seq]))


@st.composite
def calls(draw: st.DrawFn, longest: int = 150, head_dims: Sequence[int] = (1, 3, 8, 16)) -> dict[str, Any]:
    """The arguments of `call_of`."""
    seq, batch = draw(st.integers(1, longest)), draw(st.sampled_from([1, 2, 3]))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    given = draw(st.sampled_from(["queries", "documents", "sinks", "all"]))
    cut = given in ("queries", "all")
    return {
        "seq": seq,
        "queries": draw(st.one_of(st.just(1), st.integers(1, seq))) if cut else seq,
        "batch": batch,
        "causal": draw(st.booleans()),
        "lengths": tuple(draw(document_lengths(seq)) for _ in range(batch))
        if given in ("documents", "all")
        else None,
        "sinks": given in ("sinks", "all"),
        "kv_heads": kv_heads,
        "heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "head_dim": draw(st.sampled_from(head_dims)),
        "seed": draw(st.integers(0, 1000)),
    }
