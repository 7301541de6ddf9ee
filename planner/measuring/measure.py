"""Truth: a config on a workload, run in a process of its own (`planner/measuring/process.py`), so that out
of memory, a crash or a hang is a `Measurement` too. Imports no torch; the process does.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import signal
import sys
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from attention.config import AttentionConfig, Value, as_tuple
from attention.errors import ConfigError, UnavailableError
from planner.measuring import dry
from planner.measuring.process import Ended, run
from planner.workload import Workload, refuse_features

SCHEMA_VERSION: Final = 1

Outcome = Literal["ok", "oom", "crash", "timeout", "error"]
Device = Literal["cpu", "cuda"]
DryDevice = Annotated[str, Field(pattern=r"^dry:[a-z0-9-]+$")]
"""A card that is not there, by its key."""
OptionalBytes = int | None
ByteSizes = Annotated[tuple[int, ...], BeforeValidator(as_tuple)]

WALKED: Final = "PLANNER_TESTS_WALK_DRY"
"""Tests set it to walk the ways of CUDA in a dry run, whose seconds mean nothing."""
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
    """The variables of `SETTINGS` that were set."""
    date: str
    """When, ISO 8601, UTC."""


class Measurement(Value):
    """One run of a config on a workload. Figures are None unless `kind` is "ok"."""

    schema_version: Literal[1] = SCHEMA_VERSION
    config: AttentionConfig
    workload: Workload
    device: Device | DryDevice
    kind: Outcome
    """`ok`; `oom`, memory ran out; `error`, refused by the library; `timeout`, ran longer than allowed;
    `crash`, everything else: ended by a signal, or an exception that nobody expected."""
    message: str | None = None
    """Why it is not `ok`."""
    allocated: OptionalBytes = None
    """Most bytes allocated at once in a first call, pool and caches empty: parameters, inputs (in
    training the incoming gradient and the gradients too) and all that ran. CPU: see
    `planner.measuring.footprint`; NumPy arrays (layouts) are not among it. CUDA: blocks of the caching
    allocator."""
    allocated_warm: OptionalBytes = None
    """Most bytes allocated at once in a second, equal call, those that pool and caches hold by then
    included."""
    reserved: OptionalBytes = None
    """CUDA: most bytes that the caching allocator held in the first call. CPU: None."""
    device_peak: OptionalBytes = None
    """CUDA: what the driver lost to this process: `context`, `reserved`, and what was taken outside
    torch's allocator by the end. None on the CPU, and without nvidia-smi."""
    context: OptionalBytes = None
    """CUDA: what the driver lost to starting. None on the CPU, and without nvidia-smi."""
    resident: OptionalBytes = None
    """CPU: highest resident size up to the end of the first call, above that before the inputs were
    made. Code that the first call loads and thread-local buffers count, so it has a noise of some MiB.
    CUDA: None."""
    seconds: float | None = None
    """Median over `runs` of warm calls, in training with their backward; None in a dry run."""
    spread: float | None = None
    """(longest - shortest) / median of those runs."""
    reference: float | None = None
    """Seconds of a small dense attention timed between those runs, if asked for: how fast the device was at
    that time. `seconds / reference` is the median of the runs' ratios."""
    largest: ByteSizes = ()
    """CPU: the largest single allocations of the first call, descending."""
    requested: OptionalBytes = None
    """oom: bytes asked for last, if the platform said."""
    available: OptionalBytes = None
    """oom: bytes that were free then, if the platform said."""
    runs: int
    cap_bytes: OptionalBytes = None
    """Memory that the run was held to."""
    environment: Environment

    @model_validator(mode="after")
    def _whole(self) -> Self:
        timed = self.kind == "ok" and not self.is_dry
        if timed != (self.seconds is not None) or (self.kind == "ok") != (self.message is None):
            raise ValueError(
                "a measurement has seconds if it is 'ok' and no dry run, and a message if it is not 'ok'"
            )
        return self

    @property
    def is_dry(self) -> bool:
        """Whether the card was not there: bytes are torch's own, nothing was computed."""
        return dry.is_dry(self.device)

    @property
    def peak(self) -> int | None:
        """The bytes that a budget is compared with: on the CPU `allocated`; on a GPU what the card lost, or,
        where the driver does not tell, what the caching allocator held."""
        return self.allocated if self.device == "cpu" else self.device_peak or self.reserved


