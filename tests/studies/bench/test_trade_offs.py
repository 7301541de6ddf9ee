"""Rows of a config, predicted and measured, and the panels that show them."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure

from attention.config import AttentionConfig
from planner import gpus
from planner.memory.estimate import estimate
from studies.bench import trade_offs as t
from studies.bench.panels import Curves, Panel, Series, beside, curves, plain

WINDOW = t.sparse(kind="local_window", block=64, local_window_size=256)
PLAN = t.Purpose(t.task(4096), gpus.find(t.SEEDS_CARD))


@pytest.fixture
def place(scope):
    return t.here(scope, 512)


def rows_of(place, *configs: AttentionConfig):
    cases = [t.StudyConfig(f"case {n}", config, "one", n + 1) for n, config in enumerate(configs)]
    rows = [run() for _, run in t.case_steps(cases, PLAN, place)]
    assert json.loads(json.dumps(rows)) == rows
    return rows


def test_a_row_has_what_is_predicted_measured_and_kept(place):
    [row] = rows_of(place, WINDOW)
    assert row["kind"] == "local_window"
    assert AttentionConfig.from_json(json.dumps(row["config"])) == WINDOW
    assert row["planned"]["on"] == "GeForce GTX 1080"
    assert row["planned"]["allocated"] == estimate(WINDOW, t.task(4096), t.SEEDS_CARD).allocated
    assert (row["here"]["on"], row["here"]["seq"], row["here"]["dtype"]) == ("CPU", 512, "float32")
    assert row["here"]["floor"] == 4 * 512 * 8 * 64 * 4
    assert row["here"]["allocated"] == row["here"]["expected"]["allocated"]
    assert t.seconds(row) == 0.1
    assert 0 < row["quality"]["mass"] < 1
    assert row["quality"]["layers"] == 32


def test_what_would_take_too_long_is_predicted_only(place):
    [row] = rows_of(place._replace(longest=1e-9), WINDOW)
    assert row["here"]["outcome"] == "not run"
    assert "more than 1e-09 s" in row["here"]["message"]
    assert t.seconds(row) is None
    assert t.held(row["here"]) is None
    assert row["here"]["expected"]["seconds"] > 0


def test_times_are_compared_by_what_the_same_call_took_beside_them(place):
    first, second = rows_of(place, WINDOW, t.dilated((256,), (1,)))
    assert t.slower(second, first) == pytest.approx(2)
    second["here"]["reference"] *= 2  # the machine was half as fast
    assert t.slower(second, first) == pytest.approx(1)
    second["here"]["seconds"] = None
    assert t.slower(second, first) is None


def test_the_reports_count_a_thousandth_of_a_mebibyte():
    """72.1 MiB at 16,384 tokens is their 4.40 KB."""
    assert t.seeds_kb({"allocated": 72.125 * 2**20, "seq": 16_384}) == pytest.approx(4.40, abs=0.005)


def test_the_table_has_a_line_a_row_and_empty_cells_for_what_did_not_run(place):
    ran, other = rows_of(place, WINDOW, t.adaptive(64, 0.5))
    other["here"] |= {"seconds": None, "allocated": None}
    head, _, one, two = t.table([ran, other], {"blocks": lambda row: "64"}).splitlines()
    assert "ms (CPU, 512 tokens, float32)" in head
    assert "predicted ms (GeForce GTX 1080, 4,096 tokens, float16)" in head
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (one, two)]
    assert cells[0][:4] == ["case 0", "64", "100", "1.00"]
    assert cells[1][2:4] == ["", ""]


# Panels.


def test_rows_stand_beside_each_other_under_their_names(place):
    rows = rows_of(place, WINDOW, t.dilated((256,), (1,)))
    rows[1]["series"] = "other"
    figure = Figure(layout="constrained")
    beside(figure, rows, (t.memory_panel(rows[0], lambda _: 4.4), t.MASS, t.REACH))
    memory, mass, reach = figure.axes
    assert [label.get_text() for label in memory.get_yticklabels()] == ["case 0", "case 1"]
    assert mass.get_xlabel() == "mass of dense\nattention, %"
    assert len(memory.collections) == 6
    assert memory.get_xlim()[0] == 0
    assert [text.get_text() for text in reach.texts] == ["never"]  # segments that end before the sequence
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["predicted, GeForce GTX 1080", "reported, GeForce GTX 1080", "measured, CPU", "computed"]


def test_a_panel_without_numbers_has_no_ticks():
    figure = Figure()
    nothing = Panel("layers", (Series("computed", lambda _: None, "k"),), none="never")
    beside(figure, [{"name": "a", "series": ""}], (nothing,))
    assert list(figure.axes[0].get_xticks()) == []


def test_curves_show_lines_for_predictions_and_dots_for_runs(place):
    rows = rows_of(place, WINDOW, t.dilated((256,), (1,)))
    figure = Figure(layout="constrained")
    panels = (*t.five(rows), Curves("share", lambda row: row["x"], rule=(1.5, "half")))
    curves(figure, rows, panels, lambda axes: axes.set_xlabel("case"), {"one": ("k", "o")})
    time, card, memory, mass, reach, share = figure.axes[:6]
    assert time.get_ylabel() == "ms, CPU (line: predicted)"
    assert card.get_ylabel() == "predicted ms, GeForce GTX 1080"
    assert [line.get_linestyle() for line in time.lines] == ["-", "None"]
    assert list(time.lines[1].get_ydata()) == pytest.approx([100, 200])
    assert memory.get_ylim()[0] == mass.get_ylim()[0] == 0
    assert reach.get_yticklabels()[-1].get_text() == "never"
    assert reach.lines[0].get_ydata()[1] == reach.get_yticks()[-1]
    assert [text.get_text() for text in share.texts] == ["half"]


def test_ticks_of_a_logarithmic_axis_are_numbers():
    axes = Figure().add_subplot()
    axes.set(xscale="log", xlim=(900, 3000))
    plain(axes.xaxis)
    assert {"1,000", "2,000"} <= {label.get_text() for label in axes.get_xticklabels()}
