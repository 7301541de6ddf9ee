"""Calibration: what this device adds to the predictions, and how far they are off on runs unlike those
that this was learnt from. Imports no torch.

The memory model has no coefficients: its bytes follow from the code. Fitted are terms of the platform
alone, to short sequences; the errors that bounds are made of are those of sequences at least HELD_OUT
times as long, drawn at random. Runs that ended without a figure are counted and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from attention.errors import AttentionPlannerError, ConfigError
from planner.calibration import SMALL, Calibration, Domain, Terms, own_path, save
from planner.files import make_folder
from planner.measuring.measure import Device, Measurement, check_timed, walked
from planner.question.runs import OnStep
from planner.workload import features_of

if TYPE_CHECKING:
    import numpy as np

    from planner.fitting.samples import Sample
    from planner.measuring.records import RecordedRuns
    from planner.measuring.server import Batch

FITTED_SHARE: Final = 5
"""One run in so many is fitted to."""
CANDIDATES: Final = 8
"""Candidates for each run that is fitted to."""
SHORT: Final = 1024
"""Tokens of the longest sequence fitted to."""
HELD_OUT: Final = 4
"""Times as long, at least, are held-out sequences."""
LONGEST: Final[dict[Device, int]] = {"cpu": 65_536, "cuda": 1 << 20}
WORK: Final[dict[Device, float]] = {"cpu": 1 << 29, "cuda": 1 << 36}
"""Most work of one run; see `planner.fitting.samples`."""
FLOOR_BYTES: Final[dict[Device, int]] = {"cpu": 1 << 27, "cuda": 1 << 31}
TIMEOUT: Final = 300.0
"""Seconds that one run may take."""
REPETITIONS: Final = 9
"""Warm calls of a timed run, of which the median counts."""
WALKED_RUNS: Final = 6
"""Runs to time where tests walk this dry, each as small as for a CPU. With kernels that do nothing a run
costs what its host code does: the 168 of a card, of up to a million tokens, take minutes and mean no more."""
"""Told (runs done, runs in all, what comes next)."""


def calibrated(
    device: Device,
    *,
    seed: int,
    runs: int,
    progress: OnStep | None,
    path: str | Path | None,
    threads: int | None,
    speed: bool,
) -> Calibration:
    """The calibration that `planner.calibrate` returns, and saves."""
    check_timed(device)
    fitted, held_out = plan_runs(device, seed, runs)
    from planner.measuring.server import Batch

    timed, timed_apart = plan_timed(device, seed) if speed else ([], [])
    total = runs + len(timed) + len(timed_apart)
    with Batch(device, timeout=TIMEOUT, threads=threads) as batch:
        start = start_run(batch.measure)
        key = key_of(device, start)
        path = own_path(key) if path is None else Path(path)
        records_path = Path(f"{path}.records.jsonl")
        make_folder(path, "the calibration")
        earlier = _earlier_runs(records_path, start)
        measured = _measured(device, batch, [*fitted, *held_out], earlier, records_path, (0, total), progress)
    seconds: list[Measurement] = []
    if speed:
        # Without counting memory a run is short, so that many calls of it are timed.
        with Batch(
            device, timeout=TIMEOUT, threads=threads, memory=False, runs=REPETITIONS, reference=True
        ) as batch:
            earlier = _earlier_runs(records_path, start, REPETITIONS)
            seconds = _measured(
                device, batch, [*timed, *timed_apart], earlier, records_path, (runs, total), progress
            )
    if progress:
        progress(total, total, "done")
    command = f"planner calibrate --device {device} --runs {runs} --seed {seed}"
    calibration = calibration_of(
        key,
        start,
        measured[: len(fitted)],
        measured[len(fitted) :],
        command + (f" --threads {threads}" if threads else "") + ("" if speed else " --no-speed"),
    )
    calibration = with_speed(calibration, seconds[: len(timed)], seconds[len(timed) :])
    save(calibration, path)
    with contextlib.suppress(OSError):
        records_path.unlink(missing_ok=True)
    return calibration


def with_speed(
    calibration: Calibration, timed: Sequence[Measurement], timed_apart: Sequence[Measurement]
) -> Calibration:
    """The calibration with seconds fitted to runs and held to others; as it is where none of the runs has
    any."""
    if not any(m.kind == "ok" for m in timed):
        return calibration
    from planner.fitting.speed import speed_fit

    return calibration.model_copy(update={"speed": speed_fit(timed, timed_apart)})


def plan_timed(device: Device, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(runs to fit seconds to, held-out ones)."""
    from planner.fitting import speed

    if walked():
        return speed.plan_speed("cpu", seed, WALKED_RUNS)
    return speed.plan_speed(device, seed, speed.RUNS)


