"""Truth: a config on a workload, run in a process of its own. Imports no torch; the process does.

The child (`planner/measuring/child.py`) gets its task on stdin and answers, a JSON object a line, in a file
of its own; what it or a library prints goes elsewhere and is kept for diagnosis only. So whatever happens
to it, out of memory, a crash or a hang, is a `Measurement` and leaves the caller as it was.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any, Final, Literal, NamedTuple, Self, get_args

from pydantic import BeforeValidator, model_validator

from attention.config import AttentionConfig, Value, as_tuple
from attention.errors import ConfigError, UnavailableError
from planner.workload import Workload

SCHEMA_VERSION: Final = 1
TAIL = 4000
"""Characters of the child's output that are looked at when it failed."""

Kind = Literal["ok", "oom", "crash", "timeout", "error"]
Device = Literal["cpu", "cuda"]
Bytes = int | None
Sizes = Annotated[tuple[int, ...], BeforeValidator(as_tuple)]

SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "CUBLASLT_WORKSPACE_SIZE",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_MODULE_LOADING",
    "CUDA_VISIBLE_DEVICES",
    "KMP_AFFINITY",
    "LD_PRELOAD",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
)
"""Environment variables that change what is measured."""


class Environment(Value):
    """Where and with what something was measured. None: not known, because it ended before."""

    device: str | None = None
    """Name of the processor or of the GPU."""
    device_bytes: int | None = None
    """Memory of the device."""
    driver: str | None = None
    """Version of the GPU's driver."""
    cuda: str | None = None
    """CUDA that torch was built for."""
    capability: str | None = None
    """Instructions that the kernels use (`AVX2`, `AVX512`, `AVX512, AMX`), or a GPU's compute capability."""
    torch: str | None = None
    python: str
    system: str
    """Operating system and architecture."""
    threads: int | None = None
    """Threads that an operator on the CPU uses."""
    backend: str | None = None
    """`sdpa` or `flex`."""
    kernel: str | None = None
    """The fused kernel used where no bias is needed."""
    settings: dict[str, str]
    """Those of `SETTINGS` that were set."""
    date: str
    """When, ISO 8601, UTC."""


class Measurement(Value):
    """What one config did on one workload. Figures are None unless `kind` is "ok"."""

    schema_version: Literal[1] = SCHEMA_VERSION
    config: AttentionConfig
    workload: Workload
    device: Device
    kind: Kind
    """`ok`; `oom`, memory ran out; `error`, refused by the library; `timeout`, ran longer than allowed;
    `crash`, everything else: ended by a signal, or an exception that nobody expected."""
    message: str | None = None
    """Why it is not `ok`."""
    allocated: Bytes = None
    """Most bytes allocated at once in a first call, pool and caches empty: parameters, inputs (in
    training the incoming gradient and the gradients too) and all that ran. CPU: see
    `planner.measuring.footprint`; NumPy arrays (layouts) are not among it. CUDA: blocks of the caching
    allocator."""
    allocated_warm: Bytes = None
    """The same in a second, equal call, what pool and caches hold by then included."""
    reserved: Bytes = None
    """CUDA: most bytes that the caching allocator held in the first call. CPU: None."""
    device_peak: Bytes = None
    """CUDA: what the driver lost to this process: `context`, `reserved`, and what was taken outside
    torch's allocator by the end. None on the CPU, and without nvidia-smi."""
    context: Bytes = None
    """CUDA: what the driver lost to starting. None on the CPU, and without nvidia-smi."""
    resident: Bytes = None
    """CPU: highest resident size up to the end of the first call, above that before the inputs were
    made. Code that the first call loads and thread-local buffers count, so it has a noise of some MiB.
    CUDA: None."""
    seconds: float | None = None
    """Median over `runs` of warm calls, in training with their backward."""
    spread: float | None = None
    """(longest - shortest) / median of those runs."""
    reference: float | None = None
    """Seconds of a small dense attention timed between those runs, if asked for: how fast the device was at
    that time. `seconds / reference` is the median of the runs' ratios."""
    largest: Sizes = ()
    """CPU: the largest single allocations of the first call, descending."""
    requested: Bytes = None
    """oom: bytes asked for last, if the platform said."""
    available: Bytes = None
    """oom: bytes that were free then, if the platform said."""
    runs: int
    cap_bytes: Bytes = None
    """Memory that the run was held to."""
    environment: Environment

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.kind == "ok") != (self.seconds is not None) or (self.kind == "ok") != (self.message is None):
            raise ValueError("a measurement has seconds if it is 'ok', and a message if it is not")
        return self


