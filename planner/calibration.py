"""A calibration: what measuring a device told about the predictions, and the bound that follows from it.

The memory model has no coefficients to fit: its bytes follow from the code. What a device can add are
platform terms, and how far held-out runs were from their predictions. The bound is conformal: of n
held-out runs the ceil(0.99 (n + 1))-th smallest error is not exceeded by a new one of the same kind in at
least 99% of cases, whatever the errors' distribution. Imports no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from attention.config import AttentionConfig, Value, as_tuple
from attention.errors import AttentionPlannerError, ConfigError
from attention.features import NAMES
from planner.files import make_folder, read_bytes, write_whole
from planner.workload import Workload, features_of

SCHEMA_VERSION: Final = 1
SHIPPED: Final = Path(__file__).with_name("data") / "calibrations"
"""Calibrations that come with this package."""
LEVEL: Final = 0.99
SMALL: Final = 64 * 1024
"""Errors are relative to the prediction and this many bytes, which small ones have by rounding alone."""
ROUNDING: Final = 4096
"""Added to every measured bound: buffers of a few hundred bytes that no plan lists."""
UNMEASURED: Final = 0.05
"""Margin where nothing was measured: judgement."""
OUTSIDE: Final = 2.0
"""Factor on the margin, and percent added to it, outside of what was measured: judgement."""

Numbers = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


class Terms(Value):
    """Bytes that depend on the platform and not on a config."""

    overhead: Annotated[int, Field(ge=0)] = 0
    """Bytes that are allocated beside every plan."""
    context: Annotated[int, Field(ge=0)] | None = None
    """CUDA: bytes that the driver takes for the process."""


_LATER: Final[dict[str, tuple[Any, ...]]] = {"features": ((), []), "ranks": (1,)}
"""Fields that came later, and what they are without any."""


class Domain(Value):
    """Configs and workloads that the held-out runs covered."""

    variants: Names
    dtypes: Names
    modes: Names
    longest: Annotated[int, Field(ge=1)]
    """Tokens of the longest sequence."""
    features: Names = ()
    """What calls had beyond sizes: `queries`, fewer of them than tokens, `documents`, `sinks`."""
    ranks: Annotated[int, Field(ge=1)] = 1
    """The most that shared a sequence."""

    @model_serializer(mode="wrap")
    def _written(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The fields; those that came later, features and ranks, where there are some."""
        fields: dict[str, Any] = written(self)
        return {name: value for name, value in fields.items() if value not in _LATER.get(name, ())}

    def misses(self, config: AttentionConfig, workload: Workload) -> tuple[str, ...]:
        """The properties of a call that no held-out run had, such as `dtype float64`."""
        outside = []
        for what, value, covered in (
            ("variant", config.variant, self.variants),
            ("dtype", workload.dtype, self.dtypes),
            ("mode", workload.mode, self.modes),
        ):
            if value not in covered:
                outside.append(f"{what} {value}")
        if workload.seq > self.longest:
            outside.append(f"{workload.seq:,} tokens (measured up to {self.longest:,})")
        ranks = min(workload.gpus, (config.sharding and config.sharding.ring_size) or workload.gpus)
        if ranks > self.ranks:
            outside.append(f"{ranks} ranks")
        outside += [
            NAMES[feature]
            for feature in features_of(workload)
            if feature != "weights" and feature not in self.features
        ]
        return tuple(outside)


Costs = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]
"""Seconds for each unit of a total; names as in `planner.speed.work.NAMES`, those left out cost nothing."""


