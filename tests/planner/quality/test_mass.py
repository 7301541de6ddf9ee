"""Captured mass against the oracle's mask, one query after the other."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from edges import WINDOWED, by_token
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.config import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.layout import build_layout
from attention.reference import multiplicity
from planner.configs import Columns
from planner.fitting.samples import samples
from planner.quality.mass import mass, mass_of
from planner.quality.profiles import PRESETS, Profile, preset
from planner.workload import Workload

KINDS = ("local_window", "global_local", "dilated", "dilated_sparse")
PROFILES = list(PRESETS.values())


def dense(profile, n, causal):
    """[n, n], the profile's mass of every pair, as its formula says."""
    away = np.abs(np.arange(n)[:, None] - np.arange(n)[None])
    allowed = np.tril(np.ones((n, n))) if causal else np.ones((n, n))
    total = np.zeros((n, n))
    parts = [np.exp(-away / scale) for scale in profile.scales]
    parts += [np.ones((n, n)), np.broadcast_to(np.arange(n) < profile.sink_tokens, (n, n))]
    for part, share in zip(parts, (*profile.shares, profile.far_mass, profile.sink_mass), strict=True):
        part = part * allowed
        total += share * part / part.sum(axis=1, keepdims=True)
    return total


def brute(config, workload, profile):
    mask = multiplicity(config, workload.seq, workload.heads, workload.causal).numpy() > 0
    every, begin = [], 0
    for length in workload.documents or (workload.seq,):
        own = slice(begin, begin + length)
        every.append((mask[:, own, own] * dense(profile, length, workload.causal)).sum(axis=2))
        begin += length
    return np.concatenate(every, axis=1)[:, workload.seq - workload.query_tokens :].mean()


def few_heads(workload, number):
    return workload.model_copy(update={"heads": (1, 3, 8)[number % 3], "kv_heads": None})


