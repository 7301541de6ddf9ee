"""`planner study practical-limits`: cells, the tables, the grid and the sentences."""

import pytest
import torch
from matplotlib.figure import Figure

from planner import recommend
from planner.gpus import find
from studies import practical_limits as limits
from studies.bench.study import Scope


def cell(gb, seq, mode="inference", **more):
    found = {
        "outcome": "ok",
        "attention": "dilated",
        "upper": 2_500_000_000,
        "seconds": 0.25,
        "mass": 0.81,
        "widest": {"attention": "dense", "seconds": 2000.0, "mass": 1.0},
    }
    return {"card": "NVIDIA GeForce X", "gb": gb, "seq": seq, "mode": mode} | (more or found)


NOTHING = {"outcome": "nothing fits", "relaxations": ["--vram 9.76GB (needs 9.76 GB)", "--seq 524288"]}
ROWS = [
    *(cell(gb, seq, mode) for mode in limits.MODES for gb in (8, 24) for seq in (4096, 65_536)),
    cell(8, 1 << 20, **NOTHING),
]


def test_a_cell_is_what_recommend_answers():
    row = limits.cell_row("gtx1080", 4096, "inference", trials=0)
    asked = recommend(seq=4096, gpu="gtx1080", trials=0)
    assert (row["upper"], row["seconds"], row["mass"]) == (
        asked.memory.upper,
        asked.seconds,
        asked.quality.mass,
    )
    assert row["mass"] >= limits.MIN_MASS
    assert row["widest"]["mass"] >= row["mass"]
    assert row["gb"] == 8


def test_cards_are_of_the_memory_that_is_asked_for():
    assert [find(card).nominal_bytes >> 30 for card in limits.CARDS] == [8, 12, 16, 24, 80]


def test_where_nothing_fits_it_is_said_what_would(monkeypatch):
    class Nothing(limits.NothingFitsError):
        def __init__(self):
            self.relaxations = ("--vram 9.76GB (needs 9.76 GB)", "--seq 524288")

    def recommended(**asked):
        raise Nothing

    monkeypatch.setattr(limits, "recommend", recommended)
    row = limits.cell_row("gtx1080", 1 << 20, "training")
    assert row["outcome"] == "nothing fits"
    assert limits.still_fits(row) == 524_288
    assert limits.still_fits({"relaxations": ["--mode inference"]}) is None


@pytest.mark.parametrize("quick, cells", [(True, 6), (False, 60)])
def test_there_is_a_step_a_cell(quick, cells):
    labels = [label for label, _ in limits.steps(Scope(torch.device("cpu"), quick))]
    assert len(set(labels)) == cells


def test_tables_name_what_fits_and_what_would():
    table = limits.limits_table(ROWS)
    assert "| 8 GB, X | training | 64K | dilated | 2.50 | 250 ms | 81% | dense, 100% | 2,000 s |" in table
    assert "nothing fits; --vram 9.76GB (needs 9.76 GB), or --seq 524288" in table
    seeds = limits.seeds_table(ROWS)
    assert "| 16K - 64K | ImprovedDilatedAttention (with pool) | 64K | dilated, 2.50 GB, 250 ms |" in seeds
    assert "nothing fits; 524,288 tokens would" in seeds


def test_the_grid_has_a_cell_for_each_card_and_length():
    figure = Figure(figsize=(8, 5), layout="constrained")
    limits.draw(figure, ROWS)
    inference, training = figure.axes
    assert (inference.get_title(), training.get_title()) == ("inference", "training")
    assert training.get_xlabel() == "tokens"
    texts = [text.get_text() for text in inference.texts]
    assert texts.count("dilated\n250 ms, 2.5 GB") == 4
    assert texts.count("dense 2,000 s") == 4
    assert "nothing fits\nup to 0.50M" in texts
    assert [text.get_text() for text in inference.get_yticklabels()] == ["8 GB\nX", "24 GB\nX"]


def test_the_sentences_have_the_rows_figures():
    findings = limits.findings(ROWS)
    assert "something fits in 8 of 9 cells, where dilated is the fastest" in findings.answer
    assert "on the NVIDIA GeForce X 65,536 tokens take 2.5 GB and 250 ms in inference" in findings.answer
    assert "524,288 tokens still fit there" in findings.answer
    assert "dense attention with 100% of the mass fits (2,000 s)" in findings.original