def measure(
    config: AttentionConfig,
    workload: Workload,
    device: Device = "cpu",
    *,
    timeout: float = 120,
    runs: int = 3,
    threads: int | None = None,
    memory: bool = True,
    cap_bytes: int | None = None,
) -> Measurement:
    """Runs `config` on `workload` in a process of its own.

    `timeout`: seconds for everything, starting torch included. `threads`: of the CPU's operators; None
    for torch's choice in a fresh process, whatever torch.set_num_threads was told in this one.
    `memory=False` leaves out the counted calls, and with them `allocated`, `allocated_warm` and `largest` on
    the CPU. `cap_bytes` holds the run to so much memory: on CUDA what
    the caching allocator may reserve; on the CPU (Linux only, RLIMIT_DATA) private memory above what
    torch takes when idle, for the first two calls.

    ConfigError if config, workload or an argument cannot be right; UnavailableError if it can be seen
    from here that the device is not there.
    """
    _check(config, workload)
    _check_arguments(device, timeout, runs, threads, cap_bytes)
    _check_device(device, cap_bytes)
    task = {
        "config": config.model_dump(mode="json"),
        "workload": workload.model_dump(mode="json"),
        "device": device,
        "runs": runs,
        "threads": threads,
        "memory": memory,
        "reference": False,
        "cap_bytes": cap_bytes,
    }
    return _measurement(config, workload, task, _run(json.dumps(task), timeout), timeout)


def _measurement(
    config: AttentionConfig, workload: Workload, task: dict[str, Any], ended: _Ended, timeout: float
) -> Measurement:
    """What a child that ended tells about its task."""
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    environment |= ended.said.get("environment", {})
    return Measurement(
        config=config,
        workload=workload,
        device=task["device"],
        runs=task["runs"],
        cap_bytes=task["cap_bytes"],
        environment=Environment(**environment),
        **_outcome(ended, timeout),
    )


def _check(config: AttentionConfig, workload: Workload) -> None:
    """The parts of a config that name sizes name those of the workload."""
    sizes = {"heads": workload.heads, "head_dim": workload.head_dim}
    named: list[tuple[str, dict[str, int]]] = []
    if config.multihead:
        parts = config.multihead
        groups = parts.kv_heads or parts.num_heads
        named.append(
            ("multihead", {"heads": parts.num_heads, "head_dim": parts.head_dim, "kv_heads": groups})
        )
    if config.adaptive:
        named.append(("adaptive", {"heads": config.adaptive.num_heads, "head_dim": config.adaptive.head_dim}))
    for part, asked in named:
        got = {**sizes, "kv_heads": workload.groups}
        wrong = [name for name in asked if asked[name] != got[name]]
        if wrong:
            raise ConfigError(
                f"config and workload disagree: {part} has "
                + ", ".join(f"{name}={asked[name]}" for name in wrong)
                + ", the workload "
                + ", ".join(f"{name}={got[name]}" for name in wrong)
                + "; give both the same"
            )


