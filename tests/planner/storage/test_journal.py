"""A journal outlives crashes, full disks and killed workers, and shares its file with Optuna's backend."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from attention.errors import ConfigError, StorageError
from planner.storage import journal, patience
from planner.storage.journal import Journal
from planner.storage.patience import StorageWarning

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trials.journal"


def study_in(path, backend=Journal):
    return optuna.create_study(
        storage=JournalStorage(backend(str(path))), study_name="s", load_if_exists=True
    )


def filled(path, trials=3, backend=Journal):
    """A study of so many trials, each with a note of its number."""
    study = study_in(path, backend)
    for _ in range(trials):
        trial = study.ask()
        trial.set_user_attr("note", trial.number)
        study.tell(trial, trial.suggest_float("x", 0, 1))
    return study


def notes(path, backend=Journal):
    return [trial.user_attrs.get("note") for trial in study_in(path, backend).trials]


# ---- what is broken


def test_a_torn_last_line_is_set_aside_before_appending(path):
    filled(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (1, len(lines[-1]) // 2, len(lines[-1]) - 2):
        torn = lines[-1][: -1 - cut]
        path.write_bytes(b"".join(lines[:-1]) + torn)
        Path(f"{path}.torn").unlink(missing_ok=True)
        with pytest.warns(StorageWarning, match=r"ended in the midst of a line.*set aside in .*\.torn"):
            filled(path, 1)
        assert notes(path) == notes(path, JournalFileBackend) == [0, 1, 2, 3]
        assert Path(f"{path}.torn").read_bytes() == torn + b"\n"


def test_a_last_line_that_lacks_only_its_end_gets_it(path):
    filled(path)
    path.write_bytes(path.read_bytes()[:-1])
    filled(path, 1)
    assert [trial.state for trial in study_in(path, JournalFileBackend).trials] == [TrialState.COMPLETE] * 4
    assert not Path(f"{path}.torn").exists()


def test_reading_writes_nothing_and_leaves_a_line_without_an_end_to_its_writer(path):
    filled(path)
    path.write_bytes(path.read_bytes()[:-20])
    before = path.read_bytes()
    study = optuna.load_study(study_name="s", storage=JournalStorage(Journal(path, reads=True)))
    assert len(study.trials) == 3
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_optuna_added_to_a_torn_line_is_read(path):
    filled(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"delimiter|Expecting"):
        filled(path, 2, JournalFileBackend)  # unreadable, for Optuna, from here on
    with pytest.warns(StorageWarning, match="line 13 is broken"):
        filled(path, 1)
    with pytest.warns(StorageWarning, match="line 13 is broken"):
        found = study_in(path).trials
    assert [trial.user_attrs.get("note") for trial in found][:3] == [0, 1, 2]
    assert found[-1].user_attrs["note"] == found[-1].number
    assert found[-1].state == TrialState.COMPLETE


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\0" * 50, b'{"op_code":4,"worker_id":"a', b"[1]", b"{}", b'{"op_code":77,"worker_id":"a"}',
     b'{"op_code":9,"worker_id":"a","trial_id":"x","system_attr":{}}', b"\xff\xfe", b"[" * 100_000],
    ids=range(9),
)  # list of short bytes  # fmt: skip
def test_a_broken_line_in_the_middle_costs_only_itself(path, garbage):
    filled(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for at in range(1, len(lines)):
        said = json.loads(lines[at])
        path.write_bytes(b"".join([*lines[:at], garbage + b"\n", *lines[at + 1 :]]))
        if garbage:
            with pytest.warns(StorageWarning, match=f"line {at + 1} is broken"):
                logs = list(Journal(path).read_logs(0))
        else:  # a line without anything is nothing broken
            continue
        kept = [json.loads(line) for line in lines[:at] + lines[at + 1 :]]
        assert [log for log in logs if log["worker_id"] != "lost"] == kept
        if said["op_code"] == 4:
            # A trial whose beginning is lost is there all the same, and the others are who they were.
            with pytest.warns(StorageWarning):
                assert notes(path) == [0, 1, 2]


def test_a_lost_study_does_not_give_its_trials_to_the_next(path):
    filled(path, 2)
    storage = JournalStorage(Journal(path))
    other = optuna.create_study(storage=storage, study_name="other")
    other.tell(other.ask(), 5.0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"x\n" + b"".join(lines[1:]))
    with pytest.warns(StorageWarning, match="line 1 is broken"):
        storage = JournalStorage(Journal(path))
    assert [trial.value for trial in optuna.load_study(study_name="other", storage=storage).trials] == [5.0]


def test_nothing_is_made_up_where_nothing_is_broken(path):
    filled(path, 5)
    storage = JournalStorage(Journal(path))
    optuna.delete_study(study_name="s", storage=storage)
    filled(path, 2)
    expected = list(JournalFileBackend(str(path)).read_logs(0))
    assert list(Journal(path).read_logs(0)) == expected
    assert list(Journal(path).read_logs(7)) == expected[7:]
    assert notes(path) == [0, 1]


# ---- what cannot be written


def test_a_full_disk_is_said_and_leaves_the_journal_as_it_was(path):
    study = filled(path)
    before = path.read_bytes()
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, bounds[1]))
    try:
        with pytest.raises(
            StorageError, match=r"not kept: writing .*trials\.journal failed \(File too large"
        ):
            study.ask()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    assert path.read_bytes() == before
    filled(path, 1)
    assert notes(path, JournalFileBackend) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "content, looks",
    [
        ("Dear diary,\nhello\n", "begins with 'Dear diary,'"),
        ('{"a": 1}\n', "begins with"),
        ("SQLite format 3\0", "database of SQLite"),
        ('{"schema_version":1,"config":{},"workload":{}}\n', "a file of records"),
        ("\n", "begins with ''"),
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(path, content, looks):
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"trials\.journal is .*{looks}.*no journal of trials"):
        Journal(path)
    assert path.read_text() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(ConfigError, match="no ordinary file"):
            Journal(name)


@pytest.mark.parametrize(
    "content", ["", '{"op_c', '{"op_code":0,"worker_id":"a', 'x\n{"op_code":0,"worker_id"']
)
def test_a_journal_that_has_only_begun_is_one(path, content):
    path.write_text(content)
    if content.startswith("x"):
        with pytest.raises(ConfigError):
            Journal(path)
    else:
        Journal(path)


# ---- locks


def left_by_optuna(path, target, seconds_ago):
    link = Path(f"{path}.lock")
    link.symlink_to(target)
    when = time.time() - seconds_ago
    os.utime(link, (when, when), follow_symlinks=False)
    return link


@pytest.mark.parametrize("target", ["trials.journal", "folder/trials.journal", "absolute"])
def test_a_lock_that_was_left_long_ago_is_taken_over_at_once(path, target, monkeypatch):
    filled(path)
    link = left_by_optuna(path, str(path) if target == "absolute" else target, 40)
    monkeypatch.setattr(patience, "QUIET", 5.0)  # a warning would be an error
    filled(path, 1)
    assert not link.is_symlink()
    assert len(notes(path)) == 4


def test_a_lock_that_was_left_just_now_is_waited_for_and_that_is_said(path, monkeypatch):
    filled(path)
    monkeypatch.setattr(patience, "QUIET", 0.1)
    monkeypatch.setattr(journal, "GRACE", 0.5)
    link = left_by_optuna(path, "folder/trials.journal", 0)
    with pytest.warns(
        StorageWarning, match=r"waiting for .*trials\.journal\.lock, which a worker holds or left"
    ):
        filled(path, 1)
    assert not link.is_symlink()


def test_a_path_is_the_same_file_after_a_change_of_folder(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    study = study_in("trials.journal")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    study.tell(study.ask(), 1.0)
    assert len(notes(path)) == 1
    assert not list(Path().iterdir())


WORKER = """
import os, signal, sys, time
from planner.storage.journal import Journal
journal = Journal(sys.argv[1])
with journal._locked():
    print("locked", flush=True)
    {then}
