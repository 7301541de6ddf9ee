"""The memory of one call of a config: `planner.estimate`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Final, Literal, overload

from pydantic import BeforeValidator

from attention.config import AttentionConfig, Value, as_tuple
from attention.errors import ConfigError
from attention.sizes.flex import unfit_config
from attention.sizes.flex_tiles import unfit_sizes
from attention.sizes.kernel_choice import unfit_kernel
from planner import gpus
from planner.bisection import largest
from planner.calibration import Bound, Calibration, Prediction, bound_of, of_this_torch, shipped
from planner.memory import cuda_process
from planner.memory.allocator import replay, smallest_cap
from planner.memory.allocator_settings import AllocatorSettings
from planner.memory.cuda_process import DeviceLine, Display
from planner.memory.dispatch import kernel_of, plan_of
from planner.memory.dry_runs import dry_bound
from planner.memory.launches import launches_of
from planner.memory.machines import Cpu, Cuda, Machine, this_cpu, units_of
from planner.memory.nccl import NONE, NcclShare, nccl_share
from planner.memory.table import COMPONENTS, Plan, RankPlan
from planner.ranks.links import network_of
from planner.ranks.ring import likest, refuse_sharing
from planner.workload import Dtype, Workload, refuse_features

SCHEMA_VERSION: Final = 1
CUDNN_NOTES: Final = (
    "the memory of cuDNN's attention is planned as that of flash attention, which runs where torch does not "
    "take it, and an allowance; its seconds are predicted from published measurements; nobody has measured "
    "either here",
)
MULTIPROCESSORS: Final = 148
"""Of cards of which the number is not known, all of them large: as a B200 has."""


class Line(Value):
    """One named share of the peak."""

    name: str
    component: str
    bytes: int
    source: str
    """The formula, or where the figure is from."""


Lines = Annotated[
    tuple[Line, ...], BeforeValidator(lambda x: tuple(Line(**y) if isinstance(y, dict) else y for y in x))
]
Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


class MemoryEstimate(Value):
    """The memory of one call, in training with its backward: a first call, pool and caches empty. Where GPUs
    share it, that of the one which needs most."""

    schema_version: Literal[1] = SCHEMA_VERSION
    config: AttentionConfig
    workload: Workload
    on: str
    """The device: `cpu`, or a GPU's name."""
    allocated: int
    """Most bytes in live tensors at once, inputs included."""
    reserved: int
    """Most bytes that the caching allocator holds; on a CPU, which has none, `allocated`."""
    device: int
    """Bytes that the device loses to this process: `reserved` and what lies outside the allocator."""
    needed: int
    """Least memory with which it runs: the allocator gives cached segments back before it fails."""
    upper: int
    """Bytes that are not exceeded, as sure as `confidence` says: on a CPU by what is allocated, on a GPU by
    what the card loses."""
    confidence: str
    components: dict[str, int]
    """Bytes of each component at the peak, of what is allocated; `context` beside it."""
    at: str
    """The phase in which the peak is."""
    lines: Lines
    """Buffers that are alive at the peak."""
    notes: Texts = ()
    """Remarks on these figures."""
    kernel: str = ""
    """The kernel that computes the attention, in how many calls, and why."""
    launches: int | None = None
    """Kernels that the attention launches on a GPU, in training with its backward; None where nobody counted
    them."""
    time: (
        Annotated[Prediction, BeforeValidator(lambda x: Prediction(**x) if isinstance(x, dict) else x)] | None
    ) = None
    """The call's seconds; None where they are not predicted."""


def estimate(
    config: AttentionConfig,
    workload: Workload,
    device: str | gpus.Gpu = "cpu",
    *,
    calibration: Calibration | None = None,
    allocator: str = "",
    display: Display = "headless",
    others_bytes: int = 0,
    context_bytes: int | None = None,
    threads: int | None = None,
    dry: bool = False,
    rank: int | None = None,
) -> MemoryEstimate:
    """The memory of a config on a workload; see `planner.api.estimate` for what it takes. Where GPUs share
    the call it is that of the one that needs most, or of a `rank` of its ring. `dry`: as a dry run has it,
    where cuDNN and NCCL are not there."""
    refuse_features(config, workload)
    refuse_sharing(config, workload)
    if device == "cpu":
        return _on_cpu(config, workload, calibration, threads, rank)
    gpu = gpus.find(device) if isinstance(device, str) else device
    explicit = calibration is not None
    machine = machine_of(gpu, workload.dtype, None)
    calibration = calibration or calibration_for(gpu, machine, workload.dtype)
    if context_bytes is None and calibration is not None:
        context_bytes = calibration.terms.context
    outside = cuda_process.device_lines(
        gpu.architecture, display=display, others_bytes=others_bytes, context_bytes=context_bytes
    )
    settings = AllocatorSettings.parse(allocator)
    if dry:
        if config.backend == "cudnn":
            raise ConfigError("backend='cudnn' has no dry run: cuDNN is not there; use backend='auto'")
        machine = replace(machine, cudnn=False)
    _refuse_unfit(config, workload, gpu)

    def share(ranked: RankPlan) -> NcclShare:
        if dry or workload.gpus == 1:
            return NONE
        return nccl_share(workload.gpus, ranked.peers, network_of(workload.gpus, gpu))

    def taken(ranked: RankPlan) -> tuple[int, int]:
        held = replay(list(ranked.plan.events()), settings).peak_reserved
        return held + share(ranked).most, ranked.plan.peak()[1]

    ranked = _ranked(config, workload, machine, rank, taken)
    shared = share(ranked)
    return _on_gpu(
        config, workload, gpu, machine, calibration, settings, outside, explicit, ranked.plan, shared
    )


