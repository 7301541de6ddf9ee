"""Many measurements at the price of one start: like `planner.measuring.measure`, a process for each.
Imports no torch.

One server process loads torch and forks for each run, so that a run finds everything as a process of its
own would, nothing kept, nothing cached, and takes nothing along when it dies. A server that dies is
started again.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from time import monotonic
from typing import IO, Any, Final, Self

from attention.config import AttentionConfig
from planner.measuring import dry, process
from planner.measuring.measure import (
    Device,
    Measurement,
    check_arguments,
    check_device,
    check_sizes,
    measurement_of,
)
from planner.workload import Workload

START_SECONDS: Final = 300
"""Seconds that a server may take to load torch, and to notice that a run's time is over."""


class Batch:
    """Measures one run after the other; a context manager, whose end ends the server."""

    def __init__(
        self,
        device: Device | str = "cpu",
        *,
        timeout: float = 120,
        runs: int = 1,
        threads: int | None = None,
        memory: bool = True,
        reference: bool = False,
    ) -> None:
        """`timeout`: seconds for each run. `reference`: see `Measurement.reference`. The rest as in
        `planner.measuring.measure`, with its errors."""
        check_arguments(device, timeout, runs, threads, None)
        check_device(device, None)
        self._variables = dry.start_variables() if dry.is_dry(device) else None
        self._device = device
        self._task = {
            "device": device,
            "runs": runs,
            "threads": threads,
            "memory": memory,
            "reference": reference,
            "cap_bytes": None,
            "seconds": timeout,
        }
        self._timeout = timeout
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def measure(
        self,
        config: AttentionConfig,
        workload: Workload,
        *,
        card: str | None = None,
        cap_bytes: int | None = None,
    ) -> Measurement:
        """Runs `config` on `workload` in a process of its own; whatever happens to it is a measurement.

        In a dry run it may be on another `card` ("dry:NAME") than that of the batch, and `cap_bytes` is the
        card's memory.
        """
        check_sizes(config, workload)
        device = card or self._device
        dried = {"variables": dry.task_variables(device, cap_bytes)} if self._variables is not None else {}
        task = {
            **self._task,
            **dried,
            "device": device,
            "cap_bytes": cap_bytes,
            "config": config.model_dump(mode="json"),
            "workload": workload.model_dump(mode="json"),
        }
        if self._server is None:
            self._server = _Server(self._variables)
        try:
            ended = self._server.run(task, self._timeout + START_SECONDS)
        except BaseException:
            self._end()  # interrupted: what the server says next would be of this run
            raise
        if not self._server.alive:
            self._end()
        return measurement_of(config, workload, task, ended, self._timeout)

    def _end(self) -> None:
        if self._server is not None:
            self._server.end()
            self._server = None


class _Server:
    """A server process, in a session of its own."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- `end` closes it
        read, low = os.pipe()
        self._answer, self._left = read, b""
        write = process.above_standard(low)
        os.close(low)
        self.alive = True
        try:
            self._process = subprocess.Popen(
                process.command("serve", write),
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(write,),
                env=variables,
                start_new_session=True,
            )
        finally:
            os.close(write)

    def run(self, task: dict[str, Any], seconds: float) -> process.Ended:
        """How one task ended; `alive` says whether there can be another."""
        self._log.seek(0)
        self._log.truncate()
        answer: dict[str, Any] = {}
        deadline = monotonic() + seconds
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
        while (line := self._line(deadline)) is not None:
            try:
                answer |= json.loads(line)
            except ValueError:
                continue  # half a line of a run that was killed, or the empty one after it
            if "ended" in answer:
                ended = answer["ended"]
                return process.Ended(ended["code"], ended["timed_out"], answer, process.tail(self._log))
        timed_out = self.end(close=False)
        return process.Ended(self._process.returncode, timed_out, answer, process.tail(self._log))

    def _line(self, deadline: float) -> bytes | None:
        """The next line of the answers; None if the server is gone or is not heard of in time."""
        while b"\n" not in self._left:
            ready, _, _ = select.select([self._answer], [], [], max(deadline - monotonic(), 0))
            data = os.read(self._answer, 1 << 16) if ready else b""
            if not data:
                self.alive = False
                return None
            self._left += data
        line, _, self._left = self._left.partition(b"\n")
        return line

    def end(self, *, close: bool = True) -> bool:
        """Ends the server and all its processes; whether it had still been running."""
        self.alive = False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.2 if not close else 0)
        running = self._process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # forks too
        self._process.wait()
        if close:
            if self._process.stdin:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
            os.close(self._answer)
            self._log.close()
        return running