"""


def worker(path, then):
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER.format(then=then), str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    return process


def test_the_lock_of_a_killed_worker_is_taken_over_at_once(path, monkeypatch):
    filled(path)
    killed = worker(path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert killed.wait(60) == -signal.SIGKILL
    killed.stdout.close()
    assert Path(f"{path}.lock").is_symlink()
    monkeypatch.setattr(patience, "QUIET", 5.0)
    filled(path, 1)
    assert not Path(f"{path}.lock").is_symlink()


def test_a_living_worker_keeps_its_lock_and_is_waited_for(path, monkeypatch):
    filled(path)
    monkeypatch.setattr(patience, "QUIET", 0.1)
    monkeypatch.setattr(journal, "GRACE", 0.0)
    with worker(path, "time.sleep(600)") as alive:
        monkeypatch.setattr(patience, "PATIENCE", 0.5)
        with (
            pytest.warns(StorageWarning, match="waiting for another worker that has"),
            pytest.raises(
                StorageError, match=r"waited 0\.5 s for another worker that has .* locked, in vain"
            ),
        ):
            Journal(path).append_logs([])
        assert Path(f"{path}.lock").is_symlink()
        alive.kill()
    filled(path, 1)


def test_a_file_that_only_has_a_locks_name_is_left_alone(path, monkeypatch):
    filled(path)
    monkeypatch.setattr(patience, "QUIET", 1.0)
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    mine = Path(f"{path}.lock")
    mine.write_text("mine")
    os.utime(mine, (0, 0))
    with pytest.raises(StorageError, match=r"trials\.journal\.lock"):
        Journal(path).append_logs([])
    assert mine.read_text() == "mine"


def test_without_locks_of_the_system_optunas_alone_is_used(path, monkeypatch):
    def none(file, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    filled(path)
    with Journal(path)._locked():
        link = os.readlink(f"{path}.lock")
    # Now a link of ours may be a living worker's.
    os.symlink(link, f"{path}.lock")
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    with pytest.raises(StorageError, match="which a worker holds or left"):
        Journal(path).append_logs([])


def test_workers_of_optuna_and_of_ours_lose_nothing_of_each_other(path):
    code = (
        "import sys, optuna\nfrom optuna.storages.journal import JournalFileBackend\n"
        "from planner.storage.journal import Journal\n"
        "backend = {'ours': Journal, 'optuna': JournalFileBackend}[sys.argv[2]](sys.argv[1])\n"
        "sys.stdin.read()\n"
        "for n in range(60): backend.append_logs([{'op_code': 1, 'worker_id': sys.argv[3], 'study_id': n}])"
    )
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), kind, str(which)], cwd=ROOT, stdin=subprocess.PIPE
        )
        for which, kind in enumerate(["ours", "optuna", "ours"])
    ]
    for one in workers:
        one.stdin.close()
    assert [one.wait(timeout=120) for one in workers] == [0] * 3
    logs = [json.loads(line) for line in path.read_bytes().splitlines()]
    for which in range(3):
        assert [log["study_id"] for log in logs if log["worker_id"] == str(which)] == list(range(60))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
