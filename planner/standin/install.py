"""A CUDA build of torch beside a Python that has another: made once, in a folder of its own, with pip.
Imports no torch.

The folder holds torch and what only its CUDA build needs; put before the Python's own packages on its path,
it takes their torch's place, and all other packages stay the user's own. Nothing is written into their
environment, and NVIDIA's libraries are not loaded: the stand-in takes their place.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from attention.errors import UnavailableError
from planner.files import cache_folder
from planner.standin.interpreter import Interpreter
from planner.standin.torch_build import TorchBuild, check_platform, check_version, find
from planner.units import format_bytes

INDEX: Final = "https://pypi.org/simple"
UNPACKED: Final = 2.5
"""Bytes on disk, torch and triton, in those of their wheels (measured: 2.1 GB of 812 MB)."""
USUAL: Final = {"torch": 526_600_000, "triton": 285_800_000}
"""Bytes of the wheels of torch 2.13.0 and of its triton."""
PATIENCE: Final = 10.0
"""Seconds that the index gets to say how large a wheel is."""
_NEEDS: Final = re.compile(r"^Requires-Dist: (triton) *\(?==([\w.]+)", re.M)

Tell = Callable[[str], None]


def private_folder(python: Interpreter) -> Path:
    """Where the CUDA build for a Python is, or would be."""
    return cache_folder() / "torch" / f"{release(python)}-{python.tag}"


def release(python: Interpreter) -> str:
    """The release of its torch, without what says how it was built: 2.13.0 for 2.13.0+cpu."""
    if python.torch is None:
        raise UnavailableError(
            f"{python.path} has no torch; install it there (any build), so that it is known which to run"
        )
    return python.torch.partition("+")[0]


def install(python: Interpreter, say: Tell, *, index: str = INDEX) -> Path:
    """The folder with the CUDA build for a Python, made if it is not there.

    It is made under another name and renamed when whole, so that an interruption leaves nothing half-made.
    UnavailableError without pip or a wheel, or where it cannot be written.
    """
    check_platform(python.system, python.machine)
    folder = private_folder(python)
    check_version(release(python))
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder, say), tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as made:
            if folder.is_dir():  # another has made it meanwhile
                return folder
            _fill(Path(made), python, index, say)
            (Path(made) / "site").rename(folder)
    except OSError as error:
        raise UnavailableError(
            f"{folder} cannot be made: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder that can be written, with 3 GB free"
        ) from None
    return folder


@contextlib.contextmanager
def _alone(folder: Path, say: Tell) -> Iterator[None]:
    """One at a time makes a folder; the lock goes with the process that has it."""
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another installation of {folder.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fill(made: Path, python: Interpreter, index: str, say: Tell) -> None:
    site, wanted = made / "site", f"torch=={release(python)}"
    say(f"{wanted}, CUDA build for Python {python.python}: {_size('torch', release(python), python, index)}")
    _pip(python, [wanted], site, index)
    for name, version in _NEEDS.findall(_metadata(site)):
        say(f"{name}=={version}: {_size(name, version, python, index)}")
        _pip(python, [f"{name}=={version}"], site, index)
    text = (site / "torch" / "version.py").read_text(encoding="utf-8")
    if not re.search(r"^cuda\b.*= *'", text, re.M):
        raise UnavailableError(
            f"{index} has no CUDA build of {wanted} for Python {python.python}; name an index that has one "
            "with --index, as https://download.pytorch.org/whl/cu126"
        )


def _metadata(site: Path) -> str:
    return next(site.glob("torch-*.dist-info/METADATA")).read_text(encoding="utf-8")


def _pip(python: Interpreter, packages: list[str], site: Path, index: str) -> None:
    """Installs wheels alone, without what they need, into a folder."""
    at = f"--target={site}", "--no-deps", "--only-binary=:all:", "--no-compile", f"--index-url={index}"
    quiet = (
        "--isolated",
        "--disable-pip-version-check",
        "--no-input",
        "--progress-bar=on",
        "--no-warn-conflicts",
    )
    if importlib.util.find_spec("pip") is None:
        raise UnavailableError(f"{sys.executable} has no pip to install with; python -m ensurepip makes one")
    for_it = f"--python-version={python.python}", "--implementation=cp", *_platforms()
    run = subprocess.run(
        [sys.executable, "-m", "pip", "install", *quiet, *at, *for_it, *packages],
        stdout=sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or [run.stderr.strip()]
        raise UnavailableError(f"pip could not install {packages[0]} from {index}: {lines[-1][:500]}")


def _platforms() -> list[str]:
    """Kinds of wheels that a current Linux takes, newest first."""
    return [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + [
        "--platform=manylinux2014_x86_64",
        "--platform=linux_x86_64",
    ]


def _size(name: str, version: str, python: Interpreter, index: str) -> str:
    """How much is to be downloaded: as the index tells, or else as it was with torch 2.13.0."""
    tag, kind = "cp" + python.python.replace(".", ""), "application/vnd.pypi.simple.v1+json"
    request = urllib.request.Request(f"{index}/{name}/", headers={"Accept": kind})
    sizes: list[int] = []
    with (
        contextlib.suppress(OSError, ValueError, KeyError),
        urllib.request.urlopen(request, timeout=PATIENCE) as answer,
    ):
        files: list[dict[str, Any]] = json.load(answer)["files"]
        names = f"{name}-{version}-{tag}-", "x86_64.whl"
        sizes = [
            one["size"]
            for one in files
            if one["filename"].startswith(names[0]) and one["filename"].endswith(names[1]) and "size" in one
        ]
    exact = f"{format_bytes(min(sizes))}" if sizes else f"about {format_bytes(USUAL.get(name, 0))}"
    size = min(sizes) if sizes else USUAL.get(name, 0)
    return f"{exact} to download, about {format_bytes(int(UNPACKED * size))} on disk"


def torch_for(python: Interpreter) -> tuple[TorchBuild, str | None]:
    """(the CUDA build that a Python runs with, the folder that goes before its own packages): its own if it
    has one, else the private one. UnavailableError where neither is there."""
    if python.cuda is not None:
        return find(python.path), None
    folder = private_folder(python)
    if not folder.is_dir():
        raise UnavailableError(
            f"the torch of {python.path} is {python.torch}, no CUDA build; `planner dry-run --install -- "
            f"{python.path}` makes one of {release(python)} beside it and leaves that Python as it is"
        )
    return find(python.path, folder), str(folder)
