"""A private CUDA build of torch: whole or not there, one at a time, the user's environment untouched."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from attention.errors import UnavailableError
from planner.standin import install
from planner.standin.interpreter import Interpreter

PYTHON = Interpreter("python", "3.11", "cpython-311", "linux", "x86_64", "/torch", "2.13.0+cpu", None)
METADATA = "Name: torch\nRequires-Dist: sympy\nRequires-Dist: triton==3.7.1; platform_system == 'Linux'\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(install, "_size", lambda *_: "1 GB to load")


def pip(calls: list, cuda: str = "'13.0'"):
    """Stands for pip, which would load a gigabyte."""

    def run(python, packages, site, index):
        calls.append((packages, index))
        if packages[0].startswith("torch=="):
            for name, text in (
                ("torch/version.py", f"cuda: str = {cuda}\n"),
                ("torch-2.dist-info/METADATA", METADATA),
            ):
                (site / name).parent.mkdir(parents=True, exist_ok=True)
                (site / name).write_text(text)

    return run


def test_it_is_made_once_of_the_same_release_with_its_triton(monkeypatch, tmp_path):
    calls, said = [], []
    monkeypatch.setattr(install, "_pip", pip(calls))
    folder = install.install(PYTHON, said.append)
    assert folder == install.private_folder(PYTHON) == tmp_path / "attention-planner/torch/2.13.0-cpython-311"
    assert [packages for packages, _ in calls] == [["torch==2.13.0"], ["triton==3.7.1"]]
    assert all("1 GB to load" in line for line in said)
    assert install.install(PYTHON, said.append) == folder
    assert len(calls) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, UnavailableError("no wheel")])
def test_what_ends_in_the_middle_leaves_nothing_half_made(monkeypatch, error, tmp_path):
    def failing(python, packages, site, index):
        (site / "torch").mkdir(parents=True)
        raise error

    monkeypatch.setattr(install, "_pip", failing)
    with pytest.raises((KeyboardInterrupt, UnavailableError)):
        install.install(PYTHON, lambda _: None)
    assert not install.private_folder(PYTHON).exists()
    assert [path.name for path in install.private_folder(PYTHON).parent.iterdir()] == [
        ".2.13.0-cpython-311.lock"
    ]


def test_an_index_without_a_cuda_build_is_said(monkeypatch):
    monkeypatch.setattr(install, "_pip", pip([], cuda="None"))
    with pytest.raises(UnavailableError, match=r"no CUDA build of torch==2\.13\.0"):
        install.install(PYTHON, lambda _: None)
    assert not install.private_folder(PYTHON).exists()


def test_of_two_at_once_one_makes_it_and_one_waits(monkeypatch):
    calls, said, begun = [], [], threading.Event()

    def slow(python, packages, site, index):
        begun.set()
        pip(calls)(python, packages, site, index)
        waited.wait(10)

    waited = threading.Event()

    def say(line):
        said.append(line)
        if "waiting" in line:
            waited.set()

    monkeypatch.setattr(install, "_pip", slow)
    first = threading.Thread(target=install.install, args=(PYTHON, say))
    first.start()
    begun.wait(10)
    folder = install.install(PYTHON, say)
    first.join()
    assert folder.is_dir()
    assert len(calls) == 2
    assert any("waiting for another installation" in line for line in said)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UnavailableError, match="set XDG_CACHE_HOME"):
        install.install(PYTHON, lambda _: None)


def test_a_cache_that_is_a_file_is_said(tmp_path):
    (tmp_path / "attention-planner").write_text("")
    with pytest.raises(UnavailableError, match="set XDG_CACHE_HOME"):
        install.install(PYTHON, lambda _: None)


def test_without_torch_it_is_said_which_python_needs_one():
    with pytest.raises(UnavailableError, match="has no torch"):
        install.install(PYTHON._replace(torch=None), lambda _: None)


def test_what_pip_says_reaches_the_user(monkeypatch, tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found for torch==9.9' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(UnavailableError, match="No matching distribution"):
        install.install(PYTHON, lambda _: None)
