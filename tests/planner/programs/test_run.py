"""What the reports of a program's processes come to, and what is refused before anything runs."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from attention.errors import ConfigError, UnavailableError
from planner.answers.dry_run import DryRun
from planner.programs import run
from planner.report.text.dry_run import dry_run_text
from planner.standin import install
from planner.standin.interpreter import Interpreter

GIB = 1 << 30
HELD = [{"where": "train.py:9 forward > torch/nn/modules/linear.py forward", "bytes": GIB, "tensors": 3}]


def report(**changes: Any) -> dict[str, Any]:
    device = {
        "device": 0,
        "peak": 3 * GIB + GIB // 2,
        "allocated": 2 * GIB,
        "reserved": 3 * GIB,
        "retries": 0,
    }
    return {
        "devices": [{**device, "holders": HELD}],
        "began": 0.0,
        "seconds": 1.0,
        "stepped": 1,
        "steps": [{"number": 1, "seconds": 1.0, "allocated": GIB, "reserved": 2 * GIB, "retries": 0}],
        "out_of_memory": [],
        "error": "",
        "values_read": [],
        "values_read_in_all": 0,
        "notes": {},
        "unknown": [],
        **changes,
    }


def failure(**changes: Any) -> dict[str, Any]:
    return {
        "device": 0, "requested": GIB, "total": 8 * GIB, "free": GIB // 4, "allocated": GIB, "reserved": GIB,
        "where": "train.py:9 forward", "holders": HELD, "step": 1, **changes,
    }  # a row of a table  # fmt: skip


def answer(*reports: dict[str, Any], code: int = 0, lost: int = 0, loaded: bool = True) -> DryRun:
    return run.answer(
        reports,
        command=("python", "train.py"),
        gpu="rtx4060",
        torch="2.13.0+cu130",
        allocator="",
        code=code,
        lost=lost,
        loaded=loaded,
        total=8 * GIB,
        snapshot=None,
        seconds=2.0,
    )


def test_a_run_that_fits_says_what_it_took_and_what_is_left():
    found = answer(report())
    assert (found.allocated, found.reserved, found.device) == (2 * GIB, 3 * GIB, 3.5 * GIB)
    assert (found.left, found.exit_code, found.out_of_memory) == (4.5 * GIB, 0, None)
    text = dry_run_text(found)
    assert "It fits." in text
    assert "train.py:9 forward > torch/nn/modules/linear.py forward" in text.replace("\n  ", " ")
    assert max(map(len, text.splitlines())) <= 80
    assert DryRun.from_json(found.to_json()) == found


def test_an_error_of_memory_that_nothing_caught_is_exit_code_3():
    found = answer(report(out_of_memory=[failure()], notes={"uncaught": True}), code=1)
    assert found.exit_code == 3
    assert not found.out_of_memory.caught
    assert found.out_of_memory.short == GIB - GIB // 4
    assert found.largest[0].where == HELD[0]["where"]
    text = dry_run_text(found).replace("\n  ", " ")
    assert "Out of memory after 1 optimizer step: 1.07 GB were asked for and 268.44 MB left" in text


def test_an_error_of_memory_that_was_caught_leaves_the_programs_own_code():
    found = answer(report(out_of_memory=[failure(), failure(requested=GIB // 2)]), code=7)
    assert found.exit_code == 7
    assert found.out_of_memory.caught
    assert found.out_of_memory.requested == GIB // 2
    assert "The program caught it and ended with exit code 7." in dry_run_text(found).replace("\n  ", " ")


def test_a_program_that_used_no_card_says_so():
    found = answer(code=1)
    assert not found.used
    assert "It used no card, and ended with exit code 1." in dry_run_text(found)


def test_of_several_cards_the_fullest_counts_and_each_is_shown():
    second = report()
    second["devices"] = [{**second["devices"][0], "device": 1, "reserved": 4 * GIB, "peak": 5 * GIB}]
    found = answer(report(), second)
    assert [use.gpu for use in found.gpus] == [0, 1]
    assert found.reserved == 4 * GIB
    assert "gpu 1" in dry_run_text(found)


def test_processes_that_share_a_card_add_up_and_it_is_said():
    shared = answer(report(), report())
    assert shared.device == 7 * GIB
    assert any("2 processes used gpu 0 at the same time" in warning for warning in shared.warnings)


def test_processes_one_after_the_other_do_not_add_up():
    assert answer(report(), report(began=2.0)).device == 3.5 * GIB


def test_processes_that_need_more_than_the_card_together_do_not_fit():
    together = answer(report(), report(), report())
    assert together.exit_code == 3
    assert "It does not fit: the card has 2.68 GB too little." in dry_run_text(together)


def test_a_process_that_could_not_say_what_it_took_is_said():
    killed = answer(code=137, lost=1)
    assert killed.used
    assert any("ended before they could say" in warning for warning in killed.warnings)


def test_a_stand_in_that_was_kept_out_is_said():
    assert "python -I, -E and -S" in dry_run_text(answer(loaded=False)).replace("\n  ", " ")


def test_what_may_mislead_is_said():
    read = report(
        values_read=[["train.py:12 item", 3]], values_read_in_all=3, notes={"scaler": True, "ring": True}
    )
    warnings = answer(report(), read).warnings  # whichever process read them
    assert "train.py:12 item (3 times)" in warnings[0]
    assert any("GradScaler" in warning for warning in warnings)
    assert any("more tensors were made" in warning for warning in warnings)


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"gpu": "voodoo2"}, "voodoo2"),
        ({"gpu": "rtx4090", "vram": "much"}, "vram 'much' is not understood"),
        ({"gpu": "rtx4090", "gpus": 0}, "gpus must be 1 to 16"),
        ({"gpu": "rtx4090", "steps": 0}, "steps must be at least 1"),
        ({"gpu": "rtx4090", "allocator": "roundup:1"}, "roundup"),
        ({"gpu": "rtx4090", "snapshot": "/no/such/folder/s.pickle"}, "there is no folder"),
        ({"gpu": "rtx4090", "command": ["no-such-program"]}, "is no program"),
    ],
)
def test_a_request_that_cannot_be_right_is_refused_at_once(asked, said, monkeypatch):
    monkeypatch.setattr(run, "torch_for", lambda python: (None, None))
    with pytest.raises(ConfigError, match=said):
        run.dry_run(**{"command": [sys.executable, "-c", "0"], **asked})


def test_without_a_cuda_build_it_is_said_what_makes_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    python = Interpreter(
        "/usr/bin/python", "3.11", "cpython-311", "linux", "x86_64", "/t", "2.13.0+cpu", None
    )
    with pytest.raises(UnavailableError, match=r"`planner dry-run --install -- /usr/bin/python` makes one"):
        install.torch_for(python)