@pytest.mark.parametrize("longest, count", [(40, 80), (300, 60), (1500, 8)])
def test_mass_is_that_of_the_oracles_mask(longest, count):
    for number, (config, workload) in enumerate(islice(samples(5, longest=longest, kinds=KINDS), count)):
        workload = few_heads(workload, number // 4)
        profile = PROFILES[number % 4]
        expected = brute(config, workload, profile)
        assert mass_of(config, workload, profile) == pytest.approx(expected, abs=1e-3), (config, workload)


@pytest.mark.parametrize("longest, count", [(40, 60), (300, 40), (1500, 6)])
def test_mass_of_windows_that_end_at_the_token_is_that_of_the_oracles_mask(longest, count):
    for number, (config, workload) in enumerate(islice(samples(6, longest=longest, kinds=WINDOWED), count)):
        config, workload = by_token(config, number % 41 - 20), few_heads(workload, 0)
        profile = PROFILES[number % 4]
        expected = brute(config, workload, profile)
        assert mass_of(config, workload, profile) == pytest.approx(expected, abs=1e-3), (config, workload)


@pytest.mark.parametrize("longest, count", [(40, 80), (300, 40), (1500, 4)])
def test_mass_of_the_last_tokens_is_that_of_the_oracles_mask(longest, count):
    for number, (config, workload) in enumerate(islice(samples(8, longest=longest, kinds=KINDS), count)):
        workload = few_heads(workload, number // 4)
        asking = max(1, workload.seq // (1 << (number // 3 % 8)))
        workload = workload.model_copy(update={"queries": asking})
        profile = PROFILES[number % 4]
        expected = brute(config, workload, profile)
        assert mass_of(config, workload, profile) == pytest.approx(expected, abs=2e-3), (config, workload)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [None, 100, 800])
@pytest.mark.parametrize(
    "fields",
    [
        {"pattern_type": "local_window", "local_window_size": 64},
        {"pattern_type": "local_window", "local_window_size": 50, "edges": "token"},
        {"pattern_type": "global_local", "local_window_size": 64, "global_tokens": 48},
        {"pattern_type": "global_local", "local_window_size": 32, "global_tokens": 300},
        {"pattern_type": "dilated_sparse", "sparsity_ratio": 0.05},
        None,
    ],
)
def test_mass_within_documents_is_that_of_the_oracles_mask(fields, queries, causal):
    """Documents begin where blocks and segments do, so that nothing is neglected but what a fraction of
    blocks keeps of other documents."""
    branches = {"segment_lengths": [64, 256], "dilation_rates": [1, 4]}
    sizes = {"seq": 1152, "documents": (256, 256, 512, 128), "queries": queries}
    if fields is None:
        config = AttentionConfig(variant="dilated", **branches)
    else:
        branches = branches if fields["pattern_type"] == "dilated_sparse" else {}
        pattern = SparsePatternConfig(block_size=16, **fields)
        config = AttentionConfig(variant="block_sparse", pattern=pattern, **branches)
    workload = Workload(**sizes, heads=4, causal=causal)
    expected = brute(config, workload, preset("balanced"))
    neglected = 0.03 if fields and fields["pattern_type"] == "dilated_sparse" else 2e-3
    assert mass_of(config, workload, preset("balanced")) == pytest.approx(expected, abs=neglected)


@settings(max_examples=40)
@given(
    seq=st.sampled_from([1, 2, 7, 17, 33, 129, 200]),
    causal=st.booleans(),
    heads=st.sampled_from([1, 3, 8]),
    branches=st.lists(st.tuples(st.integers(6, 90), st.integers(1, 6)), min_size=0, max_size=3),
    profile=st.sampled_from(PROFILES),
)
def test_branches_that_do_not_nest(seq, causal, heads, branches, profile):
    lengths, rates = zip(*[(20, 1), *branches], strict=True)
    config = AttentionConfig(variant="dilated", segment_lengths=lengths, dilation_rates=rates)
    workload = Workload(seq=seq, causal=causal, heads=heads)
    assert mass_of(config, workload, profile) == pytest.approx(brute(config, workload, profile), abs=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_captures_all(causal):
    workload = Workload(seq=131072, causal=causal)
    assert mass_of(AttentionConfig(variant="dense"), workload, preset("retrieval")) == 1.0


def columns(kind, seq, count=24):
    rng = np.random.default_rng(1)
    size = 2 ** rng.integers(4, 8, count)
    if kind == "adaptive":
        return Columns(
            "adaptive", seq=seq, block_size=size, sparsity_ratio=rng.choice([0.01, 0.1, 1.0], count)
        )
    length = 2 ** rng.integers(7, 10, count)
    lengths, rates = tuple(length << t for t in (0, 2, 4)), tuple(np.full(count, 1 << t) for t in range(3))
    if kind == "dilated":
        return Columns("dilated", seq=seq, lengths=lengths, rates=rates)
    if kind == "dilated_sparse":
        ratio = rng.choice([0.01, 0.05, 0.3], count)
        return Columns(
            "block_sparse", kind, seq=seq, block_size=size, sparsity_ratio=ratio, lengths=lengths, rates=rates
        )
    window, shared = rng.integers(1, 900, count), rng.integers(1, 300, count)
    return Columns("block_sparse", kind, seq=seq, block_size=size, window=window, global_tokens=shared)


@pytest.mark.parametrize("kind", [*KINDS, "adaptive"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seq", [1000, np.arange(3000, 3024), 1 << 17])
@pytest.mark.parametrize("queries", [None, 1000])
def test_many_at_once_are_as_one_by_one(kind, causal, seq, queries):
    workload, many = Workload(seq=1000, causal=causal, heads=4, queries=queries), columns(kind, seq)
    together = mass(many, workload, preset("balanced"))
    assert together.shape == (24,)
    assert together.dtype == np.float64
    for at in range(0, 24, 5):
        length = int(np.broadcast_to(seq, 24)[at])
        one = mass_of(
            many.config(at, workload), workload.model_copy(update={"seq": length}), preset("balanced")
        )
        assert one == pytest.approx(together[at], abs=2e-6)


def by_rows(config, seq, causal, profile):
    """The mass of a layout's rows, at the middle query of each block; block sums of a long sequence."""
    layout = build_layout(config, seq, causal)
    size, total = layout.block_size, 0.0
    position = np.arange(size)
    for i in range(0, layout.blocks, 7):
        row = layout.row(i).astype(np.int64)
        q = i * size + position[:: max(1, size // 4)] + size // 8
        keys = (row[:, None] * size + position).ravel()
        allowed = np.arange(q.max() + 1 if causal else seq)
        for p in q:
            part = keys[keys <= p] if causal else keys[keys < seq]
            every = allowed[allowed <= p] if causal else allowed
            for scale, share in zip(
                (*profile.scales, 1e12), (*profile.shares, profile.far_mass), strict=True
            ):
                near, whole = (np.exp(-np.abs(x - p) / scale).sum() for x in (part, every))
                total += share * near / whole / len(q)
            firsts = min(profile.sink_tokens, len(every))
            total += profile.sink_mass * (part < firsts).sum() / firsts / len(q)
    return total / len(range(0, layout.blocks, 7))


@pytest.mark.parametrize("ratio", [0.02, 0.2])
@pytest.mark.parametrize("causal", [False, True])
def test_sampled_rows_stand_for_all(ratio, causal):
    config = AttentionConfig(
        variant="block_sparse",
        segment_lengths=(1024, 4096, 1 << 15),
        dilation_rates=(1, 2, 4),
        pattern=SparsePatternConfig(block_size=16, sparsity_ratio=ratio),
    )
    workload, profile = Workload(seq=20_000, causal=causal), preset("streaming")
    expected = by_rows(config, 20_000, causal, profile)
    assert mass_of(config, workload, profile) == pytest.approx(expected, abs=0.01)


def test_a_repeated_branch_and_a_wider_window_change_nothing_and_capture_more():
    base = {"variant": "dilated", "uncovered": "refuse"}
    workload = Workload(seq=4096, causal=True)
    once = AttentionConfig(**base, segment_lengths=(512, 2048), dilation_rates=(1, 2))
    twice = AttentionConfig(**base, segment_lengths=(512, 512, 2048), dilation_rates=(1, 1, 2))
    assert mass_of(once, workload, PROFILES[0]) == pytest.approx(mass_of(twice, workload, PROFILES[0]))
    wider = mass(
        Columns("block_sparse", "local_window", seq=1 << 17, block_size=64, window=2 ** np.arange(5, 18)),
        workload,
        PROFILES[0],
    )
    assert (np.diff(wider) >= -1e-9).all()


def test_adaptive_keeps_what_its_assumption_says():
    pattern = SparsePatternConfig(block_size=64, sparsity_ratio=0.1)
    config = AttentionConfig(
        variant="adaptive", pattern=pattern, adaptive=AdaptiveConfig(num_heads=8, head_dim=64)
    )
    far = Profile(name="far", source="", far_mass=1.0)
    sink = Profile(name="sink", source="", sink_mass=1.0)
    workload = Workload(seq=1 << 16, causal=False)
    assert mass_of(config, workload, far) == pytest.approx(0.95, abs=0.005)
    assert mass_of(config, workload, sink) == pytest.approx(0.95, abs=0.005)
    whole = config.model_copy(update={"pattern": pattern.model_copy(update={"sparsity_ratio": 1.0})})
    assert mass_of(whole, workload, far) == 1.0


def drawn(rng, n, profile, causal):
    """[n, n] softmax of q and k drawn from the profile: each query is one kind of the mixture.

    Channels: the position, against which an exponential's query has a slope of 1 / scale (causal: later
    keys are masked, so the logit rises towards the query); one on the sinks alone; 24 of a code, each
    key's own, that a planted query repeats.
    """
    codes = rng.choice([-1.0, 1.0], (n, 24))
    k = np.concatenate([np.arange(n)[:, None], np.arange(n)[:, None] < profile.sink_tokens, codes], axis=1)
    q = np.zeros((n, 26))
    shares = np.array([profile.sink_mass, profile.far_mass, *profile.shares])
    kinds = np.searchsorted(np.cumsum(shares), (rng.permutation(n) + 0.5) / n)  # as many of each as its share
    planted = rng.integers(0, np.arange(n) + 1 if causal else n)
    q[:, 1] = 60.0 * (kinds == 0)
    q[:, 2:] = 20.0 * (kinds == 1)[:, None] * codes[planted]
    for j, scale in enumerate(profile.scales):
        q[kinds == 2 + j, 0] = 1 / scale
    scores = q @ k.T
    scores[np.triu_indices(n, 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(
            variant="block_sparse",
            pattern=SparsePatternConfig(pattern_type="local_window", block_size=16, local_window_size=64),
        ),
        AttentionConfig(
            variant="block_sparse",
            pattern=SparsePatternConfig(
                pattern_type="global_local", block_size=16, local_window_size=32, global_tokens=16
            ),
        ),
        AttentionConfig(variant="dilated", segment_lengths=(64, 256, 1024), dilation_rates=(1, 2, 4)),
        AttentionConfig(
            variant="block_sparse",
            segment_lengths=(64, 256, 1024),
            dilation_rates=(1, 2, 4),
            pattern=SparsePatternConfig(block_size=16, sparsity_ratio=0.15),
        ),
    ],
    ids=["local_window", "global_local", "dilated", "dilated_sparse"],
)
@pytest.mark.parametrize("name", PRESETS)
def test_mass_is_that_of_softmax_over_sampled_q_and_k(config, name):
    rng, n, profile = np.random.default_rng(3), 500, PRESETS[name]
    workload = Workload(seq=n, causal=True, heads=4)
    mask = (multiplicity(config, n, 4, True).numpy() > 0).mean(axis=0)
    captured = np.mean([(mask * drawn(rng, n, profile, True)).sum(axis=1).mean() for _ in range(12)])
    assert mass_of(config, workload, profile) == pytest.approx(captured, abs=0.01)


def test_a_profile_without_sinks_has_a_mass_for_branches_that_do_not_nest():
    profile = preset("balanced").model_copy(update={"sink_mass": 0.0, "far_mass": 0.3})
    config = AttentionConfig(variant="dilated", segment_lengths=(100, 270), dilation_rates=(1, 3))
    workload = Workload(seq=300, heads=2, causal=True)
    assert mass_of(config, workload, profile) == pytest.approx(brute(config, workload, profile), abs=1e-3)
