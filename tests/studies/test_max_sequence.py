"""`planner study max-sequence`: lengths at small budgets, its table, picture and sentences."""

import pytest
import torch
from matplotlib.figure import Figure

from planner import max_sequence as longest_of
from planner.gpus import find
from planner.question.dimensions import attention_kind
from planner.workload import Workload
from studies import max_sequence
from studies.bench.attentions import one_of_each
from studies.bench.study import Scope

KINDS = one_of_each()


def card(kind, mode, gb, seq, part="cards", **more):
    return {"part": part, "attention": kind, "mode": mode, "gb": gb, "card": "a card", "seq": seq} | more


ROWS = [
    *(
        card(kind, mode, gb, 1000 * (place + 1) * gb // (1 + (mode == "training")))
        for place, kind in enumerate(KINDS)
        for mode in max_sequence.MODES
        for gb in (8, 80)
    ),
    card("base", "inference", 8, 40_000, "seeds", said=4000, counted="1 MB", pool="auto"),
    card("none", "inference", 8, 40_000, "seeds", said=1000, counted="1 MB", pool="off"),
    {
        "part": "capped",
        "attention": "dense",
        "mode": "inference",
        "budget": 8_000_000,
        "seq": 640,
        "upper": 7_900_000,
        "beyond": 8_100_000,
        "outcome": "ok",
        "message": None,
        "allocated": 7_800_000,
    },
    {
        "part": "capped",
        "attention": "multihead",
        "mode": "training",
        "budget": 8_000_000,
        "beyond": 9_000_000,
        "outcome": "nothing fits",
    },
]


def test_there_is_one_attention_of_each_kind_that_pictures_have_colours_for():
    from planner.report.plot.figure import KINDS as colours

    assert list(KINDS) == list(colours)
    assert [attention_kind(config) for kind, config in KINDS.items() if kind != "multihead"] == list(KINDS)[
        :-1
    ]
    assert KINDS["multihead"].multihead is not None


@pytest.mark.parametrize("mode", max_sequence.MODES)
def test_a_row_has_the_longest_on_the_card_of_that_memory(mode):
    row = max_sequence.card_row("dilated", KINDS["dilated"], mode, 8)
    card = find("gtx1080")
    assert row["seq"] == longest_of(KINDS["dilated"], Workload(seq=1, mode=mode), "8GB", card)
    assert row["card"] == card.name
    assert row["upper"] <= 8e9 < row["beyond"]


def test_a_budget_without_a_card_is_of_the_generic_one():
    row = max_sequence.card_row("dense", KINDS["dense"], "inference", 1)
    assert row["card"].startswith("generic")
    assert row["seq"] > 0


def test_cards_have_the_memory_that_they_stand_for():
    for gb, name in max_sequence.CARDS.items():
        assert name is None or gb * 1e9 <= find(name).usable_bytes < gb * 1.1e9


def test_the_seeds_limits_are_beside_what_is_predicted_with_and_without_a_pool():
    rows = [max_sequence.seeds_row(claim) for claim in max_sequence.claims()]
    assert {row["pool"] for row in rows} == {"auto", "on", "off"}
    assert all(row["seq"] > 10 * row["said"] for row in rows)


def test_the_predicted_longest_runs_held_to_its_budget(one_server):
    row = max_sequence.capped_row("local_window", KINDS["local_window"], "inference", 4_000_000)
    assert (row["outcome"], row["message"]) == ("ok", None), row["message"]
    assert row["allocated"] <= row["upper"] <= row["budget"] < row["beyond"]


def test_what_does_not_fit_is_not_run():
    row = max_sequence.capped_row("multihead", KINDS["multihead"], "training", 1_000_000)
    assert row["outcome"] == "nothing fits"
    assert "| multihead | training | 1.00 MB | 0 | nothing fits |" in max_sequence.capped_table([row])


def test_a_quick_run_is_small_and_a_whole_one_leaves_out_slow_dense_runs():
    quick, whole = (
        [label for label, _ in max_sequence.steps(Scope(torch.device("cpu"), quick))]
        for quick in (True, False)
    )
    assert sum("MB" in label for label in quick) == 2
    assert sum(label.startswith("dense") and ("MB" in label or "1.00 GB" in label) for label in whole) == 2
    assert len(set(whole)) == len(whole)


def test_tables_show_tokens_by_card():
    assert "| dense | training | 4,000 | 40,000 |" in max_sequence.cards_table(ROWS)
    assert "| none | 1,000 | 1 MB | 40,000 | 40 |" in max_sequence.seeds_table(ROWS)
    assert "| 640 | ok | 97.5% | 101.25% |" in max_sequence.capped_table(ROWS)


def test_the_picture_has_tokens_by_attention_and_shares_of_the_budget():
    figure = Figure(figsize=(8, 5), layout="constrained")
    max_sequence.draw(figure, ROWS)
    inference, training, used = figure.axes
    assert (inference.get_title(), training.get_title()) == ("inference", "training")
    assert inference.get_xlabel() == "longest sequence, tokens"
    assert [text.get_text() for text in inference.get_yticklabels()] == list(KINDS)
    assert "% of the budget" in used.get_ylabel()
    assert [text.get_text() for text in used.get_xticklabels()] == ["8 MB\ninference"]


def test_the_sentences_have_the_rows_figures():
    findings = max_sequence.findings(ROWS)
    assert "on 8 GB 8,000 (dense) to 56,000 (multihead) tokens are predicted for inference" in findings.answer
    assert "1 of 1 lengths predicted for the CPU ran" in findings.answer
    assert "97.5%" in findings.answer
    assert "1,000 to 4,000 tokens on 8 GB, where 10 to 40 times" in findings.original
