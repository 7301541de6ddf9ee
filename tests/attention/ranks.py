"""Processes that are the ranks of a gloo group, started once and given many things to do."""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

PRELOADED = ["torch", "torch.distributed", "attention.factories", "attention.sharding.module", "conformance"]
"""Imported once, by the process that the ranks are forks of."""
PATIENCE, AFTER_A_FAILURE = 60.0, 3.0
"""Seconds in which ranks do what they are told, unless a test says otherwise, and once one of them raised."""


class Failure(NamedTuple):
    """An error that a rank raised."""

    error: BaseException
    trace: str


class Ranks:
    """`world` processes in which torch.distributed is initialised: over a file, or over the first rank's
    port."""

    def __init__(self, world: int, store: str = "file") -> None:
        self.world = world
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        address = f"file://{tempfile.mktemp()}" if store == "file" else "tcp://127.0.0.1:0"
        if store != "file":
            address = f"tcp://127.0.0.1:{_free_port()}"
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, address, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        self.run(ready)

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Lets every rank call `function(rank, *args)`, a function of a module's top level."""
        for pipe in self.pipes:
            pipe.send((function.__code__.co_filename, function.__name__, args))

    def results(self, patience: float = PATIENCE, stopped: Collection[int] = ()) -> list[Any]:
        """What each rank returned: a `Failure` if it raised, None if it is gone, has not answered in time or
        is `stopped`."""
        results: list[Any] = [None] * self.world
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in stopped}
        while waiting and (ready := wait_for(list(waiting), patience)):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    results[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    results[rank] = None
                if isinstance(results[rank], Failure):
                    patience = AFTER_A_FAILURE
        return results

    def run(self, function: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> list[Any]:
        """What `function(rank, *args)` returned on every rank. Where one raised, that is raised here, and the
        group is closed."""
        self.start(function, *args)
        results = self.results(patience)
        for rank, result in enumerate(results):
            if isinstance(result, Failure):
                self.close()
                raise AssertionError(f"rank {rank} of {self.world} raised:\n{result.trace}") from result.error
        return results

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ready(rank: int) -> int:
    return rank


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _module(path: str) -> ModuleType:
    """The module of a file, which pytest imports without a name that others know."""
    name = f"of_ranks_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def _serve(rank: int, world: int, address: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    while True:
        try:
            path, name, args = pipe.recv()
        except EOFError:
            return
        try:
            result = getattr(_module(path), name)(rank, *args)
        except BaseException as error:  # noqa: BLE001  the test hears of it
            result = Failure(error, traceback.format_exc())
        pipe.send(result)
