"""The studies' data functions at small sizes, their tables, and what a study is."""

import json
import os
from datetime import date
from functools import partial
from importlib.metadata import version

import pytest
import torch

from attention import AttentionConfig, build
from attention.errors import AttentionPlannerError, ConfigError, UnavailableError
from planner.measuring.footprint import footprint
from planner.report.plot import figure
from studies import floors, peers
from studies.bench import attentions, catalogue, records, study

CPU = torch.device("cpu")


SOME = ("local_window", "global_local", "dilated_sparse", "dilated, 4 branches")
FLOORS = [
    pytest.param(dtype, name, marks=() if name in SOME and dtype == torch.bfloat16 else pytest.mark.slow)
    for dtype in (torch.bfloat16, torch.float32)
    for name in attentions.configs()
]


@pytest.mark.parametrize("dtype, name", FLOORS)
def test_no_attention_goes_above_its_floor_by_more_than_the_bar(name: str, dtype: torch.dtype):
    row = floors.floor_row(name, attentions.configs()[name], dtype, seq=4096)
    assert row["floor"] <= row["forward"] <= row["forward_limit"]
    assert 2 * row["floor"] <= row["training"] <= row["training_limit"]


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.slow), True])
def test_dilated_memory_does_not_depend_on_the_number_of_branches(causal: bool):
    def peak(branches: int) -> int:
        module = build(attentions.configs()[f"dilated, {branches} branches"])
        q, k, v = torch.randn(3, 1, 4096, 8, 64)
        with torch.no_grad():
            module(q, k, v, is_causal=causal)
            return footprint(lambda: module(q, k, v, is_causal=causal), CPU).peak

    peaks = [peak(branches) for branches in (2, 3, 4)]
    assert max(peaks) - min(peaks) < 64 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", list(attentions.configs()))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_bar_holds_at_131072_tokens(name: str, dtype: torch.dtype):
    row = floors.floor_row(name, attentions.configs()[name], dtype)
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


def steps(log: list[str], fails_at: str | None = None) -> list[records.Job]:
    def run(label: str) -> records.Row:
        if label == fails_at:
            raise KeyboardInterrupt
        log.append(label)
        return {"a": label}

    return [(label, partial(run, label)) for label in ("one", "two", "three")]


