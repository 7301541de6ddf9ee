"""The configs to choose from: a grid that is enumerated whole, and the full space around it, which a
sampler walks. Imports no torch.

Both have the same dimensions (`Space`), each of which the caller may fix or restrict; the grid has a few
values of each, the full space all that make sense. What a config cannot be is not generated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Protocol, Self, get_args

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from attention.config import (
    MIB,
    AttentionConfig,
    Backend,
    Counts,
    PatternType,
    Switch,
    Value,
    Variant,
    as_tuple,
)
from attention.errors import ConfigError
from planner.columns import Columns, Ints
from planner.memory.configured import goes_flex
from planner.workload import Workload

MAX_BRANCHES: Final = 4
UNIT: Final = 64
"""Tokens that segment lengths of dilated are multiples of; those of blocks are multiples of the block."""
BLOCK_SIZES: Final = (32, 64, 128, 256, 512)
GLOBAL_TOKENS: Final = (64, 256, 1024)
RATIOS: Final = (0.001, 0.003, 0.01, 0.03, 0.06, 0.12, 0.25, 0.5)
SEGMENTS: Final = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
"""First segment lengths of dilated."""
SPARSE_SEGMENTS: Final = (512, 4096, 32_768)
"""First segment lengths of dilated_sparse; the last covers everything, and there are at most three."""
GROWTHS: Final = (2, 4, 8)
"""Factors from one branch to the next, of lengths and of rates; the last length may cover everything."""
WORKSPACES: Final = (MIB, 4 * MIB, 16 * MIB)

FREE_BLOCK_SIZES: Final = (16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512)
MOST_GROWTH: Final = 1 << 16
MOST_RATE_GROWTH: Final = 16
MOST_GLOBAL: Final = 8192
"""Tokens."""
FREE_WORKSPACES: Final = (20, 26)
"""Least and most as powers of two."""
LEAST_RATIO: Final = 1e-4
MOST_VALUES: Final = 1 << 14
"""Combinations of the values that a caller lists."""

Kind = Literal["dense", "dilated", "local_window", "global_local", "dilated_sparse", "adaptive"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
_BRANCHED: Final = ("dilated", "dilated_sparse")
DIMENSIONS: Final[dict[str, tuple[str, ...]]] = {
    "patterns": get_args(PatternType),
    "block_sizes": (*get_args(PatternType), "adaptive"),
    "windows": ("local_window", "global_local"),
    "global_tokens": ("global_local",),
    "ratios": ("dilated_sparse", "adaptive"),
    "branches": _BRANCHED,
    "segments": _BRANCHED,
    "rates": _BRANCHED,
}
"""Which attentions have each dimension that not all have."""


Ratios = Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...], BeforeValidator(as_tuple)]
Variants = Annotated[tuple[Variant, ...], BeforeValidator(as_tuple), Field(min_length=1)]
Patterns = Annotated[tuple[PatternType, ...], BeforeValidator(as_tuple), Field(min_length=1)]


class Space(Value):
    """Which values of each dimension are allowed; None leaves a dimension free.

    Without `variants`, attentions that have none of the dimensions that are restricted are left out.
    Adaptive attention is tried only where `variants` names it: its scorer has to be trained before it
    attends to what the quality model says.
    """

    variants: Variants | None = None
    patterns: Patterns | None = None
    """Of block_sparse."""
    block_sizes: Counts | None = None
    windows: Counts | None = None
    """Tokens."""
    global_tokens: Counts | None = None
    ratios: Ratios | None = None
    """Fractions of blocks kept."""
    branches: Counts | None = None
    """How many."""
    segments: Counts | None = None
    """Segment lengths of all branches: with them there is nothing else about lengths to choose."""
    rates: Counts | None = None
    """Rates of all branches, not falling."""
    workspaces: Counts | None = None
    """Bytes."""
    backend: Backend | None = None
    """None for `auto`, and, where that would be FlexAttention, `sdpa` too."""
    pool: Switch = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("block_sizes", "windows", "global_tokens", "ratios", "branches", "segments", "rates",
                     "workspaces"):  # fmt: skip
            if getattr(self, name) == ():
                raise ValueError(f"{name} allows nothing; give at least one value, or leave it out")
        values = math.prod(len(given) for name in DIMENSIONS if (given := getattr(self, name)))
        if values * len(self.workspaces or (0,)) > MOST_VALUES:
            raise ValueError(
                f"the lists have more than {MOST_VALUES:,} combinations, and all are looked at; give fewer"
            )
        counts = {len(given) for given in (self.segments, self.rates) if given is not None}
        if self.branches is not None:
            if max(self.branches) > MAX_BRANCHES:
                raise ValueError(f"branches are at most {MAX_BRANCHES}, got {max(self.branches)}")
            if counts and not counts <= set(self.branches):
                raise ValueError(
                    f"branches={list(self.branches)} contradict {sorted(counts)} segment lengths or rates"
                )
        if len(counts) > 1:
            raise ValueError(
                f"segments and rates pair up, got {len(self.segments or ())} and {len(self.rates or ())}"
            )
        if counts and max(counts) > MAX_BRANCHES:
            raise ValueError(f"at most {MAX_BRANCHES} branches are searched, got {max(counts)}")
        if self.segments and list(self.segments) != sorted(self.segments):
            raise ValueError(f"segments must not fall from branch to branch, got {list(self.segments)}")
        if self.rates and list(self.rates) != sorted(self.rates):
            raise ValueError(f"rates must not fall from branch to branch, got {list(self.rates)}")
        if self.rates and self.variants == ("dilated",) and self.rates[0] != 1:
            raise ValueError(
                f"rates={list(self.rates)} leave positions without output; the first must be 1 for dilated"
            )
        for name, having in DIMENSIONS.items():
            if getattr(self, name) is not None and not set(having) & set(self.kinds):
                raise ValueError(
                    f"{name} are of {' and '.join(having)}, and none of those is allowed; "
                    f"leave {name} out, or allow one"
                )
        return self

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Attentions that are allowed, block-sparse ones by their pattern."""
        variants, patterns = self.variants, self.patterns or get_args(PatternType)
        restricted = {name for name in DIMENSIONS if getattr(self, name) is not None}
        found: list[Kind] = []
        for kind in KINDS:
            if variants is not None:
                allowed = variant_of(kind) in variants
            else:
                has = not restricted or any(kind in DIMENSIONS[name] for name in restricted)
                allowed = has and kind != "adaptive"
            if is_sparse(kind) and kind not in patterns:
                allowed = False
            if kind == "dilated" and self.rates and self.rates[0] != 1:
                allowed = False
            if allowed:
                found.append(kind)
        return tuple(found)

    def backends(self, flex: bool) -> tuple[Backend, ...]:
        """Those to try on a device that has FlexAttention (`flex`) or not."""
        if self.backend is not None:
            return (self.backend,)
        return ("auto", "sdpa") if flex else ("auto",)


