"""Tuning: what is measured counts, whatever ends a trial or the tuner, and nothing finished is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from typer.testing import CliRunner

import planner
from attention.errors import AttentionPlannerError, ConfigError, StorageError
from planner import calibration
from planner.answers.tuned import Tuned
from planner.cli.main import app
from planner.measuring.measure import Environment, Measurement
from planner.measuring.records import read
from planner.question.space import Space
from planner.search.tune import _myself, _process, limits, stored, whole

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = calibration.SHIPPED / "cpu.json"
HERE = Environment(python="3.11", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")
SPACE = Space(block_sizes=(64, 128), branches=(1, 2))
pytestmark = pytest.mark.usefixtures("asked_once")
ASKED = {"vram": "500MB", "seq": 4096, "dtype": "float32", "heads": 2, "space": SPACE}


class Device:
    """Measures at once: random seconds, the same for the same config; `ends`: how the n-th run ends."""

    def __init__(self, ends=None, allocated=1 << 20):
        self.runs, self.ends, self.allocated = [], ends or {}, allocated

    def __call__(self, config, workload):
        how = self.ends.get(len(self.runs), "ok")
        self.runs.append(config)
        if how == "interrupt":
            raise KeyboardInterrupt
        figures = {"message": f"it ended in {how}"}
        if how == "ok":
            figures = {
                "seconds": random.Random(config.to_json()).uniform(0.1, 1),
                "allocated": self.allocated,
            }
        return Measurement(
            config=config, workload=workload, device="cpu", kind=how, runs=3, environment=HERE, **figures
        )


def tune(device, path, trials=10, **more):
    storage = str(path / "trials.journal")
    return planner.tune(**{**ASKED, **more}, trials=trials, measure=device, storage=storage)


def test_the_fastest_that_was_measured_wins(tmp_path):
    device, seen = Device(), []
    found = tune(device, tmp_path, progress=seen.append)
    assert len(found.trials) == 10
    assert len({trial.config for trial in found.trials}) == 10
    assert found.best.seconds == min(trial.seconds for trial in found.trials)
    assert found.best.seconds <= found.analytic.seconds
    assert found.trials[0].config == found.analytic.config == device.runs[0]
    assert found.config == found.best.config
    assert found.speedup >= 1
    measured = [now for now in seen if now.last is not None]
    assert [now.measured for now in measured] == list(range(1, 11))
    assert measured[-1].best.seconds == min(now.last.seconds for now in measured)
    assert Tuned.from_json(found.to_json()) == found


def test_the_best_and_the_analytic_pick_are_measured_again(tmp_path):
    device = Device()
    found = tune(device, tmp_path)
    if found.best.config != found.analytic.config:
        assert device.runs[-2:] == [found.analytic.config, found.best.config]


@pytest.mark.parametrize("kind", ["oom", "crash", "timeout", "error"])
def test_a_trial_that_fails_is_a_data_point(kind, tmp_path):
    found = tune(Device({1: kind, 3: kind}), tmp_path)
    failed = [trial for trial in found.trials if trial.kind == kind]
    assert len(failed) == 2
    assert all(trial.seconds is None and f"ended in {kind}" in trial.message for trial in failed)
    assert found.best.kind == "ok"
    assert len(found.trials) == 10


def test_what_takes_more_than_the_budget_is_not_chosen(tmp_path):
    with pytest.raises(AttentionPlannerError, match="no config ran within the budget"):
        tune(Device(allocated=10**9), tmp_path, trials=3)


def test_where_nothing_runs_it_says_why(tmp_path):
    with pytest.raises(AttentionPlannerError, match="it ended in oom"):
        tune(Device(dict.fromkeys(range(99), "oom")), tmp_path, trials=3)


def test_the_same_call_goes_on_where_it_stopped(tmp_path):
    first, second = Device(), Device()
    one = tune(first, tmp_path, trials=4)
    two = tune(second, tmp_path, trials=9)
    assert two.kept == 4
    assert [trial.config for trial in two.trials[:4]] == [trial.config for trial in one.trials]
    assert len(two.trials) == 9
    new = [config for config in second.runs if config not in {two.best.config, two.analytic.config}]
    assert not set(new) & set(first.runs)
    third = Device()
    assert len(tune(third, tmp_path, trials=9).trials) == 9
    assert set(third.runs) <= {two.best.config, two.analytic.config}


def test_an_interrupt_keeps_what_there_is(tmp_path):
    found = tune(Device({4: "interrupt"}), tmp_path)
    assert found.interrupted
    assert len(found.trials) == 4
    again = tune(Device(), tmp_path)
    assert (again.kept, len(again.trials), again.interrupted) == (4, 10, False)


def test_an_interrupt_before_anything_ran_is_one(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tune(Device({0: "interrupt"}), tmp_path)


@pytest.mark.parametrize(
    "owner, begun_again",
    [
        (f"{socket.gethostname()} {os.getppid()}", False),
        (f"{socket.gethostname()} {1 << 30}", True),
        ("another-machine 1", False),
        (None, True),
    ],
)
def test_a_trial_of_a_worker_that_is_at_work_is_left_to_it(owner, begun_again, tmp_path):
    tune(Device(), tmp_path, trials=2)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "trials.journal")))
    [name] = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    trial = study.ask()
    if owner:
        trial.set_user_attr("owner", owner)
    tune(Device(), tmp_path, trials=3)
    study = optuna.load_study(study_name=name, storage=storage)
    state = study.get_trials()[trial.number].state
    assert (state == TrialState.FAIL) == begun_again
    assert (state == TrialState.RUNNING) != begun_again


def opened(path):
    """The study that is in the journal."""
    storage = JournalStorage(JournalFileBackend(str(path / "trials.journal")))
    [name] = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def test_a_process_number_that_another_process_has_by_now_is_of_a_dead_worker(tmp_path):
    tune(Device(), tmp_path, trials=2)
    trials = [opened(tmp_path).ask() for _ in range(2)]
    # The same number; began when it did, and at another time.
    stat = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    for trial, began in zip(trials, (stat[19], "1"), strict=True):
        trial.set_user_attr("owner", f"{socket.gethostname()} {os.getppid()} {began}")
    tune(Device(), tmp_path, trials=3)
    states = [opened(tmp_path).get_trials()[trial.number].state for trial in trials]
    assert states == [TrialState.RUNNING, TrialState.FAIL]


def test_a_worker_that_ended_and_was_not_waited_for_is_dead(tmp_path):
    tune(Device(), tmp_path, trials=2)
    trial = opened(tmp_path).ask()
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie:
        while _process(zombie.pid)[0] != "Z":
            time.sleep(0.01)
        trial.set_user_attr("owner", f"{socket.gethostname()} {zombie.pid}")
        tune(Device(), tmp_path, trials=3)
    assert opened(tmp_path).get_trials()[trial.number].state == TrialState.FAIL


def test_a_trial_has_its_owners_mark_from_when_it_runs(tmp_path, monkeypatch):
    # A worker that starts at any moment of another's beginning of a trial leaves it to it.
    seen, ask = [], optuna.Study.ask

    def asked(study, *given):
        trial = ask(study, *given)
        if study.study_name.startswith("tune-"):  # not what the models alone suggest
            seen.append(opened(tmp_path).trials[trial.number])
        return trial

    monkeypatch.setattr(optuna.Study, "ask", asked)
    tune(Device(), tmp_path, trials=4)
    assert len(seen) >= 4
    assert {one.state for one in seen} == {TrialState.RUNNING}
    assert {one.user_attrs.get("owner") for one in seen} == {_myself()}


@pytest.mark.parametrize("when", ["before its suggestion", "while it runs"])
def test_a_living_workers_trial_that_was_taken_for_dead_is_not_lost(when, tmp_path, monkeypatch):
    class Elsewhere(Device):
        def __call__(self, config, workload):
            if len(self.runs) == 2 and when == "while it runs":
                self.fail()
            return super().__call__(config, workload)

        def fail(self):
            for running in opened(tmp_path).get_trials(states=(TrialState.RUNNING,)):
                opened(tmp_path).tell(running.number, state=TrialState.FAIL)

    device, ask = Elsewhere(), optuna.Study.ask

    def asked(study, *given):
        trial = ask(study, *given)
        if len(device.runs) == 2 and when != "while it runs" and not failed:
            failed.append(trial.number)
            device.fail()
        return trial

    failed = []
    monkeypatch.setattr(optuna.Study, "ask", asked)
    found = tune(device, tmp_path, trials=6)
    assert len(found.trials) == 6
    assert len(stored(found.storage, found.study).trials) == 6
    assert len({trial.number for trial in stored(found.storage, found.study).trials}) == 6


def test_a_dead_workers_trial_that_another_has_taken_up_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    tune(Device(), tmp_path, trials=2)
    before = len(opened(tmp_path).get_trials(states=(TrialState.WAITING,)))
    number = opened(tmp_path).ask().number

    def late(owner):
        opened(tmp_path).tell(number, state=TrialState.FAIL)
        return False

    monkeypatch.setattr("planner.search.tune._at_work", late)
    found = tune(Device(), tmp_path, trials=3)
    assert len(found.trials) == 3
    # One was asked for here, one by the tuner, and none was added.
    assert len(opened(tmp_path).get_trials(states=(TrialState.WAITING,))) == before - 2


def test_trials_of_several_workers_have_numbers_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("planner.search.tune._myself", lambda: f"{socket.gethostname()} {os.getppid()}")

    class Other(Device):
        """Lets another worker measure three configs in the midst of its third run."""

        def __call__(self, config, workload):
            if len(self.runs) == 2:
                self.runs.append(config)
                tune(Device(), tmp_path, trials=5)
            return super().__call__(config, workload)

    found = tune(Other(), tmp_path, trials=8)
    numbers = [trial.number for trial in found.trials]
    assert sorted(set(numbers)) == numbers
    kept = stored(found.storage, found.study)
    assert [trial.number for trial in kept.trials] == numbers
    assert kept.best.number == found.best.number


def test_a_study_of_todays_version_is_read_and_goes_on(tmp_path):
    """As it was before trials had the study's numbers and what they failed under."""
    found = tune(Device({1: "crash"}), tmp_path, trials=4)
    path = tmp_path / "trials.journal"
    lines = []
    for line in path.read_text().splitlines():
        log = json.loads(line)
        attribute = log.get("user_attr", {})
        if "limits" in attribute:
            continue
        if "owner" in log.get("user_attrs", {}):
            log["user_attrs"]["owner"] = f"{socket.gethostname()} {os.getpid()}"
        if "trial" in attribute:
            attribute["trial"]["number"] = 0
        lines.append(json.dumps(log))
    path.write_text("\n".join(lines) + "\n")
    assert stored(found.storage, found.study).trials == found.trials
    device = Device()
    again = tune(device, tmp_path, trials=6)
    assert (again.kept, len(again.trials)) == (3, 6)
    assert all(trial.good for trial in again.trials)


