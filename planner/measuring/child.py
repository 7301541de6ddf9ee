"""What a measuring process does, for one run (`planner.measuring.process` starts it) or for many, one after
the other, each in a fork of its own (`planner.measuring.server`)."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter, sleep
from typing import TYPE_CHECKING, Any, NoReturn

from attention.config import AttentionConfig
from attention.errors import AttentionPlannerError, OutOfMemoryError
from planner.measuring.call import ModuleCall, call_of
from planner.workload import Workload

if TYPE_CHECKING:
    import torch

Say = Callable[..., None]
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main(answer: int) -> None:
    """Does the task on stdin and says on the file descriptor `answer` how far it is and what came out."""

    def say(**line: Any) -> None:
        os.write(answer, json.dumps(line).encode() + b"\n")

    _settle()
    _answer(json.loads(sys.stdin.buffer.read()), say)


def serve(answer: int) -> None:
    """Does tasks as they come, one a line of stdin, each in a fork of this process, which has torch
    loaded and has never used it; a task's `seconds` bound it. What `main` says of a task is followed by
    `ended`: its exit code, and whether it was ended for taking too long. Returns at the end of stdin."""
    _settle()
    import attention.factories  # noqa: F401 -- loaded here, not in each fork

    for line in sys.stdin.buffer:
        task = json.loads(line)
        child = os.fork()
        if not child:
            _settle()
            _answer(task, lambda **line: _write(answer, line))
        ended = _waited(child, task["seconds"])
        os.write(answer, b"\n")  # a fork that was killed may have left half a line
        _write(answer, {"ended": ended})


def _write(answer: int, line: dict[str, Any]) -> None:
    data = json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(answer, data) :]


def _waited(child: int, seconds: float) -> dict[str, Any]:
    """How a fork ended; it is killed when its time is over."""
    deadline, timed_out = monotonic() + seconds, False
    while True:
        pid, status = os.waitpid(child, 0 if timed_out else os.WNOHANG)
        if pid:
            return {"code": os.waitstatus_to_exitcode(status), "timed_out": timed_out}
        if monotonic() > deadline:
            timed_out = True
            os.kill(child, signal.SIGKILL)
        sleep(0.002)


def _answer(task: dict[str, Any], say: Say) -> NoReturn:
    """Says what comes out of a task and ends the process."""
    try:
        outcome = {"kind": "ok", **_trial(task, say)}
    except OutOfMemoryError as error:
        outcome = {"kind": "oom", "message": str(error), "requested": error.requested}
        cap, available = task["cap_bytes"], error.available
        if cap:
            outcome["message"] += f" (cap_bytes held the run to {cap:,} bytes)"
            available = cap if available is None else min(cap, available)  # the platform knows of no cap
        outcome["available"] = available
    except AttentionPlannerError as error:
        outcome = {"kind": "error", "message": f"{type(error).__name__}: {error}"}
    except Exception as error:  # noqa: BLE001 -- whatever it is, it is the outcome
        traceback.print_exc()
        outcome = {"kind": "crash", "message": f"{type(error).__name__}: {error}"}
    say(outcome=outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # tearing torch down takes time and can only go wrong


def _settle() -> None:
    """Dies with its parent, and before its parent where the system must choose."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _trial(task: dict[str, Any], say: Say) -> dict[str, Any]:
    os.environ.update(task.get("variables", {}))
    say(stage="importing torch")
    import torch

    from attention.errors import UnavailableError
    from attention.out_of_memory import with_emergency_release
    from attention.pool import Buffers

    config, workload = AttentionConfig(**task["config"]), Workload(**task["workload"])
    device = torch.device("cuda" if "variables" in task else task["device"])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    say(environment=_environment(device))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnavailableError(
            f"torch {torch.__version__} sees no CUDA device here; check the driver, or use device='cpu'"
        )
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())  # torch tells free memory by index alone
    measured = _measured_cuda if device.type == "cuda" else _measured_cpu
    if "variables" in task:
        measured = _measured_dry

    def everything() -> dict[str, Any]:
        return measured(config, workload, task, say)

    # Memory may run out where the library does not catch it, e.g. in making the inputs.
    nothing_kept = Buffers(cache_entries=0, cache_bytes=0)
    return with_emergency_release(everything, nothing_kept, device)