# The grid.


def grid(space: Space, workload: Workload, *, flex: bool = False, free_length: bool = False) -> list[Columns]:
    """All candidates of the grid, kind by kind; ConfigError if the restrictions leave none.

    `workload.seq` says how far segments and windows are worth trying; `free_length`: shorter sequences are of
    interest too.
    """
    found = []
    for kind in space.kinds:
        for rows in _tables(space, kind, workload):
            lists: dict[str, Any] = {name: np.array(values) for name, values in rows.items()}
            branches: dict[str, Any] = {
                "lengths": tuple(lists.pop(name) for name in list(lists) if name.startswith("length")),
                "rates": tuple(lists.pop(name) for name in list(lists) if name.startswith("rate")),
            }
            backends = space.backends(flex and is_sparse(kind))
            for backend in backends:
                columns = Columns(
                    variant_of(kind), pattern_of(kind), seq=workload.seq, backend=backend, pool=space.pool,
                    **branches, **lists,
                )  # fmt: skip
                which = _differing(
                    columns, workload, flex=flex, free_length=free_length, alone=len(backends) == 1
                )
                found.append(columns.take(which))
    found = [columns for columns in found if len(columns)]
    if not found:
        raise ConfigError(
            "the restrictions leave no candidate: allow more variants, patterns, block sizes or branches "
            "(segment lengths must be multiples of the block size)"
        )
    return found


def _differing(columns: Columns, workload: Workload, *, flex: bool, free_length: bool, alone: bool) -> Ints:
    """Which candidates are possible and not another's twin. FlexAttention takes no workspace: those that it
    runs and that differ in it alone are one. Where it does not run `auto`, that is `sdpa`, which is then left
    out unless it is the backend `alone`. With the length free it may run at another length what it does not
    at this, so that both stay."""
    backend: Backend = "flex" if columns.backend == "flex" or (free_length and not alone) else "auto"
    runs = np.zeros(len(columns), bool)
    if flex and columns.variant == "block_sparse":
        runs |= goes_flex(backend, columns.rows(workload.causal), workload.seq, workload) > 0
    if columns.backend == "sdpa":
        return np.flatnonzero(runs | alone)
    workspace = np.broadcast_to(columns.workspace, len(columns))
    possible = runs | (columns.backend == "auto")
    return np.flatnonzero(possible & (~runs | (workspace == workspace.max())))


