"""With and without a pool: what is counted and timed, what is said of it, the picture."""

from __future__ import annotations

import pytest
import torch

from attention.config import AttentionConfig
from planner.memory.estimate import estimate
from planner.report.plot import figure
from planner.workload import Workload
from studies import memory_pool as study

CPU = torch.device("cpu")


def made_up(attention: str = "dilated", seq: int = 16_384, on: tuple[float, ...] = (1.0, 1.02, 0.98)):
    """A row whose calls without a pool take a second."""
    seconds = {"on": list(on), "off": [1.0] * len(on)}
    sizes = {
        "on": {"cold": 1010, "warm": 1020, "held": 1 << 20},
        "off": {"cold": 1000, "warm": 1000, "held": 0},
    }
    return {
        "attention": attention,
        "seq": seq,
        "dtype": "bfloat16",
        "floor": 900,
        "bytes": sizes,
        "seconds": {"cold": {"on": [1.0] * len(on), "off": [1.0] * len(on)}, "warm": seconds},
    }


@pytest.mark.parametrize("name", study.configs())
def test_a_row_has_peaks_and_seconds_of_both(name):
    row = study.pool_row(name, 512, CPU, runs=2)
    assert row["bytes"]["on"]["held"] > row["bytes"]["off"]["held"] == 0
    asked = Workload(seq=512, heads=study.HEADS, dtype="bfloat16")
    for switch in study.SWITCHES:
        config = AttentionConfig(**study.configs()[name].model_dump() | {"pool": switch})
        expected = estimate(config, asked, "cpu", threads=torch.get_num_threads())
        assert row["bytes"][switch]["cold"] == pytest.approx(expected.allocated, rel=5e-3)
        for state in study.STATES:
            assert row["bytes"][switch][state] >= row["floor"]
            assert len(row["seconds"][state][switch]) == 2
            assert min(row["seconds"][state][switch]) > 0
    assert len(study.ratios(row, "warm")) == 2


def test_pairs_are_run_in_turn():
    ran = []

    def side(name: str) -> study.PoolCase:
        return study.PoolCase(lambda: ran.append(name), study.Buffers(cache_entries=0, cache_bytes=0))

    found = study._seconds({"on": side("on"), "off": side("off")}, CPU, 2)
    every = ["off", "on", "on", "off"]  # the next pair the other way round
    assert ran == ["on", "off", *every, "on", "off", *every]
    assert {len(times) for both in found.values() for times in both.values()} == {2}


@pytest.mark.parametrize(
    "on, said",
    [
        ((0.8, 0.9, 0.95), "faster"),
        ((1.1, 1.2, 1.05), "slower"),
        ((0.5, 0.6, 1.01), "no clear difference"),
        ((0.99, 0.985, 0.995), "no clear difference"),
        ((1.0, 1.0, 1.0), "no clear difference"),
    ],
)
def test_a_difference_is_one_that_all_pairs_show(on, said):
    assert study.verdict(made_up(on=on), "warm") == said


def test_the_seeds_ratios_are_those_of_their_report():
    assert study.SEEDS[131_072].time == pytest.approx(1 / 1.285, rel=1e-3)  # "28% faster"
    assert study.SEEDS[16_384].memory == pytest.approx(1 - 0.23, abs=0.01)  # "21% less", of rounded figures


def test_tables_have_a_line_a_case_and_the_seeds_beside():
    rows = [made_up(), made_up("dilated_sparse", on=(0.5, 0.5, 0.5))]
    table = study.pool_table(rows)
    assert "| dilated | 16,384 | warm | 1,000 | 1,000 | 1.00 | 0.98 to 1.02 | no clear difference |" in table
    assert "| dilated_sparse | 16,384 | warm | 1,000 | 500 | 0.50 | 0.50 to 0.50 | faster |" in table
    assert "| 16,384 | 14.4 | 16.7 | 1.16 | 0.30 | 0.23 | 0.77 | 1.00 | 1.02 | 0.50 | 1.02 |" in (
        study.seeds_table(rows)
    )


def test_the_picture_has_both_ratios_and_every_series():
    rows = [made_up(name, seq) for name in study.configs() for seq in (16_384, 32_768)]

    def look(drawn):
        study.draw(drawn, rows)
        left, right = drawn.axes
        assert left.get_ylabel() == "with a pool / without"
        assert [axes.get_xlabel() for axes in (left, right)] == ["tokens", "tokens"]
        names = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert names == [
            "dilated, cold",
            "dilated, warm",
            "dilated_sparse, cold",
            "dilated_sparse, warm",
            "original, GTX 1080",
        ]
        assert [text.get_text() for text in left.texts] == ["original: 19.8"]  # above the picture

    figure.drawn(["svg"], look)


def test_what_it_says_has_its_figures_from_the_rows():
    findings = study.findings([made_up(), made_up("dilated_sparse", 32_768, on=(0.5, 0.5, 0.5))])
    assert "no clear difference in 3 of 4 cases" in findings.answer
    assert "faster (0.50) for dilated_sparse at 32,768 tokens in warm calls" in findings.answer
    assert "1.010 to 1.020 times" in findings.answer
    assert "up to 1.0 MiB" in findings.answer
    assert "0.78 to 19.75 times the time and 0.77 to 0.84 times the memory" in findings.original
