"""What would fit, as values and as a reader sees them."""

from __future__ import annotations

import shlex

import pytest

from planner.question.relaxation import Relaxation, cheaper, spelt
from planner.units import parse_bytes
from planner.workload import Workload


@pytest.mark.parametrize(
    "change, text",
    [
        (Relaxation("vram", 9_760_000_000), "--vram 9.76GB (needs 9.76 GB)"),
        (Relaxation("vram", 9_760_000_001), "--vram 9.77GB (needs 9.76 GB)"),
        (Relaxation("seq", 98_304), "--seq 98304"),
        (Relaxation("min_mass", 0.73), "--min-mass 0.73"),
        (Relaxation("layers", 0), "--layers 0"),
        (Relaxation("max_seconds", 1.2300000000000002), "--max-seconds 1.23"),
        (Relaxation("mode", "inference"), "--mode inference"),
        (Relaxation("others_bytes", 1000), "--others 1000"),
        (Relaxation("others_bytes", 0), "no others on the card"),
        (Relaxation("workspace_bytes", 65_536), "a config with workspace_bytes=65536"),
    ],
)
def test_a_change_is_said_as_the_option_that_makes_it(change, text):
    assert spelt(change) == text


def test_memory_is_rounded_to_what_is_enough_or_said_to_the_byte():
    change = Relaxation("vram", 33_554_433)
    assert parse_bytes(shlex.split(spelt(change))[1]) >= 33_554_433
    assert spelt(change, exactly=True) == "--vram 33554433 (33.55 MB)"


def test_training_and_wide_numbers_can_be_given_up():
    full = Workload(seq=1, mode="training", dtype="float32")
    assert list(cheaper(full)) == [("mode", "inference"), ("dtype", "float16")]
    assert list(cheaper(Workload(seq=1, dtype="bfloat16"))) == []
