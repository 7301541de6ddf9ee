"""Studies of which no case ran, or one alone: a sentence that is true, and no half of an answer."""

from __future__ import annotations

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

from attention.config import AttentionConfig
from attention.errors import AttentionPlannerError, OutOfMemoryError
from attention.ops import flex
from planner.answers.recommendation import Quality
from planner.answers.tuned import Trial, Tuned
from planner.cli.main import app
from planner.measuring.measure import Environment, Measurement
from planner.memory.estimate import estimate
from planner.question.space import Space
from planner.search.relax import NothingFitsError
from planner.workload import Workload
from studies import (
    fits,
    floors,
    max_sequence,
    memory_pool,
    million_tokens,
    min_mass,
    pareto,
    practical_limits,
    ring_measured,
    search,
    tuning,
)
from studies.bench import catalogue, memory_model, records, study

CPU = torch.device("cpu")
HERE = Environment(python="3.11", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")
DENSE = AttentionConfig(variant="dense")
WHY = {"oom": "memory ran out", "crash": "ended by signal 9", "timeout": "ran longer than 600 s"}
STUDY = study.study
"""The real one, of which tests put others in its place."""
ENDS = [(name, list(WHY)[number % len(WHY)]) for number, name in enumerate(catalogue.QUESTIONS)]
"""Each study and a way for its cases to end; the slow tests have all ways."""


class NothingFits(NothingFitsError):
    def __init__(self) -> None:
        self.relaxations = ("--vram 9GB",)
        AttentionPlannerError.__init__(self, "none of 7 candidates passes")


class World:
    """What studies ask of a machine, where the cases of the numbers in `good` run and the others end as
    `kind`."""

    def __init__(self, kind: str, good: tuple[int, ...] = ()) -> None:
        self.kind, self.good, self.count = kind, good, 0

    def runs(self) -> bool:
        self.count += 1
        return self.count - 1 in self.good

    def measure(self, config: AttentionConfig, workload: Workload, *_: Any, **__: Any) -> Measurement:
        how: dict[str, Any] = {"kind": self.kind, "message": WHY[self.kind]}
        if self.runs():
            found = estimate(config, workload, "cpu")
            how = {
                "kind": "ok",
                "allocated": found.allocated,
                "allocated_warm": found.allocated,
                "seconds": 0.2,
                "spread": 0.1,
                "reference": 0.05,
            }
        return Measurement(config=config, workload=workload, device="cpu", runs=1, environment=HERE, **how)

    def step(self, run: Any) -> records.Row:
        """A step of a study that measures in its own process."""
        if self.runs():
            return run()
        raise {
            "oom": OutOfMemoryError(WHY["oom"], requested=1, available=0),
            "crash": RuntimeError(WHY["crash"]),
            "timeout": AttentionPlannerError(WHY["timeout"]),
        }[self.kind]

    def answer(self, found: Any, **asked: Any) -> Any:
        """What is recommended, if anything fits."""
        if self.runs():
            return found(**asked) if callable(found) else found
        raise NothingFits

    def process(self, *_: Any, **__: Any) -> Any:
        """A process that prints a row of a million tokens."""
        row = (
            '{"part": "measured", "attention": "x", "outcome": "ok", "seq": 1024, "short": 128, "heads": 1, '
        )
        row += '"floor": 4000, "resident": 9000, "before": 1, "seconds": 1.0, "per_token_ratio": 1.5}'
        ran = self.runs()
        return SimpleNamespace(returncode=not ran, stdout=row, stderr=WHY[self.kind])


RANK = {"sent": 64, "traffic": 64, "peak": 10_000_000, "out": 1e-16, "gradients": 1e-15}
"""What a rank found."""
FEW = Space(block_sizes=(64, 128), ratios=(0.01, 0.1), branches=(1, 2), workspaces=(1 << 20,))


def asked_quickly(answered: Any, **asked: Any) -> Any:
    return answered(**asked | {"trials": 0, "space": FEW})


def recommended() -> Any:
    workload = Workload(seq=64)
    pick = SimpleNamespace(role="widest", config=DENSE, seconds=2.0, mass=1.0)
    return SimpleNamespace(
        config=DENSE,
        workload=workload,
        memory=SimpleNamespace(upper=10**6),
        seconds=1.0,
        quality=SimpleNamespace(mass=1.0),
        alternatives=[pick],
    )


def tuned(**_: Any) -> Tuned:
    workload = Workload(seq=512)
    trial = Trial(number=0, config=DENSE, kind="ok", seconds=0.3, predicted=0.2, upper=2, allocated=1)
    return Tuned(
        config=DENSE,
        workload=workload,
        on="cpu",
        best=trial,
        analytic=trial,
        trials=(trial,),
        kept=0,
        storage="x",
        study="x",
        versions={},
        calibration="none",
        seed=0,
        command="",
        budget=1,
        reserve=0,
        memory=estimate(DENSE, workload),
        quality=Quality(profile="balanced", mass=1.0, layers=1),
    )


def longest(config: AttentionConfig, workload: Workload, budget: int, *_: Any) -> Any:
    fits = SimpleNamespace(workload=workload.model_copy(update={"seq": budget // 10**6}), upper=budget - 1)
    return SimpleNamespace(fits=fits, beyond=SimpleNamespace(upper=budget + 1))


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a world the one that studies run in."""
    answered = search.answered

    def entered(name: str, world: World, render: bool = False) -> None:
        found = STUDY(name)
        monkeypatch.setattr(study.Scope, "batch", lambda self, **_: world)
        monkeypatch.setattr(max_sequence, "measure", world.measure)
        monkeypatch.setattr(million_tokens, "subprocess", SimpleNamespace(run=world.process))
        monkeypatch.setattr(fits, "recommend", lambda **_: recommended())
        monkeypatch.setattr(practical_limits, "recommend", partial(world.answer, recommended()))
        monkeypatch.setattr(
            min_mass,
            "answered",
            lambda *_, **asked: world.answer(SimpleNamespace(answer=SimpleNamespace(seconds=1.0))),
        )
        monkeypatch.setattr(search, "answered", partial(world.answer, partial(asked_quickly, answered)))
        monkeypatch.setattr(search, "refine", lambda *_, **__: SimpleNamespace(best=None))
        monkeypatch.setattr(max_sequence, "longest", longest)
        monkeypatch.setattr(floors, "QUICK", 256)
        monkeypatch.setattr(memory_pool, "QUICK", (128, 256))
        monkeypatch.setattr(memory_model, "PEERS", {"this project": memory_model.ours})
        monkeypatch.setattr(pareto, "answered", partial(asked_quickly, answered))
        monkeypatch.setattr(pareto, "QUESTIONS", {"small": {"vram": "2GB", "seq": 8192}})
        monkeypatch.setattr(tuning, "tune", tuned)
        monkeypatch.setattr(ring_measured, "run_on_ranks", lambda world, *_, **__: [RANK] * world)
        # In the place of FlexAttention dense attention, because to compile it takes seconds.
        plain = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(flex, "compiled", lambda: lambda q, k, v, block_mask: plain(q, k, v))
        if found.independent:
            found = found._replace(
                steps=lambda scope: [
                    (label, partial(world.step, run)) for label, run in STUDY(name).steps(scope)
                ]
            )
        monkeypatch.setattr(study, "study", lambda _: found)
        if not render:  # drawn, but not made a file, which takes longest
            drawn = lambda paths, draw, what: draw(Figure(layout="constrained"))  # noqa: E731
            monkeypatch.setattr(study, "written", drawn)

    return entered


def run(name: str, out: Any) -> study.StudyRun:
    return study.run(name, device=CPU, quick=True, out=out)


@pytest.mark.parametrize("name, kind", ENDS)
def test_a_study_of_which_nothing_ran_says_so_and_why_and_leaves_nothing(enter, tmp_path, name, kind):
    nothing_runs(enter, tmp_path, name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHY)
@pytest.mark.parametrize("name", catalogue.QUESTIONS)
def test_however_cases_end_a_study_of_which_nothing_ran_says_so(enter, tmp_path, name, kind):
    nothing_runs(enter, tmp_path, name, kind)


def nothing_runs(enter, tmp_path, name, kind):
    enter(name, World(kind))
    with pytest.raises(records.NothingRanError) as said:
        run(name, tmp_path)
    text = str(said.value)
    assert text.startswith(f"study {name}-quick: nothing ran, so that there is nothing to say")
    assert WHY[kind] in text or "none of 7 candidates" in text or "nothing fits" in text
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", catalogue.QUESTIONS)
def test_a_study_of_which_one_case_ran_says_what_it_has(enter, tmp_path, name):
    # Levels of one price are one case.
    enter(name, World("oom", tuple(range(9)) if name == "min-mass" else (0,)))
    answer = run(name, tmp_path)
    assert all(sentence.endswith((".", "?")) for sentence in answer.findings)
    assert "nan" not in " ".join(answer.findings).split()
    assert records.load(f"{name}-quick", tmp_path)[0]["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("name", catalogue.QUESTIONS)
def test_a_study_of_which_any_few_cases_ran_is_drawn_and_said(enter, tmp_path, name):
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    for number in range(3):
        good = tuple(rng.sample(range(30), rng.choice((1, 2, 5))))
        enter(name, World(rng.choice(list(WHY)), good), render=True)
        try:
            answer = run(name, tmp_path / str(number))
        except records.NothingRanError:
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}, cases {good}") from error
        assert all(path.stat().st_size for path in answer.files), f"seed {seed}, cases {good}"


def test_what_was_there_stays_where_nothing_runs_the_next_time(enter, tmp_path):
    enter("fits", World("oom", tuple(range(6))))
    before = {path: path.read_bytes() for path in run("fits", tmp_path).files if path.exists()}
    records.settle(next(tmp_path.glob("*.json")))
    enter("fits", World("oom"))
    with pytest.raises(records.NothingRanError, match=r"memory ran out \(6 of 6\)"):
        run("fits", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_study_of_which_nothing_ran_stops_no_other(enter, tmp_path, monkeypatch):
    world = World("timeout")
    enter("fits", world)
    found = {name: study.study(name) for name in ("fits",)} | {"tuning": STUDY("tuning")}
    monkeypatch.setattr(study, "study", found.get)
    done = CliRunner().invoke(app, ["study", "fits", "tuning", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 2, done.output
    [line] = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("planner: error: study fits-quick: nothing ran")
    assert "ran longer than 600 s (6 of 6)" in line
    assert "Does tuning find" in done.stdout
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == {"tuning-quick"}
    assert not list(tmp_path.glob("*.part"))


def test_a_study_that_is_interrupted_says_how_to_go_on(monkeypatch, tmp_path):
    def stopped(name: str, **_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run", stopped)
    done = CliRunner().invoke(app, ["study", "fits", "--quick", "--out", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (130, "")
    said = f"what is done is kept in {tmp_path}, and the same command continues from there"
    assert done.stderr == f"planner: interrupted; {said}\n"


def test_cases_that_gave_no_row_are_named_with_their_reason(enter, tmp_path):
    enter("model-speed", World("crash", (0, 1)))
    answer = run("model-speed", tmp_path)
    assert set(answer.failed.values()) == {"RuntimeError: ended by signal 9"}
    assert len(answer.failed) == 4
    [data] = records.load("model-speed-quick", tmp_path)
    assert data["failed"] == answer.failed
    assert len(data["rows"]) == 2
    page = next(tmp_path.glob("*.md")).read_text()
    assert page.count("Did not run: ") == 4
