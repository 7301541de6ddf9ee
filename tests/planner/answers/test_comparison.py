"""Two predictions side by side: what was asked, what it changed, and files of every kind."""

from __future__ import annotations

import json

import pytest

from attention.config import AttentionConfig, SparsePatternConfig
from attention.errors import ConfigError
from planner.answers.comparison import Side, compare, side
from planner.measuring.measure import Environment, Measurement
from planner.memory.estimate import estimate
from planner.report.text.compare import comparison_data, comparison_text
from planner.workload import Workload

DENSE = AttentionConfig(variant="dense")
DILATED = AttentionConfig(variant="dilated", segment_lengths=(2048, 4096), dilation_rates=(1, 2))
SPARSE = AttentionConfig(
    variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window", block_size=64)
)


def predicted(config, device="gtx1080", **workload):
    return Side(estimate(config, Workload(**({"seq": 8192} | workload)), device))


def test_a_prediction_differs_from_itself_in_nothing():
    found = compare(predicted(DENSE), predicted(DENSE))
    assert (found.asked, found.buffers) == ({}, ())
    assert all(one == two for one, two in found.components.values())
    assert "all buffers at the peak are alike" in comparison_text(found, ("a", "b"))


@pytest.mark.parametrize("device", ["cpu", "gtx1080"])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("a, b", [(DENSE, DILATED), (DILATED, SPARSE), (SPARSE, DENSE)])
def test_differences_add_up(a, b, mode, device):
    found = compare(predicted(a, device, mode=mode), predicted(b, device, mode=mode))
    one, two = found.a.estimate, found.b.estimate
    inside = {name: both for name, both in found.components.items() if name != "context"}
    assert sum(both[0] for both in inside.values()) == one.allocated
    assert sum(both[1] for both in inside.values()) == two.allocated
    differ = [abs(buffer.b - buffer.a) for buffer in found.buffers]
    assert differ == sorted(differ, reverse=True)
    assert 0 not in differ
    for name, (first, second) in inside.items():
        if name != "rounding":
            assert sum(x.b - x.a for x in found.buffers if x.component == name) == second - first


def test_what_was_asked_is_named_where_it_differs():
    found = compare(predicted(DENSE, "cpu"), predicted(DILATED, "gtx1080", batch=2))
    assert found.asked == {
        "device": ("cpu", "NVIDIA GeForce GTX 1080"),
        "variant": ("dense", "dilated"),
        "segment_lengths": ([], [2048, 4096]),
        "dilation_rates": ([], [1, 2]),
        "batch": (1, 2),
    }


def test_text_is_80_columns_and_has_every_difference():
    found = compare(predicted(DILATED), predicted(SPARSE, batch=3))
    text = comparison_text(found, ("one.json", "x" * 100 + ".json"))
    assert all(len(line) <= 80 for line in text.splitlines())
    for buffer in found.buffers:
        assert buffer.name in text
    for part in ("A: one.json: dilated", "variant: dilated -> block_sparse", "batch: 1 -> 3", "reserved"):
        assert part in text


def test_data_has_all_of_it_and_is_plain():
    found = compare(predicted(DENSE), predicted(SPARSE))
    data = json.loads(json.dumps(comparison_data(found)))
    assert data["allocated"] == {"a": found.a.estimate.allocated, "b": found.b.estimate.allocated}
    assert data["components"].keys() == found.components.keys()
    assert [each["name"] for each in data["buffers"]] == [buffer.name for buffer in found.buffers]
    assert data["measured"] == {"a": None, "b": None}


# ---- files


def refuse(config):
    raise AssertionError("nothing is to be estimated")


def test_an_estimate_is_taken_as_it_is(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(predicted(DENSE).estimate.to_json(indent=2))
    assert side(path, refuse) == predicted(DENSE)


def test_a_config_is_estimated(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(SPARSE.to_json())
    assert side(path, lambda config: predicted(config).estimate) == predicted(SPARSE)


def test_a_measurement_stands_beside_what_is_predicted_for_it(tmp_path):
    here = Environment(python="3.11", system="Linux", settings={}, date="2026-01-01", threads=3)
    figures = {"kind": "ok", "seconds": 1.0, "allocated": 12345, "runs": 1, "environment": here}
    found = Measurement(config=DENSE, workload=Workload(seq=64), device="cpu", **figures)
    path = tmp_path / "a.json"
    path.write_text(found.to_json())
    expected = estimate(DENSE, Workload(seq=64), "cpu", threads=3)
    assert side(path, refuse) == Side(expected, 12345)
    both = compare(side(path, refuse), side(path, refuse))
    assert "12.35 KB" in comparison_text(both, ("a", "b"))


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", '{"seq": 4}', "\xff"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"a\.json is no JSON"):
        side(path, refuse)


@pytest.mark.parametrize("text", ['{"variant": "dens"}', '{"components": 3}', '{"environment": 3}'])
def test_a_file_that_is_wrong_inside_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.json: "):
        side(path, refuse)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        side(tmp_path / "none.json", refuse)
