"""Optuna over the full space, from the grid's best candidates on. Imports Optuna, no torch.

Each trial is one config by the analytic models. What it exceeds is told to the sampler as constraints.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import optuna

from attention.config import AttentionConfig
from attention.errors import AttentionPlannerError, ConfigError
from planner.columns import Columns, columns_of
from planner.search import scenario as asked
from planner.search.grid import first, order, tabled, tabulate
from planner.search.scenario import Figures, Point, Scenario
from planner.search.space import Space, chosen, parameters
from planner.search.turns import Rank, Turns

Sampler = Literal["tpe", "random", "nsga2", "nsga3", "cmaes", "qmc", "gp", "brute"]
NEEDED: Final[dict[str, tuple[str, ...]]] = {
    "cmaes": ("cmaes",), "qmc": ("scipy",), "gp": ("scipy", "torch")
}  # fmt: skip
"""Packages of samplers that Optuna does not bring."""
STARTS: Final = 8
"""Grid candidates that the search begins with."""
STARTUP, COLD_STARTUP = 10, 40
"""Trials that TPE wants before it models what is good, and from a cold start."""
IMPOSSIBLE: Final = 1e9
"""Value of a config that fits at no length."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Refined:
    """What the trials found."""

    best: Point | None
    """The best that passes everything; None if none does."""
    trials: int
    """Finished, those of an earlier run included."""


@dataclass(frozen=True)
class Storage:
    """Where trials are kept."""

    url: str
    """A URL as Optuna takes it, or a journal file."""
    study: str
    """Name in it."""
    question: str
    """What the study is about; one of another question is refused."""


def refine(
    scenario: Scenario,
    space: Space,
    starts: Sequence[AttentionConfig],
    *,
    trials: int,
    sampler: Sampler = "tpe",
    seed: int = 0,
    storage: Storage | None = None,
    progress: Progress | None = None,
) -> Refined:
    """The best config that `trials` trials find; `starts` are tried first.

    With a storage, trials that are there already count: the same call goes on where it stopped.
    """
    if trials < 0:
        raise ConfigError(f"trials must be at least 0, got {trials}")
    study = open_study(storage, sampler, seed)
    old = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    done = len(old)
    # With trials of an earlier run, not the same suggestions again.
    study.sampler = _sampler(sampler, seed + done, STARTUP if starts else COLD_STARTUP)
    if not done:
        for config in starts:
            known = parameters(config, space, scenario.workload)
            if known is not None:
                study.enqueue_trial(known, skip_if_exists=True)
    queued = done + len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))
    seen: dict[AttentionConfig, Answer] = {}
    turns = Turns(space.kinds, trials, explores=not starts)

    def judged(trial: Any, config: AttentionConfig, columns: Columns) -> Answer:
        if config not in seen:
            seen[config] = answer(scenario, columns)
        # As the config has them: what was suggested may have been rounded far.
        known = parameters(config, space, scenario.workload) or trial.params
        turns.told(seen[config].rank, known, trial.distributions)
        return seen[config]

    for earlier in old:
        if "config" in earlier.user_attrs:
            config = AttentionConfig(**earlier.user_attrs["config"])
            judged(earlier, config, columns_of(config, scenario.workload.seq))
    for number in range(done, trials):
        if progress:
            progress(number, trials)
        if number >= queued:
            study.enqueue_trial(turns.fixed(number))
        trial = study.ask()
        columns = chosen(trial, space, scenario.workload, flex=scenario.flex)
        config = columns.config(0, scenario.workload)
        found = judged(trial, config, columns)
        for name, share in found.excess.items():
            trial.set_constraint(name, share)
        trial.set_user_attr("config", config.model_dump(mode="json", exclude_defaults=True))
        study.tell(trial, found.value)
    good = [found for found in seen.values() if all(share <= 0 for share in found.excess.values())]
    table = tabled([found.columns for found in good], [found.figures for found in good if found.figures])
    best = first(scenario, table, order(scenario, table, np.arange(len(table))))
    return Refined(best, max(trials, done))


@dataclass(frozen=True)
class Answer:
    """One candidate of a trial."""

    columns: Columns
    figures: Figures | None
    """None where it fits at no length."""
    value: float
    """To be minimised."""
    excess: dict[str, float]
    """How far each constraint is exceeded; 0 or less where it is met."""

    @property
    def rank(self) -> Rank:
        """The smaller the better: how far constraints are exceeded, then the value."""
        return sum(max(share, 0.0) for share in self.excess.values()), self.value


