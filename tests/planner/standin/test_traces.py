"""This project's replay equals torch's own allocator: 1,000 random traces in each setting.

`python tests/planner/standin/test_traces.py` records the sample that the fast tests replay.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from allocator_traces import SETTINGS, Question, questions, replayed

from planner.standin.zygote import Zygote

pytestmark = [pytest.mark.slow, pytest.mark.dry]

RECORDED = Path(__file__).parents[1] / "memory" / "torch_traces.json"
COUNT = int(os.environ.get("PLANNER_DRY_TRACES", "1000"))


def torchs(zygote: Zygote, question: Question) -> list[list[int | None]]:
    """Of each trace, what torch does with it."""
    end = zygote.run(
        "dry_traces",
        "run",
        {"traces": question.traces, "fraction": question.fraction},
        vram=question.card,
        held=0,
        variables={"PYTORCH_ALLOC_CONF": question.conf} if question.conf else {},
    )
    assert end.kind == "ok", end.value
    return end.value


@pytest.mark.parametrize("setting", SETTINGS)
def test_replay_equals_torch(setting, dry, seed):
    for question in questions(setting, COUNT, seed):
        assert replayed(question) == torchs(dry, question)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_recorded_sample_is_what_torch_does(setting, dry):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    asked = questions(setting, len(recorded["outcomes"][setting]), recorded["seed"])
    found = [outcome for question in asked for outcome in torchs(dry, question)]
    assert found == recorded["outcomes"][setting]


def main(python: str, seed: int = 1, count: int = 40) -> None:
    """Records what torch does with `count` traces in each setting."""
    from planner.gpus import find as find_gpu
    from planner.standin.torch_build import find

    build = find(python)
    with Zygote(find_gpu("rtx4090"), torch=build, path=[Path(__file__).parent]) as zygote:
        outcomes = {
            setting: [row for question in questions(setting, count, seed) for row in torchs(zygote, question)]
            for setting in SETTINGS
        }
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(rows)}" for name, rows in outcomes.items())
    RECORDED.write_text(
        f'{{\n  "torch": "{build.version}", "seed": {seed},\n  "outcomes": {{\n{lines}\n  }}\n}}\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(sys.argv[1])
