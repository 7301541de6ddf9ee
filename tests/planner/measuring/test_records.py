"""Records survive what happens to files: crashes in the middle, full disks, many writers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attention import AttentionConfig, AttentionPlannerError, SparsePatternConfig
from planner.measuring.measure import Environment, Measurement
from planner.measuring.records import RecordWarning, append, read, replay
from planner.workload import Workload

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = [
    AttentionConfig(variant="dense"),
    AttentionConfig(variant="dilated", segment_lengths=[64, 128], dilation_rates=[1, 2]),
    AttentionConfig(variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window")),
]


def measurement(
    number: int = 0, date: str = "2026-11-21T00:00:00+00:00", config: AttentionConfig = CONFIGS[0], **fields
) -> Measurement:
    environment = Environment(
        device="Größe 1", python="3", system="Linux", settings={"OMP_NUM_THREADS": "2"}, date=date
    )
    given = {"kind": "ok", "seconds": 1.5, "spread": 0.0, "largest": (3, 2), "allocated": number} | fields
    return Measurement(
        config=config, workload=Workload(seq=8), device="cpu", runs=3, environment=environment, **given
    )


def test_round_trip_in_order(tmp_path):
    path = tmp_path / "records.jsonl"
    written = [measurement(i, config=config) for i, config in enumerate(CONFIGS)]
    written.append(measurement(kind="oom", seconds=None, message="line\nbreak", requested=1 << 40))
    for one in written:
        append(path, one)
    assert read(path) == written
    assert len(path.read_bytes().splitlines()) == len(written)


def test_a_torn_last_line_costs_only_itself(tmp_path):
    path = tmp_path / "records.jsonl"
    append(path, measurement(1))
    append(path, measurement(2))
    whole = path.read_bytes()
    # Anywhere, and in the middle of a letter of two bytes.
    for cut in (40, len(whole) // 4, len(whole) - whole.rindex("ö".encode()) - 1):
        path.write_bytes(whole[:-cut])
        with pytest.warns(RecordWarning, match="line 2 is no measurement"):
            assert read(path) == [measurement(1)]
        append(path, measurement(3))
        with pytest.warns(RecordWarning, match="line 2 is no measurement"):
            assert read(path) == [measurement(1), measurement(3)]
    path.write_bytes(whole[:-1])  # only the end of the line is missing
    append(path, measurement(3))
    assert read(path) == [measurement(1), measurement(2), measurement(3)]


@pytest.mark.parametrize(
    "line",
    [
        b'{"schema_version": 1, "conf',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"null",
        b"{}",
        b"NaN",
        b'{"schema_version": 2}',
        b"[" * 100_000,
    ],
)
def test_a_torn_middle_line_costs_only_itself(tmp_path, line):
    path = tmp_path / "records.jsonl"
    append(path, measurement(1))
    with path.open("ab") as file:
        file.write(line + b"\n\n")
    append(path, measurement(2))
    with pytest.warns(RecordWarning, match="line 2") as warned:
        assert read(path) == [measurement(1), measurement(2)]
    assert len(warned) == 1


def test_two_processes_at_once_lose_nothing(tmp_path):
    path = tmp_path / "records.jsonl"
    append(path, measurement())
    code = (
        "import sys; from planner.measuring.records import append, read\n"
        "path, begin = sys.argv[1], int(sys.argv[2])\n"
        "sys.stdin.read(); first = read(path)[0]\n"
        "for i in range(begin, begin + 200): append(path, first.model_copy(update={'allocated': i}))"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(begin)], cwd=ROOT, stdin=subprocess.PIPE)
        for begin in (1000, 2000)
    ]
    for writer in writers:
        assert writer.stdin
        writer.stdin.close()  # now, both
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    found = [one.allocated for one in read(path)]
    assert sorted(found) == [0, *range(1000, 1200), *range(2000, 2200)]
    assert [n for n in found if n >= 2000] == list(range(2000, 2200))  # each in its order


def test_a_full_disk_is_said_and_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    append(path, measurement(1))
    before = path.read_bytes()
    real, calls = os.write, []

    def full(file: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data[:100])  # the system may take less than it is given

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(AttentionPlannerError, match=r"not kept: .*No space left"):
        append(path, measurement(2))
    assert len(calls) == 2
    monkeypatch.undo()
    assert path.read_bytes() == before
    append(path, measurement(3))
    assert read(path) == [measurement(1), measurement(3)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device():
    with pytest.raises(AttentionPlannerError, match="No space left"):
        append("/dev/full", measurement())


def test_files_that_cannot_be_opened_are_said(tmp_path):
    with pytest.raises(AttentionPlannerError, match="not kept"):
        append(tmp_path / "none" / "records.jsonl", measurement())
    with pytest.raises(AttentionPlannerError, match=r"cannot be read from .*No such file"):
        read(tmp_path / "records.jsonl")


def test_replay_gives_the_newest(tmp_path):
    path = tmp_path / "records.jsonl"
    append(path, measurement(2, "2026-11-22T00:00:00+00:00"))
    append(path, measurement(1, "2026-11-21T00:00:00+00:00"))  # older, though written later
    append(path, measurement(3, "2026-11-22T00:00:00+00:00"))  # as new, and written later
    append(path, measurement(4, config=CONFIGS[1]))
    append(path, measurement(5, "2026-11-23T00:00:00+00:00", cap_bytes=1 << 20))
    found = replay(path)
    assert found.get(CONFIGS[0], Workload(seq=8)) == measurement(3, "2026-11-22T00:00:00+00:00")
    assert found.get(CONFIGS[1], Workload(seq=8), "cpu") == measurement(4, config=CONFIGS[1])
    assert found.get(CONFIGS[0], Workload(seq=8), cap_bytes=1 << 20).allocated == 5
    assert found.get(CONFIGS[0], Workload(seq=8), "cuda") is None
    assert found.get(CONFIGS[2], Workload(seq=8)) is None
    assert found.get(CONFIGS[0], Workload(seq=9)) is None
    assert len(found) == len(list(found)) == 3
