"""Samples are the same for the same seed, of all kinds, and within their bounds."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from attention import AttentionConfig, ConfigError, SparsePatternConfig
from planner.fitting.samples import KINDS, PLAIN, samples, steps_of, work_of
from planner.workload import Workload

ROOT = Path(__file__).resolve().parents[3]


def drawn(count: int, seed: int = 0, **options):
    return list(islice(samples(seed, **options), count))


def test_a_seed_gives_the_same_samples_in_any_process():
    here = drawn(30, seed=5, longest=4096)
    assert here == drawn(40, seed=5, longest=4096)[:30]
    assert not set(here) & set(drawn(30, seed=6, longest=4096))
    code = (
        "from itertools import islice; from planner.fitting.samples import samples\n"
        "for config, workload in islice(samples(5, longest=4096), 30):"
        " print(config.to_json(), workload.to_json())\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{c.to_json()} {w.to_json()}" for c, w in here]


def test_plain_samples_are_of_all_kinds_and_settings():
    found = drawn(300, kinds=PLAIN)
    patterns = Counter(c.pattern.pattern_type for c, _ in found if c.pattern)
    assert set(patterns.values()) == {60}
    assert Counter(c.variant for c, _ in found) == {"dense": 60, "dilated": 60, "block_sparse": 180}
    for values in (
        {w.dtype for _, w in found},
        {w.mode for _, w in found},
        {w.causal for _, w in found},
        {c.pool for c, _ in found},
        {w.groups < w.heads for _, w in found},
    ):
        assert len(values) in (2, 3, 4)
    lengths = {w.seq for _, w in found}
    assert {1, 7, 17} <= lengths
    assert any(n % 64 == 1 for n in lengths if n > 64)
    assert max(lengths) > 8192


def test_every_kind_can_be_asked_for():
    found = drawn(3 * len(KINDS), kinds=KINDS, longest=2048)
    assert sum(c.multihead is not None for c, _ in found) == 3
    assert sum(w.weights for _, w in found) == 3
    assert sum(c.variant == "adaptive" for c, _ in found) >= 3


@pytest.mark.parametrize("bounds", [{"longest": 64}, {"shortest": 4096, "longest": 65_536}, {"work": 1e7}])
def test_bounds_hold(bounds):
    for config, workload in drawn(60, **bounds):
        assert bounds.get("shortest", 1) <= workload.seq <= bounds.get("longest", 16_384)
        assert work_of(config, workload) <= bounds.get("work", float("inf"))
        assert steps_of(config, workload) <= 120


@pytest.mark.parametrize(
    "options", [{"shortest": 0}, {"shortest": 9, "longest": 8}, {"shortest": 8192, "work": 1.0}]
)
def test_bounds_that_nothing_meets_are_refused(options):
    with pytest.raises(ConfigError):
        drawn(1, **options)


def test_work_is_that_of_the_pairs():
    workload = Workload(seq=1000, heads=2, head_dim=8)
    dense = AttentionConfig(variant="dense")
    assert work_of(dense, workload) == 1000 * 1000 * 2 * 8
    assert work_of(dense, workload.model_copy(update={"mode": "training"})) == 3.5 * 1000 * 1000 * 2 * 8
    pattern = SparsePatternConfig(pattern_type="local_window", block_size=10, local_window_size=40)
    sparse = AttentionConfig(variant="block_sparse", pattern=pattern)
    assert work_of(sparse, workload) == 50 * 1000 * 2 * 8


def test_plain_kinds_are_those_without_parts():
    assert all(not c.multihead and not c.adaptive and not w.weights for c, w in drawn(20, kinds=PLAIN))
