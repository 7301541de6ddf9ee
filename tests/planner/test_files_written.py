"""A file appears whole or not at all, and what is no file is not made one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from attention.errors import AttentionPlannerError
from planner.files import write_whole


def test_a_link_stays_and_its_target_is_written(tmp_path):
    target, link = tmp_path / "there" / "target.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    link.symlink_to("there/target.txt")
    for data in (b"new", b"replaced"):
        write_whole(link, data, "--out")
        assert link.is_symlink()
        assert target.read_bytes() == data
    assert os.listdir(target.parent) == ["target.txt"]


def test_a_pipe_is_written_into_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"data", "--out")
    assert os.read(reader, 10) == b"data"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(AttentionPlannerError, match="nobody reads from it"):
        write_whole(pipe, b"data", "--out")


@pytest.mark.parametrize("link", [False, True])
def test_a_device_is_written_into_and_stays_one(link, tmp_path):
    """A pseudo-terminal: its folder takes no files, so that nothing can be put in its place."""
    above, below = os.openpty()
    path = Path(os.ttyname(below))
    if link:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    write_whole(path, b"data", "--out")
    assert os.read(above, 4) == b"data"
    assert stat.S_ISCHR(os.stat(path).st_mode)
    os.close(above)
    os.close(below)


@pytest.mark.parametrize("pipe", [False, True])
def test_stdout_by_name_gets_the_data_between_what_is_printed(pipe, tmp_path):
    code = """
import sys
from pathlib import Path
from planner.files import write_whole
print("before", flush=True)
write_whole(Path("/proc/self/fd/1"), b"data\\n", "--out")
print("after")
"""
    with open(tmp_path / "out", "wb+") as file:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.PIPE if pipe else file, check=True
        )
    assert (done.stdout if pipe else (tmp_path / "out").read_bytes()) == b"before\ndata\nafter\n"


def test_a_neighbour_called_new_is_left_alone(tmp_path):
    (tmp_path / "a.txt.new").write_bytes(b"mine")
    write_whole(tmp_path / "a.txt", b"data", "--out")
    assert (tmp_path / "a.txt.new").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "a.txt.new"]


def test_a_file_keeps_its_mode_and_a_new_one_has_the_usual(tmp_path):
    path = tmp_path / "a.txt"
    umask = os.umask(0o027)
    try:
        write_whole(path, b"data", "--out")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    write_whole(path, b"more", "--out")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AttentionPlannerError, match=r"--out .*a\.txt cannot be written: No space left"):
        write_whole(path, b"data", "--out")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", [".", "loop", "none/a.txt", "a" * 300, "nul\0l"])
def test_what_cannot_be_written_is_refused(name, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(AttentionPlannerError, match="cannot be written"):
        write_whole(tmp_path / name, b"data", "--out")


def test_a_long_name_is_no_obstacle(tmp_path):
    write_whole(tmp_path / ("a" * 255), b"data", "--out")
