"""The study of block sizes."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from attention.layout import build_layout
from attention.sizes.arrays import row_blocks
from studies import block_size


@pytest.fixture
def rows(scope):
    return [run() for _, run in block_size.steps(scope)]


@pytest.mark.parametrize("size", block_size.SIZES)
@pytest.mark.parametrize("kind", block_size.SERIES)
def test_every_size_keeps_as_many_tokens(kind: str, size: int):
    config = block_size.config_of(kind, size, block_size.SEQ, kept=1536)
    if kind == "adaptive":
        blocks = row_blocks(config.pattern.sparsity_ratio, block_size.SEQ // size)
    else:
        blocks = build_layout(config, block_size.SEQ, True).counts.max()
    assert int(blocks) * size == 1536


def test_the_picture_is_over_the_block_size(rows):
    figure = Figure(layout="constrained")
    block_size.draw(figure, rows)
    assert {axes.get_xlabel() for axes in figure.axes[:5]} == {"block, tokens"}
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["16", "128"]
    assert "causal" in figure.get_suptitle()


def test_what_is_said_is_computed(rows):
    findings = block_size.findings(rows)
    assert "blocks of 128 instead of 16" in findings.answer
    assert "local_window 2.00 times the time" in findings.answer
    assert "adaptive 1.14 times the time" in findings.answer
    rows[1]["here"]["seconds"] = None
    assert "local_window an unknown time, as one did not run, and" in block_size.findings(rows).answer
