"""Published seconds: the file that comes with the project, what is refused, a fit finds what made it."""

from __future__ import annotations

import numpy as np
import pytest

from attention.errors import ConfigError
from planner.speed.gpu_kernels import coefficients
from studies.bench.published import PUBLISHED, Published, read_published
from studies.bench.published_fit import HeldOut, covered, fitted_family, like_of, names_of, ranges

ROWS = read_published()
HEAD, FIRST = PUBLISHED.read_text().splitlines()[:2]
CELLS = dict(zip(HEAD.split(","), FIRST.split(","), strict=True))


def test_every_measurement_has_a_source_and_a_card():
    assert len(ROWS) == 720
    assert {row.kernel for row in ROWS} == {"flash2", "cudnn", "efficient", "flex"}
    assert all(row.source.count("/") >= 1 for row in ROWS)
    assert len({row.card for row in ROWS}) == 15


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"seq": "-4"}, "seq: Input should be greater than or equal to 1, got -4"),
        ({"seq": "4k"}, "seq: a whole number, got '4k'"),
        ({"ms": "nan"}, "ms: .*finite"),
        ({"ms": "0.001"}, "TFLOP/s, and the peak of NVIDIA A100-SXM4-80GB is 312"),
        ({"kv_heads": "5"}, "kv_heads: 5 does not divide 32 heads"),
        ({"card": "mi300x"}, "'mi300x' is AMD's"),
        ({"card": "A100 80GB"}, "is called a100-sxm4-80gb in gpus.json"),
        ({"kernel": "cudnn"}, "cudnn does not run float16 on NVIDIA A100"),
        ({"kernel": "flash9"}, "kernel: "),
        ({"causal": "yes"}, "causal: 0 or 1, got 'yes'"),
        ({"source": ""}, "source: "),
        ({"step": "fwd"}, "step: "),
    ],
)
def test_a_row_that_makes_no_sense_is_refused_with_its_line(tmp_path, changed, message):
    path = tmp_path / "mine.csv"
    path.write_text("\n".join((HEAD, FIRST, ",".join((CELLS | changed).values()))))
    with pytest.raises(ConfigError, match=rf"mine\.csv, line 3: .*{message}"):
        read_published(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "line 1: the columns are None"),
        (f"{HEAD},more\n", "line 1: the columns are"),
        (f"{HEAD}\n", "has no measurement"),
        (f"{HEAD}\n{FIRST},1\n", "line 2: there are to be 15 cells"),
        (f"{HEAD}\na,b\n", "line 2: there are to be 15 cells"),
    ],
)
def test_a_file_of_other_columns_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_published(path)


def test_a_fit_finds_the_coefficients_that_made_the_seconds():
    known = coefficients()
    mine = [row for row in ROWS if row.kernel == "flash2"]
    made = [row.model_copy(update={"ms": 1e3 * row.predicted(known)}) for row in mine]
    found = dict(known) | fitted_family(made, "flash2", known)
    errors = np.array([row.predicted(found) / row.seconds - 1 for row in made])
    assert np.abs(errors).max() < 0.1
    assert np.median(np.abs(errors)) < 0.01
    assert found["flash2 forward work ampere"] == pytest.approx(known["flash2 forward work ampere"], rel=0.05)


def test_what_no_row_tells_is_as_its_like():
    names = names_of("efficient", "forward")
    assert like_of("efficient forward work geforce blackwell", names) == "efficient forward work ampere"
    assert like_of("efficient forward work ampere", names) is None
    rows = [row for row in ROWS if row.card == "a100-sxm4-80gb" and row.kernel == "flash2"]
    found = fitted_family(rows, "flash2", {})
    ampere, hopper = (found[f"flash2 forward work {kind}"] for kind in ("ampere", "hopper"))
    assert hopper == pytest.approx(ampere)


def test_shipped_coefficients_are_those_of_known_cards():
    every = {
        name
        for family in ("flash2", "cudnn", "efficient", "flex")
        for step in ("forward", "backward")
        for name in names_of(family, step)
    }
    assert set(coefficients()) == every


def test_a_range_covers_its_share_of_a_class_and_is_no_wider():
    rng = np.random.default_rng(0)
    rows = []
    for source in range(20):
        row: Published = ROWS[0].model_copy(update={"source": f"a/b:{source}", "step": "forward"})
        rows += [HeldOut(row, row.seconds / ratio, False) for ratio in np.exp(rng.normal(0, 0.1, 20))]
    low, high = ranges(rows, 0.8)["flash2 forward"]
    assert low == pytest.approx(np.exp(-0.128), rel=0.03)
    assert high == pytest.approx(np.exp(0.128), rel=0.03)
    assert 0.75 < covered(rows, 0.8) < 0.85
    assert ranges(rows, 0.8)["flex forward"] == (low, high)  # of all, where a class has too few
