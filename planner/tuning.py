"""Tuning: measured trials, from the analytic Pareto set on. Imports Optuna, no torch.

What the models recommend is measured first, then what Optuna suggests from there. Every trial runs in a
process of its own; memory that runs out, a crash and a hang are results. Trials are kept as they end, so
that the same call goes on where an interrupted or killed one stopped.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final, Literal, NamedTuple

import optuna
from optuna.trial import TrialState
from pydantic import BeforeValidator

from attention.config import AttentionConfig, Value, as_tuple
from attention.errors import AttentionPlannerError, ConfigError
from planner.calibration import Calibration, make_folder, own_path
from planner.measure import Device, Measurement
from planner.memory.estimate import MemoryEstimate
from planner.recommendation import Recommendation, question
from planner.repeating import tune_command
from planner.search.picks import Quality
from planner.search.refine import Sampler, Storage, answer, check_sampler, open_study, stored_study
from planner.search.scenario import Scenario, point
from planner.search.space import Space, chosen, parameters
from planner.speed.rates import SpeedFit
from planner.tune import RUNS, TIMEOUT, TRIALS
from planner.workload import Workload

ASKS: Final = 8
"""Suggestions for each trial: those that fail the gates or were tried before are not measured."""
WORST: Final = 50.0
"""Value of what did not run: e^50 seconds."""

Measure = Callable[[AttentionConfig, Workload], Measurement]


class Trial(Value):
    """One config that was measured."""

    number: int
    config: AttentionConfig
    kind: str
    """As `Measurement.kind`; `over`, if it ran and took more memory than the budget."""
    message: str | None = None
    seconds: float | None = None
    predicted: float
    """Seconds."""
    allocated: int | None = None
    upper: int
    """Bytes predicted not to be exceeded."""

    @property
    def good(self) -> bool:
        """Whether it ran within the budget."""
        return self.kind == "ok"


class Tuned(Value):
    """What tuning found."""

    schema_version: Literal[1] = 1
    versions: dict[str, str | None]
    """As a recommendation has them, and so with what follows."""
    calibration: str
    seed: int
    command: str
    config: AttentionConfig
    workload: Workload
    on: str
    budget: int
    reserve: int
    memory: MemoryEstimate
    """Predicted for the best."""
    quality: Quality
    best: Trial
    analytic: Trial
    """What the models alone recommend, measured."""
    trials: Annotated[tuple[Trial, ...], BeforeValidator(as_tuple)]
    """All that were measured, in order."""
    kept: int
    """Of them those of an earlier run."""
    storage: str
    study: str
    interrupted: bool = False

    @property
    def speedup(self) -> float:
        """How many times as fast as the analytic pick."""
        if not self.analytic.seconds or not self.best.seconds:
            return math.inf
        return self.analytic.seconds / self.best.seconds


class Progress(NamedTuple):
    """How far it is."""

    measured: int
    wanted: int
    last: Trial | None
    best: Trial | None


def tuned(
    vram: str | int, seq: str | int, *, device: Device, trials: int, timeout: float, runs: int,
    sampler: Sampler, seed: int, storage: str | None, study: str | None, measure: Measure | None,
    records: str | Path | None, learn: bool, progress: Callable[[Progress], None] | None,
    asked: dict[str, Any],
) -> Tuned:  # fmt: skip
    """What `planner.tune` returns."""
    if type(trials) is not int or trials < 1:
        raise ConfigError(f"trials must be at least 1 and whole, got {trials!r}")
    check_sampler(sampler)
    card = "cpu" if device == "cpu" else present_gpu()
    first = question(vram, seq, **{**asked, "gpu": card, "objective": "speed"})
    if learn:
        _known_speed(first.scenario)
    kept = Storage(storage or default_storage(first.name), study or f"tune-{first.name[:12]}", first.name)
    if storage is None:
        make_folder(Path(kept.url), "trials")
    with _measuring(measure, device, timeout, runs, records) as run:
        command = tune_command(
            vram, seq, device,
            {"--trials": (trials, TRIALS), "--timeout": (timeout, TIMEOUT), "--runs": (runs, RUNS),
             "--sampler": (sampler, "tpe"), "--seed": (seed, 0)},
            asked,
        )  # fmt: skip
        analytic = first.answer.model_copy(update={"command": command, "seed": seed})
        tuning = _Tuning(analytic, first.scenario, first.space, kept, run, progress)
        found = tuning.go(trials, sampler, seed)
    if learn and tuning.measured:
        _learn(first.scenario, tuning.measured)
    return found


def stored(url: str, name: str) -> Tuned:
    """What a study that tuning keeps has found so far; ConfigError where there is no such study."""
    study = stored_study(url, name)
    found = study.user_attrs.get(_FOUND)
    if found is None:
        raise ConfigError(
            f"study {name!r} in {url} has no measured config that ran within the budget; "
            "`planner tune` makes such studies"
        )
    trials = {trial.config: trial for trial in _trials(study)}
    # These two were perhaps measured again, or were not the sampler's to suggest.
    for which in ("best", "analytic"):
        trial = Trial(**found[which])
        trials[trial.config] = trial
    ordered = tuple(sorted(trials.values(), key=lambda trial: trial.number))
    return Tuned(**found, trials=ordered, kept=len(ordered), storage=url, study=name)


_FOUND: Final = "found"
"""The attribute of a study that has what is known of it but its trials."""


_OWNER: Final = "owner"
"""The attribute of a trial that says which process measures it."""


def _myself() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


def _at_work(owner: str | None) -> bool:
    """Whether the process that began a trial is still there; of another machine's nobody can tell, and it is
    left alone."""
    host, _, process = (owner or "").rpartition(" ")
    if not host or host != socket.gethostname():
        return bool(host)
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return int(process) != os.getpid()


def _trials(study: optuna.Study) -> list[Trial]:
    """Those that were measured."""
    return [
        Trial(**old.user_attrs["trial"])
        for old in study.get_trials(deepcopy=False)
        if "trial" in old.user_attrs
    ]


def _learn(scenario: Scenario, measured: list[Measurement]) -> None:
    """Saves the calibration, its speeds corrected by these runs, where predictions look first."""
    from planner.calibration import save
    from planner.speed.fit import corrected

    known, speed = _known_speed(scenario)
    rates = corrected(speed.rates, measured)
    speed = speed.model_copy(update={"rates": rates})
    save(known.model_copy(update={"speed": speed}), own_path(known.device))


def _known_speed(scenario: Scenario) -> tuple[Calibration, SpeedFit]:
    """The calibration that predictions of seconds rest on; ConfigError if there is none."""
    known = scenario.calibration
    if known is None or known.speed is None:
        raise ConfigError("there is no calibration of this device's speed to correct: run planner calibrate")
    return known, known.speed


class _Tuning:
    """One call of `tune`: the study, and what has been measured."""

    def __init__(
        self, analytic: Recommendation, scenario: Scenario, space: Space, storage: Storage, measure: Measure,
        progress: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        self.analytic, self.scenario, self.space = analytic, scenario, space
        self.storage, self.measure, self.progress = storage, measure, progress
        self.trials: dict[AttentionConfig, Trial] = {}
        self.measured: list[Measurement] = []
        """Of this call, in order."""
        self.kept: tuple[Trial | None, Trial | None] = (None, None)
        """The best and the analytic pick as the study has them."""

    def go(self, wanted: int, sampler: Sampler, seed: int) -> Tuned:
        study = open_study(self.storage, sampler, seed)
        self._take_up(study)
        kept = len(self.trials)
        if kept:
            study.sampler = open_study(None, sampler, seed + kept).sampler
        self._start(study)
        interrupted = False
        try:
            for _ in range(wanted * ASKS):
                if len(self.trials) >= wanted and self.analytic.config in self.trials:
                    break
                self._one(study, wanted)
                self._hear(study)
            self._confirm(study)
            with whole():
                self._keep(study)
        except KeyboardInterrupt:
            if not any(trial.good for trial in self.trials.values()):
                raise
            interrupted = True
        return self._result(kept, interrupted)

    def _take_up(self, study: optuna.Study) -> None:
        """Trials of an earlier run; those that it was in the midst of are begun again, unless it still is."""
        for old in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not _at_work(old.user_attrs.get(_OWNER)):
                study.tell(old.number, state=TrialState.FAIL)
                study.enqueue_trial(old.params)
        self._hear(study)

    def _hear(self, study: optuna.Study) -> None:
        """Trials that others measured for the same study meanwhile count like one's own."""
        for trial in _trials(study):
            self.trials.setdefault(trial.config, trial)

    def _start(self, study: optuna.Study) -> None:
        """The analytic pick comes first, then the rest of the Pareto set, fastest first."""
        configs = [self.analytic.config, *(pick.config for pick in self.analytic.pareto)]
        for config in dict.fromkeys(configs):
            known = parameters(config, self.space, self.scenario.workload)
            if known is not None and config not in self.trials:
                study.enqueue_trial(known, skip_if_exists=True)

    def _one(self, study: optuna.Study, wanted: int) -> None:
        """One suggestion: measured, if it passes the gates and is new."""
        if self.analytic.config not in self.trials and not self._waiting(study):
            # What no trial can suggest is measured all the same.
            self._run(self.analytic.config)
        if self.progress:
            self.progress(Progress(len(self.trials), wanted, None, self._best()))
        with whole():
            trial = study.ask()
            trial.set_user_attr(_OWNER, _myself())
            columns = chosen(trial, self.space, self.scenario.workload, flex=self.scenario.flex)
            config = columns.config(0, self.scenario.workload)
            judged = answer(self.scenario, columns)
            good = all(excess <= 0 for excess in judged.excess.values())
            for name, excess in judged.excess.items():
                trial.set_constraint(name, excess)
            if not good and config != self.analytic.config:
                study.tell(trial, judged.value)
                return
        new = config not in self.trials
        found = self._run(config) if new else self.trials[config]
        with whole():
            if new:
                trial.set_user_attr("trial", found.model_dump(mode="json"))
                self._keep(study)
            trial.set_constraint("runs", 0.0 if found.good else 1.0)
            study.tell(trial, math.log(found.seconds) if found.good and found.seconds else WORST)
        if new and self.progress:
            self.progress(Progress(len(self.trials), wanted, found, self._best()))

    def _waiting(self, study: optuna.Study) -> bool:
        return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _run(self, config: AttentionConfig) -> Trial:
        """Runs a config and keeps what came of it."""
        found = self.measure(config, self.scenario.workload)
        self.measured.append(found)
        expected = point(self.scenario, config, self.scenario.workload.seq)
        over = found.kind == "ok" and (found.allocated or 0) > self.scenario.budget
        said = f"it took {found.allocated:,} bytes of {self.scenario.budget:,}" if over else found.message
        self.trials[config] = Trial(
            number=len(self.trials), config=config, kind="over" if over else found.kind, message=said,
            seconds=found.seconds, predicted=expected.seconds, allocated=found.allocated,
            upper=expected.memory.upper,
        )  # fmt: skip
        return self.trials[config]

    def _best(self) -> Trial | None:
        good = [trial for trial in self.trials.values() if trial.good and trial.seconds]
        return min(good, key=lambda trial: trial.seconds or math.inf, default=None)

    def _confirm(self, study: optuna.Study) -> None:
        """Measures the best and the analytic pick once more, side by side: the least of many noisy figures
        is too good. Each gets the slower of its two."""
        best = self._best()
        analytic = self.trials.get(self.analytic.config)
        if best is None or analytic is None or best.config == analytic.config or not analytic.good:
            return
        for old in (analytic, best):
            again = self.measure(old.config, self.scenario.workload)
            if again.kind == "ok" and again.seconds and old.seconds:
                seconds = max(again.seconds, old.seconds)
                self.trials[old.config] = old.model_copy(update={"seconds": seconds})

    def _keep(self, study: optuna.Study) -> None:
        """Writes into the study what was found so far, for whoever looks at it, now or after a crash."""
        best, analytic = self._best(), self.trials.get(self.analytic.config)
        if best is not None and analytic is not None and (best, analytic) != self.kept:
            self.kept = best, analytic
            found = self._result(0, False)
            without = {"trials", "kept", "storage", "study", "interrupted"}
            study.set_user_attr(_FOUND, found.model_dump(mode="json", exclude=without))

    def _result(self, kept: int, interrupted: bool) -> Tuned:
        analytic = self.trials.get(self.analytic.config)
        best = self._best()
        if best is None or analytic is None:
            why = next((t.message for t in self.trials.values() if t.message), "nothing was measured")
            raise AttentionPlannerError(f"no config ran within the budget on this device: {why}")
        of, predicted = self.analytic, point(self.scenario, best.config, self.scenario.workload.seq)
        return Tuned(
            versions=of.versions, calibration=of.calibration, seed=of.seed, command=of.command,
            config=best.config, workload=of.workload, on=of.on, budget=of.budget, reserve=of.reserve,
            memory=predicted.memory,
            quality=Quality(profile=of.quality.profile, mass=predicted.mass, layers=predicted.layers),
            best=best, analytic=analytic, trials=tuple(self.trials.values()), kept=kept,
            storage=self.storage.url, study=self.storage.study, interrupted=interrupted,
        )  # fmt: skip