def _measured_cpu(
    config: AttentionConfig, workload: Workload, task: dict[str, Any], say: Say
) -> dict[str, Any]:
    import torch

    from planner.measuring.footprint import footprints

    torch.ones(1 << 20).add_(1).sum()  # starts the threads
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
    before = _status("VmRSS")
    with _held_to(task["cap_bytes"]):
        say(stage="making the inputs")
        call = call_of(config, workload, torch.device("cpu"))
        say(environment=_environment(torch.device("cpu")) | _how(config, workload, call))
        say(stage="in the first call")
        call()
        highest = _status("VmHWM")
        call.drop_gradients()
        if task["cap_bytes"] or not task["memory"]:
            say(stage="in the second call")
            call()
            call.drop_gradients()

    figures: dict[str, Any] = {}
    if before is not None and highest is not None:
        figures["resident"] = highest - before
    if task["memory"]:
        say(stage="counting its memory")
        call.start_cold()
        cold, _, warm = footprints([call, call.drop_gradients, call], torch.device("cpu"))
        figures["allocated"] = call.nbytes + cold.peak
        figures["allocated_warm"] = call.nbytes + warm.peak
        figures["largest"] = cold.largest
    say(stage="timing")
    return figures | _timed(call, task, torch.device("cpu"))


def _measured_cuda(
    config: AttentionConfig, workload: Workload, task: dict[str, Any], say: Say
) -> dict[str, Any]:
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    idle = _driver_used(uuid)
    free_at_start, total = torch.cuda.mem_get_info(device)  # starts the context
    started = _driver_used(uuid)
    context = None if idle is None or started is None else started - idle
    if task["cap_bytes"]:
        torch.cuda.set_per_process_memory_fraction(min(task["cap_bytes"] / total, 1.0), device)

    say(stage="making the inputs")
    call = call_of(config, workload, device)
    say(environment=_environment(device) | _how(config, workload, call))
    say(stage="in the first call")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    figures: dict[str, Any] = {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
        "context": context,
    }
    if context is not None:
        # What the driver lost since the start, without what the allocator holds, is modules and
        # libraries; the allocator may have held more before than it does now.
        outside = free_at_start - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)
        figures["device_peak"] = context + max(outside, 0) + figures["reserved"]
    call.drop_gradients()

    say(stage="in the second call")
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    figures["allocated_warm"] = torch.cuda.max_memory_allocated(device)
    call.drop_gradients()
    say(stage="timing")
    return figures | _timed(call, task, device)


def _measured_dry(
    config: AttentionConfig, workload: Workload, task: dict[str, Any], say: Say
) -> dict[str, Any]:
    """A card that is not there: the bytes of a first and of a second call. What is compiled is compiled
    before, because compilers try kernels out; what a scorer chooses is not garbage."""
    import torch

    from planner.measuring.choices import choose_by_spread

    choose_by_spread()
    device = torch.device("cuda", torch.cuda.current_device())
    free_at_start, total = torch.cuda.mem_get_info(device)
    say(stage="making the inputs")
    call = call_of(config, workload, device)
    how = _how(config, workload, call)
    say(environment=_environment(device) | how | {"driver": "none: a dry run"})
    if how["backend"] == "flex":
        say(stage="compiling")
        call()
        call.start_cold()
        torch.cuda.empty_cache()
    figures: dict[str, Any] = {"context": total - free_at_start}
    for stage, name in (("in the first call", "allocated"), ("in the second call", "allocated_warm")):
        say(stage=stage)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        figures[name] = torch.cuda.max_memory_allocated(device)
        if name == "allocated":
            figures["reserved"] = torch.cuda.max_memory_reserved(device)
            figures["device_peak"] = figures["context"] + figures["reserved"]
        call.drop_gradients()
    return figures


