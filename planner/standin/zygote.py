"""One process that has imported torch and forks a child for each task, each on a card of its own.

A task names a function by module and name, its arguments as JSON, and the card. The child calls it and
answers with what it returns, which has to be JSON; what the card came to is beside it. Whatever happens to a
child is a `DryEnd` and leaves the others as they were.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from attention.errors import UnavailableError
from planner.gpus import Gpu
from planner.standin.environment import card_variables, environment
from planner.standin.torch_build import TorchBuild

_ENTRY = (
    "import sys; sys.path[:0] = sys.argv[2:]; "
    "from planner.standin.forked import serve; serve(int(sys.argv[1]))"
)


class DryEnd(NamedTuple):
    """How a task ended."""

    kind: Literal["ok", "oom", "error", "died", "timeout"]
    """`oom` is torch's OutOfMemoryError, `error` any other exception."""
    value: Any
    """What the function returned; its exception as text otherwise."""
    report: dict[str, Any]
    """What the card came to, as the stand-in and torch's allocator have it; empty where no card was used."""


class Zygote:
    """A Python with torch in it, on which functions run dry; a context manager.

    `path` is put before sys.path of the process, so that it finds the
    functions. Not for several threads at once.
    """

    def __init__(self, gpu: Gpu, *, torch: TorchBuild, path: Sequence[Path] = ()) -> None:
        self._gpu = gpu
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        answers, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                [torch.python, "-P", "-c", _ENTRY, str(theirs), *map(str, path), *map(str, _here())],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs,),
                env=environment(gpu, torch=torch),
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        self._answers = os.fdopen(answers, "rb")

    def run(
        self,
        module: str,
        function: str,
        arguments: Mapping[str, Any],
        *,
        gpu: Gpu | None = None,
        vram: int | None = None,
        gpus: int = 1,
        held: int | None = None,
        variables: Mapping[str, str] | None = None,
        timeout: float = 600.0,
    ) -> DryEnd:
        """Calls `module.function(**arguments)` in a new child, on the card given or the process's own.

        `variables` are set in the child's environment before it touches CUDA (`PYTORCH_ALLOC_CONF` for one).
        """
        task = {
            "module": module,
            "function": function,
            "arguments": dict(arguments),
            "timeout": timeout,
            "variables": dict(variables or {})
            | card_variables(gpu or self._gpu, vram=vram, gpus=gpus, held=held),
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise UnavailableError(f"the process of dry runs has ended: {self._said()}")
        kind, value, report = json.loads(line)
        return DryEnd(kind, value, report)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _said(self) -> str:
        self._log.seek(max(self._log.seek(0, os.SEEK_END) - 2000, 0))
        return self._log.read().decode(errors="replace").strip() or "it printed nothing"


def _here() -> list[Path]:
    """What the process has to find of this project: this very checkout."""
    return [Path(__file__).resolve().parents[2]]
