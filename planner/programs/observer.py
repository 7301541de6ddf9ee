"""What happens inside a user's program in a dry run, told to the process that started it.

It runs in the user's own Python, loaded by path once torch is there, so it imports the standard library and
torch alone and works from Python 3.9 on. `watch` puts hooks in place; when the program ends, a report goes
to `folder/<process id>.json`: peaks a device, optimizer steps, where memory ran out, what held it at the
peak, and what may mislead where values are not real. A program that never touches a card leaves none.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import sys
import sysconfig
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

Frame = dict[str, Any]
Event = dict[str, Any]
HeldBlock = tuple[int, int, list[Frame]]

_WRAPPERS = ("/torch/utils/_device.py", "/torch/utils/_contextlib.py", "/torch/overrides.py")
"""Files of torch that stand between a call and what it calls."""
EVENTS = 200_000
"""Allocations and frees that are remembered; a ring."""
STEPS = 1000
"""Optimizer steps that are kept, the last among them."""
FAILURES = 10
"""Allocations that failed, of which the last is kept always."""
HOLDERS = 10
"""Holders of memory that are named."""
PLACES = 5
"""Places in the program that a warning names."""
try:
    _HERE = os.getcwd()
except OSError:
    _HERE = os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})


# ---- what held memory at the peak: lists of events to lists of holders, no torch


def peak_holders(
    trace: list[Event], blocks: list[HeldBlock], holders: int = HOLDERS
) -> tuple[int, list[tuple[str, int, int]]]:
    """(bytes at the peak, what held them, largest first) of a device.

    `trace`: events in their order, as `torch.cuda.memory._snapshot()["device_traces"]` has them; `blocks`:
    [(address, requested bytes, frames)] in use after the last event. What was in use before the first event
    is known by `blocks` alone, so sums are taken backwards from the end. Bytes are as requested, before the
    allocator rounds. A holder: (where, bytes, number of tensors).
    """
    live = {address: (size, frames) for address, size, frames in blocks}
    total = peak = sum(size for size, _ in live.values())
    when = len(trace)
    for number in range(len(trace) - 1, -1, -1):
        event = trace[number]
        if event["action"] == "alloc":
            total -= event["size"]
        elif event["action"] == "free_requested":
            total += event["size"]
            if total > peak:
                peak, when = total, number
    born: dict[int, list[Frame]] = {}
    frames_of: dict[int, list[Frame]] = {}
    for number, event in enumerate(trace):
        if event["action"] == "alloc":
            born[event["addr"]] = event.get("frames") or []
        elif event["action"] == "free_requested":
            frames_of[number] = born.pop(event["addr"], [])
    for number in range(len(trace) - 1, when - 1, -1):
        event = trace[number]
        if event["action"] == "alloc":
            live.pop(event["addr"], None)
        elif event["action"] == "free_requested":
            live[event["addr"]] = (event["size"], frames_of[number])
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for size, frames in live.values():
        entry = sums[place_of(frames)]
        entry[0] += size
        entry[1] += 1
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    return peak, [(where, size, count) for where, (size, count) in ordered[:holders]]


def place_of(frames: list[Frame]) -> str:
    """Where a tensor was made: the innermost line outside of torch, and which of torch's files it called."""
    frames = [frame for frame in frames if not frame["filename"].endswith(_WRAPPERS)]
    inner = next((frame for frame in frames if _is_torch(frame["filename"])), None)
    outer = next((frame for frame in frames if _is_users(frame["filename"])), None)
    if outer is not None and "/torchinductor_" in outer["filename"]:
        return "code that torch.compile made"
    if outer is None:
        return "backward (autograd)" if inner is None else _named(inner)
    if inner is None or frames[0] is outer:
        return _named(outer)
    return f"{_named(outer)} > {_named(inner, line=False)}"


def _is_torch(filename: str) -> bool:
    return "/torch/" in filename


def _is_users(filename: str) -> bool:
    """Neither torch's nor the standard library's nor this file, nor code without a file."""
    if filename in ("<string>", "<stdin>"):
        return True
    if _is_torch(filename) or filename == __file__ or filename.startswith("<"):
        return False
    return not any(filename.startswith(folder) and "-packages" not in filename for folder in _LIBRARIES)


def _named(frame: Frame, line: bool = True) -> str:
    name = frame["filename"]
    for mark in ("site-packages/", "dist-packages/"):
        name = name.rpartition(mark)[2] if mark in name else name
    here = _HERE + os.sep
    name = name[len(here) :] if name.startswith(here) else name
    if "/torch/" in name:
        name = "torch/" + name.rpartition("/torch/")[2]
    return f"{name}:{frame['line']} {frame['name']}" if line else f"{name} {frame['name']}"