def test_saved_data_names_its_command_and_where_it_was_measured(tmp_path):
    rows = records.collect("x", "planner study x", CPU, steps([]), folder=tmp_path).rows
    assert rows == [{"a": "one"}, {"a": "two"}, {"a": "three"}]
    path = tmp_path / f"x.{records.machine(CPU)}.json"
    records.settle(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    [content] = records.load("x", tmp_path)
    assert content == json.loads(path.read_text())
    assert content["rows"] == rows
    assert content["command"] == "planner study x"
    here = content["environment"]
    assert set(here) == {"device", "version", "code", "torch", "python", "threads", "date"}
    assert here["version"] == version("attention-planner")


def test_an_interrupted_study_goes_on_where_it_stopped_and_keeps_the_data_that_was_there(tmp_path):
    records.collect("x", "old", CPU, steps([]), folder=tmp_path)
    log: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        records.collect("x", "new", CPU, steps(log, fails_at="three"), folder=tmp_path)
    assert records.load("x", tmp_path)[0]["command"] == "old"
    records.collect("x", "new", CPU, steps(log), folder=tmp_path)
    assert log == ["one", "two", "three"]
    records.collect("x", "new", CPU, steps(log), folder=tmp_path)
    assert log == ["one", "two", "three"]
    [final] = tmp_path.glob("*.json")
    records.settle(final)
    assert records.load("x", tmp_path)[0]["command"] == "new"
    assert list(tmp_path.iterdir()) == [final]
    records.collect("x", "new", CPU, steps(log), folder=tmp_path)
    assert log == ["one", "two", "three"] * 2


def test_a_write_that_is_interrupted_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    records.write(path, "old")

    def stops(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stops)
    with pytest.raises(KeyboardInterrupt):
        records.write(path, "new")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_what_another_command_left_is_not_gone_on_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        records.collect("x", "one", CPU, steps([], fails_at="two"), folder=tmp_path)
    log: list[str] = []
    records.collect("x", "another", CPU, steps(log), folder=tmp_path)
    assert log == ["one", "two", "three"]


@pytest.fixture
def day(monkeypatch):
    """Sets the day that data is measured on."""

    def be(iso: str) -> None:
        class Day(date):
            @classmethod
            def today(cls):
                return cls.fromisoformat(iso)

        monkeypatch.setattr(records, "date", Day)

    return be


def interrupted(folder, at="three"):
    with pytest.raises(KeyboardInterrupt):
        records.collect("x", "planner study x", CPU, steps([], fails_at=at), folder=folder)


def test_what_an_interrupted_study_left_keeps_its_date(tmp_path, day, capsys):
    day("2026-03-01")
    interrupted(tmp_path)
    day("2026-03-09")
    log: list[str] = []
    found = records.collect("x", "planner study x", CPU, steps(log), folder=tmp_path)
    assert log == ["three"]
    [data] = records.load("x", tmp_path)
    assert data["environment"]["date"] == "2026-03-01 to 2026-03-09"
    assert found.source.endswith("2026-03-01 to 2026-03-09")
    said = " ".join(capsys.readouterr().err.split())
    assert "x: goes on with 2 rows of 2026-03-01 from" in said
    assert "delete it to begin anew" in said
    # What was finished then and is asked for again, as by `study all`, is of that day too.
    day("2026-04-01")
    records.collect("x", "planner study x", CPU, steps(log), folder=tmp_path)
    assert log == ["three"]
    assert records.load("x", tmp_path)[0]["environment"]["date"] == "2026-03-01 to 2026-03-09"


@pytest.mark.parametrize("changed", ["version", "code", "torch", "device", "threads", "python"])
def test_rows_of_another_version_or_machine_are_measured_anew(tmp_path, monkeypatch, capsys, changed):
    interrupted(tmp_path)
    here = records.environment(CPU) | {changed: "another"}
    monkeypatch.setattr(records, "environment", lambda device: dict(here))
    log: list[str] = []
    records.collect("x", "planner study x", CPU, steps(log), folder=tmp_path)
    assert log == ["one", "two", "three"]
    assert "is of another version, machine or command" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "left",
    ["", "{", "[]", "null", '{"rows": 1}', '{"rows": {"one": 1}, "environment": {}}',
     '{"rows": {"one": {"a": "one"}}, "command": "planner study x", "environment": {"date": "2026-01-01"}}'],
)  # a file's text that just fits without more indentation  # fmt: skip
def test_a_file_that_no_interrupted_study_leaves_is_begun_anew(tmp_path, capsys, left):
    """Also what earlier versions left, which does not say of when each row is."""
    (tmp_path / f"x.{records.machine(CPU)}.part").write_text(left)
    log: list[str] = []
    records.collect("x", "planner study x", CPU, steps(log), folder=tmp_path)
    assert log == ["one", "two", "three"]
    assert "begins anew" in capsys.readouterr().err


