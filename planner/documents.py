"""The documents of a workload as sequences of their own: what the closed forms of speed and quality sum over.
Imports no torch.

A pattern is laid over the whole sequence and what crosses documents is taken away; here each document has the
pattern from its own first token on. Windows are the same either way, to the block, and blocks, segments and
rates are moved by less than one of each: that is neglected. Global tokens are those of the sequence's begin,
and a row keeps as many blocks as in the whole sequence, where its document has so many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any, Final, NamedTuple

from attention.sizes.arrays import ceil_div, maximum, row_blocks, where
from planner.configs import Columns
from planner.workload import Workload

MOST_LENGTHS: Final = 16
"""Lengths that are told apart; where there are more, neighbours in length count as their mean."""


class Document(NamedTuple):
    """Documents that are alike."""

    length: int
    queries: int
    """Their last tokens that ask, at least one."""
    start: int | None
    """Token of the sequence at which it begins; None where that is behind all global tokens."""
    copies: int


class DocumentPart(NamedTuple):
    """Documents that are alike, as candidates and a workload of their own."""

    columns: Columns
    workload: Workload
    copies: int

    @property
    def queries(self) -> int:
        """Tokens that ask in all of them."""
        return self.copies * self.workload.query_tokens


def documents_of(workload: Workload, global_tokens: int) -> list[Document]:
    """The documents in which a token asks, equal ones together."""
    lengths = workload.documents or (workload.seq,)
    first = sum(lengths) - (workload.queries or sum(lengths))
    alike: Counter[tuple[int, int, int | None]] = Counter()
    for length, stop in zip(lengths, accumulate(lengths), strict=True):
        queries = min(length, stop - first)
        if queries > 0:
            start = stop - length
            alike[length, queries, start if start < global_tokens else None] += 1
    return _fewer([Document(*document, count) for document, count in alike.items()])


def _fewer(documents: list[Document]) -> list[Document]:
    """No more than MOST_LENGTHS of those of which all tokens ask, and whose place does not matter."""
    free = sorted(one for one in documents if one.start is None and one.queries == one.length)
    if len(free) <= MOST_LENGTHS:
        return documents
    total, done = sum(one.length * one.copies for one in free), 0
    groups: dict[int, list[Document]] = {}
    for one in free:
        groups.setdefault(done * MOST_LENGTHS // total, []).append(one)
        done += one.length * one.copies
    means = []
    for group in groups.values():
        count, tokens = sum(one.copies for one in group), sum(one.copies * one.length for one in group)
        mean = max(round(tokens / count), 1)
        means.append(Document(mean, mean, None, count))
    return [one for one in documents if one not in free] + means


def parts(columns: Columns, workload: Workload) -> Iterator[DocumentPart]:
    """The candidates over each kind of document in which a token asks."""
    assert workload.documents is not None
    for document in documents_of(workload, _most_globals(columns)):
        yield _part(columns, workload, document)


def longest(columns: Columns, workload: Workload) -> DocumentPart:
    """The candidates over the first of the longest documents, all of whose tokens ask."""
    lengths = workload.documents or (workload.seq,)
    length = max(lengths)
    start = sum(lengths[: lengths.index(length)])
    return _part(columns, workload, Document(length, length, start, 1))


def _part(columns: Columns, workload: Workload, document: Document) -> DocumentPart:
    untyped: Any = columns
    fields: dict[str, Any] = {"seq": document.length}
    if columns.pattern_type == "global_local":
        start = _most_globals(columns) if document.start is None else document.start
        fields["global_tokens"] = maximum(untyped.global_tokens - start, 0)
    elif columns.variant == "adaptive" or columns.pattern_type == "dilated_sparse":
        kept = row_blocks(untyped.sparsity_ratio, ceil_div(untyped.seq, untyped.block_size))
        share: Any = kept / ceil_div(document.length, untyped.block_size)
        fields["sparsity_ratio"] = where(share < 1, share, 1.0)  # type: ignore[arg-type]
    own = {"seq": document.length, "queries": document.queries, "documents": None}
    return DocumentPart(replace(columns, **fields), workload.model_copy(update=own), document.copies)


def _most_globals(columns: Columns) -> int:
    """Global tokens of the candidate that has most."""
    column: Any = columns.global_tokens if columns.pattern_type == "global_local" else 0
    return int(column.max()) if hasattr(column, "dtype") else column
