"""The dimensions of the search, and which values of each a caller allows. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from attention.config import Backend, Counts, PatternType, Switch, Value, Variant, as_tuple

MAX_BRANCHES: Final = 4
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


def variant_of(kind: Kind) -> Variant:
    return "block_sparse" if is_sparse(kind) else kind  # type: ignore[return-value]


def pattern_of(kind: Kind) -> PatternType | None:
    return kind if is_sparse(kind) else None  # type: ignore[return-value]


def is_sparse(kind: Kind) -> bool:
    return kind in get_args(PatternType)
