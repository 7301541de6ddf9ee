"""Measurements on cards that are not there."""

from __future__ import annotations

import pytest

import planner
from attention import AttentionConfig, SparsePatternConfig
from attention.errors import ConfigError, UnavailableError
from planner import Workload
from planner.fitting.speed import fit
from planner.measuring import dry
from planner.measuring.measure import Environment, Measurement, check_arguments
from planner.measuring.server import Batch

DENSE = AttentionConfig(variant="dense")
SMALL = Workload(seq=1024, heads=4, head_dim=64, dtype="float16", mode="training", causal=True)


def record(**changes):
    place = Environment(python="", system="", settings={}, date="")
    fields = {
        "config": DENSE,
        "workload": SMALL,
        "device": "dry:rtx4090",
        "kind": "ok",
        "runs": 1,
        "allocated": 5,
    }
    return Measurement(**{**fields, "environment": place, **changes})


def test_a_card_is_named_by_any_of_its_names_and_kept_by_its_key():
    assert dry.card_of("dry:GeForce RTX 4090").key == "rtx4090"
    assert dry.named("dry:h100sxm") == "dry:h100-sxm"
    assert dry.named("cuda") == "cuda"


@pytest.mark.parametrize("device", ["dry:", "dry:voodoo2", "tpu"])
def test_what_is_no_card_is_refused(device):
    with pytest.raises(ConfigError):
        check_arguments(device, 1.0, 1, None, None)


def test_a_record_has_bytes_and_no_seconds_and_survives_json():
    dried = record()
    assert dried.is_dry
    assert Measurement.from_json(dried.to_json()) == dried
    with pytest.raises(ConfigError, match="no dry run"):
        record(seconds=1.0)
    with pytest.raises(ConfigError, match="seconds"):
        record(device="cuda")


def test_the_card_of_a_task_is_as_large_as_it_was_asked_for():
    variables = dry.task_variables("dry:rtx4090", 1 << 30)
    assert variables["STANDIN_BYTES"] == str(1 << 30)
    assert int(variables["STANDIN_HELD"]) > 0


def test_what_needs_seconds_refuses_dry_runs():
    with pytest.raises(ConfigError, match="a dry run has no seconds"):
        planner.calibrate("dry:rtx4090")
    with pytest.raises(ConfigError, match="a dry run has no seconds"):
        planner.tune("1GB", 1024, device="dry:rtx4090")
    with pytest.raises(ConfigError, match="a dry run has no seconds"):
        fit([record()])


def test_without_a_cuda_build_it_is_said_what_makes_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UnavailableError, match="planner dry-run --install"):
        planner.measure(DENSE, SMALL, "dry:rtx4090")


@pytest.mark.slow
@pytest.mark.dry
def test_many_cards_in_one_batch(dry_build):
    window = AttentionConfig(
        variant="block_sparse",
        backend="sdpa",
        pattern=SparsePatternConfig(pattern_type="local_window", block_size=64, local_window_size=256),
    )
    with Batch("dry:rtx4090") as runs:
        for card in ("dry:rtx4090", "dry:h100-sxm", "dry:v100-sxm2-16gb", "dry:gtx1080"):
            for config in (DENSE, window):
                found = runs.measure(config, SMALL, card=card)
                assert found.kind == "ok", found.message
                assert found.seconds is None
                assert found.device == card
                assert SMALL.floor < found.allocated <= found.reserved < found.device_peak


@pytest.mark.slow
@pytest.mark.dry
def test_a_run_that_is_too_large_is_out_of_memory(dry_build):
    large = SMALL.model_copy(update={"seq": 1 << 20})
    found = planner.measure(DENSE, large, "dry:rtx4090", cap_bytes=2 << 30)
    assert found.kind == "oom"