def variant_of(kind: Kind) -> Variant:
    return "block_sparse" if is_sparse(kind) else kind  # type: ignore[return-value]


def pattern_of(kind: Kind) -> PatternType | None:
    return kind if is_sparse(kind) else None  # type: ignore[return-value]


def is_sparse(kind: Kind) -> bool:
    return kind in get_args(PatternType)


def _tables(space: Space, kind: Kind, workload: Workload) -> Iterator[dict[str, list[Any]]]:
    """Columns of all combinations of a kind, one table for each number of branches."""
    workspaces = space.workspaces or WORKSPACES
    if kind == "dense":
        yield {"workspace": list(workspaces)}
    elif kind == "dilated":
        yield from _branched(_dilated(space, workload.seq), workspaces)
    elif kind == "dilated_sparse":
        yield from _branched(_dilated_sparse(space, workload.seq), workspaces)
    else:
        rows = list(_blocks(space, kind, workload))
        if rows:
            yield _transposed([row | {"workspace": w} for row in rows for w in workspaces])


Lists = tuple[tuple[int, ...], tuple[int, ...]]
"""Lengths and rates of all branches."""


def _branched(
    rows: Iterable[tuple[Lists, Mapping[str, Any]]], workspaces: Sequence[int]
) -> Iterator[dict[str, list[Any]]]:
    by_count: dict[int, list[dict[str, Any]]] = {}
    for (lengths, rates), fields in rows:
        named = {f"length{n}": length for n, length in enumerate(lengths)}
        named |= {f"rate{n}": rate for n, rate in enumerate(rates)}
        by_count.setdefault(len(lengths), []).extend(
            {**named, **fields, "workspace": workspace} for workspace in workspaces
        )
    for _, found in sorted(by_count.items()):
        yield _transposed(found)


