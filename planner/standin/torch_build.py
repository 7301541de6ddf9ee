"""Another Python's PyTorch: whether it is one that a dry run can use, found without importing it."""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attention.errors import UnavailableError

MADE_FOR: Final = ("2.8", "2.13")
"""The oldest and the newest torch that was tried; those in between are taken, others refused. 2.8.0+cu128 and
2.11.0+cu130 were tried with a few operators and a training step, 2.13.0+cu130 with everything here."""
_ASK = """
import importlib.util, json
spec = importlib.util.find_spec("torch")
print(json.dumps({"torch": spec and spec.origin, "triton": importlib.util.find_spec("triton") is not None}))
"""
_SECONDS: Final = 60
_ARCHES = re.compile(rb"sm_\d+[af]?(?: sm_\d+[af]?)+")


@dataclass(frozen=True, kw_only=True)
class TorchBuild:
    """A CUDA build of torch."""

    python: Path
    """The interpreter that has it."""
    home: Path
    """The folder of the package."""
    version: str
    """As torch has it: `2.13.0+cu130`."""
    cuda: tuple[int, int]
    """The CUDA it was compiled with."""
    arches: tuple[int, ...]
    """Compute capabilities that it has kernels for, ascending: 75, 80, 86."""
    triton: bool
    """Whether Triton is there, which `torch.compile` needs."""

    @property
    def libraries(self) -> tuple[Path, ...]:
        """Its own shared libraries."""
        return tuple(sorted((self.home / "lib").glob("lib*.so*")))


def find(python: str | Path = sys.executable, ahead: Path | None = None) -> TorchBuild:
    """The torch of the interpreter `python`, or of the folder `ahead` of its packages; UnavailableError, with
    the reason, where it cannot run dry."""
    check_platform(sys.platform, platform.machine())
    said = _ask(Path(python), ahead)
    if not said["torch"]:
        raise UnavailableError(f"{python} has no torch; a dry run runs a program with the torch that it has")
    home = Path(str(said["torch"])).parent
    known = _variables(home / "version.py")
    version, cuda = known.get("__version__") or "unknown", known.get("cuda")
    if not cuda or not (home / "lib" / "libtorch_cuda.so").exists():
        raise UnavailableError(
            f"torch {version} of {python} is no CUDA build; a dry run needs one (no GPU, no driver, no "
            "nvidia-* packages): install torch from PyPI or from download.pytorch.org/whl/cu130"
        )
    check_version(version)
    major, minor = cuda.split(".")[:2]
    return TorchBuild(
        python=Path(python),
        home=home,
        version=version,
        cuda=(int(major), int(minor)),
        arches=_arches(home / "lib" / "libtorch_python.so"),
        triton=bool(said["triton"]),
    )


def check_platform(system: str, machine: str) -> None:
    """UnavailableError where a CUDA build of torch cannot be loaded with the stand-in."""
    if (system, machine.lower()) not in (("linux", "x86_64"), ("linux", "amd64")):
        raise UnavailableError(
            f"a dry run needs Linux on x86-64, and this is {system} on {machine}; run it on such a machine, "
            "with or without a GPU"
        )


def check_version(version: str) -> None:
    """UnavailableError for a torch that the stand-in was not made for."""
    number = re.match(r"(\d+)\.(\d+)", version)
    release = tuple(map(int, number.groups())) if number else (0, 0)
    oldest, newest = (tuple(map(int, each.split("."))) for each in MADE_FOR)
    if not oldest <= release <= newest:
        raise UnavailableError(
            f"dry runs were made for torch {MADE_FOR[0]} to {MADE_FOR[1]}, and this is torch {version}; "
            "use one of these"
        )


def _ask(python: Path, ahead: Path | None) -> dict[str, object]:
    variables = os.environ | ({} if ahead is None else {"PYTHONPATH": str(ahead)})
    try:
        done = subprocess.run(
            [python, "-c", _ASK],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
            env=variables,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{python} cannot be run: {error}") from error
    if done.returncode:
        raise UnavailableError(f"{python} is no Python that answers: {done.stderr.strip()[-400:]}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def _variables(path: Path) -> dict[str, str]:
    """The strings that torch's own file of versions assigns; it is read, not run."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return dict(re.findall(r"^(\w+)(?:: [\w\[\]]+)? = '([^']*)'", text, re.MULTILINE))


def _arches(library: Path) -> tuple[int, ...]:
    """The list of architectures that torch carries as text, for `torch.cuda.get_arch_list`."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        found = _ARCHES.search(image)
        if found is None:
            raise UnavailableError(
                f"{library} does not say which cards it has kernels for; use another torch"
            )
        return tuple(sorted({int(re.sub(r"\D", "", each)) for each in found.group().decode().split()}))
