"""The grid and the full space: what is generated is possible, allowed, and the one holds the other."""

from __future__ import annotations

import random

import numpy as np
import pytest

from attention.errors import ConfigError
from planner.memory.dispatch import plan_of
from planner.memory.machines import Cuda
from planner.question.dimensions import KINDS
from planner.question.space import Space
from planner.search.candidates import BLOCK_SIZES, WORKSPACES, grid
from planner.search.suggest import chosen, full_size, parameters
from planner.workload import Workload

WORKLOADS = [Workload(seq=131072), Workload(seq=5000, causal=True), Workload(seq=17), Workload(seq=1)]


def configs(space, workload, flex=False, every=1, free_length=False, windows="none"):
    for columns in grid(space, workload, flex=flex, windows=windows, free_length=free_length):
        for at in range(0, len(columns), every):
            yield columns.config(at, workload)


class Random:
    """Suggests anything within bounds."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def suggest_categorical(self, name, choices):
        return self.random.choice(choices)

    def suggest_int(self, name, low, high, *, step=1, log=False):
        assert low <= high, name
        return round(low * (high / low) ** self.random.random()) if log else self.random.randint(low, high)

    def suggest_float(self, name, low, high, *, step=None, log=False):
        return low * (high / low) ** self.random.random()


@pytest.mark.parametrize("flex", [False, True])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_candidate_of_the_grid_is_a_config_that_a_trial_can_suggest(workload, flex):
    space, seen = Space(variants=("dense", "dilated", "block_sparse", "adaptive")), 0
    for config in configs(space, workload, flex, every=7):
        assert parameters(config, space, workload) is not None, config
        seen += 1
    assert seen > 10


def test_a_trial_is_told_the_backend_too():
    """Where there is a choice, a start of backend `auto` would else be tried as `sdpa`."""
    for backend in ("auto", "sdpa"):
        config = next(configs(Space(patterns=("local_window",), backend=backend), Workload(seq=4096)))
        found = parameters(config, Space(), Workload(seq=4096))
        assert found is not None
        assert found["backend"] == backend


def test_no_candidate_of_the_grid_is_there_twice():
    found = list(configs(Space(), Workload(seq=131072), flex=True))
    assert len(found) == len(set(found)) > 4000


def ends_of(space, workload, **device):
    found = {
        (config.pattern.edges, config.pattern.block_size) for config in configs(space, workload, **device)
    }
    return {edges: {size for one, size in found if one == edges} for edges, _ in found}


def test_windows_end_at_the_token_too_where_the_kernels_have_such_windows():
    windowed, workload = Space(patterns=("local_window", "global_local")), Workload(seq=4096)
    assert set(ends_of(windowed, workload)) == {"block"}
    for windows in ("causal", "any"):
        # Whatever the blocks: one is enough.
        assert ends_of(windowed, workload, windows=windows)["token"] == {128}
    asked = windowed.model_copy(update={"edges": ("token",)})
    assert ends_of(asked, workload) == {"token": set(BLOCK_SIZES)}
    assert ends_of(asked, workload, flex=True, windows="any") == {"token": {128}}
    flex = windowed.model_copy(update={"backend": "flex"})
    assert set(ends_of(flex, workload, flex=True, windows="any")) == {"block"}


@pytest.mark.parametrize("windows", ["causal", "any"])
def test_a_trial_is_told_the_edges_too(windows):
    workload = Workload(seq=4096, causal=True)
    for config in configs(Space(patterns=("local_window",)), workload, windows=windows, every=5):
        found = parameters(config, Space(), workload)
        assert found is not None
        assert found["edges"] == config.pattern.edges


TWINS = Space(variants=("dense", "block_sparse"), block_sizes=(32, 48, 128))
"""FlexAttention takes two of three sizes of blocks."""


@pytest.mark.parametrize("seq", [4096, pytest.param(1 << 20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("free_length", [False, True])
def test_twins_are_one_and_none_is_lost(seq, free_length):
    workload, flexible = Workload(seq=seq, head_dim=32, dtype="float32"), Cuda((8, 0))
    found = set(configs(TWINS, workload, flex=True, free_length=free_length))

    def by(config, backend):
        return config.model_copy(update={"backend": backend})

    def runs(config, workload):
        plan = plan_of(by(config, "auto"), workload, flexible)
        return any(buffer.name == "block lists" for buffer in plan.buffers)

    some = 0
    for config in configs(TWINS, workload):  # of all workspaces
        auto, sdpa = by(config, "auto") in found, by(config, "sdpa") in found
        at_once = runs(config, workload)
        ever = runs(config, workload.model_copy(update={"seq": 128})) if free_length else at_once
        if not ever:
            assert (auto, sdpa) == (True, False), config
        else:
            assert (auto, sdpa) == (config.workspace_bytes == max(WORKSPACES), True), config
        some += at_once
    assert some > 10


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex"])
@pytest.mark.parametrize("free_length", [False, True])
def test_one_backend_has_all_that_differ(backend, free_length):
    workload = Workload(seq=1 << 20)
    space = TWINS.model_copy(update={"backend": backend, "patterns": ("global_local",)})
    found = list(configs(space, workload, flex=True, free_length=free_length))
    kept = {config.workspace_bytes for config in found if config.pattern and config.pattern.block_size == 32}
    assert {config.backend for config in found} == {backend}
    assert kept == ({max(WORKSPACES)} if backend == "flex" else set(WORKSPACES))
    assert any(config.pattern and config.pattern.block_size == 48 for config in found) == (backend != "flex")


def assert_suggests_a_config(number):
    rng = random.Random(number)
    workload = rng.choice([*WORKLOADS, Workload(seq=1 << 20), Workload(seq=1000)])
    columns = chosen(Random(number), Space(), workload, flex=rng.random() < 0.5)
    config = columns.config(0, workload)
    assert len(columns) == 1
    assert list(config.dilation_rates) == sorted(config.dilation_rates)
    assert list(config.segment_lengths) == sorted(config.segment_lengths)


@pytest.mark.parametrize("number", range(50))
def test_whatever_a_trial_suggests_is_a_config(number):
    assert_suggests_a_config(number)


@pytest.mark.slow
def test_whatever_many_trials_suggest_is_a_config(seed):
    for number in range(2000):
        assert_suggests_a_config(f"{seed} {number}")


@pytest.mark.parametrize(
    "given, allowed",
    [
        ({"variants": ("dense",)}, lambda c: c.variant == "dense"),
        ({"patterns": ("local_window",), "variants": ("block_sparse",)},
         lambda c: c.pattern.pattern_type == "local_window"),
        ({"block_sizes": (48, 64), "variants": ("block_sparse",)},
         lambda c: c.pattern.block_size in (48, 64)),
        ({"windows": (1000,), "patterns": ("local_window", "global_local"), "variants": ("block_sparse",)},
         lambda c: c.pattern.local_window_size == 1000),
        ({"ratios": (0.03,), "patterns": ("dilated_sparse",), "variants": ("block_sparse",)},
         lambda c: c.pattern.sparsity_ratio == 0.03),
        ({"branches": (2,), "variants": ("dilated",)}, lambda c: len(c.branches) == 2),
        ({"segments": (2048, 8192), "rates": (1, 3), "variants": ("dilated",)},
         lambda c: c.branches == ((2048, 1), (8192, 3))),
        ({"workspaces": (1 << 21,)}, lambda c: c.workspace_bytes == 1 << 21),
        ({"backend": "sdpa"}, lambda c: c.backend == "sdpa"),
        ({"pool": "off"}, lambda c: c.pool == "off"),
        ({"global_tokens": (100,), "patterns": ("global_local",), "variants": ("block_sparse",)},
         lambda c: c.pattern.global_tokens == 100),
    ],
)  # pairs (given, allowed)  # fmt: skip
def test_restrictions_hold_in_the_grid_and_in_trials(given, allowed):
    space, workload = Space(**given), Workload(seq=131072)
    found = list(configs(space, workload, every=5))
    found += [chosen(Random(seed), space, workload).config(0, workload) for seed in range(40)]
    assert len(found) > 40
    assert all(map(allowed, found))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"segments": (100,), "rates": (1, 2)}, "pair up"),
        ({"segments": (200, 100)}, "must not fall"),
        ({"rates": (2, 1)}, "must not fall"),
        ({"branches": (5,)}, "at most 4"),
        ({"segments": (1, 2, 3, 4, 5)}, "at most 4 branches"),
        ({"branches": (2,), "segments": (64,)}, "contradict"),
        ({"block_sizes": ()}, "allows nothing"),
        ({"variants": ()}, "variants"),
        ({"variants": ("sparse",)}, "variants"),
        ({"ratios": (1.5,)}, "ratios"),
        ({"rates": (2, 4), "variants": ("dilated",)}, "first must be 1"),
        ({"patterns": ("local_window",), "variants": ("dilated",)}, "none of those is allowed"),
        ({"block_sizes": (64,), "variants": ("dense", "dilated")}, "none of those is allowed"),
        ({"edges": ("token",), "backend": "flex"}, "FlexAttention's windows end at blocks"),
    ],
)
def test_contradictions_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        Space(**given)


def test_restrictions_that_leave_nothing_are_refused():
    space = Space(
        variants=("block_sparse",), patterns=("dilated_sparse",), segments=(100,), block_sizes=(64,)
    )
    with pytest.raises(ConfigError, match="leave no candidate"):
        grid(space, Workload(seq=4096))
    with pytest.raises(ConfigError, match="leave no candidate"):
        grid(Space(backend="flex"), Workload(seq=4096), flex=False)


def test_adaptive_has_to_be_asked_for():
    assert "adaptive" not in Space().kinds
    assert set(Space(variants=("dense", "dilated", "block_sparse", "adaptive")).kinds) == set(KINDS)
    assert set(Space().kinds) == set(KINDS) - {"adaptive"}


@pytest.mark.parametrize(
    "given, kinds",
    [
        ({"patterns": ("local_window",)}, {"local_window"}),
        ({"block_sizes": (64,)}, {"local_window", "global_local", "dilated_sparse"}),
        ({"windows": (512,)}, {"local_window", "global_local"}),
        ({"segments": (2048, 8192), "rates": (1, 8)}, {"dilated", "dilated_sparse"}),
        ({"rates": (2, 8)}, {"dilated_sparse"}),
        ({"ratios": (0.1,), "global_tokens": (64,)}, {"dilated_sparse", "global_local"}),
        ({"workspaces": (1 << 20,)}, set(KINDS) - {"adaptive"}),
        (
            {"windows": (512,), "variants": ("dense", "block_sparse")},
            {"dense", "local_window", "global_local", "dilated_sparse"},
        ),
    ],
)
def test_a_restricted_dimension_leaves_attentions_that_have_it(given, kinds):
    assert set(Space(**given).kinds) == kinds


def test_the_last_branch_may_cover_everything():
    lengths = [
        max(config.segment_lengths) for config in configs(Space(variants=("dilated",)), Workload(seq=100_000))
    ]
    assert min(lengths) < 100_000 <= max(lengths)
    assert np.mean([length >= 100_000 for length in lengths]) > 0.3


def test_the_full_space_grows_with_the_sequence():
    assert 1e9 < full_size(4096) < full_size(131072)