def _measured(
    device: Device,
    batch: Batch,
    samples: Sequence[Sample],
    earlier: RecordedRuns,
    records_path: Path,
    steps: tuple[int, int],
    progress: OnStep | None,
) -> list[Measurement]:
    """A measurement of each sample, made now and kept if there is none. `steps`: (done before, of all)."""
    from planner.measuring import records

    measured: list[Measurement] = []
    for sample in samples:
        config, workload = sample
        if progress:
            progress(steps[0] + len(measured), steps[1], f"{config.variant}, {workload.seq:,} tokens")
        measurement = earlier.get(config, workload, device)
        if measurement is None:
            measurement = batch.measure(config, workload)
            records.append(records_path, measurement)
        measured.append(measurement)
    return measured


def plan_runs(device: Device, seed: int, runs: int) -> tuple[list[Sample], list[Sample]]:
    """(runs to fit to: short, the most informative of many; held-out runs: long, at random)."""
    from planner.fitting.samples import samples

    if device not in LONGEST:
        raise ConfigError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if type(runs) is not int or runs < 2:
        raise ConfigError(
            f"runs must be a whole number of at least 2, got {runs!r}: one to fit, one held out"
        )
    if type(seed) is not int:
        raise ConfigError(f"seed must be a whole number, got {seed!r}")
    count = max(runs // FITTED_SHARE, 1)
    bounds: dict[str, Any] = {"work": WORK[device], "floor_bytes": FLOOR_BYTES[device]}
    candidates = list(islice(samples(seed, longest=SHORT, **bounds), CANDIDATES * count))
    chosen = most_informative([features(sample) for sample in candidates], count)
    long = samples(seed, shortest=HELD_OUT * SHORT, longest=LONGEST[device], **bounds)
    return [candidates[index] for index in chosen], list(islice(long, runs - count))


def features(sample: Sample) -> list[float]:
    """Properties that a platform's terms might depend on: variant, dtype, mode, sizes."""
    import math

    config, workload = sample
    named = [
        *(config.variant == name for name in ("dense", "dilated", "block_sparse", "adaptive")),
        *(workload.dtype == name for name in ("float16", "bfloat16", "float64")),
        workload.mode == "training",
        workload.causal,
        workload.groups < workload.heads,
        config.multihead is not None,
        workload.weights,
        config.pool == "on",
    ]
    sizes = (workload.seq, workload.floor, config.workspace_bytes)
    return [1.0, *map(float, named), *(math.log2(size) / 20 for size in sizes)]


def most_informative(rows: Sequence[Sequence[float]], count: int) -> list[int]:
    """Indices of the rows to choose: one at a time the one that adds most to the determinant of the
    information matrix of those chosen, `sum of x x^T`, begun with a little in every direction."""
    import numpy as np

    x = np.asarray(rows, dtype=float)
    inverse: np.ndarray[Any, Any] = np.eye(x.shape[1]) * 1e3
    left, chosen = list(range(len(x))), []
    for _ in range(min(count, len(x))):
        # det(A + x x^T) = det(A) (1 + x^T A^-1 x)
        gains = np.einsum("ij,jk,ik->i", x[left], inverse, x[left])
        best = left.pop(int(np.argmax(gains)))
        along = inverse @ x[best]
        inverse -= np.outer(along, along) / (1 + x[best] @ along)
        chosen.append(best)
    return chosen


def calibration_of(
    key: str, start: Measurement, fitted: Sequence[Measurement], held_out: Sequence[Measurement], command: str
) -> Calibration:
    """The calibration that follows from these measurements. `start` is of the same device and says where
    that was."""
    from statistics import median

    short, long = _whole(fitted), _whole(held_out)
    if not short or not long:
        failed = next(m for m in (*fitted, *held_out) if m.kind != "ok")
        raise AttentionPlannerError(
            f"nothing to calibrate with: of {len(fitted) + len(held_out)} runs {len(short) + len(long)} gave "
            f"figures, too few; the first that did not: {failed.message}"
        )
    contexts = [m.context for m in (start, *short) if m.context is not None]
    context = round(median(contexts)) if contexts else None
    differences = [peak(m, context) - predicted(m, key, context) for m in short]
    overhead = max(round(median(differences)), 0)

    def error(m: Measurement) -> float:
        expected = predicted(m, key, context) + overhead
        return (peak(m, context) - expected) / (expected + SMALL)

    where = start.environment
    return Calibration(
        device=key,
        name=where.device or key,
        capability=where.capability,
        torch=where.torch or "unknown",
        threads=where.threads if key == "cpu" else None,
        date=where.date,
        command=command,
        terms=Terms(overhead=overhead, context=context),
        fitted=len(short),
        fitted_longest=max(m.workload.seq for m in short),
        errors=tuple(sorted(error(m) for m in long)),
        domain=Domain(
            variants=_names(m.config.variant for m in long),
            dtypes=_names(m.workload.dtype for m in long),
            modes=_names(m.workload.mode for m in long),
            longest=max(m.workload.seq for m in long),
            features=_names(one for m in long for one in features_of(m.workload) if one != "weights"),
        ),
        failed=len(fitted) + len(held_out) - len(short) - len(long),
    )


def peak(measurement: Measurement, context: int | None) -> int:
    """The figure that predictions are held to: what the device lost (where the driver does not tell,
    reserved and context), on a CPU what was allocated."""
    if measurement.device == "cpu":
        figure = measurement.allocated
    elif measurement.device_peak is not None:
        figure = measurement.device_peak
    else:
        figure = None if measurement.reserved is None else measurement.reserved + (context or 0)
    assert figure is not None, "a run that is 'ok' has figures"
    return figure


def predicted(measurement: Measurement, key: str, context: int | None) -> int:
    """The prediction of the same figure."""
    from planner.memory.estimate import estimate

    config, workload = measurement.config, measurement.workload
    # The calibration that there may be is of no concern here, nor whether it can be read.
    none = _nothing_known(measurement.environment.torch)
    if key == "cpu":
        threads = measurement.environment.threads
        return estimate(config, workload, key, calibration=none, threads=threads).allocated
    # Without nvidia-smi no context is known, and none is measured.
    return estimate(config, workload, key, calibration=none, context_bytes=context or 0).device


def _nothing_known(torch: str | None) -> Calibration:
    return Calibration(
        device="",
        name="",
        capability=None,
        torch=torch or "",
        threads=None,
        date="",
        command="",
        terms=Terms(),
        fitted=1,
        fitted_longest=1,
        errors=(0.0,),
        domain=Domain(variants=(), dtypes=(), modes=(), longest=1),
    )


def _whole(measurements: Iterable[Measurement]) -> list[Measurement]:
    return [m for m in measurements if m.kind == "ok"]


def _names(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))


