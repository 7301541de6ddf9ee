"""What studies say of other data than the committed: each verdict of a sentence or a title is the data's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from matplotlib.figure import Figure

from studies import (
    accuracy,
    block_size,
    config_impact,
    dilation,
    fits,
    floors,
    implementations,
    max_sequence,
    memory_breakdown,
    memory_per_token,
    memory_pool,
    million_tokens,
    min_mass,
    model_speed,
    pareto,
    peers,
    practical_limits,
    search,
    segments,
    sparsity,
    tuning,
    weights_storage,
)
from studies.bench import records, speed_model, study

MIB = 1 << 20


def committed(name: str) -> list[records.Row]:
    """The committed rows, to be changed."""
    return copy.deepcopy(records.load(name)[0]["rows"])


def headline(name: str, rows: list[records.Row]) -> str:
    figure = Figure(layout="constrained")
    study.study(name).draw(figure, rows)
    return " ".join(figure.get_suptitle().split())


def test_memory_that_settings_change_is_not_said_to_stay():
    for module in (dilation, segments, block_size):
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        rows = committed(name)
        assert "stays at" in module.findings(rows).answer
        rows[-1]["here"]["allocated"] *= 3
        findings = module.findings(rows)
        assert "memory goes from" in findings.answer or "memory there goes from" in findings.answer
        assert "stays at" not in findings.answer
    assert "The original project sees no change in memory" in dilation.findings(changed("dilation")).original
    assert "The original project too sees no change" in dilation.findings(committed("dilation")).original


def changed(name: str) -> list[records.Row]:
    rows = committed(name)
    rows[-1]["here"]["allocated"] *= 3
    return rows


def test_the_device_of_a_sentence_is_the_rows():
    rows = committed("dilation")
    for row in rows:
        row["here"]["on"] = "H100 80GB HBM3"
    assert "on a H100 80GB HBM3 memory stays" in dilation.findings(rows).answer


def test_a_setting_without_a_time_is_not_compared():
    rows = committed("dilation")
    rows[0]["here"]["seconds"] = None
    assert "have no time to compare with" in dilation.findings(rows).answer


def test_work_that_does_not_grow_with_the_segment_is_said():
    rows = committed("segments")
    assert "a token's work grows with its segment" in segments.findings(rows).original
    alone = [row for row in rows if row["series"] == "dilated, one branch"]
    alone[-1]["planned"]["seconds"] = alone[0]["planned"]["seconds"] / 2
    findings = segments.findings(rows)
    assert "takes 0.50 times the time" in findings.answer
    assert "a token's work does not grow with its segment" in findings.original


def test_large_blocks_that_are_slower_are_not_said_to_be_as_the_original_project_say():
    rows = committed("block-size")
    assert (
        "The original project too calls large blocks faster and less flexible, but"
        in block_size.findings(rows).original
    )
    assert "cut to the workspace" in block_size.findings(rows).original
    mine = [row for row in rows if row["series"] == "local_window"]
    mine[-1]["here"]["seconds"] *= 10
    mine[-1]["here"]["allocated"] *= 3
    sentence = block_size.findings(rows).original
    assert "faster and less flexible, which not all are here, and" in sentence
    assert "here the most is" in sentence
    assert "cut to the workspace" not in sentence


def test_what_sparsity_matters_for_is_what_differs():
    rows = committed("sparsity")
    assert "here it is what matters for time and mass" in sparsity.findings(rows).original
    rows[5]["here"]["allocated"] *= 4
    assert "here it matters for memory, time and mass" in sparsity.findings(rows).original
    for row in rows:
        row["planned"]["seconds"], row["quality"]["mass"] = 1.0, 0.5
        row["here"]["allocated"] = row["planned"]["allocated"] = row["here"]["floor"]
        row["planned"]["floor"] = row["here"]["floor"]
    assert "here it is what matters for none" in sparsity.findings(rows).original
    rows[0]["here"]["seconds"] = None
    assert "nearest blocks unknown" in sparsity.findings(rows).answer
    assert "| unknown |" in sparsity.even_table(rows)


def test_the_fastest_alone_is_no_slowest():
    rows = committed("implementations")
    for row in rows[1:]:
        row["here"] |= {"seconds": None, "allocated": None}
    sentence = implementations.findings(rows).answer
    assert f"{rows[0]['name']} alone ran" in sentence
    assert "8 of 9 did not run" in sentence
    assert "slowest" not in sentence


def test_what_does_not_fit_is_said():
    rows = committed("fits")
    assert headline("fits", rows).startswith("What is recommended fits")
    assert "met by a bound" in fits.findings(rows).original
    rows[0]["allocated"] = 2 * rows[0]["budget"]
    assert headline("fits", rows).startswith("1 of 99 answers take more than their budget")
    findings = fits.findings(rows)
    assert "1 of them above the budget" in findings.answer
    assert "did not keep 1 of 99 within the budget" in findings.original
    rows[1] |= {"outcome": "oom", "allocated": None}
    assert "98 answers ran, 1 did not run, 1 of them above" in fits.findings(rows).answer


def test_a_search_that_stays_far_is_not_said_to_come_near():
    rows = committed("search")
    assert "comes within 5%" in headline("search", rows)
    for row in rows:
        if row["part"] == "answer" and row["outcome"] == "ok":
            row["cold"], row["answer"] = None, -0.5
    assert "in 0% of random questions" in headline("search", rows)
    sentence = search.findings(rows).answer
    assert "comes within 5% in 0.0%" in sentence
    assert "166 are worse than it by more than 1%, 0 better: between" in sentence


def test_what_length_follows_is_what_changes_it_more():
    rows = committed("max-sequence")
    cards = max_sequence.of_part(rows, "cards")
    assert headline("max-sequence", rows).startswith(
        "Length follows memory; which attention it is matters less"
    )
    for row in cards:
        if row["attention"] == "dense":
            row["seq"] = max(row["seq"] // 1000, 1)
    assert "from attention to attention" in max_sequence._headline(cards)
    for row in max_sequence.of_part(rows, "seeds"):
        row["seq"] = row["said"] // 2
    sentence = max_sequence.findings(rows).original
    assert "0.50 to 0.50 times as many" in sentence
    assert "memory may have stopped it" in sentence


def test_the_original_project_figures_of_a_million_hold_where_they_are_met():
    rows = committed("million-tokens")
    sentence = million_tokens.findings(rows).original
    assert "for block-sparse attention holds if they are GiB" in sentence
    assert "for multihead does not (" in sentence
    assert "nor does its 1,000 for standard attention" in sentence
    for row in million_tokens.of_part(rows, "seeds"):
        row["allocated"] = 10**9 if row["attention"] == "dilated_sparse" else int(row["said"] * 2**30)
    sentence = million_tokens.findings(rows).original
    assert "for block-sparse attention does not hold if they are GiB" in sentence
    assert "for multihead does (36.16)" in sentence
    assert "; its 1,000 for standard attention does:" in sentence
    assert "not seven times" not in sentence


def test_what_a_million_tokens_need_is_of_the_rows():
    rows = committed("million-tokens")
    for row in million_tokens.of_part(rows, "predicted"):
        row["upper"] = {name: 10 * count for name, count in row["upper"].items()}
    least = min(
        row["upper"]["float16 inference"] for row in rows if row.get("seq") == 1_048_576 and "upper" in row
    )
    assert f"need {least / (4 * 1_048_576 * 8 * 64 * 2):.2f} to" in headline("million-tokens", rows)


def test_a_million_that_did_not_run_is_said_in_its_line():
    rows = committed("million-tokens")
    rows[0] = {"part": "measured", "attention": "local_window", "outcome": "memory ran out", "seq": 1_048_576}
    assert "| local_window | 1,048,576 | memory ran out |" in million_tokens.million_table(rows)
    assert "memory ran out" not in million_tokens.findings(rows).answer


def test_sparsity_that_saves_no_time_is_not_said_to():
    rows = committed("practical-limits")
    assert "even dense attention with 100% of the mass fits" in practical_limits.findings(rows).original
    assert "what sparsity saves there is time, not memory" in practical_limits.findings(rows).original
    for row in rows:
        if row["outcome"] == "ok":
            row["widest"] = row["widest"] | {"seconds": row["seconds"]}
    assert "what sparsity saves there is neither time nor memory" in practical_limits.findings(rows).original
    for row in rows:
        if row["outcome"] == "ok":
            row["widest"] = row["widest"] | {"mass": 0.4}
    sentence = practical_limits.findings(rows).original
    assert "with 40% of the mass fits" in sentence
    assert "even" not in sentence
    assert "what sparsity saves" not in sentence


def test_a_card_that_nothing_fits_is_said():
    rows = committed("practical-limits")
    for row in rows:
        if row["gb"] == 8:
            row |= {"outcome": "nothing fits", "relaxations": []}
    findings = practical_limits.findings(rows)
    assert "on the card of 8 GB none of them fits" in findings.answer
    assert "here nothing fits 8 GB either" in findings.original


def test_mass_that_costs_little_at_the_end_is_not_said_to_cost_most():
    rows = committed("min-mass")
    assert headline("min-mass", rows).startswith("The last fifth of the mass costs most of the time")
    for row in rows:
        if "seconds" in row:
            row["seconds"]["0.8"] = row["seconds"]["1.0"]
    assert headline("min-mass", rows).startswith("Four fifths of the mass cost 100% to 100% of the time")
    for row in rows:
        if "seconds" in row:
            row["seconds"]["0.9"] = None
    assert "90% cannot be had" in min_mass.findings(rows).answer


def test_there_is_as_much_to_choose_from_as_is_on_the_front():
    rows = committed("pareto")
    rows[0]["front"] = rows[0]["front"][:1]
    assert f"there are 1 and {len(rows[1]['front'])} to choose from" in pareto.findings(rows).original
    assert "always" not in pareto.findings(rows).original


@pytest.fixture
def unfitted(monkeypatch):
    """Nothing is fitted to timed runs, which takes seconds: all are predicted to take twice as long."""

    def predicted(rows):
        return [(row, 2 * row["seconds"]) for row in rows if row.get("part") == "held out"]

    monkeypatch.setattr(speed_model, "predicted", predicted)


def test_predictions_that_are_off_are_said_to_be(unfitted):
    rows = committed("accuracy")
    assert headline("accuracy", rows).startswith(
        "Memory is predicted to the byte in 82% of cases, seconds are"
    )
    for row in rows:
        if row["about"] == "memory" and row["outcome"] == "ok":
            row["predicted"] *= 2
    title = headline("accuracy", rows)
    assert title.startswith(
        "Memory is predicted to the byte in 0% of cases, seconds are off by 100.0% in the"
    )
    assert "memory is off by 100.000% in the median" in accuracy.findings(rows).answer


def test_bounds_that_lie_above_the_picture_are_counted_in_it(unfitted):
    rows = committed("accuracy")

    def drawn() -> Any:
        figure = Figure(layout="constrained")
        accuracy.draw(figure, rows)
        return figure.axes[1]

    assert "53 of 1000 lie above, up to 16.8" in [text.get_text() for text in drawn().texts]
    for row in rows:
        if row["about"] == "memory":
            row["upper"] = row["measured"]
    assert not [text for text in drawn().texts if "lie above" in text.get_text()]
    rows[0]["upper"] = rows[0]["measured"] // 2  # a bound that does not hold is shown
    assert drawn().get_ylim()[0] < 0.5


def test_twice_the_memory_is_not_denied():
    rows = committed("config-impact")
    a, b = config_impact.pair(rows, "card")
    b["allocated"] = int(2.4 * a["allocated"])
    title = headline("config-impact", rows)
    assert title.startswith("B is predicted to take 2.40 times A's memory; the original project has 2.4")
    assert " not " not in title


def test_buffers_that_follow_from_their_description_are_said_to():
    rows = committed("memory-breakdown")
    assert "which do not follow from its own description" in memory_breakdown.findings(rows).original
    ring = memory_breakdown.plan(rows, "B", memory_breakdown.RING_SEQ)["ring"]
    ring |= {"q, k and v": 24 * MIB, "memory pool": 128 * MIB}
    sentence = memory_breakdown.findings(rows).original
    assert "which follow from its own description: q, k and v are 24.0 MiB there, and ten" in sentence
    assert "not" not in sentence


def test_a_table_that_is_missed_is_not_said_to_be_met():
    rows = committed("memory-per-token")
    assert "its base is met within 0.4%: it is q, k, v and out" in memory_per_token.findings(rows).original
    memory_per_token.of_part(rows, "seeds", "base")[0]["allocated"] *= 2
    sentence = memory_per_token.findings(rows).original
    assert "its base is missed by up to 10" in sentence
    assert "it is q, k, v and out" not in sentence


def test_rows_enough_for_every_block_are_said_to_be():
    rows = committed("weights-storage")
    assert "so that not every row has one" in weights_storage.findings(rows).original
    for row in rows:
        if row["part"] == "stored":
            row["block_bytes"] //= 4
    assert "which is enough for every row" in weights_storage.findings(rows).original


def test_buffers_that_are_needed_are_not_said_to_be_none():
    rows = committed("floors")
    assert "need none of them" in floors.findings(rows).original
    rows[0]["forward"] = rows[0]["floor"] + 200 * MIB
    findings = floors.findings(rows)
    assert "at most 200.0 MiB forward" in findings.answer
    assert f"{2 * len(rows) - 1} of {2 * len(rows)} bars" in findings.answer
    assert "here it is 200.0 MiB at most" in findings.original


def test_a_pick_that_never_ran_has_no_rank():
    rows = committed("tuning")
    for row in rows:
        row |= {"rank": None, "speedup": None}
    sentence = tuning.findings(rows).answer
    assert "the models' pick never ran" in sentence
    assert "number" not in sentence
    rows[0] |= {"rank": 1, "speedup": 1.0}
    sentence = tuning.findings(rows).answer
    assert "number 1 of" in sentence
    assert "did not run in 4 of 5 questions" in sentence
    assert "nothing faster than a pick that ran" in sentence


def test_a_pool_that_helps_everywhere_is_said_to():
    rows = committed("memory-pool")
    for row in rows:
        for state in memory_pool.STATES:
            row["seconds"][state]["on"] = [second / 2 for second in row["seconds"][state]["off"]]
    sentence = memory_pool.findings(rows).answer
    assert "no clear difference in 0 of 16 cases and is faster (0.50)" in sentence
    assert "in 0 of 16 cases" in headline("memory-pool", rows)


def test_bars_that_are_broken_are_named():
    rows = committed("model-speed")
    rows[0]["seconds"] = 10.0
    assert f"over their bar: {rows[0]['what']}" in model_speed.findings(rows).answer


@pytest.mark.parametrize("part, what", [("flex", "FlexAttention's speed"), ("dense", "dense SDPA's time")])
def test_a_peer_that_did_not_run_is_not_compared_with(part: str, what: str):
    rows = [row for row in committed("peers") if row["part"] != part]
    assert what not in peers.findings(rows).answer
    tables: dict[str, Any] = dict(peers.STUDY.tables)
    assert all(table(rows) for table in tables.values())
    figure = Figure(layout="constrained")
    peers.draw(figure, rows)
    assert f"{part}: nothing ran" in [axes.get_title() for axes in figure.axes]
