"""Runs a user's program on a card that is not there, and reads what it took. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Final

from attention.errors import ConfigError
from planner import gpus as cards
from planner.answers.dry_run import DryRun, GpuUse, Holder, OutOfMemory, StepPeak
from planner.memory.allocator_settings import AllocatorSettings
from planner.memory.cuda_process import device_lines, total
from planner.standin.environment import MOST_GPUS, environment
from planner.standin.install import torch_for
from planner.standin.interpreter import interpreter, program_of, python_of
from planner.units import parse_bytes

ALLOCATOR_VARIABLES: Final = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
OBSERVER: Final = Path(__file__).with_name("observer.py")
RAN_OUT: Final = 3
"""The exit code where memory ran out and nothing caught it."""
_VALUES: Final = (
    "values are not real: {count:,} were read from the card at {places}; what depends on them, as loops "
    "that end on a loss, samplers and data-dependent shapes, may go another way"
)
_SCALER: Final = "GradScaler finds no infinities here: a step that it would skip is done"
_NOT_SEEN: Final = {
    "cuDNN convolution": "workspaces of cuDNN's convolutions; torch's own ran in their place",
    "cuDNN recurrent network": "workspaces of cuDNN's recurrent networks; torch's own ran in their place",
    "cuDNN attention": "workspaces of cuDNN's attention, where torch would take it; flash or efficient ran",
    "NCCL buffers": "NCCL's buffers, half a gigabyte and more a process group; collectives did nothing",
}
"""By the stand-in's names, what else a card would hold."""
_RESET: Final = "the program kept a memory history of its own: what held memory at the peak is not known"
_NOT_LOADED: Final = (
    "the stand-in was not loaded: python -I, -E and -S, and an environment that is cleaned, keep it out"
)
_LOST: Final = (
    "{count} processes that used a card ended before they could say what they took (killed, or crashed)"
)
_SHARED: Final = "{count} processes used gpu {gpu} at the same time: their peaks are added up"
_WENT_ON: Final = "the program went on after the step that was to be its last"
_UNNAMED: Final = "names of files that are no text keep it from being told what held memory at the peak"
_RING: Final = "more tensors were made than are remembered: what held memory is that of the program's end"


def dry_run(
    command: Sequence[str],
    *,
    gpu: str,
    vram: str | int | None = None,
    allocator: str | None = None,
    gpus: int = 1,
    snapshot: str | Path | None = None,
    steps: int | None = None,
    stdout: IO[Any] | int | None = None,
) -> DryRun:
    """Runs `command` on `gpus` cards of a kind that need not be there, and says what it took.

    Torch's allocator and the operators' code on the host are real, kernels do nothing and values are garbage.
    `vram`: the memory of a card, bytes or text; None for what the card reports. `allocator`: as
    `PYTORCH_CUDA_ALLOC_CONF` has it. `snapshot`: a file for PyTorch's memory viewer. `steps`: optimizer steps
    after which the program is ended; None to let it run. `stdout`: where its output goes.

    ConfigError for a request that cannot be right; UnavailableError where there is no CUDA build of torch for
    the command's Python, naming what makes one, or no stand-in can be had.
    """
    card = cards.find(gpu)
    bytes_of_card = card.usable_bytes if vram is None else parse_bytes(vram, "vram")
    if not 1 <= gpus <= MOST_GPUS:
        raise ConfigError(f"gpus must be 1 to {MOST_GPUS}, got {gpus}")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    if allocator and not re.search(r"per_process_memory_fraction|backend", allocator):
        AllocatorSettings.parse(allocator)  # these two are torch's to read, here where it runs
    program_of(command)
    python = interpreter(python_of(command))
    torch, site = torch_for(python)
    context = int(total(device_lines(card.architecture)))
    if snapshot is not None:
        snapshot = Path(snapshot).absolute()
        if not snapshot.parent.is_dir():
            raise ConfigError(f"--snapshot {snapshot}: there is no folder {snapshot.parent}")
        if snapshot.is_dir():
            raise ConfigError(f"--snapshot {snapshot} is a folder; name a file")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planner-dry-run-") as folder:
        variables = environment(card, vram=bytes_of_card, gpus=gpus, held=context, torch=torch, ahead=site)
        if allocator is not None:
            variables.pop("PYTORCH_ALLOC_CONF", None)
            variables["PYTORCH_CUDA_ALLOC_CONF"] = allocator
        variables |= {
            "STANDIN_OBSERVER": str(OBSERVER),
            "STANDIN_OBSERVER_FOLDER": folder,
            "STANDIN_OBSERVER_STEPS": str(steps or 0),
            "STANDIN_OBSERVER_SNAPSHOT": str(snapshot or ""),
        }
        code = _code(command, variables, stdout)
        reports = list(_reports(Path(folder)))
        begun = {path.stem for path in Path(folder).glob("*.begun")}
        lost = len(begun - {path.stem for path in Path(folder).glob("*.json")})
        loaded = (Path(folder) / "loaded").exists()
    return answer(
        reports,
        command=tuple(command),
        gpu=card.key,
        torch=torch.version,
        allocator=allocator
        or next((text for name in ALLOCATOR_VARIABLES if (text := os.environ.get(name))), ""),
        code=code,
        lost=lost,
        loaded=loaded,
        total=bytes_of_card,
        snapshot=str(snapshot) if snapshot and snapshot.exists() else None,
        seconds=time.monotonic() - began,
    )