# ---- what failed before


@pytest.mark.parametrize(
    "kind, then, now, again",
    [
        ("timeout", {"timeout": 10.0}, {"timeout": 20.0}, True),
        ("timeout", {"timeout": 20.0}, {"timeout": 10.0}, False),
        ("timeout", {}, {"runs": 1}, True),
        ("timeout", {}, {}, False),
        ("oom", {}, {"timeout": 500.0}, True),
        ("crash", {}, {}, False),
        ("crash", {}, {"runs": 1}, True),
    ],
)
def test_a_trial_that_failed_is_tried_again_when_the_limits_changed(kind, then, now, again, tmp_path):
    first = tune(Device({1: kind}), tmp_path, trials=4, **then)
    [failed] = [trial for trial in first.trials if not trial.good]
    device = Device()
    second = tune(device, tmp_path, trials=4, **now)
    assert (failed.config in device.runs) == again
    assert [trial.good for trial in second.trials].count(False) == (not again)
    assert len(second.trials) == 4
    assert second.kept == 4 - again
    if again:
        kept = stored(second.storage, second.study)
        assert next(trial for trial in kept.trials if trial.config == failed.config).good


@pytest.mark.parametrize("changed", ["version", "memory", "setting"])
def test_a_trial_that_failed_is_tried_again_when_the_cause_may_have_gone(changed, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first = tune(Device({1: "crash"}), tmp_path, trials=3)
    if changed == "version":
        monkeypatch.setattr("planner.search.tune.limits", partial(limits_with, versions={"torch": "9"}))
    elif changed == "memory":
        monkeypatch.setattr("planner.search.tune.limits", partial(limits_with, memory=1 << 50))
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
    second = tune(Device(), tmp_path, trials=3)
    assert (len(first.trials), second.kept) == (3, 2)
    assert all(trial.good for trial in second.trials)


def limits_with(*given, **changed):
    return limits(*given) | changed


def test_where_nothing_has_run_all_is_tried_again(tmp_path):
    with pytest.raises(AttentionPlannerError, match="it ended in crash"):
        tune(Device(dict.fromkeys(range(9), "crash")), tmp_path, trials=2)
    found = tune(Device(), tmp_path, trials=2)
    assert (found.kept, len(found.trials)) == (0, 2)
    assert all(trial.good for trial in found.trials)


def test_an_analytic_pick_that_no_trial_can_suggest_is_a_trial_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("planner.search.tune.parameters", lambda *_: None)
    found = tune(Device(), tmp_path, trials=3)
    assert found.analytic.config in {trial.config for trial in stored(found.storage, found.study).trials}
    assert len({trial.number for trial in found.trials}) == len(found.trials)
    assert tune(Device(), tmp_path, trials=3).kept == len(found.trials)


def test_what_took_more_than_the_budget_is_not_tried_again(tmp_path):
    class Over(Device):
        def __call__(self, config, workload):
            self.allocated = 10**9 if len(self.runs) == 1 else 1 << 20
            return super().__call__(config, workload)

    first = tune(Over(), tmp_path, trials=3)
    assert [trial.kind for trial in first.trials] == ["ok", "over", "ok"]
    assert tune(Device(), tmp_path, trials=3, timeout=500.0).kept == 3


def test_of_a_gpus_run_what_the_card_lost_is_what_the_budget_is_compared_with(tmp_path):
    class Gpu(Device):
        def __call__(self, config, workload):
            run = super().__call__(config, workload)
            lost = 10**9 if len(self.runs) == 2 else 1 << 20
            return run.model_copy(update={"device": "cuda", "reserved": 1 << 20, "device_peak": lost})

    trials = tune(Gpu(), tmp_path, trials=3).trials
    assert [trial.kind for trial in trials] == ["ok", "over", "ok"]
    assert [trial.allocated for trial in trials] == [1 << 20, 10**9, 1 << 20]


def test_two_workers_on_one_study_hear_of_each_other(tmp_path, monkeypatch):
    # Both are this process: the first one's trials are signed by another that is there.
    monkeypatch.setattr("planner.search.tune._myself", lambda: f"{socket.gethostname()} {os.getppid()}")

    class Other(Device):
        """Lets another worker measure two configs in the midst of its second run."""

        def __call__(self, config, workload):
            if len(self.runs) == 1:
                self.runs.append(config)
                other = tune(Device(), tmp_path, trials=4)
                self.found = {trial.config for trial in other.trials}
            return super().__call__(config, workload)

    device = Other()
    found = tune(device, tmp_path, trials=6)
    assert len(found.trials) == 6
    assert len({trial.config for trial in found.trials} & device.found) >= 3


def test_another_question_has_trials_of_its_own(tmp_path):
    tune(Device(), tmp_path, trials=2)
    assert tune(Device(), tmp_path, trials=2, seq=8192).kept == 0


def test_measurements_can_be_kept_as_records(tmp_path):
    kept = tmp_path / "runs.jsonl"
    found = tune(Device(), tmp_path, trials=3, records=kept)
    assert {m.config for m in read(kept)} == {trial.config for trial in found.trials}


def test_what_was_measured_can_correct_the_calibration(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    asked = {**ASKED, "trials": 6, "measure": Device()}
    tuned = planner.tune(**asked, learn=True)
    ratio = statistics.median(trial.seconds / trial.predicted for trial in tuned.trials)
    found = planner.recommend(**ASKED, gpu="cpu", trials=0)
    shipped = planner.recommend(**ASKED, gpu="cpu", trials=0, calibration=calibration.load(SHIPPED))
    assert "float32 x " in found.calibration
    assert found.seconds == pytest.approx(shipped.seconds * ratio)


def test_by_default_trials_are_kept_in_the_users_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    found = planner.tune(**ASKED, trials=2, measure=Device())
    assert Path(found.storage).is_relative_to(tmp_path)
    assert planner.tune(**ASKED, trials=2, measure=Device()).kept == 2


def test_what_cannot_be_asked():
    with pytest.raises(ConfigError, match="trials must be at least 1"):
        planner.tune(**ASKED, trials=0, measure=Device())


# ---- with real processes


SMALL = ["--vram", "200MB", "--seq", "512", "--dtype", "float32", "--heads", "2", "--head-dim", "16",
         "--block-size", "64", "--runs", "1"]  # a command line, option and value together  # fmt: skip


def command(path, *more):
    return ["tune", *SMALL, "--storage", str(path / "t.journal"), *more]


def test_a_trial_that_hangs_is_a_timeout(one_server, tmp_path):
    run = CliRunner().invoke(app, command(tmp_path, "--trials", "1", "--timeout", "0.01"))
    assert run.exit_code == 2
    assert "no config ran within the budget" in run.stderr
    assert "not done after 0.01 s" in run.stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_tuner_that_is_ended_goes_on_where_it_stopped(how, one_server, tmp_path):
    begun = subprocess.Popen(
        [sys.executable, "-m", "planner", *command(tmp_path, "--trials", "200")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    finished = 0
    for line in begun.stderr:
        finished += " of 200: " in line
        if finished == 3:
            break
    time.sleep(0.05)
    begun.send_signal(how)
    begun.communicate()
    assert begun.returncode == (130 if how == signal.SIGINT else -how)
    again = CliRunner().invoke(app, command(tmp_path, "--trials", "5", "--format", "json"))
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert found["kept"] >= 3
    assert len(found["trials"]) >= 5


@pytest.mark.parametrize("at", [0, 1])
def test_after_an_interruption_no_more_is_measured_than_was_asked_for(at, tmp_path):
    """The analytic pick's trial is begun again behind all that is queued."""
    with contextlib.suppress(KeyboardInterrupt):
        tune(Device({at: "interrupt"}), tmp_path, trials=3)
    found = tune(Device(), tmp_path, trials=3)
    assert len(found.trials) == 3
    assert found.analytic.config in {trial.config for trial in found.trials}


def test_an_interrupt_waits_until_what_is_written_is(monkeypatch):
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 -- where it is raised is the point
        with whole():
            signal.raise_signal(signal.SIGINT)
            done.append("written")
        done.append("never")
    assert done == ["written"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt), whole():  # noqa: PT012 -- where it is raised is the point
        signal.raise_signal(signal.SIGINT)
        done.append("waiting")
        signal.raise_signal(signal.SIGINT)
        done.append("never")
    assert done == ["waiting"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_ends_tuning_with_an_error_and_the_study_goes_on(tmp_path):
    class Full(Device):
        """The disk is full from the fourth run on."""

        def __call__(self, config, workload):
            if len(self.runs) == 3:
                size = (tmp_path / "trials.journal").stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, bounds[1]))
            return super().__call__(config, workload)

    bounds = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(StorageError, match="the study was not kept"):
            tune(Full(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
    assert tune(Device(), tmp_path).kept == 3


# ---- what a study has kept


def test_a_study_says_what_was_found_though_its_tuner_is_gone(tmp_path):
    found = tune(Device(), tmp_path, trials=5)
    assert stored(found.storage, found.study) == found.model_copy(update={"kept": 5})
    more = tune(Device({2: "interrupt"}), tmp_path, trials=9)
    again = stored(more.storage, more.study)
    assert again.trials[:5] == found.trials[:5]
    assert {trial.config for trial in again.trials} == {trial.config for trial in more.trials}
    assert again.best.seconds == min(trial.seconds for trial in again.trials)


def test_a_study_that_is_not_there_is_refused_and_no_file_is_made(tmp_path):
    missing = tmp_path / "no.db"
    for url in (str(missing), f"sqlite:///{missing}"):
        with pytest.raises(ConfigError, match="there is no such file"):
            stored(url, "tune")
    assert not missing.exists()
    with pytest.raises(ConfigError, match="cannot be used"):
        stored("nonsense://x", "tune")
    found = tune(Device(), tmp_path, trials=2)
    with pytest.raises(ConfigError, match=r"no study is called 'other' in .*; it has 'tune-"):
        stored(found.storage, "other")


def test_a_study_without_a_measurement_is_refused(tmp_path):
    storage = str(tmp_path / "s.journal")
    planner.recommend("8GB", 4096, trials=1, space=SPACE, storage=storage, study="mine")
    with pytest.raises(ConfigError, match="no measured config"):
        stored(storage, "mine")


def test_what_was_found_says_what_repeats_it_and_what_it_takes(tmp_path):
    found = tune(Device(), tmp_path, trials=3, layers=None, reserve="100MB")
    assert found.command == (
        "planner tune --vram 500MB --seq 4K --trials 3 --heads 2 --dtype float32 --reserve 100MB --layers 0 "
        "--block-size 64,128 --branches 1,2"
    )
    assert (found.budget, found.reserve) == (500 * 10**6, 100 * 10**6)
    assert found.memory.config == found.config
    assert found.memory.upper == found.best.upper
    assert found.quality.mass >= 0.8
