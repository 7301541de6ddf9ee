"""One server of measurements for all tests that measure for real: to load torch anew takes seconds each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal
from unittest.mock import patch

from planner.measuring import process
from planner.measuring.process import Ended
from planner.measuring.server import START_SECONDS, _Server

START = process.command


def preloaded(entry: Literal["main", "serve"], answer: int) -> list[str]:
    """The command, with what torch loads for backward loaded before the first fork, not in each, and no
    garbage of forks looked for among what was loaded."""
    *options, code, root, file = START(entry, answer)
    first = "import gc, torch.fx.experimental.symbolic_shapes; gc.freeze()"
    return [*options, f"{first}; {code}", root, file]


class SharedServer:
    """In the place of a batch's server: outlives the batch, unless a run was left undone, and is started
    again when it is gone."""

    def __init__(self) -> None:
        self._server: _Server | None = None
        self._busy = False

    @property
    def alive(self) -> bool:
        return self._server is not None and self._server.alive

    def run(self, task: dict[str, Any], seconds: float) -> Ended:
        if not self.alive:
            self.close()
            with patch.object(process, "command", preloaded):
                self._server = _Server()
        assert self._server
        self._busy = True
        ended = self._server.run(task, seconds)
        self._busy = False
        return ended

    def single(self, task: str, timeout: float, variables: Mapping[str, str] | None = None) -> Ended:
        """In the place of a process for one task."""
        assert variables is None
        return self.run({**json.loads(task), "seconds": timeout}, timeout + START_SECONDS)

    def end(self, *, close: bool = True) -> None:
        if self._busy:
            self.close()

    def close(self) -> None:
        self._busy = False
        if self._server:
            self._server.end()
        self._server = None