def _code(command: Sequence[str], variables: dict[str, str], stdout: IO[Any] | int | None) -> int:
    """Runs it with this terminal's streams. Ctrl-C and SIGTERM go to the program, which may take its time."""
    try:
        process = subprocess.Popen(command, env=variables, stdout=stdout)
    except OSError as error:
        raise ConfigError(
            f"{command[0]} cannot be started: {error.strerror or error}; a script needs a first line that "
            "names its interpreter, or the interpreter before it"
        ) from None
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    with process:
        interrupted = False
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                if interrupted:
                    process.kill()
                interrupted = True
    if before is not None:
        signal.signal(signal.SIGTERM, before)
    if interrupted:
        return 128 + signal.SIGINT
    return 128 - code if code < 0 else code


def _reports(folder: Path) -> Iterable[dict[str, Any]]:
    for path in sorted(folder.glob("*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def answer(
    reports: Sequence[dict[str, Any]],
    *,
    command: tuple[str, ...],
    gpu: str,
    torch: str,
    allocator: str,
    code: int,
    total: int,
    lost: int = 0,
    loaded: bool = True,
    snapshot: str | None,
    seconds: float,
) -> DryRun:
    """What the reports of a program's processes come to. Several processes on one card add up there."""
    uses = _uses(reports, total)
    fullest = max(
        uses,
        key=lambda use: use.device,
        default=GpuUse(gpu=0, total=total, allocated=0, reserved=0, device=0),
    )
    on_it = [report for report in reports if any(each["device"] == fullest.gpu for each in report["devices"])]
    main = max(on_it, key=_allocated, default=None)
    failures = [failure for report in reports for failure in _failures(report)]
    uncaught = [failure for failure, _ in failures if not failure.caught]
    out = uncaught[0] if uncaught else failures[-1][0] if failures else None
    holders = next((held for failure, held in failures if failure is out), []) or _holders_of(
        main, fullest.gpu
    )
    return DryRun(
        command=command,
        gpu=gpu,
        torch=torch,
        allocator=allocator,
        exit_code=RAN_OUT if (uncaught and code) or (not code and fullest.device > total) else code,
        used=bool(uses or lost),
        allocated=fullest.allocated,
        reserved=fullest.reserved,
        device=fullest.device,
        left=fullest.total - fullest.device,
        retries=sum(each["retries"] for report in reports for each in report["devices"]),
        out_of_memory=out,
        largest=tuple(Holder(**held) for held in holders),
        steps=tuple(StepPeak(**step) for step in main["steps"]) if main else (),
        gpus=tuple(uses),
        warnings=(*_warnings(reports), *_circumstances(uses, lost, loaded, reports)),
        unknown=tuple(
            sorted({_NOT_SEEN.get(name, name) for report in reports for name in report["unknown"]})
        ),
        stopped=any(report["notes"].get("stopped") for report in reports),
        stepped=main["stepped"] if main else 0,
        error=next((report["error"] for report in reports if report["error"]), ""),
        snapshot=snapshot,
        seconds=seconds,
    )


def _allocated(report: dict[str, Any]) -> int:
    return max((each["allocated"] for each in report["devices"]), default=0)


def _uses(reports: Sequence[dict[str, Any]], total: int) -> list[GpuUse]:
    """What each card lost: of processes that ran at the same time the sum, of others the largest."""
    uses = []
    for gpu in sorted({each["device"] for report in reports for each in report["devices"]}):
        spans = [
            (report["began"], report["began"] + report["seconds"], each)
            for report in reports
            for each in report["devices"]
            if each["device"] == gpu
        ]
        together = [[each for begin, end, each in spans if begin <= moment < end] for moment, _, _ in spans]
        at_once = max(together, key=lambda each: sum(one["peak"] for one in each))
        allocated, reserved, device = (
            sum(one[name] for one in at_once) for name in ("allocated", "reserved", "peak")
        )
        uses.append(
            GpuUse(
                gpu=gpu,
                total=total,
                allocated=allocated,
                reserved=reserved,
                device=device,
                processes=len(at_once),
            )
        )
    return uses


def _circumstances(
    uses: Sequence[GpuUse], lost: int, loaded: bool, reports: Sequence[dict[str, Any]]
) -> Iterable[str]:
    """What a reader has to know of how it ran."""
    if not loaded:
        yield _NOT_LOADED
    if lost:
        yield _LOST.format(count=lost)
    for use in uses:
        if use.processes > 1:
            yield _SHARED.format(count=use.processes, gpu=use.gpu)
    if any(report["notes"].get("went on") for report in reports):
        yield _WENT_ON


def _failures(report: dict[str, Any]) -> list[tuple[OutOfMemory, list[dict[str, Any]]]]:
    """Allocations of a process that failed, with what held memory then; the last one ended it if none caught
    its error."""
    events = report["out_of_memory"]
    return [
        (
            OutOfMemory(
                gpu=event["device"],
                requested=event["requested"],
                free=event["free"],
                short=max(event["requested"] - event["free"], 0),
                where=event["where"],
                step=event["step"],
                caught=not (report["notes"].get("uncaught") and event is events[-1]),
            ),
            event["holders"],
        )
        for event in events
    ]


def _holders_of(report: dict[str, Any] | None, gpu: int) -> list[dict[str, Any]]:
    if report is None:
        return []
    held: list[dict[str, Any]] = next(
        (each["holders"] for each in report["devices"] if each["device"] == gpu), []
    )
    return held


def _warnings(reports: Sequence[dict[str, Any]]) -> Iterable[str]:
    count = sum(report["values_read_in_all"] for report in reports)
    if count:
        reader = max(reports, key=lambda report: report["values_read_in_all"])
        places = [
            f"{place} ({times:,} times)" if times > 1 else place for place, times in reader["values_read"]
        ]
        yield _VALUES.format(count=count, places=", ".join(places))
    notes = {name for report in reports for name, there in report["notes"].items() if there}
    texts = {"scaler": _SCALER, "own history": _RESET, "ring": _RING, "unnamed": _UNNAMED}
    for name, text in texts.items():
        if name in notes:
            yield text
