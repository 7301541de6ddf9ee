"""Tuning: measured trials, from the analytic Pareto set on. Imports Optuna, no torch.

What the models recommend is measured first, then what Optuna suggests from there. Every trial runs in a
process of its own; memory that runs out, a crash and a hang are results. Trials are kept as they end, so
that the same call goes on where an interrupted or killed one stopped.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from attention.config import AttentionConfig
from attention.errors import AttentionPlannerError, ConfigError
from planner.answers.recommendation import Quality, Recommendation
from planner.answers.tuned import Trial, Tuned
from planner.calibration import Calibration, SpeedFit, own_path
from planner.files import make_folder
from planner.measuring.measure import SETTINGS, Device, Measurement, check_timed
from planner.question.asked import Sampler
from planner.question.command import tune_command
from planner.question.runs import TRIAL_RUNS, TRIAL_TIMEOUT, TUNING_TRIALS
from planner.question.space import Space
from planner.search.evaluate import point
from planner.search.recommend import answered
from planner.search.refine import judge
from planner.search.samplers import check_sampler, sampler_of
from planner.search.scenario import Scenario
from planner.search.suggest import chosen, parameters
from planner.storage.study import Storage, open_study, stored_study
from planner.workload import Workload

ASKS: Final = 8
"""Suggestions for each trial: those that fail the gates or were tried before are not measured."""
PROVISIONAL: Final = -1
"""Number of a trial until the study has it."""
WORST: Final = 50.0
"""The sampler's value for a config that did not run: the logarithm of e^50 seconds."""

Measure = Callable[[AttentionConfig, Workload], Measurement]


class TuningProgress(NamedTuple):
    """Progress of tuning: trials measured so far and wanted in all, the last trial, the best so far."""

    measured: int
    wanted: int
    last: Trial | None
    best: Trial | None


def tuned(
    vram: str | int,
    seq: str | int,
    *,
    device: Device,
    trials: int,
    timeout: float,
    runs: int,
    sampler: Sampler,
    seed: int,
    storage: str | None,
    study: str | None,
    measure: Measure | None,
    records: str | Path | None,
    learn: bool,
    progress: Callable[[TuningProgress], None] | None,
    options: dict[str, Any],
) -> Tuned:
    """The answer of `planner.tune`."""
    if type(trials) is not int or trials < 1:
        raise ConfigError(f"trials must be at least 1 and whole, got {trials!r}")
    if options.get("gpus", 1) != 1:
        raise ConfigError(
            f"tuning runs on one device, and gpus={options['gpus']}; leave gpus out, or choose for several "
            "with planner.recommend"
        )
    check_sampler(sampler)
    check_timed(device)
    card = "cpu" if device == "cpu" else present_gpu()
    first = answered(vram, seq, **{**options, "gpu": card, "objective": "speed"})
    if learn:
        _calibrated_speed(first.scenario)
    store = Storage(storage or default_storage(first.name), study or f"tune-{first.name[:12]}", first.name)
    if storage is None:
        make_folder(Path(store.url), "trials")
    with _measuring(measure, device, timeout, runs, records) as run:
        command = tune_command(
            vram,
            seq,
            device,
            {
                "--trials": (trials, TUNING_TRIALS),
                "--timeout": (timeout, TRIAL_TIMEOUT),
                "--runs": (runs, TRIAL_RUNS),
                "--sampler": (sampler, "tpe"),
                "--seed": (seed, 0),
            },
            options,
        )
        analytic = first.answer.model_copy(update={"command": command, "seed": seed})
        tuning = _Tuning(
            analytic,
            first.scenario,
            first.space,
            store,
            run,
            limits(timeout, runs, analytic.versions),
            progress,
        )
        answer = tuning.go(trials, sampler, seed)
    if learn and tuning.measured:
        _learn(first.scenario, tuning.measured)
    return answer