def answer(scenario: Scenario, columns: Columns) -> Answer:
    """What the models have for one candidate; with the length free, at the longest that fits."""
    if scenario.free_length:
        table = tabulate(scenario, [columns])
        if not len(table):
            return Answer(columns, None, IMPOSSIBLE, {"memory": 1.0})
        columns = replace(columns, seq=int(table.seq[0]))
        found = table.figures
    else:
        found = asked.figures(scenario, columns)
    memory, seconds, mass = (float(column[0]) for column in found)
    excess = asked.excess(scenario, memory, seconds, mass)
    if scenario.gates.layers is not None:
        # Asked only of those that pass the rest: it takes longest.
        met = max(excess.values()) <= 0 and bool(asked.reaching(scenario, columns)[0])
        excess["reach"] = 0.0 if met else 1.0
    value = {
        "speed": math.log(max(seconds, 1e-12)),
        "quality": -mass + 1e-6 * math.log(max(seconds, 1e-12)),
        "seq": -math.log(max(int(np.max(columns.seq)), 1)) + 1e-6 * math.log(max(seconds, 1e-12)),
    }[scenario.objective]
    return Answer(columns, found, value, excess)


# Studies.


def open_study(storage: Storage | None, sampler: Sampler, seed: int) -> optuna.Study:
    """A new study, or the one that the storage has under this name; ConfigError where it cannot be had."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    chosen_sampler = _sampler(sampler, seed)
    if storage is None:
        return optuna.create_study(sampler=chosen_sampler)
    try:
        study = optuna.create_study(
            storage=_open(storage.url), study_name=storage.study, sampler=chosen_sampler,
            load_if_exists=True,
        )  # fmt: skip
        known = study.user_attrs.get("question")
        if known is None:
            study.set_user_attr("question", storage.question)
    except AttentionPlannerError:
        raise
    except Exception as error:  # noqa: BLE001 -- whatever a database driver raises
        raise _unusable(storage.url, error) from None
    if known not in (None, storage.question):
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
            known = optuna.get_all_study_names(storage)
            study = optuna.load_study(study_name=name, storage=storage) if name in known else None
    except AttentionPlannerError:
        raise
    except Exception as error:  # noqa: BLE001 -- whatever a database driver raises
        raise _unusable(url, error) from None
    if study is None:
        there = f"it has {', '.join(map(repr, known[:5]))}" if known else "it has none"
        raise ConfigError(f"no study is called {name!r} in {url}; {there}")
    return study


def _unusable(url: str, error: Exception) -> ConfigError:
    said = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(
        f"storage {url!r} cannot be used: {said[:200]}; write e.g. studies.journal or sqlite:///studies.db"
    )


def _open(url: str, *, reads: bool = False) -> Any:
    """A URL is a database's; anything else is a journal file. `reads`: nothing will be written to it."""
    if "://" in url:
        from planner.search.database import open_database

        return open_database(url)
    from optuna.storages import JournalStorage

    from planner.search.journal import Journal

    return JournalStorage(Journal(url, reads=reads))


def check_sampler(name: str) -> None:
    """ConfigError where there is no such sampler, or a package that it needs is missing: Optuna imports those
    when the first value is suggested, after all other work."""
    if name not in get_args(Sampler):
        raise ConfigError(f"sampler must be one of {', '.join(get_args(Sampler))}, got {name!r}")
    missing = [package for package in NEEDED.get(name, ()) if find_spec(package) is None]
    if missing:
        needed = " ".join(missing)
        raise ConfigError(
            f"sampler {name!r} needs {needed}, which is not installed: pip install {needed}, or choose tpe"
        )


def _sampler(name: Sampler, seed: int, startup: int = STARTUP) -> optuna.samplers.BaseSampler:
    samplers = optuna.samplers
    makers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        # Dimension by dimension: kinds have dimensions of their own, and Optuna's joint model takes longer.
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=False, n_startup_trials=startup),
        "random": lambda: samplers.RandomSampler(seed=seed),
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed),
        "nsga3": lambda: samplers.NSGAIIISampler(seed=seed),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed),
        "qmc": lambda: samplers.QMCSampler(seed=seed),
        "gp": lambda: samplers.GPSampler(seed=seed),
        "brute": lambda: samplers.BruteForceSampler(seed=seed),
    }
    check_sampler(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return makers[name]()


__all__ = ["Refined", "Sampler", "Storage", "answer", "open_study", "refine"]
