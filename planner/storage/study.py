"""A study in its storage: a new one, or the one that is there. Imports Optuna, no torch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from attention.errors import AttentionPlannerError, ConfigError


@dataclass(frozen=True)
class Storage:
    """Where trials are kept."""

    url: str
    """A URL as Optuna takes it, or a journal file."""
    study: str
    """Name of the study in the storage."""
    question: str
    """Fingerprint of the question that the study answers; a study of another question is refused."""


def open_study(storage: Storage | None, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """A new study, or the one that the storage has under this name; ConfigError where it cannot be had."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if storage is None:
        return optuna.create_study(sampler=sampler)
    try:
        study = optuna.create_study(
            storage=_open(storage.url), study_name=storage.study, sampler=sampler, load_if_exists=True
        )
        question = study.user_attrs.get("question")
        if question is None:
            study.set_user_attr("question", storage.question)
    except AttentionPlannerError:
        raise
    except Exception as error:  # noqa: BLE001 -- whatever a database driver raises
        raise _unusable(storage.url, error) from None
    if question not in (None, storage.question):
        raise ConfigError(
            f"study {storage.study!r} in {storage.url} answers another question; choose another --study"
        )
    return study


def stored_study(url: str, name: str) -> optuna.Study:
    """A study that is there already; ConfigError where it is not. Makes no file."""
    path = url.partition("sqlite:///")[2] if url.startswith("sqlite:///") else url
    if "://" not in path and not Path(path).is_file():
        raise ConfigError(f"storage {url!r} cannot be used: there is no such file")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = _open(url, reads=True)
            names = optuna.get_all_study_names(storage)
            study = optuna.load_study(study_name=name, storage=storage) if name in names else None
    except AttentionPlannerError:
        raise
    except Exception as error:  # noqa: BLE001 -- whatever a database driver raises
        raise _unusable(url, error) from None
    if study is None:
        there = f"it has {', '.join(map(repr, names[:5]))}" if names else "it has none"
        raise ConfigError(f"no study is called {name!r} in {url}; {there}")
    return study


def _unusable(url: str, error: Exception) -> ConfigError:
    message = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(
        f"storage {url!r} cannot be used: {message[:200]}; write e.g. studies.journal or sqlite:///studies.db"
    )


def _open(url: str, *, reads: bool = False) -> Any:
    """A URL is a database's; anything else is a journal file. `reads`: nothing will be written to it."""
    if "://" in url:
        from planner.storage.database import open_database

        return open_database(url)
    from optuna.storages import JournalStorage

    from planner.storage.journal import Journal

    return JournalStorage(Journal(url, reads=reads))
