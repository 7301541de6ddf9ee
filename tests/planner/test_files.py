"""One reader of the JSON files that users name."""

import os
import threading
from pathlib import Path

import pytest

from attention.errors import ConfigError
from planner import files as json_files
from planner.files import read_json, reading_once


def test_what_a_file_holds_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b' {"seq": [1, 2.5, "\xc3\xa9"]}')
    assert read_json(path) == {"seq": [1, 2.5, "é"]}


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"{'a': 1}", b"[" * 100_000])
def test_what_is_no_json_is_refused_by_name(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_json(path, "--config ")
    assert str(caught.value).startswith(f"--config {path} is no JSON: ")


def test_what_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match=f"{path} cannot be read: "):
            read_json(path)


def test_a_pipe_that_nobody_writes_into_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="a pipe that nobody has written into"):
        read_json(pipe)


def test_it_is_said_what_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(json_files, "PATIENCE", 0.05)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    late = threading.Timer(0.3, lambda: (os.write(writer, b"[1, 2]"), os.close(writer)))
    late.start()
    assert read_json(pipe, "--config ") == [1, 2]
    late.join()
    assert capsys.readouterr().err == f"planner: waiting for what is written into --config {pipe}\n"


def test_a_pipe_that_is_named_twice_is_read_once():
    reader, writer = os.pipe()
    os.write(writer, b"[1]")
    os.close(writer)
    with reading_once():
        assert read_json(Path(f"/dev/fd/{reader}")) == read_json(Path(f"/proc/self/fd/{reader}")) == [1]
    with pytest.raises(ConfigError):
        read_json(Path(f"/dev/fd/{reader}"))
    os.close(reader)


def test_a_file_without_an_end_is_refused(tmp_path):
    with open(tmp_path / "sparse.json", "wb") as file:
        file.truncate(1 << 40)
    for path in (Path("/dev/zero"), tmp_path / "sparse.json"):
        with pytest.raises(ConfigError, match="has more than 33,554,432 bytes"):
            read_json(path)
