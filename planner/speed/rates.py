"""Seconds that a unit of work costs on a device: fitted to measurements, or documented defaults. No torch.

Defaults are not measured here on the device they are for, and say so. Where they come from:

- Attention kernels of GPUs: fitted to published measurements, see `planner/speed/gpu_kernels.py`. Matrix
  products in float64, for which nobody published any: half the peak, scores in memory.
- A PyTorch operator takes 5 to 25 microseconds of the host's time: 5 here, times the operators that a call, a
  tile and a gather consist of. Torch's own attention takes 10 to 14 on the host of a V100
  (KaigeZheng/SDPA-Benchmark), a dense call here 1.4 to 2.9 times as long (docs/explanation/speed.md). The
  host's time hides behind the device's, or the other way round: the longer of both counts.
- What surrounds a kernel on a GPU: its reads and writes at the memory's bandwidth.
- CPUs: what one thread of an AMD EPYC took, fitted to 250 runs on a busy machine; see `default_cpu_rates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

from attention.errors import ConfigError
from planner.calibration import Costs, Rates, SpeedFit
from planner.gpus import Gpu, backends
from planner.memory.estimate import calibration_for, machine_of
from planner.memory.machines import Cpu, Machine
from planner.speed.gpu_kernels import KERNELS, Direction, family_of, kernel_costs
from planner.workload import ITEMSIZE, Dtype, Workload

NOT_MEASURED: Final = "documented defaults: not measured"

HOST: Final = ("launches", "gathers", "gates", "tiles", "passes")
"""Units of work that a GPU's host does."""
OPERATOR: Final = 5e-6
"""Seconds of the host's time an operator."""


def default_rates(device: Gpu | Machine) -> Rates:
    """Rates by what is documented above: of a card by its peaks, dtypes without a known one left out; or of
    a CPU. ConfigError for a GPU of which nothing is known."""
    if isinstance(device, Cpu):
        return default_cpu_rates(device)
    if not isinstance(device, Gpu):
        raise ConfigError(f"the speed of {device} is not known; name a card, e.g. rtx4090")
    gpu = device
    ahead, behind, peaks = {}, {}, {}
    bandwidth = gpu.bandwidth or 0.0
    for dtype in ITEMSIZE:
        peak = gpu.rates.get(dtype)
        if dtype == "float16" and gpu.capability < (7, 0):  # kernels there compute in float32
            peak = gpu.rates.get("float32")
        if not peak or not bandwidth:
            continue
        peaks[dtype] = peak
        ahead[dtype], behind[dtype] = _gpu_costs(gpu, dtype, peak, bandwidth)
    if not peaks:
        raise ConfigError(
            f"no peak rate of {gpu.name} is known, so that its speed cannot be predicted; calibrate"
        )
    return Rates(
        device=gpu.key,
        source=f"{NOT_MEASURED} here, kernels as published; {gpu.name}",
        workers=gpu.sm_count or 1,
        forward=ahead,
        backward=behind,
        peak=peaks,
        bandwidth=bandwidth,
    )


def _gpu_costs(gpu: Gpu, dtype: str, peak: float, bandwidth: float) -> tuple[Costs, Costs]:
    size = ITEMSIZE[dtype]
    single = gpu.rates.get("float32") or peak
    beside = {
        "gathered": 4 * size / bandwidth,
        # A part is written, subtracted and added in place: seven reads and writes of a number.
        "merged": (7 * size if size < 8 else 3 * size + 7 * 4) / bandwidth,
        "summed": 2 * (size + 2 * max(size, 4)) / bandwidth,
        "sunk": size / bandwidth,
        "matmul": 2 / (0.7 * peak),
        "scored": 2 / (0.5 * single),
        "ranked": 160 / bandwidth,
        "gated": 40 / bandwidth,
    }
    ahead = {
        **beside,
        **_kernels(gpu, dtype, "forward", peak, bandwidth),
        "launches": 4 * OPERATOR,
        "gathers": 15 * OPERATOR,
        "tiles": 4 * OPERATOR,
        "passes": 4 * OPERATOR,
    }
    behind = {
        **beside,
        **_kernels(gpu, dtype, "backward", peak, bandwidth),
        "launches": 8 * OPERATOR,
        "gathers": 25 * OPERATOR,
        "gates": 25 * OPERATOR,
        "tiles": 4 * OPERATOR,
        "passes": 6 * OPERATOR,
    }
    return ahead, behind


def _kernels(gpu: Gpu, dtype: str, step: Direction, peak: float, bandwidth: float) -> Costs:
    """Costs of the units of all kernels that run a dtype on a card."""
    if dtype == "float64":  # products at half the peak, and scores in memory some eight times over
        times = 1 if step == "forward" else 2
        return {
            "plain.work": (8 if step == "forward" else 25) / peak,
            "plain.pairs": 8 * times * ITEMSIZE[dtype] / bandwidth,
        }
    kernels = set(backends(gpu, cast(Dtype, dtype)))
    return {
        f"{kernel}.{unit}": cost
        for kernel in KERNELS
        if {"flash2": "flash"}.get(kernel, family_of(kernel)) in kernels - {"plain"}
        for unit, cost in kernel_costs(kernel, step, gpu, dtype).items()
    }


