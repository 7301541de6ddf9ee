"""`planner study million-tokens`: a small run in place of a million, predictions, the ring's arithmetic."""

import pytest
import torch
from matplotlib.figure import Figure

from planner.gpus import find
from planner.memory.estimate import estimate
from planner.workload import Workload
from studies import million_tokens as million
from studies.bench.attentions import one_of_each
from studies.bench.study import Scope

DILATED = one_of_each()["dilated"]


@pytest.fixture(scope="module")
def rows():
    measured = {
        "part": "measured",
        "attention": "local_window",
        "seq": 1024,
        "short": 256,
        "heads": 1,
        "floor": 2_000_000_000,
        "resident": 2_500_000_000,
        "before": 1,
        "seconds": 3.0,
        "per_token_ratio": 1.5,
    }
    predicted = [
        million.predicted_row(kind, config, seq)
        for kind, config in one_of_each().items()
        for seq in million.COUNTS
    ]
    ring = [
        million.ring_row(seq, dtype, mode)
        for seq in million.COUNTS
        for dtype in ("float16", "float32")
        for mode in million.MODES
    ]
    return [measured, *predicted, *ring, *map(million.claim_row, million.CLAIMS)]


def test_a_run_counts_its_tokens_and_what_is_resident():
    row = million.million_row("local_window", runs=1, seq=512, short=256, heads=1)
    assert (row["seq"], row["short"], row["floor"]) == (512, 256, 4 * 512 * 64 * 2)
    assert row["resident"] >= row["before"] > 0
    assert row["per_token_ratio"] > 0


def test_what_is_predicted_is_the_planners_estimate():
    row = million.predicted_row("dilated", DILATED, million.MILLION)
    workload = Workload(seq=million.MILLION, dtype="float32", mode="training")
    asked = estimate(DILATED, workload, million.CARD)
    assert row["upper"]["float32 training"] == asked.upper
    assert row["allocated"]["float32 training"] == asked.allocated
    assert row["upper"]["float16 training"] == row["upper"]["bfloat16 training"]


@pytest.mark.parametrize("mode, blocks", [("inference", 6), ("training", 12)])
def test_a_ranks_bytes_are_blocks_accumulator_and_log_sum_exp(mode, blocks):
    block = 1000 * million.HEADS * million.HEAD_DIM
    found = million.ring_bytes(1000, "float16", mode)
    assert found == blocks * 2 * block + 4 * block + 4 * 1000 * million.HEADS


@pytest.mark.parametrize("seq", million.COUNTS)
def test_as_few_cards_as_have_room(seq):
    card = find("gtx1080")
    found = million.cards_needed(seq, "float32", "training", card)
    context = estimate(DILATED, Workload(seq=1), card).components["context"]

    def rank(cards: int) -> int:
        return context + million.ring_bytes(-(-seq // cards), "float32", "training")

    assert rank(found) <= card.usable_bytes < rank(found - 1)


def test_one_card_where_one_is_enough_and_two_where_a_ring_of_one_would_be():
    assert million.cards_needed(1024, "float16", "inference", find("gtx1080")) == 1
    assert million.cards_needed(million.MILLION, "float16", "training", find("gtx1080")) == 2


def test_a_quick_run_measures_no_million():
    quick, whole = (million.steps(Scope(torch.device("cpu"), quick)) for quick in (True, False))
    measured = [[run for label, run in some if "measured" in label] for some in (quick, whole)]
    assert [run.keywords.get("seq", million.MILLION) for run in measured[0]] == [32_768]
    assert len(measured[1]) == 2
    assert len({label for label, _ in whole}) == len(whole)


def test_tables_show_each_part(rows):
    assert "| local_window | 1,024 | 2.33 | 1.86 | 3.0 | 1.50 x that at 256 |" in million.million_table(rows)
    assert "inference, float16 or bfloat16, GB" in million.predicted_table(rows)
    assert million.ring_table(rows).count("\n") == 9
    assert "| block-sparse, multihead | 33.68 | multihead |" in million.seeds_table(rows)


def test_the_picture_has_predictions_a_measured_run_and_the_rings(rows):
    figure = Figure(figsize=(8, 5), layout="constrained")
    million.draw(figure, rows)
    one, ten, measured, ring = figure.axes
    assert (one.get_title(), ten.get_title()) == ("1,048,576 tokens", "10,485,760 tokens")
    assert "GB, predicted" in one.get_xlabel()
    assert "resident, GB" in measured.get_xlabel()
    assert "by arithmetic" in ring.get_title()
    assert "11 | 20" in [text.get_text() for text in ring.texts]


def test_the_sentences_have_the_rows_figures(rows):
    findings = million.findings(rows)
    assert "1,024 tokens ran in one process with 2.50 GB resident at most" in findings.answer
    assert "in 1.50 times the time a token that 256 take" in findings.answer
    assert "by arithmetic 11 NVIDIA GeForce GTX 1080" in findings.answer
    base = next(row for row in rows if row.get("what") == "block-sparse, base")
    assert f" GB; {base['allocated'] / 1e9:.2f} predicted)" in findings.original
    assert "18 TB" in findings.original