def start_run(run: Callable[..., Measurement]) -> Measurement:
    """A run that cannot fail, and so says what is wrong with the device if it does."""
    from attention.config import AttentionConfig
    from planner.workload import Workload

    measurement = run(AttentionConfig(variant="dense"), Workload(seq=64, dtype="float32"))
    if measurement.kind != "ok":
        raise AttentionPlannerError(
            f"nothing can be measured on this {measurement.device}: {measurement.message}"
        )
    return measurement


def key_of(device: Device, start: Measurement) -> str:
    """`cpu`, or the key of the GPU."""
    if device == "cpu":
        return "cpu"
    from planner import gpus

    return gpus.of_device(start.environment.device or "", start.environment.device_bytes).key


def _earlier_runs(records_path: Path, start: Measurement, repetitions: int = 1) -> RecordedRuns:
    """Runs that an interrupted calibration left, of those that this device and torch made; those timed so
    many times."""
    from planner.measuring import records

    measurements = records.read(records_path) if records_path.exists() else []
    return records.RecordedRuns(
        m for m in measurements if _place(m) == _place(start) and m.runs == repetitions
    )


def _place(m: Measurement) -> tuple[object, ...]:
    where = m.environment
    # A run that died early may not say where it ran.
    return m.device, where.torch, where.device, where.capability, where.threads