def speed_rates_of(card: Any, workload: Workload, options: Mapping[str, Any]) -> Rates:
    """Measured rates of the device, where a calibration has them for the dtype; else documented defaults.
    `options`: of `planner.estimate`."""
    fit = speed_fit_of(card, workload, options)
    if fit is not None:
        return fit.rates
    return default_rates(
        card if isinstance(card, Gpu) else machine_of(card, workload.dtype, options.get("threads"))
    )


def speed_fit_of(card: Any, workload: Workload, options: Mapping[str, Any]) -> SpeedFit | None:
    """What a calibration says of the device's speed in the workload's dtype; None where there is none."""
    machine = machine_of(card, workload.dtype, options.get("threads"))
    calibration = options.get("calibration") or calibration_for(card, machine, workload.dtype)
    fit = calibration.speed if calibration is not None else None
    return fit if fit is not None and workload.dtype in fit.rates.forward else None


CPU_BANDWIDTH: Final = 8e9
"""Bytes a second and thread: assumption."""
CPU_MATRIX_UNIT: Final = 8.0
"""Times as fast with a matrix unit for the type (docs/explanation/speed.md, AMX)."""
CPU_PEAK: Final = {"float32": 80e9, "bfloat16": 75e9, "float16": 45e9, "float64": 40e9}
"""FLOP/s of a thread in large calls."""
_FORWARD: Final[dict[str, Costs]] = {
    "float32": {"work": 4.4e-11, "pairs": 8e-10, "keys": 8e-10, "queries": 1e-9, "merged": 1e-8},
    "bfloat16": {"work": 4.6e-11, "pairs": 1.1e-9, "keys": 9e-10, "queries": 1e-9, "merged": 1.2e-8},
    "float16": {"work": 3.2e-11, "pairs": 2.2e-9, "keys": 4.8e-9, "queries": 8e-9, "merged": 2.8e-8},
}
_BACKWARD: Final[Costs] = {
    "work": 9e-11, "pairs": 2.5e-9, "keys": 1e-9, "queries": 1.2e-8, "summed": 1e-9, "gathered": 7e-9,
    "widened": 1e-9, "tokens": 1e-9, "gated": 3e-9, "launches": 1e-4, "gathers": 4e-4, "tiles": 1e-4,
    "passes": 1e-3, "scored": 1.2e-10, "ranked": 1e-6, "gates": 5e-4,
}  # costs beside those of forward, row by row  # fmt: skip
_FORWARD_BESIDE: Final[Costs] = {
    "gathered": 7e-10,
    "tokens": 5e-10,
    "launches": 5e-5,
    "gathers": 9e-5,
    "tiles": 5e-5,
    "passes": 3e-4,
    "scored": 1e-10,
    "ranked": 5e-8,
}
_MATMUL: Final = {
    "float32": (2.8e-11, 2.5e-11),
    "bfloat16": (2.7e-10, 8.1e-10),
    "float16": (1.8e-10, 9.2e-10),
}
"""Seconds a multiply-add, forward and backward."""


def default_cpu_rates(cpu: Cpu) -> Rates:
    """Rates of a CPU that nobody has calibrated: those of one thread of an AMD EPYC (AVX2, torch 2.13),
    shared by its threads; float64 takes twice as long as float32."""
    ahead, behind = {}, {}
    for dtype, kernel in _FORWARD.items():
        fast = CPU_MATRIX_UNIT if dtype in cpu.units else 1.0
        products = {"matmul": _MATMUL[dtype][0]}
        ahead[dtype] = {name: cost / fast for name, cost in (kernel | products).items()} | _FORWARD_BESIDE
        behind[dtype] = _BACKWARD | {"matmul": _MATMUL[dtype][1] / fast}
    with_double(ahead)
    with_double(behind)
    for costs in (*ahead.values(), *behind.values()):
        for name in costs.keys() - set(HOST):
            costs[name] /= cpu.threads
    peaks = {
        dtype: peak * cpu.threads * (CPU_MATRIX_UNIT if dtype in cpu.units else 1)
        for dtype, peak in CPU_PEAK.items()
    }
    return Rates(
        device="cpu",
        source=f"{NOT_MEASURED}; a CPU of {cpu.threads} threads",
        workers=cpu.threads,
        forward=ahead,
        backward=behind,
        peak=peaks,
        bandwidth=CPU_BANDWIDTH * cpu.threads,
    )


def with_double(costs: dict[str, Costs]) -> None:
    """Adds float64 of a CPU, which is not timed: half as many numbers to a register, twice the time of
    float32, the host's part apart."""
    if "float32" in costs and "float64" not in costs:
        single = costs["float32"]
        costs["float64"] = {name: cost * (1 if name in HOST else 2) for name, cost in single.items()}
