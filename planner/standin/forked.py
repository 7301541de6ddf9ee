"""What runs in the process of dry runs: torch is imported once, and each task is done by a fork.

Imports what its own Python has: the standard library and torch.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import traceback
from typing import Any


def serve(answers: int) -> None:
    """Does tasks from stdin, a JSON object a line, until there are no more; a line of answer each, to a file
    descriptor."""
    importlib.import_module("torch")
    for line in sys.stdin:
        task = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            os.setpgid(0, 0)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the tasks are the parent's
            _child(task, writer)
        os.close(writer)
        text, late = _read(reader, task["timeout"])
        if late:
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if late:
            text = json.dumps(["timeout", f"took more than {task['timeout']:g} s", {}])
        elif not text:
            text = json.dumps(["died", f"exit status {os.waitstatus_to_exitcode(status)}", {}])
        os.write(answers, text.encode() + b"\n")


def _child(task: dict[str, Any], answer: int) -> None:
    """Does one task and ends the process."""
    import torch

    os.environ.update(task["variables"])
    if settings := task["variables"].get("PYTORCH_ALLOC_CONF"):
        # Torch read it when it was imported.
        torch._C._accelerator_setAllocatorSettings(settings)
    try:
        function = getattr(importlib.import_module(task["module"]), task["function"])
        ended = ["ok", function(**task["arguments"])]
    except torch.OutOfMemoryError as error:
        ended = ["oom", str(error)]
    except BaseException:  # noqa: BLE001 - whatever it is, the parent is told, and this process ends
        ended = ["error", traceback.format_exc(limit=-12)]
    report = sys.modules["sitecustomize"].report(torch) if torch.cuda.is_initialized() else {}
    with os.fdopen(answer, "w") as out:
        json.dump([*ended, report], out)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _read(reader: int, timeout: float) -> tuple[str, bool]:
    """All that a child writes, and whether it took too long."""
    found = b""
    with os.fdopen(reader, "rb", buffering=0) as file:
        while select.select([file], [], [], timeout)[0]:
            part = file.read(1 << 16)
            if not part:
                return found.decode(), False
            found += part
    return "", True
