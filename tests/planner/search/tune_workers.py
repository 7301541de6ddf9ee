"""Workers that tune without measuring, at random killed: `tune_workers.py HOW STORAGE SEED ROUNDS`.

`kill`: one worker after the other, each killed at a random moment, and one that ends. `together`: several at
once on each of the rounds' studies, of which one is killed. The exit code is 0 if nothing was lost, nothing
hung and no worker ended in an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import planner
from attention import ConfigError
from planner.answers import tuned
from planner.measuring.measure import Environment, Measurement
from planner.measuring.records import read
from planner.question.space import Space
from planner.search import tune as tuning
from planner.storage.patience import StorageWarning

HERE = Environment(python="3", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")
ASKED = {"vram": "500MB", "seq": 4096, "dtype": "float32", "heads": 2, "space": Space(block_sizes=(64, 128))}
PATIENT = 240.0
"""Seconds that a worker may take."""


def answered(*given, _real=tuning.answered, _known={}, **asked):  # noqa: B006 -- it is to be remembered
    key = repr((given, asked))
    if key not in _known:
        _known[key] = _real(*given, **asked)
    return _known[key]


def measure(config, workload):
    time.sleep(random.Random(config.to_json()).uniform(0, 0.01))
    return Measurement(
        config=config,
        workload=workload,
        device="cpu",
        kind="ok",
        runs=3,
        environment=HERE,
        seconds=random.Random(config.to_json()).uniform(0.1, 1),
        allocated=1 << 20,
    )


def tune(storage, study, trials, records=None):
    return planner.tune(
        **ASKED,
        storage=storage,
        study=study,
        trials=trials,
        measure=measure,
        records=records,
        sampler="random",
    )


def begun(storage, study, trials, folder, name):
    """A worker's process; what it says is in a file of its name."""
    child = os.fork()
    if child:
        return child
    code = 1
    with open(folder / f"{name}.log", "w") as log, contextlib.redirect_stderr(log):
        try:
            found = tune(storage, study, trials, folder / "records")
            (folder / f"{name}.json").write_text(found.to_json())
            code = 0
        except BaseException:  # noqa: BLE001 -- it is what is looked for
            traceback.print_exc()
        log.flush()
    os._exit(code)


def ended(child, folder, name):
    """Waits for a worker that is to end well."""
    deadline = time.monotonic() + PATIENT
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"{name} hangs: {(folder / f'{name}.log').read_text()}")
        time.sleep(0.01)
    said = (folder / f"{name}.log").read_text()
    assert found[1] == 0, f"{name} ended in {found[1]}: {said}"
    assert "Traceback" not in said, said


def kept(storage, study):
    """Configs and seconds of a study that has any."""
    with contextlib.suppress(ConfigError):
        return {trial.config: trial.seconds for trial in tuning.stored(storage, study).trials}
    return {}


def size(folder):
    with contextlib.suppress(FileNotFoundError):
        return (folder / "records").stat().st_size
    return 0


def kill(storage, seed, rounds, folder):
    """Each worker goes on where the last was killed."""
    moment = random.Random(seed)
    before = {}
    for round in range(rounds):
        child = begun(storage, "s", 100_000, folder, f"killed {round}")
        if round % 3:  # else while it begins
            measured, deadline = size(folder), time.monotonic() + PATIENT
            while size(folder) == measured and time.monotonic() < deadline:
                time.sleep(0.005)
        time.sleep(moment.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status == signal.SIGKILL, (folder / f"killed {round}.log").read_text()
        after = kept(storage, "s")
        assert before.items() <= after.items(), f"round {round} lost trials"
        before = after
    measured = {one.config for one in read(folder / "records")}
    # A kill costs the one trial that had just been measured.
    assert len(measured - set(before)) <= rounds, f"{len(measured - set(before))} were lost"
    ended(begun(storage, "s", len(before) + 5, folder, "last"), folder, "last")
    after = kept(storage, "s")
    assert before.items() <= after.items()
    assert len(after) >= len(before) + 5
    return {"trials": len(after), "lost": len(measured - set(before))}


def together(storage, seed, rounds, folder, workers=3, trials=12):
    """All workers end, but for one that is killed, and what each measured is in the study."""
    moment = random.Random(seed)
    total = 0
    for round in range(rounds):
        names = [f"worker {round} {which}" for which in range(workers)]
        children = [begun(storage, f"s{round}", trials, folder, name) for name in names]
        time.sleep(moment.uniform(0.05, 0.5))
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
        for child, name in zip(children[1:], names[1:], strict=True):
            ended(child, folder, name)
        found = tuning.stored(storage, f"s{round}")
        numbers = [trial.number for trial in found.trials]
        assert len(set(numbers)) == len(numbers) >= trials
        there = {trial.config: trial.number for trial in found.trials}
        for name in names[1:]:
            answer = tuned.Tuned.from_json((folder / f"{name}.json").read_text())
            assert {trial.config for trial in answer.trials} <= set(there)
        total += len(numbers)
    return {"trials": total}


def main():
    how, storage, seed, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    warnings.simplefilter("error")
    # A kill may leave half a line, which is set aside; and a lock may be waited for.
    warnings.simplefilter("always", StorageWarning)
    tuning.answered = answered
    with tempfile.TemporaryDirectory() as folder:
        for warm in (f"{folder}/warm.journal", f"sqlite:///{folder}/warm.db"):
            tune(warm, "warm", 1)  # loads everything, once for all workers
        found = {"kill": kill, "together": together}[how](storage, seed, rounds, Path(folder))
    print(json.dumps(found), file=sys.stderr)


if __name__ == "__main__":
    main()
