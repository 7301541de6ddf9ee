"""A study's database, used by many and sometimes gone for a while. Imports Optuna, no torch.

What is asked of it is asked again while it is locked or restarted. `Patience` bounds that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from typing import Any

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError, SQLAlchemyError

from attention.errors import StorageError
from planner.storage.patience import Patience

_ASKED = (
    "create_new_study", "delete_study", "set_study_user_attr", "set_study_system_attr",
    "get_study_id_from_name", "get_study_name_from_id", "get_study_directions", "get_study_user_attrs",
    "get_study_system_attrs", "get_all_studies", "_create_new_trial", "_set_trial_param",
    "get_trial_id_from_study_id_trial_number", "_get_best_trial_id", "set_trial_intermediate_value",
    "set_trial_user_attr", "set_trial_system_attr", "get_trial", "_get_trials",
)  # list of words  # fmt: skip
"""All that a study asks of its database, but for `set_trial_state_values`."""


BEGIN = text(
    "UPDATE trials SET state = 'RUNNING', datetime_start = :now WHERE trial_id = :trial AND state = 'WAITING'"
)


class Database(RDBStorage):
    """Optuna's storage in a database; StorageError where a database that was there does not come back in
    time."""

    @property
    def named(self) -> str:
        """Its URL, without a password."""
        return self.engine.url.render_as_string(hide_password=True)

    def answer_of(self, ask: Callable[[], Any]) -> Any:
        """The database's answer to `ask`, asked again until it is back."""
        patience = Patience(f"the database {self.named}", "see to it, and the same command goes on")
        while True:
            try:
                return ask()
            except (StorageInternalError, SQLAlchemyError) as error:
                cause = _cause(error)
                if not _passes(cause):
                    raise StorageError(
                        f"the study was not kept: the database {self.named} failed ({_first_line(cause)}); "
                        "what it has is whole: see to it, and the same command goes on"
                    ) from error
                patience.wait(_first_line(cause))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        if state == TrialState.RUNNING and self.engine.dialect.name == "sqlite":
            return bool(self.answer_of(lambda: self._begun(trial_id)))
        asked_before = False

        def ask() -> bool:
            nonlocal asked_before
            again, asked_before = asked_before, True
            try:
                return RDBStorage.set_trial_state_values(self, trial_id, state, values)
            except UpdateFinishedTrialError:
                # The connection may have ended after it was done and before that was said.
                if again and self.get_trial(trial_id).state == state:
                    return True
                raise

        done: bool = self.answer_of(ask)
        return done

    def _begun(self, trial_id: int) -> bool:
        """Takes a trial that waits; False where another has it. Optuna reads the state and then writes it,
        which takes two statements, and SQLite locks no row between them: two workers would both have it."""
        with self.engine.begin() as connection:
            changed = connection.execute(BEGIN, {"trial": trial_id, "now": datetime.now().isoformat(" ")})
        return changed.rowcount == 1


def _patient(name: str) -> Callable[..., Any]:
    ask = getattr(RDBStorage, name)

    @functools.wraps(ask)
    def patient(self: Database, *arguments: Any, **options: Any) -> Any:
        return self.answer_of(lambda: ask(self, *arguments, **options))

    return patient


for _name in _ASKED:
    setattr(Database, _name, _patient(_name))


def open_database(url: str) -> Database:
    """The database of a URL, with its tables; several workers may make them at once."""
    patience = Patience(f"the tables of {url}, which another worker makes", "begin again")
    while True:
        try:
            return Database(url)
        except (StorageInternalError, SQLAlchemyError) as error:
            message = _first_line(_cause(error)).lower()
            if not any(sign in message for sign in ("already exists", "duplicate", "unique", "locked")):
                raise
            patience.wait(message)


def _cause(error: Exception) -> BaseException:
    """The driver's own error, where Optuna wrapped it in one of its own."""
    return error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error


def _passes(error: BaseException) -> bool:
    """Whether the same may work later: the server is away or busy, or another worker has the file locked."""
    if isinstance(error, PendingRollbackError):
        return True  # Optuna asked again in the session in which the connection ended
    if not isinstance(error, DBAPIError):
        return False
    if "sqlite" in type(error.orig).__module__:
        return "locked" in str(error.orig)
    return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    of = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    lines = str(of).strip().splitlines()
    return lines[0][:200] if lines else type(of).__name__


__all__ = ["Database", "open_database"]
