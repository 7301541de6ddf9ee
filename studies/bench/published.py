"""Published seconds of attention kernels on GPUs, `studies/bench/published.csv`: facts that others measured,
each with its source. A file that makes no sense is refused with the line and what is wrong. Imports no torch.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from attention.config import Value
from attention.errors import ConfigError
from planner.files import read_bytes
from planner.gpus import Gpu, backends, find
from planner.speed.gpu_kernels import (
    ABOVE_PEAK,
    Coefficients,
    Direction,
    SequenceCall,
    efficient_kernel,
    kernel_seconds,
)
from planner.workload import Dtype

PUBLISHED: Final = Path(__file__).with_name("published.csv")
COUNTS: Final = ("batch", "heads", "kv_heads", "head_dim", "seq")
BACKENDS: Final = {"flash2": "flash"}
"""Kernels that `planner.gpus.backends` calls otherwise."""

Whole = Annotated[int, Field(ge=1)]


_card = cache(find)


class Published(Value):
    """One published measurement."""

    source: Annotated[str, Field(min_length=1)]
    """owner/repository, then the file and its commit, or the issue."""
    card: str
    """A key of `planner/data/gpus.json`."""
    kernel: Literal["flash2", "cudnn", "efficient", "flex"]
    dtype: Dtype
    batch: Whole
    heads: Whole
    kv_heads: Whole
    head_dim: Whole
    seq: Whole
    causal: bool
    window: Whole | None
    """Keys behind a query that it sees; None for all."""
    step: Literal["forward", "backward", "both"]
    ms: Annotated[float, Field(gt=0)]
    """Milliseconds of a call."""
    read_from: Literal["chart", "table"]
    """A chart's labels are of whole TFLOP/s, from which the milliseconds follow."""
    notes: str

    @model_validator(mode="after")
    def _possible(self) -> Published:
        gpu = _card(self.card)
        if gpu.key != self.card:
            raise ConfigError(f"card: {self.card!r} is called {gpu.key} in gpus.json; write that")
        if self.heads % self.kv_heads:
            raise ConfigError(f"kv_heads: {self.kv_heads} does not divide {self.heads} heads")
        if BACKENDS.get(self.kernel, self.kernel) not in backends(gpu, self.dtype):
            raise ConfigError(f"kernel: {self.kernel} does not run {self.dtype} on {gpu.name}")
        peak = (gpu.rates["float16"] or 0.0) if gpu.capability >= (7, 0) else gpu.rates["float32"] or 0.0
        if peak and self.flops / self.seconds > ABOVE_PEAK * peak:
            raise ConfigError(
                f"ms: {self.ms:g} would be {self.flops / self.seconds / 1e12:,.0f} TFLOP/s, and the peak of "
                f"{gpu.name} is {peak / 1e12:,.0f}; check it and the sizes"
            )
        return self

    @property
    def seconds(self) -> float:
        return self.ms / 1e3

    @property
    def steps(self) -> tuple[Direction, ...]:
        return ("forward", "backward") if self.step == "both" else (self.step,)

    @property
    def repository(self) -> str:
        return self.source.partition(":")[0].partition(" ")[0]

    @property
    def gpu(self) -> Gpu:
        return _card(self.card)

    @property
    def flops(self) -> float:
        """4 D a pair that is seen, and 10 D in backward."""
        seen = self.seq if self.window is None else min(self.window + 1, self.seq)
        share = 0.5 if self.causal and self.window is None else 1.0
        pairs = self.batch * self.heads * self.seq * seen * share
        return pairs * self.head_dim * sum(4.0 if step == "forward" else 10.0 for step in self.steps)

    @property
    def call(self) -> SequenceCall:
        """The kernel's call."""
        kernel = efficient_kernel(self.head_dim) if self.kernel == "efficient" else self.kernel
        return SequenceCall(
            kernel,
            self.dtype,
            self.batch,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.seq,
            self.seq,
            self.causal,
            self.window,
        )

    def predicted(self, known: Coefficients | None = None) -> float:
        """Seconds by the planner's model."""
        return float(sum(kernel_seconds(self.call, step, self.gpu, known) for step in self.steps))


def read_published(path: Path = PUBLISHED) -> list[Published]:
    """The measurements of a file; ConfigError naming the line and what is wrong with it."""
    try:
        lines = read_bytes(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text: {error}") from None
    reader = csv.DictReader(lines)
    names = list(Published.model_fields)
    if reader.fieldnames is None or sorted(reader.fieldnames) != sorted(names):
        raise ConfigError(f"{path}, line 1: the columns are {reader.fieldnames}; write {','.join(names)}")
    rows = []
    for cells in reader:
        try:
            rows.append(_row(cells))
        except ConfigError as error:
            raise ConfigError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise ConfigError(f"{path} has no measurement; one a line below {','.join(names)}")
    return rows


def _row(cells: dict[str, Any]) -> Published:
    if None in cells or None in cells.values():
        raise ConfigError(f"there are to be {len(Published.model_fields)} cells, as there are columns")
    fields: dict[str, Any] = dict(cells)
    for name in COUNTS:
        fields[name] = _number(name, cells[name], int)
    fields["ms"] = _number("ms", cells["ms"], float)
    fields["window"] = _number("window", cells["window"], int) if cells["window"] else None
    if cells["causal"] not in ("0", "1"):
        raise ConfigError(f"causal: 0 or 1, got {cells['causal']!r}")
    return Published(**fields | {"causal": cells["causal"] == "1"})


def _number(name: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(
            f"{name}: {'a whole number' if kind is int else 'a number'}, got {text!r}"
        ) from None


def sources_of(rows: Sequence[Published]) -> list[str]:
    """The files of the sources, in order."""
    return sorted({row.source for row in rows})
