"""What `estimate` and `max-seq` show: every share, sums that add up, 80 columns; and the picture."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest

from attention.config import AttentionConfig, SparsePatternConfig
from attention.errors import AttentionPlannerError, ConfigError, UnavailableError
from planner import gpus
from planner.memory.estimate import estimate, max_sequence
from planner.report.plot.estimate import plot
from planner.report.text.estimate import estimate_text, label, longest_text, waterfall
from planner.search.longest import longest
from planner.workload import Workload

WINDOW = AttentionConfig(
    variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window", block_size=64)
)
DENSE = AttentionConfig(variant="dense")
CARD = estimate(DENSE, Workload(seq=32768, mode="training"), "gtx1080")
HERE = estimate(WINDOW, Workload(seq=8192), "cpu", threads=2)


def shown(text: str) -> list[str]:
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines == [line.rstrip() for line in lines]
    return lines


# ---- the waterfall


@pytest.mark.parametrize("found", [CARD, HERE], ids=["card", "cpu"])
def test_a_waterfall_goes_from_nothing_to_what_the_device_loses(found):
    steps = waterfall(found)
    assert steps[0].start == 0
    assert all(a.start + a.bytes == b.start for a, b in pairwise(steps))
    assert steps[-1].start + steps[-1].bytes == found.device
    assert set(found.components) <= {step.name for step in steps}


@pytest.mark.parametrize("found", [CARD, HERE], ids=["card", "cpu"])
def test_bars_follow_each_other_and_none_is_empty(found):
    lines = shown(estimate_text(found, None, lines=False))
    bars = [line for line in lines if "#" in line]
    assert [line.split("  ")[0] for line in bars] == [
        *(label(step.name) for step in waterfall(found)),
        "together",
    ]
    edges = [(line.index("#"), line.rindex("#") + 1) for line in bars]
    assert all(a[1] - 1 <= b[0] <= a[1] for a, b in pairwise(edges[:-1]))
    assert edges[-1] == (edges[0][0], edges[-2][1])
    assert bars[-1].endswith("100.0%")


def test_all_figures_are_there():
    text = " ".join(estimate_text(CARD, None, lines=False).split())
    for count in (CARD.workload.floor, CARD.allocated, CARD.reserved, CARD.device, CARD.needed, CARD.upper):
        assert f"({count:,} bytes)" in text
    for part in (CARD.on, CARD.at, CARD.confidence, "32,768 tokens", *CARD.notes):
        assert part in text
    assert "budget" not in text


def test_a_cpu_has_no_figures_of_a_caching_allocator():
    text = estimate_text(HERE, None, lines=False)
    assert "reserved" not in text
    assert f"allocated    {HERE.allocated / 1e6:.2f} MB" in text


@pytest.mark.parametrize(
    "budget, said",
    [
        (CARD.upper, "fits, 0 B to spare"),
        (CARD.upper - 1, "may fit: the upper bound is 1 B above it"),
        (CARD.needed, "may fit"),
        (CARD.needed - 1, "does not fit: 1 B too little"),
    ],
)
def test_a_budget_is_compared_with_the_upper_bound(budget, said):
    text = estimate_text(CARD, budget, lines=False)
    assert f"({budget:,} bytes)" in text
    assert said in text


@pytest.mark.parametrize("found", [CARD, HERE], ids=["card", "cpu"])
def test_lines_are_every_buffer_with_its_formula(found):
    text = " ".join(" ".join(shown(estimate_text(found, None, lines=True))).split())
    for line in found.lines:
        assert f"{line.name} ({label(line.component)}) {line.bytes:,}" in text
        assert " ".join(line.source.split()) in text
    assert found.lines[0].source not in estimate_text(found, None, lines=False)


# ---- the longest sequence


def test_the_longest_and_what_a_block_more_takes():
    budget = 2 * 10**9
    card, options = gpus.generic(budget), {"calibration": None}
    found = longest(WINDOW, Workload(seq=1), budget, card, options)
    seq = max_sequence(WINDOW, Workload(seq=1), budget)
    assert found.fits is not None
    assert (found.fits.workload.seq, found.beyond.workload.seq) == (seq, seq + 64)
    assert found.fits.upper <= budget < found.beyond.upper
    assert found.relaxations == ()
    text = " ".join(" ".join(shown(longest_text(found))).split())
    assert f"longest {seq:,} tokens" in text
    assert f"next block {seq + 64:,} tokens" in text
    assert f"({found.beyond.upper:,} bytes)" in text


def test_where_nothing_fits_each_relaxation_would_and_none_is_larger_than_it_must_be():
    workload = Workload(seq=1, batch=100, mode="training", dtype="float32")
    budget = 10**7
    found = longest(DENSE, workload, budget, "cpu", {"threads": 2})
    assert found.fits is None
    assert found.beyond.workload.seq == 64
    assert found.beyond.upper > budget
    batch, *others = found.relaxations
    assert others == [("vram", found.beyond.upper)]
    assert batch.what == "batch"
    fewer = batch.value

    def upper(batch: int) -> int:
        asked = workload.model_copy(update={"seq": 64, "batch": batch})
        return estimate(DENSE, asked, "cpu", threads=2).upper

    assert upper(fewer) <= budget < upper(fewer + 1)
    text = "\n".join(shown(longest_text(found)))
    assert f"would fit    --batch {fewer}\n" in text
    assert f"would fit    --vram {found.beyond.upper} ({found.beyond.upper / 1e6:.2f} MB)" in text


def test_a_crowded_card_can_be_emptied():
    card = gpus.find("gtx1080")
    context = estimate(DENSE, Workload(seq=64), card).upper
    budget = context + 10**8
    options = {"display": "desktop", "others_bytes": 0}
    found = longest(DENSE, Workload(seq=1), budget, card, options)
    assert found.relaxations[0] == ("display", "headless")
    options = {"display": "headless", "others_bytes": 10**9}
    most, *_ = longest(DENSE, Workload(seq=1), budget, card, options).relaxations
    assert most.what == "others_bytes"
    held = most.value
    fits = [estimate(DENSE, Workload(seq=64), card, others_bytes=n).upper <= budget for n in (held, held + 1)]
    assert fits == [True, False]


# ---- the picture


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_a_picture_is_drawn_960_pixels_wide(name, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / name
    plot(CARD, path, budget=8 * 10**9)
    content = path.read_bytes()
    if name.endswith("png"):
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(content[16:20], "big") == 960
    else:
        assert b"<svg" in content


def test_a_picture_that_cannot_be_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"must end in .png or .svg"):
        plot(CARD, tmp_path / "a.txt")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnavailableError, match="pip install matplotlib"):
        plot(CARD, tmp_path / "a.png")


def test_a_picture_where_no_file_can_be_is_one_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(AttentionPlannerError, match="cannot be written: No such file"):
        plot(CARD, tmp_path / "nowhere" / "a.png")
