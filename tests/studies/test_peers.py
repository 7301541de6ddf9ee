"""`planner study peers`: small comparisons without compiling, its tables, picture and sentences."""

import pytest
import torch
from matplotlib.figure import Figure

from attention.ops import flex
from studies import peers
from studies.bench.study import Scope

CPU = torch.device("cpu")
OUT = 16 << 20


def flexed(pattern, dtype, ratio):
    return {
        "part": "flex",
        "seq": 2048,
        "pattern": pattern,
        "dtype": dtype,
        "block": 64,
        "kept": 3,
        "gflops": 200.0,
        "flex_gflops": 100.0,
        "ratio": ratio,
    }


def of_dtype(dtype):
    return [
        *(flexed(pattern, dtype, ratio) for pattern, ratio in (("local_window", 2.0), ("adaptive", 0.5))),
        *(
            {
                "part": "dense",
                "seq": 4096,
                "dtype": dtype,
                "heads": 2,
                "block": 128,
                "sparsity": left_out,
                "ratio": ratio,
                "seconds": 1.0,
                "dense_seconds": 4.0,
            }
            for left_out, ratio in ((0.9, 0.125), (0.2, 0.9))
        ),
        {
            "part": "training",
            "seq": 2048,
            "attention": "local_window",
            "dtype": dtype,
            "block": 64,
            "kept": 9,
            "forward_seconds": 1.0,
            "ratio": 3.5,
        },
        {
            "part": "bare",
            "seq": 2048,
            "pattern": "adaptive",
            "dtype": dtype,
            "block": 64,
            "kept": 3,
            "in_place": 1.25,
            "copied": 0.75,
        },
        {
            "part": "memory",
            "seq": 2048,
            "pattern": "local_window",
            "dtype": dtype,
            "block": 64,
            "kept": 3,
            "out": OUT,
            "ours": OUT * 5 // 4,
            "flex": 3 * OUT,
            "mask": 1 << 20,
            "dense": 2 * OUT,
        },
    ]


ROWS = [row for dtype in ("float32", "bfloat16") for row in of_dtype(dtype)]


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention's place taken by dense attention, because to compile it takes seconds."""
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(flex, "compiled", lambda: lambda q, k, v, block_mask: plain(q, k, v))


@pytest.mark.parametrize("pattern", peers.PATTERNS)
def test_what_is_allocated_is_counted_on_all_sides(uncompiled, pattern):
    row = peers.memory_row(pattern, torch.float32, 64, 3, CPU, seq=512)
    assert row["out"] == 512 * peers.HEADS * peers.HEAD_DIM * 4
    assert row["out"] < row["ours"] < 3 * row["out"]
    # Counts and indices, int32, as wide as the matrix of 8 x 8 blocks.
    heads = peers.HEADS if pattern == "adaptive" else 1
    assert row["mask"] >= 2 * heads * (8 + 8 * 8) * 4
    assert row["flex"] == row["dense"] + row["mask"]


def test_rows_have_ratios_of_what_they_compare(uncompiled):
    flexed = peers.flex_row("local_window", torch.float32, 64, 3, CPU, 1, seq=512)
    dense = peers.dense_row(torch.float32, 64, 0.1, CPU, 1, seq=512)
    training = peers.training_row("dilated, 3 branches", torch.float32, 64, 3, CPU, 1, seq=512)
    kernel = peers.kernel_row(torch.float32, 64, 64, 1)
    bare = [peers.bare_row(pattern, torch.float32, 64, 3, 1, seq=512) for pattern in peers.GATHERED]
    assert all(row["ratio"] > 0 for row in (flexed, dense, training, kernel))
    assert all(row["in_place"] > 0 and row["copied"] > 0 for row in bare)
    assert (flexed["seq"], dense["seq"], training["seq"]) == (512, 512, 512)
    assert dense["ratio"] == pytest.approx(dense["seconds"] / dense["dense_seconds"])


def test_a_quick_run_compiles_one_pattern_and_has_all_parts():
    quick, whole = ([label for label, _ in peers.steps(Scope(CPU, quick))] for quick in (True, False))
    assert sum(label.startswith("local_window") for label in quick) == 2
    assert not any(label.startswith(("adaptive", "dilated_sparse")) for label in quick)
    for part in ("kernel", "bare", "memory", "dense", "training"):
        assert sum(label.startswith(part) for label in quick) >= 2
    assert len(set(whole)) == len(whole)
    assert sum(label.startswith("memory") for label in whole) == 8
    assert sum(label.startswith("bare") for label in whole) == 24


def test_the_bare_kernel_copies_the_lists_it_is_timed_with(uncompiled, monkeypatch):
    copied = []
    select = torch.index_select
    monkeypatch.setattr(
        torch, "index_select", lambda x, *given, out: copied.append(select(x, *given, out=out))
    )
    peers.bare_row("adaptive", torch.float32, 64, 3, 1, seq=512)
    # Keys and values; two warm-ups and one run; of 8 rows 2, 4, and all a call; each once.
    tokens = [x.numel() // peers.HEAD_DIM for x in copied]
    assert sum(tokens) == 2 * 3 * 3 * 8 * peers.HEADS * 3 * 64


def test_tables_show_each_part():
    assert "| local_window | float32 | 64 | 3 | 200 | 100 | 2.00 |" in peers.flex_table(ROWS)
    assert "| adaptive | bfloat16 | 0.50 | 0.50 |" in peers.summary_table(ROWS)
    assert "| float32 | 2 | 128 | 90% | 1.00 | 4.00 | 0.125 |" in peers.dense_table(ROWS)
    assert "| adaptive | bfloat16 | 64 | 3 | 1.25 | 0.75 | 0.50 |" in peers.bare_table(ROWS)
    memory = "| local_window | bfloat16 | 2,048 | 16.00 | 20.00 | 48.00 | 1.00 | 32.00 |"
    assert memory in peers.memory_table(ROWS)


def test_the_picture_has_a_panel_a_peer_one_of_training_and_one_of_memory():
    figure = Figure(figsize=(8, 5), layout="constrained")
    peers.draw(figure, ROWS)
    flexed, dense, training, memory = figure.axes
    assert "its time / ours" in flexed.get_xlabel()
    assert [text.get_text() for text in flexed.get_yticklabels()] == ["local_window", "adaptive"]
    assert dense.get_title() == "against dense SDPA, 4,096 tokens, 2 heads"
    assert dense.get_yticklabels()[0].get_text() == "90% left out,\nblock 128"
    assert training.get_xlabel() == "time of a step / time of its forward"
    assert "in outputs" in memory.get_xlabel()
    assert {text.get_text() for text in flexed.texts} == {"float32", "bfloat16"}


def test_the_sentences_have_the_rows_figures():
    found = peers.findings(ROWS).answer
    assert "1.00 times FlexAttention's speed in the geometric mean over 4 layouts, 0.50 in the worst" in found
    assert "12.5% to 12.5% of dense SDPA's time at 4,096 tokens" in found
    assert "in bfloat16 1.25, dense SDPA 2.00, FlexAttention with its mask 3.00" in found
