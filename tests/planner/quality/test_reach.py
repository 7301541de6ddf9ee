"""Reach against a search over the oracle's mask, token by token."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from edges import WINDOWED, by_token
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.config import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.reference import multiplicity
from planner.configs import Columns, columns_of
from planner.fitting.samples import samples
from planner.quality.reach import keyless, layers, reaches
from planner.workload import Workload

KINDS = ("local_window", "global_local", "dilated", "dilated_sparse")


def searched(config, workload):
    sees = (multiplicity(config, workload.seq, workload.heads, workload.causal) > 0).any(dim=0).numpy()
    seen = np.arange(workload.seq) == workload.seq - 1
    for layer in range(1, workload.seq + 1):
        now = seen | sees[seen].any(axis=0)
        if now.all():
            return layer
        if (now == seen).all():
            return None
        seen = now
    return None


@pytest.mark.parametrize("longest", [40, 300])
def test_layers_are_those_of_the_oracles_mask(longest):
    for config, workload in islice(samples(7, longest=longest, kinds=KINDS), 80):
        expected = searched(config, workload)
        assert layers(config, workload) == expected, (config, workload)
        for within in (1, 2, 5):
            found = reaches(columns_of(config, workload.seq), workload, within)
            assert found.tolist() == [expected is not None and expected <= within]


def test_layers_of_windows_that_end_at_the_token_are_those_of_the_oracles_mask():
    for number, (config, workload) in enumerate(islice(samples(8, longest=200, kinds=WINDOWED), 60)):
        config = by_token(config, number % 41 - 20)
        assert layers(config, workload) == searched(config, workload), (config, workload)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("documents", [(64, 256, 32), (256, 16, 256)])
def test_layers_of_documents_are_those_of_the_longest(documents, causal):
    """Global tokens are those of the first document."""
    seq, begin = sum(documents), documents.index(256)
    for shared, own in ((16, 0 if begin else 16), (80, 16 if begin else 80)):
        fields = {"block_size": 16, "local_window_size": 32}
        pattern = SparsePatternConfig(pattern_type="global_local", global_tokens=shared, **fields)
        config = AttentionConfig(variant="block_sparse", pattern=pattern)
        alone = SparsePatternConfig(pattern_type="local_window", **fields)
        if own:
            alone = pattern.model_copy(update={"global_tokens": own})
        expected = searched(
            AttentionConfig(variant="block_sparse", pattern=alone), Workload(seq=256, causal=causal)
        )
        workload = Workload(seq=seq, documents=documents, causal=causal)
        assert layers(config, workload) == expected
        assert layers(config, workload.model_copy(update={"queries": 1})) == expected
        found = reaches(columns_of(config, seq), workload, expected)
        assert found.tolist() == [True]


@settings(max_examples=40)
@given(
    seq=st.integers(1, 120),
    causal=st.booleans(),
    heads=st.sampled_from([1, 3, 8]),
    branches=st.lists(st.tuples(st.integers(6, 90), st.integers(1, 6)), min_size=1, max_size=3),
)
def test_branches_that_do_not_nest_or_cover(seq, causal, heads, branches):
    lengths, rates = zip(*branches, strict=True)
    config = AttentionConfig(
        variant="dilated", segment_lengths=lengths, dilation_rates=rates, uncovered="zero"
    )
    workload = Workload(seq=seq, causal=causal, heads=heads)
    assert layers(config, workload) == searched(config, workload)
    assert keyless(config) == (1 not in rates)


@pytest.mark.parametrize("kind", [*KINDS, "adaptive"])
@pytest.mark.parametrize("causal", [False, True])
def test_many_at_once_are_as_one_by_one(kind, causal):
    rng, count, workload = np.random.default_rng(2), 40, Workload(seq=3000, causal=causal, heads=4)
    size, length = 2 ** rng.integers(4, 8, count), 2 ** rng.integers(7, 10, count)
    branches = {
        "lengths": (length, length << 3),
        "rates": (np.ones(count, np.int64), 2 ** rng.integers(0, 4, count)),
    }
    ratio = rng.choice([0.001, 0.02, 0.1, 1.0], count)
    many = {
        "dilated": Columns("dilated", seq=3000, **branches),
        "adaptive": Columns("adaptive", seq=3000, block_size=size, sparsity_ratio=ratio),
        "dilated_sparse": Columns(
            "block_sparse", "dilated_sparse", seq=3000, block_size=size, sparsity_ratio=ratio, **branches
        ),
    }.get(kind) or Columns(
        "block_sparse",
        kind,
        seq=3000,
        block_size=size,
        window=rng.integers(1, 2000, count),
        global_tokens=rng.integers(1, 99, count),
    )
    each = [layers(many.config(at, workload), workload) for at in range(count)]
    for within in (1, 2, 3, 12, 4000):
        expected = [found is not None and found <= within for found in each]
        assert reaches(many, workload, within).tolist() == expected


def test_dense_reaches_at_once():
    assert layers(AttentionConfig(variant="dense"), Workload(seq=1 << 20)) == 1


def test_causal_global_tokens_do_not_help():
    pattern = SparsePatternConfig(
        pattern_type="global_local", block_size=64, local_window_size=512, global_tokens=64
    )
    config = AttentionConfig(variant="block_sparse", pattern=pattern)
    assert layers(config, Workload(seq=1 << 14)) == 2
    assert layers(config, Workload(seq=1 << 14, causal=True)) == 32


@pytest.mark.parametrize(
    "seq, ratio, heads, expected",
    [(64, 0.1, 1, 1), (4096, 0.001, 8, None), (4096, 0.1, 1, 3), (4096, 0.1, 8, 2), (4096, 1.0, 1, 1)],
)
def test_adaptive_multiplies_by_what_its_heads_choose(seq, ratio, heads, expected):
    config = AttentionConfig(
        variant="adaptive",
        pattern=SparsePatternConfig(block_size=64, sparsity_ratio=ratio),
        adaptive=AdaptiveConfig(num_heads=heads, head_dim=64),
    )
    assert layers(config, Workload(seq=seq, heads=heads)) == expected
