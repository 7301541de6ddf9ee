"""Pictures of commands: every figure and unit is written, and nothing over anything else."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from typer.testing import CliRunner

from attention import AttentionConfig, SparsePatternConfig
from planner.answers.comparison import Side, compare
from planner.cli.main import app
from planner.memory.estimate import estimate
from planner.report.page.charts import Axis, Mark, bar, delta, pair, points, shade
from planner.report.page.html import tag
from planner.report.places import Box, Name, placed
from planner.report.plot.compare import change, draw_comparison, rows_of
from planner.report.plot.estimate import draw_pareto, draw_waterfall
from planner.report.plot.figure import drawn
from planner.report.plot.ranks import draw_shared
from planner.report.ranks import shared
from planner.report.text.recommend import seconds
from planner.report.ticks import linear_ticks, log_ticks
from planner.units import format_bytes
from planner.workload import Workload

DENSE = AttentionConfig(variant="dense")
WINDOW = AttentionConfig(
    variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window", block_size=64)
)
CARD = estimate(DENSE, Workload(seq=32768, mode="training"), "gtx1080")


def look(draw):
    """(the texts of a picture with their boxes in pixels, the picture)."""
    found = {}

    def keep(figure):
        draw(figure)
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(Text) if text.get_visible()]
        found["figure"] = figure
        found["texts"] = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]

    drawn([], keep)
    return found["texts"], found["figure"]


def hidden(texts):
    """Pairs of texts that are written over each other, by more than a pixel."""
    return [
        (a, b)
        for (a, x), (b, y) in combinations(texts, 2)
        if min(x.x1, y.x1) - max(x.x0, y.x0) > 1 and min(x.y1, y.y1) - max(x.y0, y.y0) > 1
    ]


def beyond(texts, figure):
    """Texts that leave the picture."""
    return [
        text
        for text, box in texts
        if box.x0 < -1 or box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1
    ]


@pytest.mark.parametrize("budget", [None, CARD.upper, int(1.02 * CARD.upper), 2 * CARD.upper, 8 * 10**9])
def test_a_waterfall_has_its_figures_beside_it(budget):
    texts, figure = look(lambda figure: draw_waterfall(figure, CARD, budget))
    said = " ".join(text for text, _ in texts)
    assert "memory at the peak, GB" in said or "memory at the peak, MB" in said
    assert f"upper bound {format_bytes(CARD.upper)}" in said
    assert "100.0%" in said
    assert budget is None or f"budget {format_bytes(budget)}" in said
    assert hidden(texts) == []
    assert beyond(texts, figure) == []


def test_the_pareto_set_has_its_picks_named(recommended):
    texts, figure = look(lambda figure: draw_pareto(figure, recommended))
    said = " ".join(text for text, _ in texts)
    for pick in recommended.alternatives:
        assert f"{seconds(pick.seconds)}, {100 * pick.mass:.1f}%" in said
        assert pick.role in said
    assert "size: memory at most" in said
    assert "time of a call, predicted" in said
    assert hidden(texts) == []
    assert beyond(texts, figure) == []


@pytest.mark.parametrize("device", ["cpu", "gtx1080"])
def test_a_comparison_has_both_and_the_change(device):
    a, b = (
        Side(estimate(config, Workload(seq=65536, mode="training"), device)) for config in (DENSE, WINDOW)
    )
    found = compare(a, b)
    rows = rows_of(found)
    *parts, together, upper = rows
    assert sum(row[1] for row in parts) == together[1] == a.estimate.device
    assert sum(row[2] for row in parts) == together[2] == b.estimate.device
    assert upper[1:] == (a.estimate.upper, b.estimate.upper)
    texts, figure = look(lambda figure: draw_comparison(figure, found, ("one.json", "two.json")))
    said = [text for text, _ in texts]
    assert {name for name, _, _ in rows} <= set(said)
    assert {change(one, two) for _, one, two in rows} <= set(said)
    assert "A: one.json, dense" in said
    assert any(text.startswith("At the upper bound B takes") for text in said)
    assert hidden(texts) == []
    assert beyond(texts, figure) == []


def test_a_change_is_said_by_how_much():
    assert change(5, 5) == "="
    assert change(0, 10**6) == "+1.0 MB"
    assert change(4 * 10**9, 10**9) == "-3.00 GB (-75%)"
    assert change(10**6, 20 * 10**6) == "+19.0 MB (x 20)"


def test_the_command_draws_it(tmp_path):
    for name, config in (("a", DENSE), ("b", WINDOW)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config.model_dump(mode="json")))
    asked = ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--seq", "8K"]
    plot = tmp_path / "c.png"
    result = CliRunner().invoke(app, [*asked, "--plot", str(plot)], prog_name="planner")
    assert result.stderr == f"planner: the comparison was drawn in {plot}\n"
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    wrong = CliRunner().invoke(app, [*asked, "--plot", "c.txt"], prog_name="planner")
    assert (wrong.exit_code, wrong.stdout) == (2, "")


# ---- what pictures are made of


@given(st.floats(1e-9, 1e9), st.floats(1.001, 1e12), st.integers(3, 10))
def test_ticks_are_within_and_few(low, factor, most):
    ticks = log_ticks(low, low * factor, most)
    assert ticks == sorted(ticks)
    assert all(low <= tick <= low * factor for tick in ticks)
    assert len(ticks) <= most
    straight = linear_ticks(low, low * factor, most)
    assert len(straight) in range(1, most + 2) or factor < 1.1


@pytest.mark.parametrize(
    "low, high, names",
    [(4.5, 7.5, {"5", "6", "7"}), (9, 35, {"10", "20", "30"}), (3000, 9000, {"4,000", "6,000"})],
)
def test_a_narrow_logarithmic_axis_has_plain_numbers(low, high, names):
    def draw(figure):
        axes = figure.subplots()
        axes.set(xscale="log", xlim=(low, high), ylim=(0, 1), yticks=[])

    made = []
    drawn(["svg"], lambda figure: (draw(figure), made.append(figure)))
    made[0].draw_without_rendering()
    shown = {text.get_text() for text in made[0].axes[0].get_xticklabels(which="both") if text.get_text()}
    assert names <= shown
    assert not any("10^" in text or "e+" in text for text in shown)


def test_ticks_are_round():
    assert log_ticks(0.04, 3, 8) == [0.05, 0.1, 0.2, 0.5, 1, 2]
    assert linear_ticks(79, 101, 6) == [80, 85, 90, 95, 100]


def test_names_avoid_points_each_other_and_the_edge():
    within = Box(0, 0, 200, 100)
    marks = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in ((20, 50), (40, 50), (190, 50), (190, 62))]
    names = [Name(20, 50, 40, 10), Name(190, 50, 40, 10), Name(190, 62, 40, 10)]
    boxes = placed(names, marks, within, 8)
    assert all(box.common(mark) == 0 for box in boxes for mark in marks)
    assert all(a.common(b) == 0 for a, b in combinations(boxes, 2))
    assert all(within.left <= box.left and box.right <= within.right for box in boxes)


def test_bars_stay_within_their_strip():
    for svg in (
        bar(0.9, 0.4),
        bar(-1, 5),
        bar(2, 2),
        delta(-9),
        delta(0),
        delta(0.5),
        pair(3, -1),
        pair(0, None),
    ):
        numbers = [float(part.split('"')[1]) for part in svg.replace(" x=", "@").split("@")[1:]] or [0]
        assert all(0 <= number <= 100 for number in numbers)
    assert "ink" not in delta(0)


@pytest.mark.parametrize(
    "values", [[(1, 1)], [(1, 5), (1, 5)], [(1e-9, 0), (1e9, 100)], [(0, -5), (-1, 1e300)], [(3, 3), (4, 4)]]
)
@pytest.mark.parametrize("diagonal", [False, True])
def test_points_can_be_anywhere(values, diagonal):
    marks = [Mark(x, y, 1, "dense", "said <b>", "name <b>") for x, y in values]
    chart = points(
        "what", marks, Axis("x", seconds, log=True), Axis("y", seconds, log=diagonal), diagonal=diagonal
    )
    assert "nan" not in chart
    assert "inf" not in chart
    assert "<b>" not in chart
    assert chart.count('class="point"') == 2 * len(marks)


def test_shades_are_nothing_all_and_between():
    assert [shade(share) for share in (0, 1e-9, 0.33, 0.34, 0.67, 0.99, 1)] == [0, 1, 1, 2, 3, 3, 4]
    assert tag("p") == "<p></p>"


@pytest.mark.parametrize("gpus, mode", [(4, "inference"), (64, "training")])
def test_who_holds_and_sends_what_is_drawn_with_nothing_hidden(gpus, mode):
    found = shared(WINDOW, Workload(seq=65_536, gpus=gpus, mode=mode, causal=True))
    texts, figure = look(lambda figure: draw_shared(figure, found))
    assert not hidden(texts)
    assert not beyond(texts, figure)
    assert any(f"{gpus} GPUs, by keys" in text for text, _ in texts)
    held, moved, _ = figure.axes
    assert len(held.collections) == gpus
    assert moved.images[0].get_array().shape == (gpus, gpus)
