"""`planner study million-tokens`: a small run in place of a million, predictions, cards that share."""

import pytest
import torch
from matplotlib.figure import Figure

from attention import ShardingConfig
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
        million.ring_row(kind, million.MILLION, mode) for kind in million.SHARED for mode in million.MODES
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


def test_as_few_cards_as_have_room():
    card, shared = find("gtx1080"), DILATED.model_copy(update={"sharding": ShardingConfig(exchange="keys")})
    found = million.cards_needed(shared, million.MILLION, "float32", "training", card)

    def needed(cards: int) -> int:
        workload = Workload(seq=million.MILLION, dtype="float32", mode="training", gpus=cards)
        return estimate(shared, workload, card).upper

    assert found > 1
    assert needed(found) <= card.usable_bytes < needed(found - 1)
    assert million.cards_needed(shared, 1024, "float16", "inference", card) == 1


def test_a_quick_run_measures_no_million():
    quick, whole = (million.steps(Scope(torch.device("cpu"), quick)) for quick in (True, False))
    measured = [[run for label, run in some if "measured" in label] for some in (quick, whole)]
    assert [run.keywords.get("seq", million.MILLION) for run in measured[0]] == [32_768]
    assert len(measured[1]) == 2
    assert len({label for label, _ in whole}) == len(whole)


def test_tables_show_each_part(rows):
    assert "| local_window | 1,024 | 2.33 | 1.86 | 3.0 | 1.50 x that at 256 |" in million.million_table(rows)
    assert "inference, float16 or bfloat16, GB" in million.predicted_table(rows)
    assert million.ring_table(rows).count("\n") == 7
    assert "| block-sparse, multihead | 33.68 | multihead |" in million.seeds_table(rows)


def test_the_picture_has_predictions_a_measured_run_and_the_rings(rows):
    figure = Figure(figsize=(8, 5), layout="constrained")
    million.draw(figure, rows)
    one, ten, measured, ring = figure.axes
    assert (one.get_title(), ten.get_title()) == ("1,048,576 tokens", "10,485,760 tokens")
    assert "GB, predicted" in one.get_xlabel()
    assert "resident, GB" in measured.get_xlabel()
    assert ring.get_title() == "cards that share dense attention, 16 / 32 bits"
    cards = next(row["cards"]["NVIDIA GeForce GTX 1080"] for row in rows if row["part"] == "ring")
    assert f"{cards['float16']} / {cards['float32']}" in [text.get_text() for text in ring.texts]


def test_the_sentences_have_the_rows_figures(rows):
    findings = million.findings(rows)
    assert "1,024 tokens ran in one process with 2.50 GB resident at most" in findings.answer
    assert "in 1.50 times the time a token that 256 take" in findings.answer
    shared = [row["cards"]["NVIDIA GeForce GTX 1080"]["float16"] for row in rows if row.get("cards")][1::2]
    assert (
        f"to share 1,048,576 in training takes {min(shared)} to {max(shared)} NVIDIA GeForce GTX 1080"
        in findings.answer
    )
    base = next(row for row in rows if row.get("what") == "block-sparse, base")
    assert f" GB; {base['allocated'] / 1e9:.2f} predicted)" in findings.original
    assert "18 TB" in findings.original