def measure(
    config: AttentionConfig,
    workload: Workload,
    device: Device | str = "cpu",
    *,
    timeout: float = 120,
    runs: int = 3,
    threads: int | None = None,
    memory: bool = True,
    cap_bytes: int | None = None,
) -> Measurement:
    """Runs `config` on `workload` in a process of its own. `device`: "cpu", "cuda", or "dry:NAME" for a card
    that is not there, of which bytes are measured and no seconds.

    `timeout`: seconds for everything, starting torch included. `threads`: of the CPU's operators; None
    for torch's choice in a fresh process, whatever torch.set_num_threads was told in this one.
    `memory=False` leaves out the counted calls, and with them `allocated`, `allocated_warm` and `largest` on
    the CPU. `cap_bytes` holds the run to so much memory: on CUDA what the caching allocator may reserve; in
    a dry run it is the card's memory; on the CPU (Linux only, RLIMIT_DATA) private memory above what torch
    takes when idle, for the first two calls.

    ConfigError if config, workload or an argument cannot be right; UnavailableError if it can be seen
    from here that the device is not there.
    """
    check_sizes(config, workload)
    check_arguments(device, timeout, runs, threads, cap_bytes)
    check_device(device, cap_bytes)
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
    variables = None
    if dry.is_dry(device):
        variables = dry.start_variables()
        task["variables"] = dry.task_variables(device, cap_bytes)
    return measurement_of(config, workload, task, run(json.dumps(task), timeout, variables), timeout)


def measurement_of(
    config: AttentionConfig, workload: Workload, task: dict[str, Any], ended: Ended, timeout: float
) -> Measurement:
    """The measurement from the answer of a child that ended."""
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    environment |= ended.answer.get("environment", {})
    return Measurement(
        config=config,
        workload=workload,
        device=f"{dry.PREFIX}{dry.card_of(task['device']).key}"
        if dry.is_dry(task["device"])
        else task["device"],
        runs=task["runs"],
        cap_bytes=task["cap_bytes"],
        environment=Environment(**environment),
        **_outcome(ended, timeout),
    )


def check_sizes(config: AttentionConfig, workload: Workload) -> None:
    """ConfigError unless the parts of a config that name sizes name those of the workload, and it takes what
    the workload has; and for several GPUs, for which there are plans alone."""
    if workload.gpus > 1:
        raise ConfigError(
            f"a measurement is of one device, and the workload of {workload.gpus} GPUs; leave out gpus, or "
            "predict it with planner.estimate"
        )
    refuse_features(config, workload)
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
    for part, expected in named:
        got = {**sizes, "kv_heads": workload.groups}
        wrong = [name for name in expected if expected[name] != got[name]]
        if wrong:
            raise ConfigError(
                f"config and workload disagree: {part} has "
                + ", ".join(f"{name}={expected[name]}" for name in wrong)
                + ", the workload "
                + ", ".join(f"{name}={got[name]}" for name in wrong)
                + "; give both the same"
            )


def check_arguments(
    device: str, timeout: float, runs: int, threads: int | None, cap_bytes: int | None
) -> None:
    """ConfigError for what no measurement can be asked for."""
    if dry.is_dry(device):
        dry.card_of(device)
    elif device not in get_args(Device):
        raise ConfigError(f"device must be 'cpu', 'cuda' or 'dry:NAME', got {device!r}")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ConfigError(f"timeout must be seconds above 0, got {timeout!r}")
    for name, value in (("runs", runs), ("threads", threads), ("cap_bytes", cap_bytes)):
        if value is None and name != "runs":
            continue
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_timed(device: str) -> None:
    """ConfigError for a dry run, which gives no seconds."""
    if dry.is_dry(device):
        raise ConfigError(
            f"{device}: a dry run has no seconds, so nothing can be timed on it; use 'cuda' where it is, "
            "or 'cpu'"
        )


def walked() -> bool:
    """Whether tests walk the ways of CUDA in a dry run: to their ends, over as few runs as have one."""
    return WALKED in os.environ and "STANDIN_LIBRARIES" in os.environ


def check_device(device: str, cap_bytes: int | None) -> None:
    """UnavailableError for what can be seen to be missing without starting anything."""
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
    if "STANDIN_LIBRARIES" in os.environ:
        if walked():
            return
        raise UnavailableError(
            "inside a dry run nothing is computed and nothing can be timed; measure bytes on 'dry:NAME'"
        )
    nodes = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/nvhost-ctrl-gpu")
    if sys.platform == "darwin" or (
        sys.platform == "linux" and not any(os.path.exists(node) for node in nodes)
    ):
        raise UnavailableError("no CUDA device to measure on: this machine has none; use device='cpu'")


def _outcome(ended: Ended, timeout: float) -> dict[str, Any]:
    """Kind, figures and message of a Measurement."""
    if "outcome" in ended.answer:
        outcome: dict[str, Any] = ended.answer["outcome"]
        return outcome
    where = f"while {ended.answer.get('stage', 'starting')}"
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