def _timed(call: ModuleCall, task: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Seconds of warm calls. Asked for a reference, each is timed between two calls of the same small dense
    attention, which tells how fast the device was at just that time."""
    import torch

    def seconds(run: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - begin

    x = torch.randn((1, 8, 768, 64) if task.get("reference") else (0,), device=device)

    def reference_seconds() -> float:
        return seconds(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x))

    times, ratios = [], []
    before = min(reference_seconds(), reference_seconds()) if task.get("reference") else 0.0
    for _ in range(task["runs"]):
        times.append(seconds(call))
        if task.get("reference"):
            after = reference_seconds()
            ratios.append(2 * times[-1] / (before + after))
            before = after
        call.drop_gradients()
    middle = median(times)
    timing = {"seconds": middle, "spread": (max(times) - min(times)) / middle}
    return timing | ({"reference": middle / median(ratios)} if ratios else {})


@contextlib.contextmanager
def _held_to(cap_bytes: int | None) -> Iterator[None]:
    """Private writable memory is held to `cap_bytes` above what it is now."""
    if cap_bytes is None:
        yield
        return
    import resource

    from attention.errors import UnavailableError

    now = _status("VmData")
    if now is None:
        raise UnavailableError("cap_bytes needs VmData in /proc/self/status, which this system does not give")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + cap_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _status(field: str) -> int | None:
    """Bytes of a field of /proc/self/status; None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _driver_used(uuid: str) -> int | None:
    """Bytes in use on a GPU by all processes; asking starts no context. None without nvidia-smi."""
    answer = _smi("memory.used", uuid)
    return int(answer) * (1 << 20) if answer and answer.isdigit() else None


def _smi(field: str, uuid: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    try:
        done = subprocess.run([*command, f"--id={name}"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _environment(device: torch.device) -> dict[str, Any]:
    import torch

    environment: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        if torch.cuda.is_available():
            card = torch.cuda.get_device_properties(device)
            environment |= {
                "device": card.name,
                "device_bytes": card.total_memory,
                "capability": f"{card.major}.{card.minor}",
            }
        with contextlib.suppress(OSError):
            environment["driver"] = Path("/sys/module/nvidia/version").read_text().strip()
        return environment
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    matrices = ", AMX" if "amx_bf16" in flags else ""
    if "amx_fp16" in flags:
        matrices += " with float16"
    environment["device"] = models[0] if models else platform.processor() or platform.machine()
    environment["capability"] = torch.backends.cpu.get_cpu_capability() + matrices
    with contextlib.suppress(OSError, ValueError, AttributeError):
        environment["device_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return environment


def _how(config: AttentionConfig, workload: Workload, call: ModuleCall) -> dict[str, str]:
    """Backend and fused kernel."""
    import torch

    from attention.inputs import shape_of
    from attention.ops import flex, kernels
    from attention.sizes.kernel_choice import kernel_choice

    # As large as q and k, and in the first of an input.
    sizes = (
        (workload.batch, tokens, heads, workload.head_dim)
        for tokens, heads in ((workload.query_tokens, workload.heads), (workload.seq, workload.groups))
    )
    q, k = (call.inputs[0].detach().as_strided(size, (0, 0, 0, 1)) for size in sizes)
    if workload.is_plain and not workload.weights and flex.resolve(config, q, k, workload.causal) == "flex":
        return {"backend": "flex", "kernel": f"flex_attention, compiled by torch {torch.__version__}"}
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else None
    chosen = kernel_choice(
        config,
        shape_of(q, k, config, workload.causal, documents=len(workload.documents or ()) > 1),
        capability,
        flex=False,
        flash_is_built=kernels.flash_is_built(),
        activated=kernels.activated_flash(),
    )
    return {"backend": "sdpa", "kernel": chosen.kernel}