def test_the_code_is_known_by_all_its_files_but_data(monkeypatch, tmp_path):
    for name in ("attention/a.py", "planner/data/b.json", "studies/c.py", "studies/data/d.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "studies" / "bench" / "records.py"))
    monkeypatch.setattr(records, "DATA", tmp_path / "studies" / "data")
    digest = records.code.__wrapped__
    first = digest()
    (tmp_path / "studies/data/d.json").write_text("2")
    assert digest() == first
    (tmp_path / "planner/data/b.json").write_text("2")
    assert digest() != first


def test_data_says_what_it_is_from_with_the_version_if_it_has_one():
    where = {"device": "a CPU", "torch": "2", "date": "2026-01-01"}
    assert records.source({"command": "c", "environment": where}) == "`c`, a CPU, torch 2, 2026-01-01"
    newer = {"command": "c", "environment": where | {"version": "0.1.0"}}
    assert records.source(newer) == "`c`, a CPU, version 0.1.0, torch 2, 2026-01-01"


def test_a_step_that_ends_in_an_error_is_a_case_that_did_not_run_or_ends_the_study(tmp_path):
    def full() -> records.Row:
        raise RuntimeError("no memory\nat all")

    asked = [*steps([])[:2], ("four", full)]
    with pytest.raises(RuntimeError, match="no memory"):
        records.collect("x", "planner study x", CPU, asked, folder=tmp_path)
    found = records.collect("x", "planner study x", CPU, asked, folder=tmp_path, independent=True)
    assert found.failed == {"four": "RuntimeError: no memory"}
    assert len(found.rows) == 2
    with pytest.raises(records.NothingRanError, match=r"RuntimeError: no memory \(1 of 1\)"):
        records.collect("y", "planner study y", CPU, asked[2:], folder=tmp_path, independent=True)
    assert {path.name[0] for path in tmp_path.iterdir()} == {"x"}


def test_a_markdown_table_puts_numbers_to_the_right():
    text = records.markdown([["a", "1.5"], ["b", "-2"]], ["what", "figure"])
    assert text.splitlines() == ["| what | figure |", "| --- | ---: |", "| a | 1.5 |", "| b | -2 |"]


# Studies as a whole.


@pytest.mark.parametrize("name", catalogue.QUESTIONS)
def test_a_study_has_what_a_study_has(name):
    found = study.study(name)
    assert catalogue.QUESTIONS[name].endswith("?")
    assert found.tables
    assert set(found.devices) <= {"cpu", "cuda"}


def test_names_of_tables_are_of_one_study_each():
    every = [table for name in catalogue.QUESTIONS for table in study.study(name).tables]
    assert len(every) == len(set(every))


def test_all_is_all_and_a_name_counts_once():
    assert catalogue.names(("all",)) == tuple(catalogue.QUESTIONS)
    assert catalogue.names(("fits", "fits")) == ("fits",)


def test_an_unknown_study_is_named_with_what_was_meant():
    with pytest.raises(ConfigError, match="did you mean min-mass"):
        catalogue.names(("min-mas",))


@pytest.fixture
def two_rows(monkeypatch):
    """A study of two rows under the name of another; the steps that ran."""
    ran: list[str] = []

    def step(label: str) -> records.Row:
        ran.append(label)
        return {"what": label, "of": {"bytes": 7}}

    def draw(drawn, rows):
        axes = drawn.add_subplot()
        axes.bar([row["what"] for row in rows], [row["of"]["bytes"] for row in rows])
        axes.set_ylabel("bytes")

    small = study.Study(
        lambda scope: [(name, partial(step, name)) for name in ("a", "b")],
        {"small": lambda rows: records.markdown([[row["what"]] for row in rows], ["what"])},
        draw,
        lambda rows: study.Findings("Asked: x?", f"Found: {len(rows)}.", "The original project says so too."),
    )
    monkeypatch.setattr(study, "study", lambda name: small)
    return ran


def test_a_study_becomes_five_files(two_rows, tmp_path):
    answer = study.run("fits", device=CPU, quick=True, out=tmp_path / "new")
    assert {path.suffix for path in answer.files} == {".json", ".csv", ".md", ".png", ".svg"}
    records.settle(answer.files[0])
    assert sorted(answer.files) == sorted((tmp_path / "new").iterdir())
    content = {path.suffix: path.read_bytes() for path in answer.files}
    assert json.loads(content[".json"])["command"] == "planner study fits --quick"
    assert content[".csv"].decode().splitlines() == ["what,of.bytes", "a,7", "b,7"]
    assert content[".png"].startswith(b"\x89PNG")
    assert b"<svg" in content[".svg"]
    assert "Found: 2." in content[".md"].decode()


def test_the_same_rows_give_the_same_files(two_rows, tmp_path):
    twice = [study.run("fits", device=CPU, quick=False, out=tmp_path / name).files for name in "ab"]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*twice, strict=True))


def test_a_missing_font_is_said_and_costs_no_rows(two_rows, tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(figure, "FONT", "No Such Font")
        with pytest.raises(UnavailableError, match="No Such Font"):
            study.run("fits", device=CPU, quick=False, out=tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".md", ".part"}
    study.run("fits", device=CPU, quick=False, out=tmp_path)
    assert two_rows == ["a", "b"]


def test_studies_that_a_device_cannot_run_are_left_out_of_all_and_refused_by_name():
    every = study.able(tuple(catalogue.QUESTIONS), "cuda", True)
    assert "dilation" in every
    assert "floors" not in every
    with pytest.raises(ConfigError, match="on cuda there is no study floors: they run on cpu"):
        study.able(("dilation", "floors"), "cuda", False)


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(two_rows, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AttentionPlannerError, match="it is a file"):
        study.run("fits", device=CPU, quick=False, out=tmp_path / "file")
    with pytest.raises(AttentionPlannerError, match="choose another folder"):
        study.run("fits", device=CPU, quick=False, out=tmp_path / "file" / "folder")
    assert two_rows == []


@pytest.mark.parametrize(
    "value, digits, said", [(1.1113, 2, 1.12), (1.11, 2, 1.11), (0.3, 1, 0.3), (0.0, 3, 0.0), (2.0001, 0, 3)]
)
def test_what_is_the_most_is_not_rounded_down(value, digits, said):
    assert study.rounded_up(value, digits) == said
