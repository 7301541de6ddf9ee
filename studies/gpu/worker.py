"""A process that computes rows on the device, so that whatever a row does to it, the run goes on.

An error of CUDA leaves a process useless, and a kernel that hangs never returns: then the process is ended,
and the next row starts another. Rows are made by functions of plain arguments that give plain data.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

from attention.errors import AttentionPlannerError, OutOfMemoryError

if TYPE_CHECKING:  # which imports torch; the functions asked do
    from studies.bench.records import Row

SHORT: Final = 300
"""Characters of a message."""


class Worker:
    """Asks functions of a process of its own, which starts when it is first asked."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Connection | None = None

    def ask(self, module: str, function: str, **arguments: Any) -> Row:
        """What a function of a module gives, with its `outcome`: that of the row, or else `ok`; `oom`,
        `refused` (by the library), `error` or `crash`, each with a `message`."""
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,))  # no daemon: compilers fork
            self._process.start()
            theirs.close()
        try:
            self._pipe.send((module, function, arguments))
            row: Row = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self.end()
            return {"outcome": "crash", "message": f"its process ended with code {code}"}
        if row["outcome"] == "error":
            self.end()
        return row

    def end(self) -> None:
        """Ends the process, whatever it is at."""
        if self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._pipe = None


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run is interrupted, and ends this process
    while True:
        try:
            module, function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(getattr(import_module(module), function), arguments))


def _answer(function: Callable[..., Row], arguments: dict[str, Any]) -> Row:
    try:
        return {"outcome": "ok", **function(**arguments)}
    except AttentionPlannerError as error:
        out = isinstance(error, OutOfMemoryError)
        return {"outcome": "oom" if out else "refused", "message": short(error)}
    except Exception as error:  # noqa: BLE001 -- what one row meets, the others need not
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
            return {"outcome": "oom", "message": short(error)}
        return {"outcome": "error", "message": f"{type(error).__name__}: {short(error)}"}
    finally:
        _give_back()


def _give_back() -> None:
    """Memory that the allocator keeps goes back to the card, for what is measured in other processes."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    gc.collect()
    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        return  # the error that the row has met, once more


def short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:SHORT] if lines else "it gave no reason"