@overload
def machine_of(device: gpus.Gpu, dtype: Dtype, threads: int | None) -> Cuda: ...
@overload
def machine_of(device: Literal["cpu"] | gpus.Gpu, dtype: Dtype, threads: int | None) -> Machine: ...
def machine_of(device: Literal["cpu"] | gpus.Gpu, dtype: Dtype, threads: int | None) -> Machine:
    """The machine of a device; `threads` are a CPU's, None for those that torch takes."""
    if not isinstance(device, str):
        return Cuda(device.capability, device.sm_count or MULTIPROCESSORS)
    here = this_cpu(dtype)
    return here if threads is None else replace(here, threads=threads)


def calibration_for(device: Literal["cpu"] | gpus.Gpu, machine: Machine, dtype: Dtype) -> Calibration | None:
    """The calibration that predictions rest on where none is given."""
    if not isinstance(device, str):
        return shipped(device.key)
    calibration = shipped("cpu")
    if calibration is not None and isinstance(machine, Cpu) and dtype in machine.units:
        # This dtype runs in a unit that the calibrated CPU may not have: its kernel copies keys and values.
        return calibration if dtype in units_of(calibration.capability or "") else None
    return calibration


def _on_cpu(
    config: AttentionConfig,
    workload: Workload,
    calibration: Calibration | None,
    threads: int | None,
    rank: int | None,
) -> MemoryEstimate:
    if config.backend == "flex":
        raise ConfigError("backend='flex' runs on CUDA only; use backend='auto' for device='cpu'")
    _refuse_kernel(config, workload, None, "the CPU")
    machine = machine_of("cpu", workload.dtype, threads)
    plan = _ranked(config, workload, machine, rank, lambda ranked: (0, ranked.plan.peak()[1])).plan
    at, allocated = plan.peak()
    chosen = calibration or calibration_for("cpu", machine, workload.dtype)
    one = likest(config, workload) if workload.gpus > 1 else workload
    ranks = one.model_copy(update={"gpus": workload.gpus})
    bound = bound_of(chosen, config, ranks, allocated, explicit=calibration is not None)
    return MemoryEstimate(
        config=config,
        workload=workload,
        on="cpu",
        allocated=allocated,
        reserved=allocated,
        device=allocated,
        needed=allocated,
        upper=bound.upper,
        confidence=bound.confidence,
        components=plan.components(at),
        at=at,
        lines=_lines(plan, at),
        notes=bound.notes,
        kernel=str(kernel_of(config, one, machine)),
    )


def _on_gpu(
    config: AttentionConfig,
    workload: Workload,
    gpu: gpus.Gpu,
    machine: Cuda,
    calibration: Calibration | None,
    settings: AllocatorSettings,
    outside: tuple[cuda_process.DeviceLine, ...],
    explicit: bool,
    plan: Plan,
    shared: NcclShare,
) -> MemoryEstimate:
    outside += (DeviceLine("NCCL", "context", shared.likely, shared.source, False),)
    events = list(plan.events())
    outcome = replay(events, settings)
    at, _ = plan.peak()
    context = int(cuda_process.total(outside))
    cap = smallest_cap(events, settings)
    lost = outcome.peak_reserved + context
    one = likest(config, workload) if workload.gpus > 1 else workload
    ranks = one.model_copy(update={"gpus": workload.gpus})
    bound = dry_bound(config, workload, outcome.peak_reserved, context)
    if calibration is not None and (explicit or of_this_torch(calibration)):
        bound = bound_of(calibration, config, ranks, lost, explicit=explicit, device=gpu.key)
    components = plan.components(at)
    components["context"] = context
    kernel = kernel_of(config, one, machine)
    launches = launches_of(config, workload, machine) if workload.gpus == 1 else None
    notes = bound.notes + (CUDNN_NOTES if kernel.kernel == "cudnn" else ())
    named = tuple(
        Line(name=line.name, component=line.component, bytes=int(line.bytes), source=line.source)
        for line in outside
        if line.bytes
    )
    return MemoryEstimate(
        config=config,
        workload=workload,
        on=gpu.name,
        allocated=outcome.peak_allocated,
        reserved=outcome.peak_reserved,
        device=outcome.peak_reserved + context,
        needed=cap + context,
        upper=bound.upper + shared.most - shared.likely,
        confidence=bound.confidence,
        components={name: components[name] for name in COMPONENTS if components.get(name)},
        at=at,
        lines=_lines(plan, at) + named,
        notes=(*notes, *filter(None, [gpus.caution(gpu)])),
        kernel=str(kernel),
        launches=None if launches is None else int(launches.number),
    )


