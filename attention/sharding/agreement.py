"""What the ranks of a ring agree on before they exchange anything, so that a refusal is on all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from attention.config import AttentionConfig
from attention.documents import Lengths
from attention.errors import InputError, shortened
from attention.inputs import DTYPES
from attention.sharding.transport import Transport

PASSES: Final = ("forward", "backward", "gather", "traffic")
DEVICES: Final = ("cpu", "cuda")
INPUTS: Final = ("q", "k", "v", "sinks", "the scorer")


def _one_of(names: tuple[Any, ...]) -> Callable[[int], str]:
    return lambda number: str(names[number]).removeprefix("torch.")


def _some_of(number: int) -> str:
    return ", ".join(name for bit, name in enumerate(INPUTS) if number >> bit & 1) or "none"


def _hash(number: int) -> str:
    return f"{number:016x}"[-8:] if number else "none"


FIELDS: Final[Mapping[str, Callable[[int], str]]] = {
    "pass": _one_of(PASSES),
    "number of the call": str,
    "config": _hash,
    "dtype": _one_of(DTYPES),
    "device": _one_of(DEVICES),
    "batch": str,
    "heads": str,
    "kv_heads": str,
    "head_dim": str,
    "is_causal": lambda number: str(bool(number)),
    "inputs that need gradients": _some_of,
    "sinks": lambda number: str(bool(number)),
    "documents": _hash,
    "dtype and shape beside the tokens": _hash,
}
"""What is equal on all ranks, and how a value of it is said."""


def refuse(transport: Transport, error: Exception) -> NoReturn:
    """Raises the error of this rank's call, and lets the others know, who refuse theirs in `agree`."""
    transport.agree([1])
    raise error


def agree(transport: Transport, terms: Mapping[str, int], tokens: int = 0) -> list[int]:
    """The tokens of each rank, if all of them come with the same `terms`, numbers by the names of `FIELDS`.
    Otherwise, and where one of them refuses, it is an InputError on all ranks, which says who has what."""
    fields = [terms.get(name, 0) for name in FIELDS]
    rows = transport.agree([0, tokens, *fields])
    refusing = [transport.ranks[rank] for rank, row in enumerate(rows) if row[0]]
    if refusing:
        raise InputError(
            f"ranks {refusing} refused their part of this call, as their errors say; nothing was exchanged"
        )
    differences = []
    for place, (name, text) in enumerate(FIELDS.items(), 2):
        holders: dict[int, list[int]] = {}
        for rank, row in zip(transport.ranks, rows, strict=True):
            holders.setdefault(row[place], []).append(rank)
        if len(holders) > 1:
            each = (f"{text(value)} on ranks {ranks}" for value, ranks in holders.items())
            differences.append(f"{name}: {', '.join(each)}")
    if differences:
        raise InputError(
            "the ranks that share a sequence differ, and nothing was exchanged; call the same attention with "
            f"inputs of one kind on all: {shortened('; '.join(differences), 1000)}"
        )
    return [row[1] for row in rows]


def check_tokens(tokens: list[int], dealt: list[int]) -> None:
    """Raises InputError unless ranks hold as many tokens as they are dealt."""
    if tokens == dealt:
        return
    raise InputError(
        f"a sequence of {sum(dealt)} tokens is shared by ranks of "
        f"{shortened(str(dealt), 300)} tokens, got {shortened(str(tokens), 300)}; give each rank its own by "
        "module.shard(x), or those at module.positions(seq)"
    )


def terms_of_call(
    config: AttentionConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    lengths: Lengths | None,
    sinks: Tensor | None,
    scorer: Tensor | None = None,
) -> dict[str, int]:
    """The terms of a forward call, of checked inputs. `scorer`: a weight of it, if the attention has one."""
    trains = torch.is_grad_enabled()
    needs = [x is not None and trains and x.requires_grad for x in (q, k, v, sinks, scorer)]
    return {
        "pass": PASSES.index("forward"),
        "config": number_of(config.to_json()),
        "dtype": DTYPES.index(q.dtype),
        "device": DEVICES.index(q.device.type),
        "batch": q.shape[0],
        "heads": q.shape[2],
        "kv_heads": k.shape[2],
        "head_dim": q.shape[3],
        "is_causal": int(is_causal),
        "inputs that need gradients": sum(need << bit for bit, need in enumerate(needs)),
        "sinks": int(sinks is not None),
        "documents": 0 if lengths is None else number_of(repr(lengths)),
    }


def number_of(text: str) -> int:
    """63 bits that another text does not have."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
