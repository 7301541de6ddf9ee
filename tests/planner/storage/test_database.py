"""A database that is busy or away for a while costs a wait, and one that is full or gone an error of ours."""

from __future__ import annotations

import resource
import sqlite3
import threading

import optuna
import pytest
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError, PendingRollbackError

from attention.errors import StorageError
from planner.storage import patience
from planner.storage.database import Database, open_database
from planner.storage.patience import StorageWarning


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'studies.db'}"


def gone(invalidated=True):
    """What Optuna raises when the server is restarted."""
    error = OperationalError("SELECT 1", {}, Exception("the server closed the connection"), invalidated)
    found = StorageInternalError("An exception is raised during the commit.")
    found.__cause__ = error
    return found


def at_once(number, work):
    """Runs `work` in so many threads, to their ends."""
    workers = [threading.Thread(target=work) for _ in range(number)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_workers_that_make_the_tables_of_a_fresh_database_at_once_all_get_them(rounds, tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "QUIET", 60.0)
    for round in range(rounds):
        start, found = threading.Barrier(6), []

        def work(start=start, found=found, url=f"sqlite:///{tmp_path / f'{round}.db'}"):
            start.wait()
            storage = open_database(url)
            study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
            study.tell(study.ask(), 1.0)
            found.append(study)
            storage.engine.dispose()

        at_once(6, work)
        assert len(found) == 6
        assert sorted(trial.number for trial in found[0].trials) == list(range(6))
        found[0]._storage._backend.engine.dispose()


def test_one_of_the_workers_that_take_a_waiting_trial_at_once_has_it(url, monkeypatch):
    monkeypatch.setattr(patience, "QUIET", 60.0)
    storage = open_database(url)
    study = optuna.create_study(storage=storage, study_name="s")
    for _ in range(40):
        study.enqueue_trial({})
    waiting = [trial._trial_id for trial in study.trials]
    start, taken = threading.Barrier(4), []

    def work():
        own = open_database(url)
        start.wait()
        taken.extend(id for id in waiting if own.set_trial_state_values(id, TrialState.RUNNING))
        own.engine.dispose()

    at_once(4, work)
    assert sorted(taken) == waiting
    assert all(trial.datetime_start for trial in study.trials)
    assert not storage.set_trial_state_values(waiting[0], TrialState.RUNNING)
    storage.engine.dispose()


def test_a_database_that_comes_back_is_waited_for_and_that_is_said(url, monkeypatch):
    monkeypatch.setattr(patience, "QUIET", 0.0)
    storage, calls = open_database(url), []

    def answers():
        calls.append(1)
        if len(calls) < 4:
            raise gone()
        return "here"

    with pytest.warns(StorageWarning, match="waiting for the database sqlite.*: the server closed") as said:
        assert storage.answer_of(answers) == "here"
    assert len(said) == 1
    storage.engine.dispose()


def test_a_connection_that_ended_within_a_question_is_one_that_comes_back(url):
    # Reading, Optuna asks a second time in the session of the first.
    storage, errors = open_database(url), [PendingRollbackError("Can't reconnect until ...")]
    assert storage.answer_of(lambda: "here" if not errors else raised(errors.pop())) == "here"
    storage.engine.dispose()


def raised(error):
    raise error


def test_a_database_that_does_not_come_back_is_an_error(url, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    storage = open_database(url)

    def never():
        raise gone(invalidated=False)

    with pytest.raises(StorageError, match=r"waited 0\.1 s for the database .*in vain \(the server closed"):
        storage.answer_of(never)
    storage.engine.dispose()


def test_a_database_that_another_has_locked_is_waited_for(tmp_path, url, monkeypatch):
    monkeypatch.setattr(patience, "QUIET", 60.0)
    open_database(url).engine.dispose()
    storage = Database(url, engine_kwargs={"connect_args": {"timeout": 0.01}})
    other = sqlite3.connect(tmp_path / "studies.db", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    later = threading.Timer(0.5, other.rollback)
    later.start()
    optuna.create_study(storage=storage, study_name="s")
    later.join()
    other.close()
    storage.engine.dispose()


def test_a_full_disk_is_an_error_at_once_and_the_study_stays_readable(url, tmp_path):
    storage = open_database(url)
    study = optuna.create_study(storage=storage, study_name="s")
    study.tell(study.ask(), 1.0)
    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "studies.db").stat().st_size, bounds[1]))
    try:
        with pytest.raises(StorageError, match=r"not kept: the database sqlite.* failed \("):  # noqa: PT012
            for _ in range(100):
                study.set_user_attr("much", "x" * 10_000)
                study.tell(study.ask(), 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    storage.engine.dispose()
    again = open_database(url)
    study = optuna.load_study(study_name="s", storage=again)
    assert study.trials[0].value == 1.0
    study.tell(study.ask(), 2.0)
    again.engine.dispose()


def test_what_was_done_before_the_connection_ended_is_not_done_twice(url, monkeypatch):
    done = RDBStorage.set_trial_state_values
    calls = []

    def cut(self, *given):
        done(self, *given)  # as it would raise the second time
        calls.append(1)
        if len(calls) == 1:
            raise gone()
        return True

    monkeypatch.setattr(RDBStorage, "set_trial_state_values", cut)
    storage = open_database(url)
    study = optuna.create_study(storage=storage, study_name="s")
    trial = study.ask()
    study.tell(trial, 1.0)
    assert study.trials[0].state == TrialState.COMPLETE
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial._trial_id, TrialState.FAIL, None)
    storage.engine.dispose()


def test_a_password_is_not_told(monkeypatch):
    pytest.importorskip("psycopg2")
    storage = Database.__new__(Database)
    import sqlalchemy

    storage.engine = sqlalchemy.create_engine("postgresql://me:secret@host/db")
    assert storage.named == "postgresql://me:***@host/db"
