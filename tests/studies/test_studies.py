"""The studies' data functions at small sizes, their tables, and docs that equal the committed data."""

import argparse
import json
import sys
from functools import partial

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


def steps(log: list[str], fails_at: str | None = None) -> list[records.Step]:
    def run(label: str) -> records.Row:
        if label == fails_at:
            raise KeyboardInterrupt
        log.append(label)
        return {"a": label}

    return [(label, partial(run, label)) for label in ("one", "two", "three")]


def test_saved_data_names_its_command_and_where_it_was_measured(tmp_path):
    rows = records.collect("x", "python -m x", CPU, steps([]), keep=True, folder=tmp_path)
    assert rows == [{"a": "one"}, {"a": "two"}, {"a": "three"}]
    path = tmp_path / f"x.{records.machine(CPU)}.json"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    [content] = records.load("x", tmp_path)
    assert content == json.loads(path.read_text())
    assert content["rows"] == rows
    assert content["command"] == "python -m x"
    assert {"device", "torch", "date", "threads"} <= set(content["environment"])


def test_an_interrupted_study_goes_on_where_it_stopped_and_keeps_the_data_that_was_there(tmp_path):
    records.collect("x", "old", CPU, steps([]), keep=True, folder=tmp_path)
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        records.collect("x", "new", CPU, steps(log, fails_at="three"), keep=True, folder=tmp_path)
    assert records.load("x", tmp_path)[0]["command"] == "old"
    records.collect("x", "new", CPU, steps(log), keep=True, folder=tmp_path)
    assert log == ["one", "two", "three"]
    assert records.load("x", tmp_path)[0]["command"] == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_another_command_left_is_not_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        records.collect("x", "one", CPU, steps([], fails_at="two"), keep=True, folder=tmp_path)
    log: list[str] = []
    records.collect("x", "another", CPU, steps(log), keep=True, folder=tmp_path)
    assert log == ["one", "two", "three"]


def test_a_study_that_keeps_nothing_writes_nothing(tmp_path):
    records.collect("x", "c", CPU, steps([]), keep=False, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_markdown_table_puts_numbers_to_the_right():
    text = records.markdown([["a", "1.5"], ["b", "-2"]], ["what", "figure"])
    assert text.splitlines() == ["| what | figure |", "| --- | ---: |", "| a | 1.5 |", "| b | -2 |"]


@pytest.mark.parametrize("page", sorted(tables.DOCS.glob("*.md")), ids=lambda path: path.name)
def test_the_docs_tables_are_those_of_the_committed_data(page):
    assert tables.filled(page.read_text()) == page.read_text()


@pytest.mark.parametrize(
    "module, arguments",
    [
        (run, ["--seq", "0"]),
        (run, ["--seq", "many"]),
        (run, ["--dtype", "int8"]),
        (run, ["--config", "nowhere.json"]),
        (run, ["--config", sys.executable]),
        (run, ["--device", "moon"]),
        (run, ["--device", "cuda:999"]),
        (peers, ["--runs", "0"]),
        (peers, ["--runs", "-1"]),
        (peers, ["--device", "moon"]),
        (peers, ["--only", "everything"]),
        (memory, ["--seq", "8"]),
    ],
)
def test_a_wrong_request_is_exit_code_2_and_one_line(module, arguments: list[str], capsys):
    try:
        code = module.main(arguments)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    assert "error" in said.err.splitlines()[-1]


def test_a_gpu_that_is_not_there_is_said_to_be_missing():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(argparse.ArgumentTypeError, match="sees no GPU"):
        records.present_device("cuda")


def test_a_run_prints_time_and_peak(capsys):
    assert run.main(["--seq", "512", "--heads", "2", "--head-dim", "16", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "peak allocated" in out
    assert "512 tokens" in out
    assert max(map(len, out.splitlines())) <= 80
