"""The front door: `estimate`, `predict_time`, `recommend`, `tune` and `calibrate`. Imports no torch, and all
that a function needs only when it is called.

recommend(vram="8GB", seq=131072).build()
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from planner.question.runs import CALIBRATION_RUNS, TRIAL_RUNS, TRIAL_TIMEOUT, TUNING_TRIALS

if TYPE_CHECKING:
    from attention.config import AttentionConfig
    from planner.answers.recommendation import Recommendation
    from planner.answers.tuned import Tuned
    from planner.calibration import Calibration, Prediction
    from planner.gpus import Gpu
    from planner.measuring.measure import Device
    from planner.memory.cuda_process import Display
    from planner.memory.estimate import MemoryEstimate
    from planner.question.asked import Asked, Sampler
    from planner.search.tune import Measure, TuningProgress
    from planner.workload import Workload


def estimate(
    config: AttentionConfig,
    workload: Workload,
    device: str | Gpu = "cpu",
    *,
    link: str | None = None,
    node: int | None = None,
    calibration: Calibration | None = None,
    allocator: str = "",
    display: Display = "headless",
    others_bytes: int = 0,
    context_bytes: int | None = None,
    threads: int | None = None,
    dry: bool = False,
) -> MemoryEstimate:
    """Predicts the memory of a config on a workload, without running it and without a GPU.

    `device`: "cpu" or a GPU (`planner gpus` lists them). `calibration`: in place of the shipped one;
    one of another device or torch is used with a note. `allocator`: as PYTORCH_CUDA_ALLOC_CONF has it.
    `display`, `others_bytes`, `context_bytes`: what else is on the card. `threads`: a CPU's; None
    for those that torch would take in a fresh process (OMP_NUM_THREADS, or the cores that this one may run
    on), not what torch.set_num_threads was told in this one. `dry`: of a dry run, where cuDNN is not there.

    A module is taken to be of the workload's dtype, its parameters too (`module.to(dtype)`): a scorer left in
    float32 beside 16-bit q, k and v takes more. Documents are taken to be numbered in int32.

    Where GPUs share the call (`workload.gpus`), the memory is that of the one that needs most, and the answer
    is a `SharedEstimate`, whose `sharing` has what they exchange and the seconds that takes. `link`: what
    joins them, "nvlink4", or for nodes of `node` GPUs "nvlink4,ndr"; None for what such devices usually have.
    """
    from planner.answers.prediction import with_time
    from planner.answers.shared import refuse_idle_links, with_sharing
    from planner.memory.estimate import estimate as predicted

    if workload.gpus == 1:
        refuse_idle_links(link, node)
    prediction = predicted(
        config,
        workload,
        device,
        calibration=calibration,
        allocator=allocator,
        display=display,
        others_bytes=others_bytes,
        context_bytes=context_bytes,
        threads=threads,
        dry=dry,
    )
    shared = with_sharing(prediction, device, link=link, node=node, calibration=calibration, threads=threads)
    return with_time(shared, device, calibration=calibration, threads=threads, dry=dry)


def predict_time(
    config: AttentionConfig,
    workload: Workload,
    device: str | Gpu = "cpu",
    *,
    link: str | None = None,
    node: int | None = None,
    calibration: Calibration | None = None,
    threads: int | None = None,
) -> Prediction:
    """Predicts the seconds of a warm call, in training with its backward, and the range that they are in with
    four calls of five. `device` and the options: as of `estimate`.

    Seconds rest on the device's calibration; without one on documented defaults, which for the attention
    kernels of GPUs are fitted to published measurements. Where GPUs share the call, it is the time of the one
    that takes longest. ConfigError where nothing is known of the device's speed, and for `weights=True`.
    """
    from planner.answers.prediction import predicted_time

    return predicted_time(
        config, workload, device, link=link, node=node, calibration=calibration, threads=threads
    )


def recommend(
    vram: str | int | None = None, seq: str | int | None = None, **options: Unpack[Asked]
) -> Recommendation:
    """The attention for a sequence within a memory budget.

    `vram`: bytes, or text such as "8GB"; None for all of the card. `seq`: tokens; None for the longest that
    fits. `options`: see `Asked`, and as `planner.estimate` takes them `calibration`, `allocator`, `display`,
    `others_bytes`, `context_bytes` and `threads`.

    `NothingFitsError` where nothing does, naming what would help.
    """
    from planner.search.recommend import answered

    return answered(vram, seq, **options).answer


def calibrate(
    device: Device = "cpu",
    *,
    seed: int = 0,
    runs: int = CALIBRATION_RUNS,
    progress: Callable[[int, int, str], None] | None = None,
    path: str | Path | None = None,
    threads: int | None = None,
    speed: bool = True,
) -> Calibration:
    """Measures `runs` runs on this machine, each in a process of its own, and saves what they tell. With
    `speed`, `planner.fitting.speed.RUNS` more are timed.

    The runs follow from `seed` and `runs`. `path`: None for where `planner.estimate` looks first. Beside it,
    in `*.records.jsonl`, each run is kept as it ends, so that the same call goes on where an interrupted
    one stopped; that file goes when all is done. `threads`: of the CPU's operators.

    ConfigError for arguments that cannot be right, UnavailableError where there is no such device,
    AttentionPlannerError if nothing could be measured, or what was measured not be kept.
    """
    from planner.fitting.calibrate import calibrated

    return calibrated(
        device, seed=seed, runs=runs, progress=progress, path=path, threads=threads, speed=speed
    )


def tune(
    vram: str | int,
    seq: str | int,
    *,
    device: Device = "cpu",
    trials: int = TUNING_TRIALS,
    timeout: float = TRIAL_TIMEOUT,
    runs: int = TRIAL_RUNS,
    sampler: Sampler = "tpe",
    seed: int = 0,
    storage: str | None = None,
    study: str | None = None,
    measure: Measure | None = None,
    records: str | Path | None = None,
    learn: bool = False,
    progress: Callable[[TuningProgress], None] | None = None,
    **options: Any,
) -> Tuned:
    """Measures up to `trials` configs on this device and returns the fastest that runs within `vram` and, as
    predicted, passes the gates; never one slower than what the models alone recommend.

    `timeout`: seconds for a trial. `storage`, `study`: where trials are kept; by default in the user's data
    folder, under a name that the question has. `measure`: in place of running, e.g. recorded runs. `records`:
    a file that every measurement is added to. `learn`: correct the calibration's speeds by what was measured,
    for predictions from then on. `options`: as `planner.recommend` takes it. Ctrl-C ends it early
    with what there is, once something was measured.
    """
    from planner.search.tune import tuned

    return tuned(
        vram,
        seq,
        device=device,
        trials=trials,
        timeout=timeout,
        runs=runs,
        sampler=sampler,
        seed=seed,
        storage=storage,
        study=study,
        measure=measure,
        records=records,
        learn=learn,
        progress=progress,
        options=options,
    )
