"""Documents by their lengths, those alike together."""

from __future__ import annotations

import numpy as np

from planner.configs import Columns
from planner.documents import MOST_LENGTHS, Document, documents_of, longest, parts
from planner.workload import Workload


def test_equal_documents_are_together_but_those_with_global_tokens():
    workload = Workload(seq=100, documents=(20, 20, 40, 20))
    assert documents_of(workload, 0) == [Document(20, 20, None, 3), Document(40, 40, None, 1)]
    apart = documents_of(workload, 25)
    assert apart == [
        Document(20, 20, 0, 1),
        Document(20, 20, 20, 1),
        Document(40, 40, None, 1),
        Document(20, 20, None, 1),
    ]


def test_documents_in_which_no_token_asks_are_left_out():
    workload = Workload(seq=100, documents=(20, 20, 40, 20), queries=30)
    assert documents_of(workload, 0) == [Document(40, 10, None, 1), Document(20, 20, None, 1)]


def test_many_lengths_are_a_few_means_of_as_many_tokens():
    lengths = tuple(range(100, 400))
    found = documents_of(Workload(seq=sum(lengths), documents=lengths), 0)
    assert len(found) <= MOST_LENGTHS
    assert sum(one.copies for one in found) == 300
    assert abs(sum(one.copies * one.length for one in found) / sum(lengths) - 1) < 1e-3


def test_candidates_have_the_blocks_of_the_sequence_and_the_global_tokens_of_its_begin():
    workload = Workload(seq=4096, documents=(1024, 2048, 1024))
    shared = np.array([16, 1500])
    columns = Columns(
        "block_sparse", "global_local", seq=4096, block_size=64, window=128, global_tokens=shared
    )
    found = [(part.workload.seq, part.columns.global_tokens.tolist()) for part in parts(columns, workload)]
    assert found == [(1024, [16, 1500]), (2048, [0, 476]), (1024, [0, 0])]
    assert longest(columns, workload).columns.global_tokens.tolist() == [0, 476]
    adaptive = Columns("adaptive", seq=4096, block_size=64, sparsity_ratio=np.array([0.1, 0.5]))
    ratios = [part.columns.sparsity_ratio.tolist() for part in parts(adaptive, workload)]
    assert ratios == [[6 / 16, 1.0], [6 / 32, 1.0]]