class Rates(Value):
    """Seconds for each unit of work on a device, by pass and dtype."""

    device: str
    """`cpu`, or a GPU's key."""
    source: str
    """Where they come from: `measured ...`, or `NOT_MEASURED` and of what."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Threads or multiprocessors that share a kernel call; 1 if not known."""
    forward: dict[str, Costs]
    """Costs of the forward pass by dtype."""
    backward: dict[str, Costs]
    peak: dict[str, Annotated[float, Field(gt=0)]]
    """FLOP/s by dtype, to which utilisation is relative."""
    bandwidth: Annotated[float, Field(gt=0)]
    """Bytes a second of the device's memory."""

    @model_validator(mode="after")
    def _of_today(self) -> Self:
        """Refuses a GPU's rates of before its kernels were told apart: they had one cost of `work` for
        all."""
        if self.device != "cpu" and any("work" in costs for costs in self.forward.values()):
            raise ConfigError(
                f"its speeds of {self.device} are of an earlier version, which did not tell kernels apart"
            )
        return self

    def costs(self, step: Literal["forward", "backward"], dtype: str) -> Costs:
        """Costs of a pass in a dtype; ConfigError if there are none."""
        by_dtype: dict[str, Costs] = getattr(self, step)
        if dtype not in by_dtype:
            raise ConfigError(
                f"no speed of {dtype} is known on {self.device}, only of {', '.join(sorted(by_dtype))}; "
                "use one of these" + (" or calibrate" if self.device == "cpu" else "")
            )
        return by_dtype[dtype]


class SpeedFit(Value):
    """Rates fitted to a device's runs, and how far they are off on runs that they were not fitted to."""

    rates: Rates
    fitted: Annotated[int, Field(ge=1)]
    """Runs that the rates were fitted to."""
    held_out: Annotated[int, Field(ge=0)]
    errors: Numbers = ()
    """(predicted - measured) / measured of the held-out runs, ascending."""
    median_error: Annotated[float, Field(ge=0)] = 0.0
    """Median of the errors' absolute values."""
    rank_correlation: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Spearman's rank correlation of predicted and measured seconds of the held-out runs."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Median spread of a held-out run's repetitions, relative: below it nothing can be told."""

    def summary(self) -> str:
        """A sentence on runs, errors and noise."""
        return (
            f"seconds: fitted to {self.fitted} timed runs; on {self.held_out} held-out ones off by "
            f"{self.median_error:.1%} (median), rank correlation {self.rank_correlation:.3f}, where repeated "
            f"calls spread by {self.noise:.1%}"
        )


class Prediction(Value):
    """Seconds of a warm call, in training with its backward, and how sure they are."""

    seconds: Annotated[float, Field(gt=0)]
    low: Annotated[float, Field(gt=0)]
    """The seconds are not below this and not above `high` in four calls of five: by held-out runs of the
    device's calibration, on a GPU without one by published measurements; judgement where there is neither."""
    high: Annotated[float, Field(gt=0)]
    launches: Annotated[int, Field(ge=0)] | None = None
    """Kernels that the attention launches on a GPU; None where nobody counted them."""
    source: str = ""
    """Where the seconds come from."""


class Calibration(Value):
    """Platform terms of a device and how far predictions were off on held-out runs."""

    schema_version: Literal[1] = SCHEMA_VERSION
    device: str
    """`cpu`, or a GPU's key."""
    name: str
    """The processor or card as it calls itself."""
    capability: str | None
    torch: str
    threads: int | None
    date: str
    command: str
    """The command that repeats this calibration."""
    terms: Terms
    fitted: Annotated[int, Field(ge=1)]
    """Runs that the terms were fitted to."""
    fitted_longest: Annotated[int, Field(ge=1)]
    """Tokens of the longest of them."""
    errors: Annotated[Numbers, Field(min_length=1)]
    """(measured - predicted) / (predicted + SMALL) of the held-out runs, ascending."""
    domain: Domain
    failed: Annotated[int, Field(ge=0)] = 0
    """Runs without a figure: memory or time ran out, or they crashed. They are in no other field."""
    speed: SpeedFit | None = None
    """Seconds for each unit of work, from timed runs of their own; None if none were made."""

    def margin(self) -> tuple[float, float]:
        """(error that is not exceeded, with which confidence)."""
        return conformal(self.errors)


