"""The Python that runs a command, and the torch it has, found without importing that."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from attention.errors import ConfigError, UnavailableError

_ASK: Final = """
import importlib.util, json, platform, re, sys
spec = importlib.util.find_spec("torch")
folder = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
text = open(folder + "/version.py").read() if folder else ""
found = dict(re.findall(r"^(__version__|cuda)\\b[^=\\n]*= *'([^']*)'", text, re.M))
print(json.dumps({
    "python": ".".join(map(str, sys.version_info[:2])), "tag": sys.implementation.cache_tag,
    "system": sys.platform, "machine": platform.machine(), "folder": folder,
    "torch": found.get("__version__"), "cuda": found.get("cuda"),
}))
"""
_PYTHON: Final = re.compile(r"python[\d.]*t?")
PATIENCE: Final = 60.0
"""Seconds that a Python gets to say what it has."""


class Interpreter(NamedTuple):
    """A Python, and the torch that it would import."""

    path: str
    python: str
    """Its version, as 3.11."""
    tag: str
    """Of its compiled files, as cpython-311."""
    system: str
    machine: str
    folder: str | None
    """Of its torch."""
    torch: str | None
    """The torch's version, as 2.13.0+cpu; None without one."""
    cuda: str | None
    """The CUDA its torch was built for; None for other builds."""


def program_of(command: Sequence[str]) -> str:
    """The file that a command starts; ConfigError where there is none."""
    if not command:
        raise ConfigError("no command to run; write it after --, e.g. -- python train.py")
    path = shutil.which(command[0])
    if path is None:
        raise ConfigError(f"{command[0]!r} is no program here; write the command after --, as in a shell")
    return path


def python_of(command: Sequence[str]) -> str:
    """The Python that a command runs: itself, or what its first line names, or else the first on PATH."""
    path = program_of(command)
    with open(path, "rb") as file:
        first = file.readline(4096)
    if _PYTHON.fullmatch(Path(path).name) and not first.startswith(b"#!"):
        return path
    words = first[2:].decode(errors="replace").split() if first.startswith(b"#!") else []
    if words and Path(words[0]).name == "env":
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    if words and _PYTHON.fullmatch(Path(words[0]).name):
        named = shutil.which(words[0])
        if named:
            return named
    python = shutil.which("python3") or shutil.which("python")
    if python is None:
        raise ConfigError(f"{command[0]} starts no Python that is found, and there is none on PATH")
    return python


def interpreter(path: str, environment: dict[str, str] | None = None) -> Interpreter:
    """What a Python says of itself."""
    try:
        run = subprocess.run(
            [path, "-c", _ASK],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            stdin=subprocess.DEVNULL,
            env=os.environ | (environment or {}),
        )
        told = json.loads(run.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        raise UnavailableError(
            f"{path} does not say which torch it has; is it a Python of 3.9 or later?"
        ) from None
    return Interpreter(path, **told)
