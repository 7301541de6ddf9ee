"""Ranks on one machine: processes of a gloo group, each of which does the same and says what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from attention.errors import AttentionPlannerError
from studies.bench.records import Row

PATIENCE: Final = 600.0
"""Seconds that the ranks of a run may take."""


def run_on_ranks(world: int, function: str, patience: float = PATIENCE, **options: Any) -> list[Row]:
    """What `function(**options)` returned on each of `world` ranks, each a process with one thread.

    `function`: as `package.module:name`; its options and what it returns are JSON. AttentionPlannerError
    where a rank does not end well: what the first such rank said last.
    """
    with TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    __name__,
                    folder,
                    str(rank),
                    str(world),
                    function,
                    json.dumps(options),
                ],
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        try:
            for rank, process in enumerate(processes):
                said = process.communicate(timeout=patience)[1]
                if process.returncode:
                    last = (said.splitlines() or [f"exit code {process.returncode}"])[-1]
                    raise AttentionPlannerError(f"rank {rank} of {world}: {last}")
        except subprocess.TimeoutExpired:
            raise AttentionPlannerError(f"{world} ranks took more than {patience:g} s") from None
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        return [json.loads(_answer(folder, rank).read_text()) for rank in range(world)]


def _answer(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.json"


def _run(folder: str, rank: str, world: str, function: str, options: str) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(world)
    )
    module, name = function.split(":")
    row = getattr(import_module(module), name)(**json.loads(options))
    _answer(folder, int(rank)).write_text(json.dumps(row))
    dist.barrier()  # none closes its connections while another still needs them
    dist.destroy_process_group()


if __name__ == "__main__":
    _run(*sys.argv[1:])