def conformal(errors: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """(the error that a new run does not exceed, its confidence); the confidence is `level`, or less
    where there are too few runs for it."""
    ordered, n = sorted(errors), len(errors)
    rank = math.ceil(level * (n + 1))
    if rank <= n:
        return ordered[rank - 1], level
    return ordered[-1], n / (n + 1)


class Bound(NamedTuple):
    """An upper bound, how sure it is, and what to know about it."""

    upper: int
    confidence: str
    notes: tuple[str, ...]


def bound_of(
    calibration: Calibration | None,
    config: AttentionConfig,
    workload: Workload,
    predicted: int,
    *,
    explicit: bool,
    device: str = "cpu",
) -> Bound:
    """The bound of a prediction in bytes on a device. `explicit`: the caller named the calibration, so that
    it is used even if it is of another torch or device."""
    if calibration is None:
        return Bound(
            math.ceil(predicted * (1 + UNMEASURED)),
            f"not measured: a margin of {UNMEASURED:.0%}",
            ("no calibration of this device: all figures are predicted, the margin is judgement",),
        )
    notes = []
    if calibration.device != device:
        notes.append(f"the calibration is of {calibration.device}, the estimate for {device}")
    if not of_this_torch(calibration):
        here = installed_torch()
        if not explicit:
            note = f"calibrated with torch {calibration.torch}, torch {here} is installed: not used"
            bound = bound_of(None, config, workload, predicted, explicit=False)
            return bound._replace(notes=(note, *bound.notes))
        notes.append(f"the calibration is of torch {calibration.torch}, torch {here} is installed")
    error, confidence = calibration.margin()
    margin = max(error, 0.0)
    confidence_text = f"{confidence:.1%} of {len(calibration.errors):,} held-out runs"
    outside = calibration.domain.misses(config, workload)
    if outside:
        margin = margin * OUTSIDE + 0.01
        confidence_text = "outside what was measured: a wider margin"
        notes.append(f"not among what was measured: {', '.join(outside)}")
    total = predicted + calibration.terms.overhead
    return Bound(math.ceil(total + margin * (total + SMALL)) + ROUNDING, confidence_text, tuple(notes))


def of_this_torch(calibration: Calibration) -> bool:
    """Whether it was made with the release of torch that is installed, or none is."""
    here = installed_torch()
    return here is None or _release(here) == _release(calibration.torch)


def least_upper(calibration: Calibration | None, predicted: Any) -> Any:
    """The least that `bound_of` has for any call with this prediction; ints, or arrays of them."""
    if calibration is None:
        return predicted * (1 + UNMEASURED)
    total = predicted + calibration.terms.overhead
    return total + max(calibration.margin()[0], 0.0) * (total + SMALL) + ROUNDING


def _release(torch: str) -> str:
    """2.13.0 of 2.13.0+cpu: builds of one release have the same kernels."""
    return torch.partition("+")[0]


@cache
def installed_torch() -> str | None:
    """Version of torch, without importing it; None if there is none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def load(path: str | Path) -> Calibration:
    """A calibration from its file; ConfigError naming the file where it is missing, torn or wrong."""
    path = Path(path)
    try:
        text = read_bytes(path, "calibration ")
    except ConfigError as error:
        raise ConfigError(f"{error}; make one with `planner calibrate`") from None
    try:
        return Calibration.from_json(text)
    except ConfigError as error:
        raise ConfigError(
            f"calibration {path} is not usable: {error}; make a new one with `planner calibrate`"
        ) from None


def shipped(device: str) -> Calibration | None:
    """The calibration of `cpu` or a GPU's key, if there is one: the user's own, else this package's."""
    for path in (own_path(device), SHIPPED / f"{device}.json"):
        if path.exists():
            return load(path)
    return None


def own_path(device: str) -> Path:
    """Where the user's calibration of `cpu` or a GPU's key is kept."""
    folder = os.environ.get("XDG_DATA_HOME", "")
    # As the XDG specification has it, a relative path is as none.
    data = Path(folder) if os.path.isabs(folder) else Path(os.path.expanduser("~")) / ".local" / "share"
    return data / "attention-planner" / "calibrations" / f"{device}.json"


def save(calibration: Calibration, path: str | Path) -> None:
    """Writes a calibration, whole or not at all; AttentionPlannerError if it could not be written."""
    path = Path(path)
    make_folder(path, "the calibration")
    try:
        write_whole(path, f"{calibration.to_json(indent=1)}\n".encode(), "the file")
    except AttentionPlannerError as error:
        raise AttentionPlannerError(
            f"the calibration was not kept: {error}; make room or choose another file, and run the same again"
        ) from error


def as_record(calibration: Calibration) -> dict[str, Any]:
    """The calibration as plain data."""
    return calibration.model_dump(mode="json")