@contextmanager
def whole() -> Iterator[None]:
    """Holds Ctrl-C back until what is written is written: a journal's lock that is interrupted raises
    something else, or stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []
    usual = signal.signal(signal.SIGINT, lambda *event: pressed.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed and callable(usual):
        usual(*pressed[0])


@contextmanager
def _measuring(
    measure: Measure | None, device: Device, timeout: float, runs: int, records: str | Path | None
) -> Iterator[Measure]:
    """What measures; every measurement is added to `records`, if that is a file."""
    from planner.batch import Batch
    from planner.records import append

    with Batch(device, timeout=timeout, runs=runs) as batch:
        run = measure or batch.measure

        def kept(config: AttentionConfig, workload: Workload) -> Measurement:
            found = run(config, workload)
            if records is not None:
                append(records, found)
            return found

        yield kept


def present_gpu() -> str:
    """Key of the GPU that is here; UnavailableError if there is none."""
    from planner import gpus
    from planner.measure import measure

    found = measure(AttentionConfig(variant="dense"), Workload(seq=64), "cuda", memory=False)
    return gpus.find(found.environment.device or "").key


def default_storage(name: str) -> str:
    """The journal file of a question, in the user's data folder."""
    return str(own_path("x").parents[1] / "tunings" / f"{name[:16]}.journal")


__all__ = ["Measure", "Progress", "Trial", "Tuned", "stored", "tuned"]