def stored(url: str, name: str) -> Tuned:
    """The answer so far of a study that tuning keeps; ConfigError where there is no such study."""
    study = stored_study(url, name)
    summary = study.user_attrs.get(_SUMMARY)
    if summary is None:
        raise ConfigError(
            f"study {name!r} in {url} has no measured config that ran within the budget; "
            "`planner tune` makes such studies"
        )
    trials = measured_of(study)
    numbers = {trial.number for trial in trials.values()}
    these: dict[str, Trial] = {}
    # Perhaps measured again, or (by an earlier version) under a number that a trial has now.
    for which in ("best", "analytic"):
        trial = Trial(**summary[which])
        newest = trials.get(trial.config)
        free = trial.number if trial.number not in numbers else max(numbers) + 1
        these[which] = trial.model_copy(update={"number": newest.number if newest else free})
    trials |= {trial.config: trial for trial in these.values()}
    ordered = tuple(sorted(trials.values(), key=lambda trial: trial.number))
    return Tuned(**{**summary, **these}, trials=ordered, kept=len(ordered), storage=url, study=name)


_SUMMARY: Final = "found"
"""The attribute of a study that has its answer so far, without the trials."""


_OWNER: Final = "owner"
"""The attribute of a trial that says which process measures it."""

_LIMITS: Final = "limits"
"""The attribute of a failed trial that says under which limits it ran."""


def _myself() -> str:
    """This process, in a way that no later one is called."""
    began = _process(os.getpid())
    return f"{socket.gethostname()} {os.getpid()}" + (f" {began[1]}" if began else "")


def _process(number: int) -> tuple[str, str] | None:
    """(state, when it began) of a process, as the system has them; None where it does not say."""
    try:
        status = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return None
    fields = status.rpartition(")")[2].split()  # its name comes before, and may have anything in it
    return fields[0], fields[19]


def _at_work(owner: str | None) -> bool:
    """Whether the process that began a trial is still there; of another machine's nobody can tell, and it is
    left alone."""
    host, *process = (owner or "").split(" ")
    if host != socket.gethostname():
        return bool(host)
    if not process or not process[0].isdigit():
        return False
    number = int(process[0])
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    present = _process(number)
    if present is not None:
        state, began = present
        # Ended, and its parent has not heard of it; or the number is another process's by now.
        if state in "ZX" or (len(process) > 1 and process[1] != began):
            return False
    return number != os.getpid()


def measured_of(study: optuna.Study, without: Collection[int] = ()) -> dict[AttentionConfig, Trial]:
    """The measured trials in order, each config once: the first time that it ran, or else the last.
    `without`: numbers of trials that do not count."""
    trials: dict[AttentionConfig, Trial] = {}
    for old in study.get_trials(deepcopy=False):
        trial = _trial(old)
        if trial is not None and trial.number not in without:
            earlier = trials.get(trial.config)
            if earlier is None or not earlier.good:
                trials[trial.config] = trial
    return trials


def _trial(old: FrozenTrial) -> Trial | None:
    """The measured trial that a study's trial holds; None if it holds none."""
    if "trial" not in old.user_attrs:
        return None
    # Earlier versions counted in each worker.
    return Trial(**{**old.user_attrs["trial"], "number": old.number})