def _check_arguments(
    device: str, timeout: float, runs: int, threads: int | None, cap_bytes: int | None
) -> None:
    if device not in get_args(Device):
        raise ConfigError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ConfigError(f"timeout must be seconds above 0, got {timeout!r}")
    for name, value in (("runs", runs), ("threads", threads), ("cap_bytes", cap_bytes)):
        if value is None and name != "runs":
            continue
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_device(device: str, cap_bytes: int | None) -> None:
    """Raises UnavailableError for what can be seen to be missing without starting anything."""
    if importlib.util.find_spec("torch") is None:
        raise UnavailableError("measuring needs torch, which is not installed here: pip install torch")
    if device == "cpu" and cap_bytes is not None and sys.platform != "linux":
        raise UnavailableError(
            f"cap_bytes on the CPU needs Linux, this is {sys.platform}; measure without a cap"
        )
    if device != "cuda":
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        raise UnavailableError("no CUDA device to measure on: CUDA_VISIBLE_DEVICES hides all; unset it")
    nodes = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/nvhost-ctrl-gpu")
    if sys.platform == "darwin" or (
        sys.platform == "linux" and not any(os.path.exists(node) for node in nodes)
    ):
        raise UnavailableError("no CUDA device to measure on: this machine has none; use device='cpu'")


# The child finds this very checkout, whatever its working directory holds.
_START = (
    "import sys; root, answer = sys.argv[1:]; root in sys.path or sys.path.insert(0, root); "
    "from planner.measuring.child import main; main(int(answer))"
)


def _command(answer: int) -> list[str]:
    """The child; it writes its answer to the file descriptor `answer`."""
    return [sys.executable, "-P", "-c", _START, str(Path(__file__).resolve().parents[2]), str(answer)]


class _Ended(NamedTuple):
    """How a child ended."""

    code: int
    timed_out: bool
    said: dict[str, Any]
    """The lines of its answer, later over earlier."""
    tail: str
    """The end of what it printed."""


def _run(task: str, timeout: float) -> _Ended:
    """Runs the child in a session of its own, which is killed whole if it takes too long or if anything
    (Ctrl-C) ends the wait."""
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as log:
        handed = above_standard(answer.fileno())
        try:
            process = subprocess.Popen(
                _command(handed), stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(handed,),
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(handed)
        timed_out = False
        try:
            process.communicate(task.encode(), timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdin:
                process.stdin.close()
        return _Ended(process.returncode, timed_out, _said(answer), _tail(log))


def above_standard(file: int) -> int:
    """Another descriptor of an open file, above those of the standard streams: where one of these is closed,
    what is opened gets its number, and a child has that number for the stream."""
    return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)


def _said(answer: IO[bytes]) -> dict[str, Any]:
    """All whole lines of an answer as one object; a child that is killed may leave half a line."""
    answer.seek(0)
    said: dict[str, Any] = {}
    for line in answer.read().splitlines():
        try:
            said |= json.loads(line)
        except ValueError:
            break
    return said


def _tail(log: IO[bytes]) -> str:
    log.seek(max(log.seek(0, os.SEEK_END) - TAIL, 0))
    return log.read().decode(errors="replace").strip()


def _outcome(ended: _Ended, timeout: float) -> dict[str, Any]:
    """Kind, figures and message of a Measurement."""
    if "outcome" in ended.said:
        outcome: dict[str, Any] = ended.said["outcome"]
        return outcome
    where = f"while {ended.said.get('stage', 'starting')}"
    if ended.timed_out:
        return {
            "kind": "timeout",
            "message": f"not done after {timeout:g} s, {where}; allow more with timeout=",
        }
    if ended.code == -signal.SIGKILL:
        return {
            "kind": "oom",
            "message": f"the system killed the process {where}, most likely because memory ran out",
        }
    if ended.code == -signal.SIGABRT and "bad_alloc" in ended.tail:
        return {"kind": "oom", "message": f"memory ran out inside a kernel, {where} (std::bad_alloc)"}
    how = f"was ended by {_signal(-ended.code)}" if ended.code < 0 else f"ended with code {ended.code}"
    printed = f"; it printed: {ended.tail}" if ended.tail else ""
    return {"kind": "crash", "message": f"the process {how} {where}{printed}"}


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
