"""Configuration A against B: their plans, the original project's lines beside them, the picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from attention.config import AttentionConfig
from planner.measuring.measure import Environment, Measurement
from planner.measuring.server import Batch
from planner.report.plot import figure
from planner.workload import Workload
from studies import config_impact
from studies.bench import memory_rows
from studies.bench.memory_rows import MIB


@pytest.fixture(scope="module")
def rows():
    """As a quick study has them, what was measured made up."""
    card = [config_impact.card_row(name) for name in "AB"]
    small = {"part": "here", "seq": 4096, "floor": 16 * MIB, "on": "cpu", "components": {"qkv": 12 * MIB}}
    sizes = [{"allocated": 17 * MIB, "cold": 17 * MIB}, {"allocated": 18 * MIB, "cold": 18 * MIB}]
    here = [
        {"config": name, "outcome": "ok", **small, **size} for name, size in zip("AB", sizes, strict=True)
    ]
    return [*card, *here]


def test_the_settings_are_those_of_the_seeds():
    small, large = config_impact.configs().values()
    assert small.branches == ((2048, 1),)
    assert large.branches == ((65536, 1), (131072, 2))
    assert (small.pattern.block_size, small.pattern.sparsity_ratio) == (64, 0.01)
    assert (large.pattern.block_size, large.pattern.sparsity_ratio) == (256, 0.02)


def test_both_settings_stay_near_the_floor(rows):
    for row in config_impact.pair(rows, "card"):
        assert row["floor"] == 4 * 131_072 * 8 * 64 * 2
        assert row["floor"] < row["allocated"] < 1.03 * row["floor"]
        assert sum(row["components"].values()) == row["allocated"]
        assert row["on"] == "NVIDIA GeForce GTX 1080"


def test_what_runs_is_predicted_and_measured(one_server):
    with Batch("cpu", timeout=60) as batch:
        row = config_impact.here_row("A", 2048, batch)
    assert row["cold"] == row["allocated"] == sum(row["components"].values())
    assert row["warm"] >= row["floor"]
    assert row["outcome"] == "ok"


def test_what_does_not_run_has_no_figures():
    class Full:
        def measure(self, config: AttentionConfig, workload: Workload):
            place = Environment(python="3.11", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")
            return Measurement(
                config=config,
                workload=workload,
                device="cpu",
                kind="oom",
                message="memory ran out",
                runs=1,
                environment=place,
            )

    row = memory_rows.measured(config_impact.configs()["A"], Workload(seq=64), Full())
    assert row["cold"] is None
    assert row["outcome"] == "memory ran out"


def test_a_table_has_every_component_and_what_was_measured(rows):
    table = config_impact.components_table(rows)
    assert "| qkv | 402.65 MB | 402.65 MB | = |" in table
    assert "| **allocated, measured** |  |  |  | 17.83 MB | 18.87 MB | +1.05 MB |" in table
    assert "masks" not in table
    lost = [*rows[:3], {**rows[3], "cold": None}]
    assert "|  |  |  | 17.83 MB | did not run |  |" in config_impact.components_table(lost)


def test_the_seeds_lines_stand_beside_ours(rows):
    table = config_impact.claims_table(rows)
    assert "| q, k, v and out | not counted | 512.0 | not counted | 512.0 |" in table
    assert "| segment structures | 0 | 0 | 100.0 | 0 |" in table
    # Every byte here has its line.
    for row in config_impact.pair(rows, "card"):
        parts = {claim.what: claim.here(row) for claim in config_impact.CLAIMS}
        in_memory = [count for what, count in parts.items() if what not in ("pattern indices", "together")]
        assert sum(in_memory) == parts["together"] == row["allocated"]


def test_the_picture_has_a_bar_for_each_way_of_knowing(rows):
    def look(drawn):
        config_impact.draw(drawn, rows)
        (axes,) = drawn.axes
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names[:3] == ["A, original project", "B, original project", "A, GTX 1080, predicted"]
        assert names[-1] == "B, CPU, measured"
        assert axes.get_xlabel() == "memory, bytes a token"
        assert "1,024  (128.0 MiB)" in [text.get_text() for text in axes.texts]
        assert "measured at 4,096" in drawn.get_suptitle()

    figure.drawn(["svg"], look)


def test_what_it_says_has_its_figures_from_the_rows(rows):
    a, b = config_impact.pair(rows, "card")
    findings = config_impact.findings(rows)
    assert f"{b['allocated'] / a['allocated']:.3f} times" in findings.answer
    assert f"it is {18 / 17:.3f} times" in findings.answer
    assert "305.0 against 128.0 MiB, 2.4 times" in findings.original
    lost = [*rows[:3], {**rows[3], "cold": None, "outcome": "out of memory"}]
    assert "out of memory" in config_impact.findings(lost).answer


def test_a_and_b_are_the_docs_examples():
    examples = Path(__file__).parents[2] / "docs" / "examples"
    names = ("small.json", "large.json")
    found = [AttentionConfig.from_json((examples / name).read_bytes()) for name in names]
    assert found == list(config_impact.configs().values())
