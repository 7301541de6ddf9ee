"""`planner study scaling`: rows of few GPUs, formulas beside them, tables, picture and sentences."""

from __future__ import annotations

import pytest
import torch
from matplotlib.figure import Figure

from attention import build
from planner import estimate
from planner.workload import Workload
from studies import scaling
from studies.bench.study import Scope


@pytest.fixture(scope="module")
def rows():
    names = ("LongNet", "local_window", "dense, heads")
    grown = [scaling.scaling_row(name, "grows", world) for world in (1, 8) for name in names]
    return [*grown, scaling.published_row(scaling.RINGS[1])]


def test_a_row_is_what_the_planner_estimates(rows):
    row = next(row for row in rows if row["attention"] == "local_window" and row["world"] == 8)
    asked = estimate(
        scaling.attentions(row["seq"], 8)["local_window"], scaling.task(row["seq"], 8), scaling.CARD
    )
    assert (row["seq"], row["upper"]) == (1 << 20, asked.upper)
    assert row["received"] == asked.sharing.forward.received == 4095 * 2 * 8 * 128 * 2
    assert row["efficiency"] == pytest.approx(row["one"] / (8 * row["seconds"]))


def test_one_gpu_is_the_measure(rows):
    for row in rows[:3]:
        assert (row["world"], row["efficiency"], row["received"], row["ring"]) == (1, 1.0, 0, 0)


def test_longnet_has_branches_up_to_the_whole_sequence():
    config = scaling.longnet(1 << 20)
    assert config.segment_lengths[0] == 2048
    assert config.segment_lengths[-1] == 1 << 20
    assert build(config)
    assert scaling.longnet(131_072).dilation_rates == (1, 4, 16, 64)


def test_others_receive_what_their_way_of_sharing_implies():
    assert scaling.ring_bytes(1024, 4) == 768 * 2 * 8 * 128 * 2
    # Branches of 2,048 and 8,192 tokens, of which the second is longer than the 4,096 of a rank; its rate is
    # 4, as are the heads that share keys.
    assert scaling.torchscale_bytes(scaling.longnet(8192), 8192, 2) == 4096 * 2 * 8 * 128 * 2


def test_as_many_gpus_as_divide_the_heads_can_exchange_them():
    assert "dense, heads" in scaling.attentions(1 << 20, 8)
    assert "dense, heads" not in scaling.attentions(1 << 20, 16)


def test_rings_that_others_measured_are_planned_on_their_card(rows):
    row = rows[-1]
    assert row["published"] == 0.817
    workload = Workload(seq=65_536, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", causal=True, gpus=8)
    assert scaling.task(65_536, 8, "inference") == workload
    assert "| 81.7% |" in scaling.published_table(rows)


def test_a_step_has_a_label_of_its_own():
    labels = [label for label, _ in scaling.steps(Scope(torch.device("cpu"), quick=False))]
    assert len(labels) == len(set(labels))
    assert len(scaling.steps(Scope(torch.device("cpu"), quick=True))) < len(labels) / 3


def test_tables_picture_and_sentences_have_the_rows_figures(rows):
    table = scaling.scaling_table(rows)
    assert table.count("\n") == 7
    assert "| local_window | 8 | 1,048,576 |" in table
    assert scaling.fixed_table(rows) == ""
    figure = Figure(layout="constrained")
    scaling.draw(figure, rows)
    assert [axes.get_xlabel() for axes in figure.axes] == ["GPUs"] * 3
    longest = next(row for row in rows if row["attention"] == "LongNet" and row["world"] == 8)
    answer = scaling.findings(rows).answer
    assert f"LongNet receives {longest['received'] / 1e6:,.0f} MB" in answer
    assert f"LongNet {longest['efficiency']:.0%}" in answer
