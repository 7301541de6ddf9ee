"""`planner show`: its figures are those of the layout, its pictures show every kept block, in 80 columns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from edges import by_token
from typer.testing import CliRunner

from attention import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from attention.errors import ConfigError
from attention.layout import build_layout
from planner.cli.main import app
from planner.quality.mass import mass_of
from planner.quality.profiles import PRESETS
from planner.quality.reach import layers
from planner.report.plot.figure import drawn
from planner.report.plot.layout import draw_layout, plot_layout
from planner.report.seen import MAXIMUM_TOKENS, cells, seen, seen_data, strips
from planner.report.text.layout import HALVES, seen_text
from planner.workload import Workload

ROOT = Path(__file__).resolve().parents[3]
PROFILE = PRESETS["balanced"]
WINDOW = AttentionConfig(
    variant="block_sparse",
    pattern=SparsePatternConfig(
        pattern_type="global_local", block_size=32, local_window_size=64, global_tokens=32
    ),
)
SPARSE = AttentionConfig(
    variant="block_sparse",
    segment_lengths=(1024, 4096),
    dilation_rates=(1, 2),
    pattern=SparsePatternConfig(block_size=64),
)
DILATED = AttentionConfig(variant="dilated", segment_lengths=(256, 1024), dilation_rates=(1, 4))
ADAPTIVE = AttentionConfig(
    variant="adaptive", pattern=SparsePatternConfig(), adaptive=AdaptiveConfig(num_heads=8, head_dim=64)
)
EACH = pytest.mark.parametrize(
    "config",
    [AttentionConfig(variant="dense"), WINDOW, SPARSE, DILATED],
    ids=["dense", "window", "sparse", "dilated"],
)


def look(config, seq=1024, causal=False, heads=8):
    return seen(config, Workload(seq=seq, causal=causal, heads=heads), PROFILE)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"}, prog_name="planner")


# ---- figures


@EACH
@pytest.mark.parametrize("causal", [False, True])
def test_figures_are_those_of_the_layout_and_the_models(config, causal):
    found, workload = look(config, causal=causal), Workload(seq=1024, causal=causal)
    assert found.layers == layers(config, workload)
    assert found.mass == mass_of(config, workload, PROFILE)
    if config is not DILATED:
        layout = build_layout(config, 1024, causal)
        assert (found.units, found.size, found.exact) == (layout.blocks, layout.block_size, True)
        assert (found.minimum, found.maximum) == (layout.counts.min(), layout.counts.max())
        assert found.share == pytest.approx(layout.density)
    if causal and config.variant == "dense":
        assert found.permitted == 1


def test_windows_that_end_at_the_token_are_seen_token_by_token_and_by_all_heads():
    found = look(by_token(WINDOW, 5), causal=True)
    assert (found.unit, found.units, found.by_head) == ("token", 1024, False)
    assert (found.minimum, found.maximum) == (1, 70 + 32)
    text = seen_text(found, "#")
    assert "edges token" in text
    assert "head 0" not in text


def test_a_dilated_attention_is_seen_by_one_head():
    found = look(DILATED)
    assert (found.unit, found.units, found.size) == ("token", 1024, 1)
    assert (found.minimum, found.maximum) == (256, 256 + 192)
    kinds = strips(found)
    assert [(one.length, one.rate, one.heads[0]) for one in kinds] == [
        (256, 1, 0),
        (1024, 4, 0),
        (1024, 4, 1),
        (1024, 4, 2),
        (1024, 4, 3),
    ]
    assert kinds[2].heads == (1, 5)
    assert [at for at, one in enumerate(kinds[2].positions) if one] == list(range(1, 64, 4))
    assert strips(look(WINDOW)) == []


@pytest.mark.parametrize("causal", [False, True])
def test_of_an_adaptive_attention_the_budget_is_known(causal):
    found = look(ADAPTIVE, seq=4000, causal=causal)
    assert (found.units, found.maximum, found.mass, found.layers) == (32, 3, None, None)
    rows = np.minimum(np.arange(1, 33), 3) if causal else np.full(32, 3)
    assert found.mean == pytest.approx(rows.mean())
    text = seen_text(found, "#")
    assert "at run time" in text
    assert "3 blocks a row, 9.38% of all" in text
    assert "mass " not in text.replace("mass and reach", "").replace("what mass and", "")


def test_reach_is_looked_for_so_far_and_no_further():
    near = AttentionConfig(
        variant="block_sparse",
        pattern=SparsePatternConfig(pattern_type="local_window", block_size=16, local_window_size=16),
    )
    workload = Workload(seq=16 * 300, causal=True)
    assert layers(near, workload) == 299
    assert layers(near, workload, 299) == 299
    assert layers(near, workload, 298) is None
    assert "not within 256 layers" in seen_text(seen(near, workload, PROFILE), "#")


def test_what_is_too_much_for_a_picture_is_refused():
    with pytest.raises(ConfigError, match="at most 67,108,864 tokens"):
        look(WINDOW, seq=MAXIMUM_TOKENS + 1)
    many = AttentionConfig(variant="dilated", segment_lengths=(64,) * 13, dilation_rates=(1,) * 13)
    with pytest.raises(ConfigError, match="at most 12 branches"):
        look(many)


def test_a_picture_of_millions_of_tokens_takes_no_longer():
    found = look(
        AttentionConfig(variant="dilated", segment_lengths=(4096, 1 << 22), dilation_rates=(1, 8)), 1 << 22
    )
    assert not found.exact
    assert "about" in seen_text(found, "#")
    assert cells(found, 4, 4).min() > 0


# ---- characters


def picture(text: str) -> list[str]:
    """The picture's lines, without what is left of them."""
    begin = next(at for at, line in enumerate(text.splitlines()) if "keys" in line) + 1
    lines = text.splitlines()[begin:]
    end = next(at for at, line in enumerate(lines) if "drawn:" in line or "a mark is" in line)
    return [line[8:].ljust(72) for line in lines[:end]]


