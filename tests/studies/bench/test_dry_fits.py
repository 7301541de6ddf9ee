"""Questions whose answers are run on cards that are not there."""

from __future__ import annotations

import json
import sys
from functools import partial
from unittest import mock

import pytest
from matplotlib.figure import Figure

from planner import gpus
from planner.measuring.measure import Environment, Measurement
from planner.question.space import Space
from studies import fits
from studies.bench import dry, dry_fits

HERE = Environment(python="3.11", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")


class Batch:
    """Runs that take nine tenths of their card, or run out beyond a number of tokens."""

    def __init__(self, longest: int):
        self.longest, self.caps = longest, []

    def measure(self, config, workload, *, card, cap_bytes):
        self.caps.append(cap_bytes)
        end = {"config": config, "workload": workload, "device": card, "runs": 1, "environment": HERE}
        if workload.seq > self.longest:
            return Measurement(**end, kind="oom", message="memory ran out")
        return Measurement(**end, kind="ok", allocated=1, reserved=2, device_peak=int(0.9 * cap_bytes))


def test_questions_are_of_all_objectives_and_cards_and_the_same_each_time():
    asked = [dry_fits.question(number) for number in range(dry_fits.QUESTIONS)]
    assert asked == [dry_fits.question(number) for number in range(dry_fits.QUESTIONS)]
    assert {one["objective"] for one in asked} == {"speed", "seq", "quality"}
    assert {one["gpu"] for one in asked} == set(dry.CARDS)
    assert all(2e9 <= one["vram"] <= min(80e9, gpus.find(one["gpu"]).usable_bytes) for one in asked)
    assert {one["mode"] for one in asked} == {"inference", "training"}
    assert {one["backend"] for one in asked} == {None, "sdpa"}


def test_what_the_file_has_is_published_without_a_cuda_build(monkeypatch, tmp_path):
    rows = [{"number": number, "about": "dry", "outcome": "nothing fits", "asked": {}} for number in (1, 0)]
    path, published = tmp_path / "rows.jsonl", []
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr(dry_fits, "Batch", mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(dry_fits, "publish", lambda *what: published.append(what))
    monkeypatch.setattr(sys, "argv", ["dry_fits", str(path), "--count", "2", "--publish"])
    dry_fits.main()
    [(name, command, written, _)] = published
    assert (name, written) == ("fits", rows[::-1])
    assert command == "python -m studies.bench.dry_fits FILE --count 2 --publish"
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.slow
def test_an_answer_runs_on_a_card_without_what_the_display_has_and_a_longest_one_also_longer():
    asked = dry_fits.question(1) | {"vram": 3_000_000_000, "display": "desktop"}
    batch = Batch(longest=0)
    row = dry_fits.question_row(asked, batch)
    assert row["outcome"] == row["longer"] == "oom"
    batch = Batch(longest=row["seq"])
    row = dry_fits.question_row(asked, batch)
    assert (row["outcome"], row["longer"]) == ("ok", "oom")
    assert batch.caps == [3_000_000_000 - 966_367_642] * 2
    assert row["taken"] == int(0.9 * batch.caps[0]) + 966_367_642
    table = fits.fits_table([row, row | {"longer": "ok", "taken": 3_100_000_000}])
    assert table.splitlines()[-1].endswith("| 103.3% | 1 of 2 |")
    assert "run dry" in fits.findings([row]).question
    assert "1 of 1 run out with 5% more tokens" in fits.findings([row]).answer
    figure = Figure(layout="constrained")
    fits.draw(figure, [row])
    assert "What is recommended fits" in figure.get_suptitle()


def test_what_nothing_fits_is_an_outcome(monkeypatch):
    few = partial(Space, block_sizes=(128,), ratios=(0.1,), branches=(1, 2), workspaces=(1 << 20,))
    monkeypatch.setattr(dry_fits, "Space", few)
    asked = dry_fits.question(0) | {"seq": 50_000_000}
    assert dry_fits.question_row(asked, Batch(0))["outcome"] == "nothing fits"