def limits(timeout: float, runs: int, versions: dict[str, str | None]) -> dict[str, Any]:
    """The limits that trials run under: if they change, one that failed may not fail again."""
    bounds = [resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    memory = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    memory += [bound for bound in bounds if bound != resource.RLIM_INFINITY]
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    return {
        "timeout": timeout,
        "runs": runs,
        "memory": min(memory),
        "versions": versions,
        "settings": settings,
    }


def may_end_otherwise(failed: Trial, then: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether a trial that failed is worth another try under the limits of now. `then`: those that it failed
    under, None if it does not say."""
    if failed.good or failed.kind == "over":
        return False
    if then is None:
        return True
    if failed.kind == "timeout" and {**then, "timeout": 0} == {**now, "timeout": 0}:
        return bool(now["timeout"] > then["timeout"])
    return then != now


def _learn(scenario: Scenario, measured: list[Measurement]) -> None:
    """Saves the calibration, its speeds corrected by these runs, where predictions look first."""
    from planner.calibration import save
    from planner.fitting.speed import corrected

    calibration, speed = _calibrated_speed(scenario)
    rates = corrected(speed.rates, measured)
    speed = speed.model_copy(update={"rates": rates})
    save(calibration.model_copy(update={"speed": speed}), own_path(calibration.device))


def _calibrated_speed(scenario: Scenario) -> tuple[Calibration, SpeedFit]:
    """The calibration that predictions of seconds rest on; ConfigError if there is none."""
    calibration = scenario.calibration
    if calibration is None or calibration.speed is None:
        raise ConfigError("there is no calibration of this device's speed to correct: run planner calibrate")
    return calibration, calibration.speed


def _value_and_constraint(trial: Trial) -> tuple[float, float]:
    """(value, constraint) of a trial for the sampler: log seconds; 0 if the trial is good, else 1."""
    good = trial.good and trial.seconds
    return math.log(trial.seconds or 1.0) if good else WORST, 0.0 if trial.good else 1.0


def _given_up(study: optuna.Study, number: int) -> bool:
    """Ends a dead worker's trial; whether it was this process that did."""
    try:
        study.tell(number, state=TrialState.FAIL)
    except (UpdateFinishedTrialError, ValueError):
        return False
    return True


class _Tuning:
    """One call of `tune`: the study, and what has been measured."""

    def __init__(
        self,
        analytic: Recommendation,
        scenario: Scenario,
        space: Space,
        storage: Storage,
        measure: Measure,
        limits: dict[str, Any],
        progress: Callable[[TuningProgress], None] | None,
    ) -> None:
        self.analytic, self.scenario, self.space = analytic, scenario, space
        self.storage, self.measure, self.progress = storage, measure, progress
        self.limits = limits
        self.trials: dict[AttentionConfig, Trial] = {}
        self.again: dict[AttentionConfig, FrozenTrial] = {}
        """Configs that failed before and are to be tried again, each with its last failed trial."""
        self.outdated: set[int] = set()
        """Numbers of the failed trials of these configs."""
        self.measured: list[Measurement] = []
        """Measurements of this call, in order."""
        self.stored_picks: tuple[Trial | None, Trial | None] = (None, None)
        """The best and the analytic pick as the study has them."""

    def go(self, wanted: int, sampler: Sampler, seed: int) -> Tuned:
        study = open_study(self.storage, sampler_of(sampler, seed))
        self._take_up(study)
        earlier = len(self.trials)
        if earlier:
            study.sampler = sampler_of(sampler, seed + earlier)
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
        return self._result(earlier, interrupted)

    def _take_up(self, study: optuna.Study) -> None:
        """Trials of an earlier run. Those that it was in the midst of are begun again, unless it still is;
        those that failed too, if they may end otherwise now or nothing has run at all."""
        for old in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not _at_work(old.user_attrs.get(_OWNER)) and _given_up(study, old.number):
                self._queue(study, old.params)
        earlier, trials = measured_of(study), study.get_trials(deepcopy=False)
        nothing_ran = not any(trial.good for trial in earlier.values())
        self.again = {
            config: trials[trial.number]
            for config, trial in earlier.items()
            if nothing_ran
            or may_end_otherwise(trial, trials[trial.number].user_attrs.get(_LIMITS), self.limits)
        }
        self.outdated = {
            old.number for old in trials if (trial := _trial(old)) and trial.config in self.again
        }
        self._hear(study)

    def _queue(self, study: optuna.Study, params: dict[str, Any], **how: Any) -> None:
        """Suggests a trial; it is marked from the beginning, so that whoever starts when it has just begun to
        run does not take it for a dead worker's."""
        study.enqueue_trial(params, user_attrs={_OWNER: _myself()}, **how)

    def _ask(self, study: optuna.Study) -> optuna.Trial:
        """The next trial, with this process's mark."""
        if not self._waiting(study):
            self._queue(study, {})  # nothing is fixed: the sampler's suggestion
        trial = study.ask()
        if trial.user_attrs.get(_OWNER) != _myself():
            trial.set_user_attr(_OWNER, _myself())
        return trial

    def _hear(self, study: optuna.Study) -> None:
        """Trials that others measured for the same study meanwhile count like one's own."""
        for config, trial in measured_of(study, self.outdated).items():
            own = self.trials.get(config)
            if own is None or (trial.good and not own.good):
                self.trials[config] = trial

    def _start(self, study: optuna.Study) -> None:
        """The analytic pick comes first, then the rest of the Pareto set, fastest first."""
        configs = [self.analytic.config, *(pick.config for pick in self.analytic.pareto)]
        for config in dict.fromkeys(configs):
            params = parameters(config, self.space, self.scenario.workload)
            if params is not None and config not in self.trials:
                self._queue(study, params, skip_if_exists=True)

    def _one(self, study: optuna.Study, wanted: int) -> None:
        """One suggestion: measured, if it passes the gates and is new."""
        if self.again:
            self._again(study, wanted)
            return
        if self.analytic.config not in self.trials and not self._comes_in_time(study, wanted):
            # What no trial can suggest, or only after all that is queued, is measured all the same.
            self._unsuggested(study, self.analytic.config, {}, {}, wanted)
            return
        self._report(wanted)
        try:
            with whole():
                trial = self._ask(study)
                columns = chosen(
                    trial,
                    self.space,
                    self.scenario.workload,
                    flex=self.scenario.flex,
                    windows=self.scenario.windows,
                )
                config = columns.config(0, self.scenario.workload)
                judged = judge(self.scenario, columns)
                good = all(excess <= 0 for excess in judged.excess.values())
                for name, excess in judged.excess.items():
                    trial.set_constraint(name, excess)
                if not good and config != self.analytic.config:
                    study.tell(trial, judged.value, skip_if_finished=True)
                    return
        except UpdateFinishedTrialError:
            return  # another took this worker for dead, and the trial up
        new = config not in self.trials
        outcome = self._run(config, trial.number) if new else self.trials[config]
        with whole():
            self._tell(study, trial, outcome, new=new)
        if new:
            self._hear(study)
            self._report(wanted, outcome)

    def _comes_in_time(self, study: optuna.Study, wanted: int) -> bool:
        """Whether a queued trial may yet suggest the analytic pick before as many as are wanted are measured;
        of an interrupted run its trial is begun again behind all others."""
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        pick = parameters(self.analytic.config, self.space, self.scenario.workload)
        if not waiting or pick is None:
            return False
        return len(self.trials) < wanted - 1 or waiting[0].system_attrs.get("fixed_params") == pick

    def _report(self, wanted: int, last: Trial | None = None) -> None:
        if self.progress:
            self.progress(TuningProgress(len(self.trials), wanted, last, self._best()))

    def _tell(self, study: optuna.Study, trial: optuna.Trial, outcome: Trial, *, new: bool) -> None:
        """Keeps what came of a trial; if another took this worker for dead, and the trial up, as one more."""
        attributes = self._attributes(outcome) if new else {}
        value, constraint = _value_and_constraint(outcome)
        try:
            for name, attribute in attributes.items():
                trial.set_user_attr(name, attribute)
            trial.set_constraint("runs", constraint)
            study.tell(trial, value, skip_if_finished=True)
        except UpdateFinishedTrialError:
            if new:
                self._add(study, outcome, trial.params, trial.distributions)
        if new:
            self._keep(study)

    def _add(
        self,
        study: optuna.Study,
        outcome: Trial,
        params: dict[str, Any],
        distributions: dict[str, BaseDistribution],
    ) -> None:
        """Keeps what was measured as a trial of its own; from one without parameters no sampler learns."""
        value, constraint = _value_and_constraint(outcome)
        ending: dict[str, Any] = {"value": value} if params else {"state": TrialState.FAIL}
        study.add_trial(
            create_trial(
                **ending,
                params=params,
                distributions=distributions,
                constraints={"runs": constraint},
                user_attrs={_OWNER: _myself(), **self._attributes(outcome)},
            )
        )
        number = measured_of(study, self.outdated)[outcome.config].number
        self.trials[outcome.config] = outcome.model_copy(update={"number": number})

    def _attributes(self, trial: Trial) -> dict[str, Any]:
        """User attributes that a measured trial gets in the study."""
        under = {} if trial.good else {_LIMITS: self.limits}
        return {**under, "trial": trial.model_dump(mode="json")}

    def _again(self, study: optuna.Study, wanted: int) -> None:
        """Measures one that failed before: the analytic pick, or else the first."""
        config = self.analytic.config if self.analytic.config in self.again else next(iter(self.again))
        old = self.again.pop(config)
        if config not in self.trials:  # nor has another worker by now
            self._unsuggested(study, config, old.params, old.distributions, wanted)

    def _unsuggested(
        self,
        study: optuna.Study,
        config: AttentionConfig,
        params: dict[str, Any],
        distributions: dict[str, BaseDistribution],
        wanted: int,
    ) -> None:
        """Measures what no sampler was asked for."""
        self._report(wanted)
        self._run(config, PROVISIONAL)
        with whole():
            self._add(study, self.trials[config], params, distributions)
            self._keep(study)
        self._report(wanted, self.trials[config])

    def _waiting(self, study: optuna.Study) -> bool:
        return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _run(self, config: AttentionConfig, number: int) -> Trial:
        """Runs a config and keeps what came of it."""
        run = self.measure(config, self.scenario.workload)
        self.measured.append(run)
        expected = point(self.scenario, config, self.scenario.workload.seq)
        over = run.kind == "ok" and (run.peak or 0) > self.scenario.budget
        self.trials[config] = Trial(
            number=number,
            config=config,
            kind="over" if over else run.kind,
            message=f"it took {run.peak:,} bytes of {self.scenario.budget:,}" if over else run.message,
            seconds=run.seconds,
            predicted=expected.seconds,
            allocated=run.peak,
            upper=expected.memory.upper,
            launches=expected.memory.launches,
        )
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
        """Writes the answer so far into the study, for whoever looks at it, now or after a crash."""
        best, analytic = self._best(), self.trials.get(self.analytic.config)
        if best is not None and analytic is not None and (best, analytic) != self.stored_picks:
            self.stored_picks = best, analytic
            summary = self._result(0, False)
            without = {"trials", "kept", "storage", "study", "interrupted"}
            study.set_user_attr(_SUMMARY, summary.model_dump(mode="json", exclude=without))

    def _result(self, earlier: int, interrupted: bool) -> Tuned:
        analytic = self.trials.get(self.analytic.config)
        best = self._best()
        if best is None or analytic is None:
            why = next((t.message for t in self.trials.values() if t.message), "nothing was measured")
            raise AttentionPlannerError(f"no config ran within the budget on this device: {why}")
        ordered = sorted(self.trials.values(), key=lambda trial: trial.number)
        of, predicted = self.analytic, point(self.scenario, best.config, self.scenario.workload.seq)
        return Tuned(
            versions=of.versions,
            calibration=of.calibration,
            seed=of.seed,
            command=of.command,
            config=best.config,
            workload=of.workload,
            on=of.on,
            budget=of.budget,
            reserve=of.reserve,
            memory=predicted.memory,
            quality=Quality(profile=of.quality.profile, mass=predicted.mass, layers=predicted.layers),
            best=best,
            analytic=analytic,
            trials=tuple(ordered),
            kept=earlier,
            storage=self.storage.url,
            study=self.storage.study,
            interrupted=interrupted,
        )


@contextmanager
def whole() -> Iterator[None]:
    """Holds Ctrl-C back until what is written is written, and together what belongs together. A second one
    ends that too: a storage may have to be waited for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []

    def press(number: int, frame: FrameType | None) -> None:
        pressed.append((number, frame))
        if len(pressed) > 1 and callable(usual):
            usual(number, frame)

    usual = signal.signal(signal.SIGINT, press)
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
    """A function that measures a config; every measurement is added to `records`, if that is a file."""
    from planner.measuring.records import append
    from planner.measuring.server import Batch

    with Batch(device, timeout=timeout, runs=runs) as batch:
        run = measure or batch.measure

        def recorded(config: AttentionConfig, workload: Workload) -> Measurement:
            measurement = run(config, workload)
            if records is not None:
                append(records, measurement)
            return measurement

        yield recorded


def present_gpu() -> str:
    """Key of the GPU that is here; UnavailableError if there is none."""
    from planner import gpus
    from planner.measuring.measure import measure

    where = measure(AttentionConfig(variant="dense"), Workload(seq=64), "cuda", memory=False).environment
    return gpus.of_device(where.device or "", where.device_bytes).key


def default_storage(name: str) -> str:
    """The journal file of a question, in the user's data folder."""
    return str(own_path("x").parents[1] / "tunings" / f"{name[:16]}.journal")


__all__ = ["Measure", "Trial", "Tuned", "TuningProgress", "stored", "tuned"]