def _transposed(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _dilated(space: Space, seq: int) -> Iterator[tuple[Lists, Mapping[str, Any]]]:
    for lists in branch_lists(space, seq, UNIT, SEGMENTS, GROWTHS):
        if all(rate <= length for length, rate in zip(*lists, strict=True)):
            yield lists, {}


def _dilated_sparse(space: Space, seq: int) -> Iterator[tuple[Lists, Mapping[str, Any]]]:
    for block in space.block_sizes or BLOCK_SIZES[:-1]:
        if not _divides(block, space.segments):
            continue
        whole = -(-seq // block) * block
        for lists in branch_lists(space, seq, block, SPARSE_SEGMENTS, (8,)):
            if not (space.segments or space.branches) and (lists[0][-1] < whole or len(lists[0]) > 3):
                continue
            for ratio in space.ratios or RATIOS:
                yield lists, {"block_size": block, "sparsity_ratio": ratio}


def _divides(block: int, segments: Sequence[int] | None) -> bool:
    return all(length % block == 0 for length in segments or ())


def branch_lists(
    space: Space, seq: int, unit: int, firsts: Iterable[int], growths: Sequence[int]
) -> list[Lists]:
    """Lengths, multiples of `unit`, and rates of one to four branches, each once.

    Lengths grow by one factor; the last is as it comes, or else covers the whole sequence, without which no
    token hears of those in another segment. Rates grow by a factor of `GROWTHS`, from 1.
    """
    counts = space.branches or tuple(range(1, MAX_BRANCHES + 1))
    if space.segments is not None:
        counts = (len(space.segments),)
    elif space.rates is not None:
        counts = (len(space.rates),)
    found: dict[Lists, None] = {}
    for count in counts:
        for lengths in _lengths(space, seq, unit, firsts, growths, count):
            for factor in GROWTHS if count > 1 else (1,):
                rates = space.rates or tuple(factor**n for n in range(count))
                found[lengths, rates] = None
    return list(found)


def _lengths(
    space: Space, seq: int, unit: int, firsts: Iterable[int], growths: Sequence[int], count: int
) -> Iterator[tuple[int, ...]]:
    if space.segments is not None:
        yield space.segments
        return
    whole = -(-seq // unit) * unit
    for first in firsts:
        start = -(-first // unit) * unit
        for growth in growths:
            lengths = tuple(start * growth**n for n in range(count))
            if lengths[-1] <= whole:
                yield lengths
            if count == 1:
                yield (whole,)
            elif lengths[-2] < whole:
                yield (*lengths[:-1], -(-whole // lengths[-2]) * lengths[-2])


def _blocks(space: Space, kind: Kind, workload: Workload) -> Iterator[dict[str, Any]]:
    """Fields of local_window, global_local and adaptive."""
    for block in space.block_sizes or BLOCK_SIZES:
        if kind == "adaptive":
            yield from ({"block_size": block, "sparsity_ratio": r} for r in space.ratios or RATIOS)
            continue
        for window in space.windows or window_sizes(block, workload):
            if kind == "local_window":
                yield {"block_size": block, "window": window}
            else:
                rounded = dict.fromkeys(-(-tokens // block) * block for tokens in GLOBAL_TOKENS)
                for tokens in space.global_tokens or rounded:
                    yield {"block_size": block, "window": window, "global_tokens": tokens}


def window_sizes(block: int, workload: Workload) -> list[int]:
    """Tokens of the windows worth trying: 2^k and 3 x 2^(k-1) blocks, up to those that see everything."""
    most = most_window(block, workload)
    powers = range(0 if workload.causal else 1, most.bit_length() + 1)
    found = {min(n, most) for power in powers for n in (1 << power, 3 << power >> 1)}
    return sorted(n * block for n in found if n >= (1 if workload.causal else 2))


def most_window(block: int, workload: Workload) -> int:
    """Blocks of a window in which every query sees everything."""
    blocks = -(-workload.seq // block)
    return max(blocks - 1, 1) * (1 if workload.causal else 2)


def widest_window(workload: Workload) -> int:
    """Tokens of the widest window that blocks of any size need to see everything."""
    return max(size * most_window(size, workload) for size in (*FREE_BLOCK_SIZES, *BLOCK_SIZES))


# The full space.


class Trial(Protocol):
    """What chooses: an `optuna.Trial`, or anything with its suggestions."""

    def suggest_categorical(self, name: str, choices: Any, /) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...


def chosen(trial: Trial, space: Space, workload: Workload, *, flex: bool = False) -> Columns:
    """One candidate of the full space, as the trial suggests it."""
    sizes = space.block_sizes or FREE_BLOCK_SIZES
    fitting = tuple(size for size in sizes if _divides(size, space.segments))
    kinds = tuple(kind for kind in space.kinds if kind != "dilated_sparse" or fitting)
    kind: Kind = kinds[0] if len(kinds) == 1 else trial.suggest_categorical("kind", kinds)
    fields: dict[str, Any] = {
        "workspace": 1 << trial.suggest_int("workspace_log2", *FREE_WORKSPACES)
        if space.workspaces is None
        else _one(trial, "workspace", space.workspaces)
    }
    unit = UNIT
    if kind not in ("dense", "dilated"):
        unit = fields["block_size"] = _nearest(
            trial, "block_size", fitting if kind == "dilated_sparse" else sizes
        )
    if kind in ("dilated_sparse", "adaptive"):
        ratio = (
            trial.suggest_float("sparsity_ratio", LEAST_RATIO, 1.0, log=True)
            if space.ratios is None
            else _one(trial, "sparsity_ratio", space.ratios)
        )
        fields["sparsity_ratio"] = float(f"{ratio:.3g}")
    if kind in ("local_window", "global_local"):
        fields["window"] = (
            _tokens(trial, "window", unit, widest_window(workload))
            if space.windows is None
            else _one(trial, "window", space.windows)
        )
        fields["window"] = min(fields["window"], unit * most_window(unit, workload))
    if kind == "global_local":
        fields["global_tokens"] = (
            _tokens(trial, "global_tokens", unit, MOST_GLOBAL)
            if space.global_tokens is None
            else _one(trial, "global_tokens", space.global_tokens)
        )
    if kind in ("dilated", "dilated_sparse"):
        fields["lengths"], fields["rates"] = _suggested(trial, space, workload.seq, unit)
    backends = space.backends(flex and is_sparse(kind))
    return Columns(
        variant_of(kind), pattern_of(kind), seq=workload.seq, pool=space.pool,
        backend=_one(trial, "backend", backends), **fields,
    )  # fmt: skip


def _nearest(trial: Trial, name: str, values: Sequence[int]) -> int:
    """One of ascending values: the nearest to a number, so that a sampler knows which are alike."""
    if len(values) == 1:
        return values[0]
    wanted = trial.suggest_int(name, min(values), max(values), log=True)
    return min(values, key=lambda value: abs(math.log(value / wanted)))


def _tokens(trial: Trial, name: str, unit: int, most: int) -> int:
    """A number of tokens that is a multiple of `unit`."""
    return max(round(trial.suggest_int(name, 1, max(most, 2), log=True) / unit), 1) * unit


def _one(trial: Trial, name: str, values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else trial.suggest_categorical(name, tuple(values))


def _suggested(trial: Trial, space: Space, seq: int, unit: int) -> Lists:
    counts = space.branches or tuple(range(1, MAX_BRANCHES + 1))
    given = space.segments or space.rates
    count = len(given) if given else _one(trial, "branches", counts)
    whole = -(-seq // unit)
    lengths, rates = [], []
    length, rate = 0, 1
    for n in range(count):
        if n == 0:
            if not space.segments:
                # One range for all block sizes: the longest is what covers everything, whatever the unit.
                longest = 2 * max(seq, *FREE_BLOCK_SIZES, *(space.block_sizes or ()))
                length = min(_tokens(trial, "first_segment", unit, longest) // unit, whole)
        else:
            if not space.segments:
                growth = trial.suggest_int(f"growth_{n}", 1, MOST_GROWTH, log=True)
                length *= min(growth, -(-whole // length))
            if not space.rates:
                rate *= trial.suggest_int(f"rate_growth_{n}", 1, MOST_RATE_GROWTH, log=True)
        lengths.append(length * unit)
        rates.append(min(rate, length * unit) if not space.segments else rate)
    return space.segments or tuple(lengths), space.rates or tuple(rates)


def parameters(config: AttentionConfig, space: Space, workload: Workload) -> dict[str, Any] | None:
    """What a trial has to suggest to arrive at a config; None if the full space has no such config."""
    pattern = config.pattern
    kind = pattern.pattern_type if pattern and config.variant == "block_sparse" else config.variant
    workspace = config.workspace_bytes
    found: dict[str, Any] = {"kind": kind, "workspace": workspace, "backend": config.backend}
    found["workspace_log2"] = workspace.bit_length() - 1
    if pattern:
        found["block_size"] = pattern.block_size
        if kind in ("dilated_sparse", "adaptive"):
            found["sparsity_ratio"] = pattern.sparsity_ratio
        else:
            found["window"] = pattern.local_window_size
            found["global_tokens"] = pattern.global_tokens
    lengths, rates = config.segment_lengths, config.dilation_rates
    if lengths:
        found |= {"branches": len(lengths), "first_segment": lengths[0]}
        for n in range(1, len(lengths)):
            found[f"growth_{n}"] = lengths[n] // lengths[n - 1]
            found[f"rate_growth_{n}"] = rates[n] // rates[n - 1]
    told = _Told(found)
    try:
        # As on a device where a trial chooses the backend too.
        made = chosen(told, space, workload, flex=True).config(0, workload)
    except KeyError:
        return None
    return {name: found[name] for name in told.asked} if made == config else None


class _Told:
    """A trial that suggests what it was told, and remembers what it was asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values, self.asked = values, list[str]()

    def suggest_categorical(self, name: str, choices: Any, /) -> Any:
        if self.values[name] not in choices:
            raise KeyError(name)
        self.asked.append(name)
        return self.values[name]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self._within(name, low, high))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self._within(name, low, high))

    def _within(self, name: str, low: float, high: float) -> Any:
        if not low <= self.values[name] <= high:
            raise KeyError(name)
        self.asked.append(name)
        return self.values[name]


def full_size(seq: int) -> float:
    """Configs in the full space for a sequence, about: the product over what each kind chooses, distinct
    windows, kept blocks and segment lengths counted in blocks."""
    workspaces = FREE_WORKSPACES[1] - FREE_WORKSPACES[0] + 1
    total = float(workspaces)  # dense
    for block in FREE_BLOCK_SIZES:
        blocks = math.ceil(seq / block)
        total += workspaces * 2 * blocks * (1 + MOST_GLOBAL // block)  # with global tokens, and without
        total += workspaces * blocks * _branchings(blocks)
    return total + workspaces * _branchings(math.ceil(seq / UNIT))


def _branchings(units: int) -> float:
    """Lists of one to four branches: first length, factors of lengths whose product stays within, rates."""
    total = 0.0
    for count in range(1, MAX_BRANCHES + 1):
        lengths = units * math.log(max(units, 2)) ** (count - 1) / math.factorial(count - 1)
        total += lengths * MOST_RATE_GROWTH ** (count - 1)
    return total


__all__ = ["Kind", "Space", "chosen", "full_size", "grid", "parameters"]
