"""What a Python does first in a dry run: once torch is imported, the stand-in's libraries come before it.

This runs in the user's Python, whatever packages that has, and needs the standard library only. The folder of
the stand-in is in STANDIN_LIBRARIES. A library that is loaded already satisfies whoever asks for its name, so
neither a driver nor NVIDIA's packages are looked at, and nothing is written into the environment.
"""

import atexit
import contextlib
import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Bootstrap(importlib.abc.MetaPathFinder):
    """Finds torch as it would be found, loads the stand-in first and settles torch afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.loader is None:
            return None
        _load_libraries(os.environ["STANDIN_LIBRARIES"])
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            _settle(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


def _load_libraries(folder: str) -> None:
    # The first one brings the code; what compilers link to (libcuda.so) leads to another of these.
    for name in ["libstandin.so", *sorted(name for name in os.listdir(folder) if ".so" in name)]:
        ctypes.CDLL(os.path.join(folder, name), mode=ctypes.RTLD_GLOBAL)


def _watch(torch: Any, observer: str) -> None:
    """Loads a file by its path and has it watch the program; it may import no more than this one."""
    spec = importlib.util.spec_from_file_location("_standin_observer", observer)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.watch(torch, report)


def _settle(torch: Any) -> None:
    """cuDNN is not emulated; torch has other ways, whose memory is known."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    if observer := os.environ.get("STANDIN_OBSERVER"):
        _watch(torch, observer)
    if folder := os.environ.get("STANDIN_REPORTS"):
        atexit.register(_write_report, torch, folder)


def report(torch: Any) -> dict[str, Any]:
    """What this process came to: launches, what is not known, and a device's bytes as the card and as torch's
    allocator have them."""
    library = ctypes.CDLL("libstandin.so")
    size = library.standin_report(None, ctypes.c_size_t(0)) + 4096
    text = ctypes.create_string_buffer(size)
    library.standin_report(text, ctypes.c_size_t(size))
    found: dict[str, Any] = json.loads(text.value)
    for index, device in enumerate(found["devices"]):
        stats = torch.cuda.memory_stats(index)
        for name in ("allocated", "reserved", "requested"):
            device[f"peak_{name}"] = stats.get(f"{name}_bytes.all.peak", 0)
        device["retries"] = stats.get("num_alloc_retries", 0)
        device["ooms"] = stats.get("num_ooms", 0)
    return found


def _write_report(torch: Any, folder: str) -> None:
    """The report as JSON in a file of this process's own; one that used no card writes none."""
    if not torch.cuda.is_initialized():
        return
    path = os.path.join(folder, f"{os.getpid()}.json")
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump({"command": sys.argv, **report(torch)}, file)
    os.replace(path + ".part", path)


def _run_the_next_one() -> None:
    """Runs the sitecustomize that this one hides, if the user's Python has one."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [path for path in sys.path if os.path.abspath(path or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if "STANDIN_OBSERVER_FOLDER" in os.environ:
    with (
        contextlib.suppress(OSError),
        open(os.path.join(os.environ["STANDIN_OBSERVER_FOLDER"], "loaded"), "a"),
    ):
        pass  # that this file was read at all
if "STANDIN_LIBRARIES" in os.environ:
    sys.meta_path.insert(0, _Bootstrap())
_run_the_next_one()
