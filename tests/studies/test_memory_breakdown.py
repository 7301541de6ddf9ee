"""Base, ring-style and this project, part by part; the way from one to the other; settings measured."""

from __future__ import annotations

import pytest
import torch

from attention.config import AttentionConfig
from planner.memory.estimate import estimate
from planner.report.plot import figure
from planner.workload import Workload
from studies import memory_breakdown as study
from studies.bench.memory_rows import MIB
from studies.config_impact import configs

TENSOR = 131_072 * 8 * 64 * 2
"""Bytes of q, of k, of v and of out."""


@pytest.fixture(scope="module")
def rows():
    """As a study has them, what was measured made up."""
    plans = [study.plan_row(*asked) for asked in (("A", 131_072), ("B", 131_072), ("B", 65_536))]
    run = {"part": "setting", "config": "B", "setting": "as it is", "seq": 4096, "on": "cpu"}
    sizes = {"allocated": 17 * MIB, "cold": 17 * MIB, "warm": 18 * MIB}
    return [*plans, run | sizes | {"kept": {"pool": MIB // 2, "layouts": 0, "masks": MIB}}]


def test_ring_style_buffers_have_the_sizes_of_their_description(rows):
    ring = study.plan(rows, "B")["ring"]
    assert ring["q, k and v"] == 3 * TENSOR
    assert ring["memory pool"] == 10 * TENSOR  # the longest segment is the whole sequence
    assert ring["temporary outputs"] == 2 * TENSOR  # of either branch
    assert ring["communication buffers"] == 2 * TENSOR
    assert ring["ring's state"] == 2 * 4 * 131_072 * 8
    active = 512 * 10  # 2% of 512 blocks in each of 512 rows
    assert ring["pattern cache"] == 100 * 16 * active
    assert ring["block lists"] == 2 * 16 * active
    assert ring["dilated-index cache"] == 8 * (65_536 + 131_072)
    small = study.plan(rows, "A")["ring"]
    assert small["memory pool"] == 10 * 2048 * 8 * 64 * 2
    assert small["temporary outputs"] == TENSOR  # 64 segments of 2,048


def test_a_segment_is_no_longer_than_the_sequence(rows):
    ring = study.plan(rows, "B", 65_536)["ring"]
    assert ring["temporary outputs"] == TENSOR  # two branches of half of it
    assert ring["memory pool"] == 5 * TENSOR


@pytest.mark.parametrize("name", ["A", "B"])
def test_the_four_lead_from_ring_style_to_this_project_byte_by_byte(rows, name):
    row = study.plan(rows, name)
    expected = estimate(configs()[name], Workload(seq=131_072), "gtx1080").allocated + study.cublas()
    assert sum(row["here"].values()) == row["allocated"] == expected
    found = study.savings(row)
    assert [saving.optimisation for saving in found] == list(study.OPTIMISATIONS)
    assert sum(row["ring"].values()) - sum(saving.bytes for saving in found) == expected
    assert found[-1].left == expected


def test_every_part_belongs_to_one_optimisation_or_stays():
    stay = [part for part in study.PARTS if not part.optimisation]
    assert {part.what for part in stay} == {"q, k and v", "out", "cuBLAS workspace"}
    assert all(part.base and part.ring for part in stay)
    assert {part.optimisation for part in study.PARTS} - {""} == set(study.OPTIMISATIONS)
    claimed = {name for *_, parts in study.CLAIMS.values() for name in parts}
    assert claimed == {part.what for part in study.PARTS}


@pytest.mark.parametrize(
    "setting, holds",
    [
        ("as it is", ("pool", "layouts", "masks")),
        ("pool='off'", ("layouts", "masks")),
        ("cache_entries=0", ("pool",)),
        ("cache_bytes=64 KiB", ("pool", "layouts")),
    ],
)
def test_settings_say_what_is_kept_between_calls(setting, holds):
    """At a length whose tiles are too many to be kept, so that their layout is."""
    config = AttentionConfig(**configs()["B"].model_dump() | study.SETTINGS[setting])
    held = study.kept(config, Workload(seq=65536, heads=1, head_dim=8, causal=True), torch.device("cpu"))
    assert tuple(what for what, count in held.items() if count) == holds


def test_tables_have_formulas_figures_and_totals(rows):
    parts = study.parts_table(rows)
    assert "| memory pool |  | 10 B L H D e | 0 | 20.0 | 0 | 0 | 1,280.0 | 0 |" in parts
    assert study.savings_table(rows).splitlines()[-1].endswith("525.4 |")
    claims = study.claims_table(rows)
    assert "| q, k and v | 48 | 384.0 | 24 | 192.0 |" in claims
    assert "| **together** | 128 | 522.8 | 408 |" in claims
    assert "| B | as it is | 17.0 | 17.0 | 18.0 | 512.0 | 0.0 | 1,024.0 |" in study.settings_table(rows)


def test_the_picture_is_a_waterfall_for_each_config(rows):
    def look(drawn):
        study.draw(drawn, rows)
        left, right = drawn.axes
        assert [axes.get_title() for axes in (left, right)] == ["configuration A", "configuration B"]
        names = [label.get_text() for label in left.get_yticklabels()]
        assert names == [
            "base, by formula",
            "ring-style, by formula",
            *study.OPTIMISATIONS,
            "this project, predicted",
        ]
        assert "-1,280.0" in [text.get_text() for text in right.texts]
        assert all("MiB" in axes.get_xlabel() for axes in (left, right))

    figure.drawn(["svg"], look)


def test_what_it_says_has_its_figures_from_the_rows(rows):
    findings = study.findings(rows)
    assert "dynamic pool sizing gives back 1,280.0" in findings.answer
    assert "hold 1.5 MiB, measured" in findings.answer
    assert "192.0 MiB there, not 24" in findings.original
