"""The studies' data functions at small sizes, their tables, and docs that equal the committed data."""

import json
import subprocess
import sys

import pytest
import torch

from attention import AttentionConfig, build
from planner.footprint import footprint
from studies import memory, peers, records, run, tables

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", list(memory.configs()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_attention_goes_above_its_floor_by_more_than_the_bar(name: str, dtype: torch.dtype):
    row = memory.floor_row(name, memory.configs()[name], dtype, seq=4096)
    assert row["floor"] <= row["forward"] <= row["forward_limit"]
    assert 2 * row["floor"] <= row["training"] <= row["training_limit"]


@pytest.mark.parametrize("causal", [False, True])
def test_dilated_memory_does_not_depend_on_the_number_of_branches(causal: bool):
    def peak(branches: int) -> int:
        module = build(memory.configs()[f"dilated, {branches} branches"])
        q, k, v = torch.randn(3, 1, 4096, 8, 64)
        with torch.no_grad():
            module(q, k, v, is_causal=causal)
            return footprint(lambda: module(q, k, v, is_causal=causal), CPU).peak

    peaks = [peak(branches) for branches in (2, 3, 4)]
    assert max(peaks) - min(peaks) < 64 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", list(memory.configs()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_bar_holds_at_131072_tokens(name: str, dtype: torch.dtype):
    row = memory.floor_row(name, memory.configs()[name], dtype)
    assert row["forward"] <= row["forward_limit"]
    assert row["training"] <= row["training_limit"]


@pytest.mark.parametrize("pattern", peers.PATTERNS)
def test_peers_compare_as_many_blocks_as_they_say(pattern: str):
    config = peers.config_for(pattern, block=64, kept=9)
    assert AttentionConfig.from_json(config.to_json()) == config
    if config.variant == "block_sparse":
        layout = peers.build_layout(config, peers.SEQ, False)
        assert layout.counts.max() == 9


def test_versus_gives_the_ratio_of_peer_to_ours():
    ours = lambda: torch.ones(10)  # noqa: E731
    mine, theirs, ratio = records.versus(ours, ours, CPU, 3)
    assert mine > 0
    assert theirs > 0
    assert ratio > 0


def test_saved_data_names_its_command_and_where_it_was_measured(tmp_path):
    path = records.save("x", "python -m x", CPU, [{"a": 1}], tmp_path)
    content = records.load("x", tmp_path)
    assert content == json.loads(path.read_text())
    assert content["rows"] == [{"a": 1}]
    assert content["command"] == "python -m x"
    assert {"device", "torch", "date", "threads"} <= set(content["environment"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_markdown_table_puts_numbers_to_the_right():
    text = records.markdown([["a", "1.5"], ["b", "-2"]], ["what", "figure"])
    assert text.splitlines() == ["| what | figure |", "| --- | ---: |", "| a | 1.5 |", "| b | -2 |"]


@pytest.mark.parametrize("page", sorted(tables.DOCS.glob("*.md")), ids=lambda path: path.name)
def test_the_docs_tables_are_those_of_the_committed_data(page):
    assert tables.filled(page.read_text()) == page.read_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seq", "0"],
        ["--seq", "many"],
        ["--dtype", "int8"],
        ["--config", "nowhere.json"],
        ["--device", "moon"],
    ],
)
def test_a_wrong_request_is_exit_code_2_and_no_traceback(arguments: list[str]):
    done = subprocess.run(
        [sys.executable, "-m", "studies.run", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_run_prints_time_and_peak(capsys):
    assert run.main(["--seq", "512", "--heads", "2", "--head-dim", "16", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "peak allocated" in out
    assert "512 tokens" in out
    assert max(map(len, out.splitlines())) <= 80
