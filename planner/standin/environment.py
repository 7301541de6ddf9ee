"""The variables under which any Python program sees a card that is not there."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from attention.errors import ConfigError
from planner.gpus import Gpu
from planner.memory.cuda_process import device_lines, total
from planner.standin.build import folder
from planner.standin.torch_build import TorchBuild, find

SITE: Final = Path(__file__).with_name("site")
"""On PYTHONPATH, what a dry Python does first is in here."""
MOST_GPUS: Final = 16


def environment(
    gpu: Gpu,
    *,
    vram: int | None = None,
    gpus: int = 1,
    held: int | None = None,
    torch: TorchBuild | None = None,
    python: str | Path = sys.executable,
    ahead: str | Path | None = None,
    launches: Path | None = None,
    reports: Path | None = None,
    inherited: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """All environment variables for a process, and what it starts, that is to see `gpus` cards like `gpu`.

    `vram` is the card's memory in bytes, its `usable_bytes` by default; `held` of them are taken from outside
    of allocations, by default the planned context. `torch` is the build that the process imports, or else
    that of `python`; `ahead`, the folder that has it, if that comes before the Python's own packages.
    `launches` is a file that gets a line a kernel: name, grid, block, stream, by tabs. Each process that used
    a card writes its peaks to `reports`, a folder, as it ends.
    """
    build = torch or find(python)
    libraries = folder(build)
    first = [str(SITE), *([] if ahead is None else [str(ahead)])]
    path = [*first, *filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))]
    found = dict(inherited) | card_variables(gpu, vram=vram, gpus=gpus, held=held)
    found |= {
        "PYTHONPATH": os.pathsep.join(path),
        "STANDIN_LIBRARIES": str(libraries),
        "ATTENTION_TRUST_KERNELS": "1",  # kernels do nothing, so that none is as its definition
        "TRITON_LIBCUDA_PATH": str(libraries),
    }
    for name, place in (("STANDIN_LAUNCHES", launches), ("STANDIN_REPORTS", reports)):
        found.pop(name, None)
        if place is not None:
            found[name] = str(place.resolve())
    return found


def card_variables(
    gpu: Gpu, *, vram: int | None = None, gpus: int = 1, held: int | None = None
) -> dict[str, str]:
    """The variables that say which card it is, read at the first call of CUDA after a start or a fork."""
    memory = gpu.usable_bytes if vram is None else vram
    taken = int(total(device_lines(gpu.architecture))) if held is None else held
    if not 1 <= gpus <= MOST_GPUS:
        raise ConfigError(f"a dry run has 1 to {MOST_GPUS} GPUs, got {gpus}")
    if not 0 <= taken < memory:
        raise ConfigError(
            f"{taken:,} of the card's {memory:,} bytes are taken from the start; give it more memory"
        )
    if gpu.sm_count is None:
        raise ConfigError(f"{gpu.name} cannot be run dry: its number of multiprocessors is not known")
    return {
        "STANDIN_NAME": gpu.name,
        "STANDIN_CAPABILITY": f"{gpu.capability[0]}.{gpu.capability[1]}",
        "STANDIN_MULTIPROCESSORS": str(gpu.sm_count),
        "STANDIN_BYTES": str(memory),
        "STANDIN_L2": str(gpu.l2_bytes or 0),
        "STANDIN_HELD": str(taken),
        "STANDIN_DEVICES": str(gpus),
    }
