"""Weights, dense and as active blocks: their sizes, the original project's beside them, the picture."""

from __future__ import annotations

import pytest
import torch

from attention import build
from attention.layout import count_active
from planner.measuring.server import Batch
from planner.report.plot import figure
from studies import weights_storage as study
from studies.bench.memory_rows import MIB


@pytest.fixture(scope="module")
def rows():
    """As a study has them, what was measured made up."""
    stored = [study.stored_row(name, seq) for name in study.configs() for seq in study.LENGTHS]
    run = {
        "part": "measured",
        "seq": 512,
        "on": "cpu",
        "allocated": 8 * MIB,
        "cold": 8 * MIB,
        "outcome": "ok",
    }
    return [*stored, *({**run, "attention": name} for name in study.configs())]


@pytest.mark.parametrize("name", study.configs())
def test_what_is_stored_is_the_active_blocks_and_their_indices(rows, name):
    row = study.stored(rows, name, 8192)
    config = study.configs()[name]
    size = config.pattern.block_size if config.pattern else 64
    active = count_active(config, 8192, False)
    assert row["stored"] == active * (8 * size * size * 2 + 16)


def test_dense_weights_are_the_dense_matrix(rows):
    row = study.stored(rows, "dense", 4096)
    assert row["dense"] == 8 * 4096**2 * 2 == 256 * MIB  # the original project's figure
    assert row["dense"] < row["stored"] < 1.001 * row["dense"]


@pytest.mark.parametrize("name", study.configs())
def test_a_module_returns_what_is_predicted(name):
    q, k, v = torch.randn(3, 1, 512, 8, 64).half()
    _, weights = build(study.configs()[name])(q, k, v, return_attention_weights=True)
    held = weights.block_values.nbytes + weights.block_indices.nbytes
    assert held == study.stored_row(name, 512)["stored"]


def test_a_call_with_weights_is_predicted_and_measured(one_server):
    with Batch("cpu", timeout=60) as batch:
        row = study.measured_row(study.SPARSE, 512, batch)
    assert row["cold"] == pytest.approx(row["allocated"], rel=1e-3)
    assert row["components"]["weights"] == 4 * 8 * 128 * 128 * 2  # a block a row


def test_the_seeds_have_fewer_blocks_than_rows(rows):
    for seq, size in study.SEEDS.items():
        row = study.stored(rows, study.SPARSE, seq)
        assert study.blocks_a_row(row, size * MIB) < 1
        assert study.blocks_a_row(row, row["rows"] * row["block_bytes"]) == 1
        assert row["stored"] >= row["rows"] * row["block_bytes"]


def test_more_of_the_lengths_fit_with_fewer_blocks(rows):
    fits = [study.longest(rows, name) for name in study.configs()]
    assert fits == sorted(fits)
    assert fits[0] == 16_384


def test_tables_have_a_line_a_length_and_the_seeds_sizes(rows):
    table = study.stored_table(rows)
    assert len(table.splitlines()) == 2 + len(study.LENGTHS)
    assert "| 4,096 | 256.1 | 16.0 | 6.3% |" in table
    assert "| 4,096 | 256.0 | 5.1 | 2.0% | 0.64 | 8.0 | 16.0 |" in study.claims_table(rows)
    lost = [*rows[:-1], {**rows[-1], "cold": None, "outcome": "memory ran out"}]
    assert "| local_window 512 | 512 | 8.0 | memory ran out |" in study.measured_table(lost)


def test_the_picture_names_every_attention_and_its_units(rows):
    def look(drawn):
        study.draw(drawn, rows)
        left, right = drawn.axes
        assert {*study.configs(), "original: 95% sparsity"} == {text.get_text() for text in left.texts}
        assert [text.get_text() for text in left.get_yticklabels()][:3] == ["1 MiB", "32 MiB", "1 GiB"]
        assert left.get_xlabel() == right.get_xlabel() == "tokens"
        assert "lines predicted, GTX 1080" in right.get_title()

    figure.drawn(["svg"], look)


def test_what_it_says_has_its_figures_from_the_rows(rows):
    findings = study.findings(rows)
    assert "8,192.5 MiB for dilated_sparse 5%" in findings.answer
    assert "16,384 for dense" in findings.answer
    assert "0.64 and 0.61 blocks of 128 a row" in findings.original
    assert "16.0 and 48.0 MiB" in findings.original