@EACH
@pytest.mark.parametrize("seq", [1, 100, 1024, 4000, 100_000])
@pytest.mark.parametrize("ink", ["#", "\u2588"])
def test_it_is_80_columns_wide_at_most_and_in_the_characters_that_there_are(config, seq, ink):
    text = seen_text(look(config, seq, causal=True), ink)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.isascii() == (ink == "#")
    assert len(picture(text)) <= 37


def test_each_block_is_drawn_where_there_is_room():
    found = look(WINDOW)
    kept = cells(found, 32, 32) > 0
    halves = picture(seen_text(found, "\u2588"))
    large = np.array([[HALVES.index(mark) for mark in row] for row in halves])
    rows = np.stack([large % 2, large // 2], axis=1).reshape(-1, 72)[:64, :64]
    np.testing.assert_array_equal(rows, np.kron(kept, np.ones((2, 2))))
    plain = picture(seen_text(found, "#"))
    np.testing.assert_array_equal(
        [[mark == "#" for mark in row[:64]] for row in plain], np.kron(kept, np.ones((1, 2)))
    )


@pytest.mark.parametrize("config", [WINDOW, AttentionConfig(variant="dense"), DILATED])
def test_shades_say_how_much(config):
    found = look(config, 23_040, causal=True)
    rows = picture(seen_text(found, "\u2588"))
    shares = cells(found, 36, 72)
    for marks, values in zip(rows, shares.tolist(), strict=True):
        for mark, share in zip(marks, values, strict=True):
            assert (mark == " ") == (share == 0)
            assert (mark == "\u2588") == (share == 1)
    assert len({mark for row in rows for mark in row}) > 1


# ---- files


@EACH
def test_it_is_drawn_with_its_names(config):
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    found = look(config)
    draw_layout(figure, found)
    matrix = figure.get_axes()[0]
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("keys, tokens", "queries, tokens")
    assert [label.get_text() for label in matrix.get_xticklabels()] == ["0", "256", "512", "768", "1K"]
    assert f"of all pairs of {found.unit}s" in figure.get_suptitle()
    assert len(figure.get_axes()) == (2 if config is DILATED else 1)
    shown = matrix.get_images()[0].get_array()
    np.testing.assert_allclose(shown, cells(found, 128, 128))
    assert drawn(["svg"], lambda figure: draw_layout(figure, found))[0].startswith(b"<?xml")


def test_an_adaptive_attention_has_no_picture(tmp_path):
    with pytest.raises(ConfigError, match="leave out --plot"):
        plot_layout(look(ADAPTIVE), tmp_path / "a.png")


# ---- the command


def test_a_file_says_how_long_and_options_say_otherwise(tmp_path):
    kept = tmp_path / "answer.json"
    kept.write_text(
        json.dumps(
            {
                "config": WINDOW.model_dump(mode="json"),
                "pareto": [],
                "workload": {"seq": 2048, "causal": True, "dtype": "float32"},
            }
        )
    )
    data = json.loads(run("show", str(kept), "--format", "json").stdout)
    assert (data["seq"], data["causal"]) == (2048, True)
    assert data == json.loads(json.dumps(seen_data(look(WINDOW, 2048, True))))
    data = json.loads(run("show", str(kept), "--seq", "1K", "--format", "json").stdout)
    assert (data["seq"], data["causal"]) == (1024, True)
    kept.write_text(WINDOW.to_json())
    assert json.loads(run("show", str(kept), "--format", "json").stdout)["seq"] == 4096
    assert run("show", str(kept), "--format", "yaml").stdout.startswith("config:\n")


def test_options_describe_a_config_as_they_do_elsewhere(tmp_path):
    line = "--variant dilated --segments 256,1K --rates 1,4 --seq 1K --heads 2"
    asked = line.split()
    result = run("show", *asked, "--plot", str(tmp_path / "a.svg"))
    assert result.exit_code == 0
    assert result.stderr == f"planner: the layout was drawn in {tmp_path / 'a.svg'}\n"
    assert "head 1 " in result.stdout
    assert "head 2 " not in result.stdout
    other = run("show", *asked, "--profile", "retrieval", "--format", "json").stdout
    assert json.loads(other)["profile"] == "retrieval"


@pytest.mark.parametrize(
    "asked, said",
    [
        ("", "pass e.g. --variant dense, or FILE"),
        ("none.json", "none.json cannot be read: No such file"),
        ("README.md", "README.md is no JSON"),
        ("pyproject.toml --seq 1K", "pyproject.toml is no JSON"),
        ("docs/examples/small.json --variant dense", "the file has the whole config"),
        ("--variant dense --seq 0", "--seq must be above 0"),
        ("--variant dense --seq 1G", "--seq '1G' is not understood"),
        ("--variant dense --seq 99M", "at most 67,108,864 tokens"),
        ("--variant dense --heads 0", "heads"),
        ("--variant dense --profile none", "no profile is called 'none'"),
        ("--variant dense --plot a.gif", "must end in .png or .svg"),
        ("--variant adaptive --plot a.png", "leave out --plot"),
    ],
)
def test_a_wrong_request_is_one_line(asked, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = run("show", *asked.split())
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert said in line


def test_it_imports_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['rich'] = sys.modules['matplotlib'] = None\n"
        "from planner.cli.main import app\n"
        "try: app(['show', '--variant', 'dilated', '--segments', '64', '--rates', '1'])\n"
        "except SystemExit as end: assert end.code == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
