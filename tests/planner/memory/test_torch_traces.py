"""The replay against what torch's own allocator did with the same events: a recorded sample.

Recorded with torch 2.13.0+cu130 by `tests/planner/standin/test_traces.py`, which compares many more.
"""

import json
from pathlib import Path

import pytest
from allocator_traces import SETTINGS, questions, replayed

RECORDED = json.loads(Path(__file__).with_name("torch_traces.json").read_text(encoding="utf-8"))


def test_every_setting_is_recorded_and_some_run_out():
    assert set(RECORDED["outcomes"]) == set(SETTINGS)
    for name, (_, limit) in SETTINGS.items():
        ran_out = [outcome[4] is not None for outcome in RECORDED["outcomes"][name]]
        assert any(ran_out) == (limit is not None), name
        assert not all(ran_out), name


@pytest.mark.parametrize("setting", SETTINGS)
def test_replay_is_as_torch_was(setting):
    recorded = RECORDED["outcomes"][setting]
    asked = questions(setting, len(recorded), RECORDED["seed"])
    assert [outcome for question in asked for outcome in replayed(question)] == recorded
