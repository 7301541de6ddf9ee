"""Optuna over the full space, from the grid's best candidates on. Imports Optuna, no torch.

Each trial is one config by the analytic models. What it exceeds is told to the sampler as constraints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import optuna

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner.configs import Columns, columns_of
from planner.question.asked import OnTrial, Sampler
from planner.question.space import Space
from planner.search import evaluate
from planner.search.evaluate import Figures, Point
from planner.search.proposals import Rank, Turns
from planner.search.samplers import COLD_STARTUP, STARTUP, sampler_of
from planner.search.scenario import Scenario
from planner.search.solve import first, order, tabled, tabulate
from planner.search.suggest import chosen, parameters
from planner.storage.study import Storage, open_study

STARTS: Final = 8
"""Grid candidates that the search begins with."""
IMPOSSIBLE: Final = 1e9
"""Value of a config that fits at no length."""


@dataclass(frozen=True)
class Refined:
    """The outcome of the trials."""

    best: Point | None
    """The best that passes everything; None if none does."""
    trials: int
    """Finished trials, those of an earlier run included."""


def refine(
    scenario: Scenario,
    space: Space,
    starts: Sequence[AttentionConfig],
    *,
    trials: int,
    sampler: Sampler = "tpe",
    seed: int = 0,
    storage: Storage | None = None,
    progress: OnTrial | None = None,
) -> Refined:
    """The best config that `trials` trials find; `starts` are tried first.

    With a storage, trials that are there already count: the same call goes on where it stopped.
    """
    if trials < 0:
        raise ConfigError(f"trials must be at least 0, got {trials}")
    study = open_study(storage, sampler_of(sampler, seed))
    old = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    done = len(old)
    # With trials of an earlier run, not the same suggestions again.
    study.sampler = sampler_of(sampler, seed + done, STARTUP if starts else COLD_STARTUP)
    if not done:
        for config in starts:
            params = parameters(config, space, scenario.workload)
            if params is not None:
                study.enqueue_trial(params, skip_if_exists=True)
    queued = done + len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)))
    judgements: dict[AttentionConfig, Judged] = {}
    turns = Turns(space.kinds, trials, explores=not starts)

    def considered(trial: Any, config: AttentionConfig, columns: Columns) -> Judged:
        if config not in judgements:
            judgements[config] = judge(scenario, columns)
        # As the config has them: what was suggested may have been rounded far.
        params = parameters(config, space, scenario.workload) or trial.params
        turns.record(judgements[config].rank, params, trial.distributions)
        return judgements[config]

    for earlier in old:
        if "config" in earlier.user_attrs:
            config = AttentionConfig(**earlier.user_attrs["config"])
            considered(earlier, config, columns_of(config, scenario.workload.seq))
    for number in range(done, trials):
        if progress:
            progress(number, trials)
        if number >= queued:
            study.enqueue_trial(turns.fixed(number))
        trial = study.ask()
        columns = chosen(trial, space, scenario.workload, flex=scenario.flex, windows=scenario.windows)
        config = columns.config(0, scenario.workload)
        judgement = considered(trial, config, columns)
        for name, share in judgement.excess.items():
            trial.set_constraint(name, share)
        trial.set_user_attr("config", config.model_dump(mode="json", exclude_defaults=True))
        study.tell(trial, judgement.value)
    good = [one for one in judgements.values() if all(share <= 0 for share in one.excess.values())]
    table = tabled([one.columns for one in good], [one.figures for one in good if one.figures])
    best = first(scenario, table, order(scenario, table, np.arange(len(table))))
    return Refined(best, max(trials, done))


@dataclass(frozen=True)
class Judged:
    """One candidate of a trial."""

    columns: Columns
    figures: Figures | None
    """Memory, seconds and mass; None where the candidate fits at no length."""
    value: float
    """The number that the sampler minimises."""
    excess: dict[str, float]
    """How far each constraint is exceeded; 0 or less where it is met."""

    @property
    def rank(self) -> Rank:
        """The smaller the better: how far constraints are exceeded, then the value."""
        return sum(max(share, 0.0) for share in self.excess.values()), self.value


def judge(scenario: Scenario, columns: Columns) -> Judged:
    """The models' verdict on one candidate; with the length free, at the longest that fits."""
    if scenario.free_length:
        table = tabulate(scenario, [columns])
        if not len(table):
            return Judged(columns, None, IMPOSSIBLE, {"memory": 1.0})
        columns = replace(columns, seq=int(table.seq[0]))
        figures = table.figures
    else:
        figures = evaluate.figures(scenario, columns)
    memory, seconds, mass = (float(column[0]) for column in figures)
    excess = evaluate.excess(scenario, memory, seconds, mass)
    if scenario.gates.layers is not None:
        # Asked only of those that pass the rest: it takes longest.
        reaches = max(excess.values()) <= 0 and bool(evaluate.reaching(scenario, columns)[0])
        excess["reach"] = 0.0 if reaches else 1.0
    value = {
        "speed": math.log(max(seconds, 1e-12)),
        "quality": -mass + 1e-6 * math.log(max(seconds, 1e-12)),
        "seq": -math.log(max(int(np.max(columns.seq)), 1)) + 1e-6 * math.log(max(seconds, 1e-12)),
    }[scenario.objective]
    return Judged(columns, figures, value, excess)


__all__ = ["Refined", "Sampler", "Storage", "judge", "open_study", "refine"]
