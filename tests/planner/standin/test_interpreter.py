"""Which Python runs a command, and which torch that has."""

from __future__ import annotations

import sys

import pytest
import torch

from attention.errors import ConfigError, UnavailableError
from planner.standin.interpreter import interpreter, python_of


def script(folder, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_python_is_itself():
    assert python_of([sys.executable, "train.py"]) == sys.executable


def test_a_console_script_runs_the_python_of_its_first_line(tmp_path):
    assert python_of([script(tmp_path, "train", f"#!{sys.executable}\nprint()\n")]) == sys.executable


def test_a_first_line_with_env_is_looked_up(tmp_path, monkeypatch):
    python = script(tmp_path, "python3", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert python_of([script(tmp_path, "train", "#!/usr/bin/env -S X=1 python3 -u\n")]) == python


def test_what_names_no_python_runs_the_first_of_the_path(tmp_path, monkeypatch):
    python = script(tmp_path, "python3", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert python_of([script(tmp_path, "train.sh", "#!/bin/bash\npython train.py\n")]) == python


@pytest.mark.parametrize("command, said", [([], "no command to run"), (["no-such-program"], "is no program")])
def test_a_command_that_is_not_there_is_refused(command, said):
    with pytest.raises(ConfigError, match=said):
        python_of(command)


def test_without_any_python_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="starts no Python that is found"):
        python_of([script(tmp_path, "train.sh", "#!/bin/bash\n")])


def test_a_python_says_which_torch_it_has_without_importing_it():
    mine = interpreter(sys.executable)
    assert (mine.torch, mine.cuda) == (torch.__version__, torch.version.cuda)
    assert mine.python == ".".join(map(str, sys.version_info[:2]))


def test_what_is_no_python_is_refused(tmp_path):
    with pytest.raises(UnavailableError, match="does not say which torch it has"):
        interpreter(script(tmp_path, "python3", "#!/bin/sh\necho no\n"))


def test_a_python_without_torch_has_none(tmp_path):
    bare = script(tmp_path, "python3", f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    assert interpreter(bare).torch is None
