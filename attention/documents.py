"""Documents: numbers of tokens, in runs; the tokens of a run see each other alone."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention.errors import InputError

Lengths = tuple[tuple[int, ...], ...]
"""Tokens of each document of each batch item, in their order."""
MOST_KEPT = 16
"""Tensors whose documents are remembered."""
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_kept: dict[int, tuple[weakref.ref[Tensor], int, Lengths]] = {}


def document_lengths(documents: Any, batch: int, seq: int) -> Lengths:
    """The lengths of the documents of [batch, seq] numbers of which equal ones follow each other.

    What the numbers are is read once for a tensor, however many layers ask, as long as nobody writes to it;
    of a tensor made under `torch.inference_mode`, which does not tell, each time.
    """
    if not isinstance(documents, Tensor) or documents.dtype not in WHOLE:
        what = documents.dtype if isinstance(documents, Tensor) else type(documents).__name__
        raise InputError(f"documents must be a tensor of whole numbers, one a token; got {what}")
    if tuple(documents.shape) != (batch, seq):
        raise InputError(
            f"documents must be [batch, seq] of k, {[batch, seq]}, a number for each token; got "
            f"{list(documents.shape)}"
        )
    if documents.is_meta:
        raise InputError("documents on the meta device hold no numbers; give them where k is")
    version = None if documents.is_inference() else documents._version
    kept = _kept.get(id(documents))
    if version is not None and kept is not None and kept[0]() is documents and kept[1] == version:
        return kept[2]
    lengths = _lengths(documents.detach())
    if version is not None:
        _kept.pop(id(documents), None)
        for key in [key for key, (tensor, *_) in list(_kept.items()) if tensor() is None]:
            _kept.pop(key, None)
        for key in list(_kept)[: max(len(_kept) + 1 - MOST_KEPT, 0)]:
            _kept.pop(key, None)
        _kept[id(documents)] = (weakref.ref(documents), version, lengths)
    return lengths


def _lengths(documents: Tensor) -> Lengths:
    lengths: list[tuple[int, ...]] = []
    for item, numbers in enumerate(documents.cpu().numpy()):
        if not len(numbers):
            lengths.append(())
            continue
        begins = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist()]
        runs, seen = numbers[begins].tolist(), set()
        for number in runs:
            if number in seen:
                raise InputError(
                    f"equal numbers of documents must follow each other, but in batch item {item} there is "
                    f"{number}, then others, then {number} again; number the documents anew"
                )
            seen.add(number)
        lengths.append(tuple(end - begin for begin, end in pairwise([*begins, len(numbers)])))
    return tuple(lengths)