# ---- what is watched


class Watch:
    """What a process has seen so far."""

    def __init__(
        self, torch: Any, card: Callable[[Any], dict[str, Any]], folder: str, stop_after: int, snapshot: str
    ) -> None:
        self.torch = torch
        self.card = card
        self.folder = folder
        self.stop_after = stop_after
        self.snapshot = snapshot
        self.start()

    def start(self) -> None:
        """Nothing is seen yet: the process has just begun, or was forked from one that saw something."""
        self.process = os.getpid()
        self.began = time.time()
        self.stepped_in_all = 0
        self.steps: list[dict[str, Any]] = []
        self.out_of_memory: list[dict[str, Any]] = []
        self.error = ""
        self.values_read: Counter[str] = Counter()
        self.notes: dict[str, bool] = {}
        self.highest: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
        """By device, peaks that the program reset."""
        self.history = True

    def stats(self, device: int) -> dict[str, int]:
        stats = self.torch.cuda.memory_stats(device)
        allocated, reserved = self.highest[device]
        return {
            "allocated": max(allocated, stats.get("allocated_bytes.all.peak", 0)),
            "reserved": max(reserved, stats.get("reserved_bytes.all.peak", 0)),
            "retries": stats.get("num_alloc_retries", 0),
        }

    def devices(self) -> list[int]:
        if not self.torch.cuda.is_initialized():
            return []
        return list(range(self.torch.cuda.device_count()))

    def stepped(self, *_: Any) -> None:
        """An optimizer has done a step."""
        devices = self.devices()
        if not devices:
            return
        each = [self.stats(device) for device in devices]
        fullest = max(each, key=lambda stats: stats["allocated"])
        self.stepped_in_all += 1
        del self.steps[STEPS - 1 :]  # the first ones and the last
        self.steps.append({"number": self.stepped_in_all, "seconds": time.time() - self.began, **fullest})
        if self.stepped_in_all <= 3:
            self.write()
        if self.stop_after and self.stepped_in_all == self.stop_after:
            self.notes["stopped"] = True
            raise SystemExit(0)
        if self.stop_after and self.stepped_in_all > self.stop_after:
            self.notes["went on"] = True

    def ran_out(self, device: int, requested: int, total: int, free: int) -> None:
        """torch calls this where an allocation fails for good, before it raises."""
        stack = [
            {"filename": code.f_code.co_filename, "line": number, "name": code.f_code.co_name}
            for code, number in _walk(sys._getframe().f_back)  # None in backward, in a thread of its own
        ]
        self.out_of_memory.append(
            {
                "device": device,
                "requested": requested,
                "free": free,
                "where": place_of(stack),
                "holders": self.holders(device),
                "step": self.stepped_in_all,
            }
        )
        del self.out_of_memory[FAILURES - 1 : -1]  # the first ones and the last
        self.write()

    def holders(self, device: int) -> list[dict[str, Any]]:
        """What holds the device's memory at its peak; nothing if the program turned the history off."""
        if not self.history:
            return []
        try:
            snapshot = self.torch.cuda.memory._snapshot()
        except (RuntimeError, UnicodeError):  # of names that are no text
            self.notes["unnamed"] = True
            return []
        blocks = []
        for segment in snapshot["segments"]:
            if segment["device"] != device:
                continue
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    size = block.get("requested_size", block["size"])
                    blocks.append((block["address"], size, block.get("frames") or []))
        traces = snapshot.get("device_traces") or []
        trace = traces[device] if device < len(traces) else []
        _, named = peak_holders(trace, blocks)
        if len(trace) >= EVENTS:
            self.notes["ring"] = True
        return [{"where": where, "bytes": size, "tensors": count} for where, size, count in named]

    def report(self, ended: bool = False) -> dict[str, Any]:
        devices = self.devices()
        each, card = [], self.card(self.torch)
        ran_out = {event["device"] for event in self.out_of_memory}
        for device in devices:
            stats = self.stats(device)
            if stats["reserved"] or device in ran_out:
                holders = self.holders(device) if ended and "uncaught" not in self.notes else []
                peak = card["held"] + card["devices"][device]["peak"]
                each.append({"device": device, "peak": peak, **stats, "holders": holders})
        return {
            "began": self.began,
            "seconds": time.time() - self.began,
            "devices": each,
            "steps": self.steps,
            "stepped": self.stepped_in_all,
            "out_of_memory": self.out_of_memory,
            "error": self.error,
            "values_read": self.values_read.most_common(PLACES),
            "values_read_in_all": sum(self.values_read.values()),
            "notes": self.notes,
            "unknown": sorted(card["unknown"]),
        }

    def write(self, ended: bool = False) -> None:
        """The report as it is; of a process that used no card, none."""
        if os.getpid() != self.process or not self.devices():
            return
        path = os.path.join(self.folder, f"{self.process}.json")
        text = json.dumps(self.report(ended))
        with contextlib.suppress(OSError):  # who asked may be gone
            with open(path + ".part", "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(path + ".part", path)

    def ended(self) -> None:
        if os.getpid() != self.process or not self.devices():
            return
        self.write(ended=True)
        if self.snapshot:
            try:
                self.torch.cuda.memory._dump_snapshot(self.snapshot)
            except (OSError, RuntimeError) as error:
                print(f"planner: the snapshot was not written: {error}", file=sys.stderr)


def _walk(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def watch(torch: Any, card: Callable[[Any], dict[str, Any]]) -> Watch:
    """Puts hooks in place; torch has just been imported. `card`: what the stand-in has of this process."""
    folder, steps, snapshot = (
        os.environ[f"STANDIN_OBSERVER_{name}"] for name in ("FOLDER", "STEPS", "SNAPSHOT")
    )
    seen = Watch(torch, card, folder, int(steps), snapshot)
    atexit.register(seen.ended)
    os.register_at_fork(after_in_child=seen.start)
    _on_exit(seen)
    _on_error(seen)
    _on_step(seen)
    _on_card(seen)
    _on_reset(seen)
    _on_values(seen)
    _on_scaler(seen)
    return seen


def _on_exit(seen: Watch) -> None:
    """Workers of multiprocessing, and some programs, leave without what is registered for the end."""
    leave = os._exit

    def left(status: int) -> NoReturn:
        seen.ended()
        leave(status)

    os._exit = left


def _memory_ran_out(seen: Watch, error: BaseException | None) -> bool:
    """Whether an error is of memory, or was raised for one."""
    while error is not None:
        if isinstance(error, seen.torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _on_error(seen: Watch) -> None:
    before, in_thread = sys.excepthook, threading.excepthook

    def thread_hook(arguments: Any) -> None:
        if _memory_ran_out(seen, arguments.exc_value):
            seen.notes["uncaught"] = True
        in_thread(arguments)

    threading.excepthook = thread_hook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        seen.error = f"{name}: {error}".removesuffix(": ")[:2000]
        if _memory_ran_out(seen, error):
            seen.notes["uncaught"] = True
        before(kind, error, trace)

    sys.excepthook = hook


def _on_step(seen: Watch) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(seen.stepped)


def _on_card(seen: Watch) -> None:
    """What can be set only once a card is in use."""
    torch = seen.torch

    def begin() -> None:
        with contextlib.suppress(OSError), open(os.path.join(seen.folder, f"{os.getpid()}.begun"), "w"):
            pass  # so that it is known of one that cannot say what it took
        torch._C._cuda_attach_out_of_memory_observer(seen.ran_out)
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=EVENTS)
        record = torch.cuda.memory._record_memory_history

        @functools.wraps(record)
        def recorded(*arguments: Any, **options: Any) -> Any:
            seen.history, seen.notes["own history"] = (
                False,
                True,
            )  # the program's own history has taken the place of this one
            return record(*arguments, **options)

        torch.cuda.memory._record_memory_history = recorded

    torch.cuda._lazy_call(begin)


def _on_reset(seen: Watch) -> None:
    """A program that resets the peaks does not lose them for the report."""
    cuda = seen.torch.cuda
    reset = cuda.memory.reset_peak_memory_stats

    @functools.wraps(reset)
    def kept(device: Any = None) -> Any:
        for index in seen.devices():
            stats = seen.stats(index)
            seen.highest[index] = [stats["allocated"], stats["reserved"]]
        return reset(device)

    cuda.memory.reset_peak_memory_stats = cuda.reset_peak_memory_stats = kept


READ = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero")


def _on_values(seen: Watch) -> None:
    """Counts where values of a card are read: they are garbage, and so is what depends on them."""
    tensor = seen.torch.Tensor

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def read(self: Any, *arguments: Any, **options: Any) -> Any:
            if self.is_cuda:
                frame = sys._getframe(1)
                if _is_users(frame.f_code.co_filename):
                    place = {"filename": frame.f_code.co_filename, "line": frame.f_lineno, "name": name}
                    seen.values_read[_named(place)] += 1
            return method(self, *arguments, **options)

        return read

    for name in READ:
        setattr(tensor, name, counted(name, getattr(tensor, name)))


def _on_scaler(seen: Watch) -> None:
    scaler = seen.torch.amp.GradScaler
    made = scaler.__init__

    @functools.wraps(made)
    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.notes["scaler"] = True
        return made(self, *arguments, **options)

    scaler.__init__ = noted
