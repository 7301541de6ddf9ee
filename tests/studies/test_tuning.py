"""`planner study tuning`: a row from replayed runs, the table, the picture and the sentences."""

import pytest
import torch
from matplotlib.figure import Figure

from attention import AttentionConfig
from planner import Workload
from planner.answers.recommendation import Quality
from planner.answers.tuned import Trial, Tuned
from planner.memory.estimate import estimate
from studies import tuning
from studies.bench.study import Scope

CONFIGS = [
    AttentionConfig(variant="dense"),
    AttentionConfig(variant="dilated", segment_lengths=(64,), dilation_rates=(1,)),
    AttentionConfig(variant="dilated", segment_lengths=(128,), dilation_rates=(1,)),
]


def trial(number, seconds, kind="ok"):
    return Trial(
        number=number,
        config=CONFIGS[number],
        kind=kind,
        seconds=seconds,
        predicted=0.2,
        upper=2,
        allocated=1,
        message=None if kind == "ok" else "no",
    )


def tuned(pick, *others):
    trials = (pick, *others)
    best = min((one for one in trials if one.good), key=lambda one: one.seconds)
    workload = Workload(seq=512)
    return Tuned(
        config=best.config,
        workload=workload,
        on="cpu",
        best=best,
        analytic=pick,
        trials=trials,
        kept=0,
        storage="x",
        study="x",
        versions={},
        calibration="none",
        seed=0,
        command="",
        budget=1,
        reserve=0,
        memory=estimate(best.config, workload),
        quality=Quality(profile="balanced", mass=1.0, layers=1),
    )


def row_of(monkeypatch, found):
    monkeypatch.setattr(tuning, "tune", lambda **asked: found)
    return tuning.scenario_row({"vram": "1MB", "seq": 512}, 3)


@pytest.fixture
def rows(monkeypatch):
    faster = tuned(trial(0, 0.3), trial(1, 0.2), trial(2, None, "oom"))
    return [
        row_of(monkeypatch, faster),
        row_of(monkeypatch, tuned(trial(0, 0.3), trial(1, 0.6))),
        row_of(monkeypatch, tuned(trial(0, None, "oom"), trial(1, 0.6))),
    ]


def test_a_row_has_the_picks_rank_and_what_did_not_run(rows):
    assert [row["rank"] for row in rows] == [2, 1, None]
    assert [row["speedup"] for row in rows] == [pytest.approx(1.5), 1.0, None]
    assert [row["ran"] for row in rows] == [2, 2, 1]
    assert [row["failed"] for row in rows] == [{"oom": 1}, {}, {"oom": 1}]
    assert [one["attention"] for one in rows[0]["trials"]] == ["dense", "dilated", "dilated"]


def test_trials_are_kept_in_a_folder_that_goes_away(monkeypatch):
    seen = []

    def fake(**asked):
        seen.append(tuning.Path(asked["storage"]).parent)
        assert seen[-1].is_dir()
        return tuned(trial(0, 0.3))

    monkeypatch.setattr(tuning, "tune", fake)
    tuning.scenario_row(tuning.QUICK, 1)
    assert not seen[0].exists()


def test_a_tuning_that_was_interrupted_is_no_row(monkeypatch):
    found = tuned(trial(0, 0.3)).model_copy(update={"interrupted": True})
    with pytest.raises(KeyboardInterrupt):
        row_of(monkeypatch, found)


def test_a_quick_run_is_one_question():
    quick, whole = (tuning.steps(Scope(torch.device("cpu"), quick)) for quick in (True, False))
    assert (len(quick), len(whole)) == (1, 5)
    assert quick[0][1].args == (tuning.QUICK, 4)


def test_questions_differ_in_length_dtype_heads_mode_and_causality():
    for name, least in (("seq", 4), ("dtype", 3), ("heads", 3)):
        assert len({asked[name] for asked in tuning.SCENARIOS}) >= least
    assert {asked.get("mode") for asked in tuning.SCENARIOS} == {None, "training"}
    assert {asked.get("causal") for asked in tuning.SCENARIOS} == {None, True}


def test_the_table_has_times_and_what_did_not_run(rows):
    table = tuning.tuning_table(rows)
    assert "| dense | 300 ms | 200 ms | dilated | 200 ms | 1.50 | 2 | 2 | 1 oom |" in table
    assert "| dense | oom | 200 ms | dilated | 600 ms |  |  | 1 | 1 oom |" in table


def test_the_picture_has_every_trials_speed(rows):
    assert tuning.speeds(rows[1]) == [("dense", 1.0), ("dilated", pytest.approx(0.5))]
    figure = Figure(figsize=(8, 5), layout="constrained")
    tuning.draw(figure, rows)
    [axes] = figure.axes
    assert "speed against the models' pick" in axes.get_xlabel()
    assert axes.get_yticklabels()[0].get_text() == "512 tokens, 8 heads x 64\nfloat16, inference"
    texts = [text.get_text() for text in axes.texts]
    assert "best 1.50 x the pick's speed\npick is no. 2 of 2\n1 did not run" in texts
    assert "the pick did not run\n1 did not run" in texts


def test_the_sentences_have_the_rows_figures(rows):
    found = tuning.findings(rows).answer
    assert "something faster in 1 of 3 questions, by a factor of 1.50" in found
    assert "of 2 of what ran, did not run in 1 of 3 questions, and 2 of 7 trials did not run" in found
    assert "nothing faster" in tuning.findings(rows[1:2]).answer