def _ranked(
    config: AttentionConfig,
    workload: Workload,
    machine: Machine,
    rank: int | None,
    taken: Callable[[RankPlan], tuple[int, int]],
) -> RankPlan:
    """The plan of a rank, by default of the one of which most is `taken`."""
    if workload.gpus == 1:
        return RankPlan(plan_of(config, workload, machine), 0)
    from planner.memory import sharded  # NumPy, which plans of one device do not need

    if rank is None:
        return sharded.fullest_rank(config, workload, machine, taken)
    return sharded.rank_plan(config, workload, machine, rank)


def _refuse_unfit(config: AttentionConfig, workload: Workload, gpu: gpus.Gpu) -> None:
    if workload.dtype == "bfloat16" and not gpus.native_bfloat16(gpu):
        raise ConfigError(
            f"{gpu.name} has no bfloat16 attention kernel: it needs compute capability 8.0; use float16 or "
            "float32"
        )
    why = unfit_config(config) or unfit_sizes(workload.head_dim, workload.itemsize, gpu.capability)
    if config.backend == "flex" and why:
        raise ConfigError(
            f"backend='flex' cannot run this on {gpu.name}: {why}; use backend='auto' or 'sdpa'"
        )
    _refuse_kernel(config, workload, gpu.capability, gpu.name)


def _refuse_kernel(
    config: AttentionConfig, workload: Workload, capability: tuple[int, int] | None, name: str
) -> None:
    why = unfit_kernel(config, workload.head_dim, workload.itemsize, capability)
    if why:
        raise ConfigError(f"backend={config.backend!r} cannot run this on {name}: {why}; use backend='auto'")


def _lines(plan: Plan, at: str) -> Lines:
    return tuple(
        Line(name=buffer.name, component=buffer.component, bytes=int(buffer.bytes), source=buffer.formula)
        for buffer in plan.buffers
        if at in buffer.phases and buffer.bytes
    )


def max_sequence(
    config: AttentionConfig,
    workload: Workload,
    vram: int | str,
    device: str | gpus.Gpu | None = None,
    **options: object,
) -> int:
    """The longest sequence, a multiple of the block size, at which `upper` stays within `vram`.

    0 if not even one block fits. `vram`: bytes, or text such as "8GB". `device`: "cpu" or a GPU; without
    one a generic card of that memory. `options`: those of `estimate`. `workload.seq` is not read; where fewer
    tokens ask than there are, the sequence has as many at least. ConfigError for documents, whose lengths fix
    that of the sequence.
    """
    from planner.units import parse_bytes

    budget = parse_bytes(vram, "vram")
    on = device or gpus.generic(budget)
    unit = config.pattern.block_size if config.pattern else 64
    if workload.documents is not None:
        raise ConfigError(
            "documents fix the length of the sequence, so that no longest is to be found; leave them out"
        )
    least = workload.least_blocks(unit)

    def fits(config: AttentionConfig, blocks: int) -> bool:
        blocks = max(blocks, least)
        if blocks * unit > workload.most_tokens:
            return False
        sized_workload = workload.model_copy(update={"seq": blocks * unit})
        return estimate(config, sized_workload, on, **options).upper <= budget  # type: ignore[arg-type]

    count = _longest(partial(fits, config))
    if config.variant == "block_sparse" and config.backend == "auto" and on != "cpu":
        # From where `auto` leaves FlexAttention it takes less, its lists: a longer one may fit again.
        longer = _longest(partial(fits, config.model_copy(update={"backend": "sdpa"})))
        count = longer if longer > count and fits(config, longer) else count
    return count * unit


def _longest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where smaller ones fit too; 0 if not even 1 does."""
    if not fits(1):
        return 0
    low = 1
    while fits(2 * low):
        low *= 2
    return largest(fits, low, 2 * low)


__all__ = ["Bound", "Line", "MemoryEstimate", "estimate", "max_sequence"]
