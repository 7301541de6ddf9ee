"""Which values of each dimension of the search a caller allows. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Final, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from attention.config import Backend, Counts, Edges, PatternType, Switch, Value, Variant, as_tuple
from attention.sizes.kernel_choice import unfit_attention
from planner.question.dimensions import DIMENSIONS, KINDS, AttentionKind, is_sparse, pattern_of, variant_of

MAX_BRANCHES: Final = 4
MOST_VALUES: Final = 1 << 14
"""Combinations of the values that a caller lists."""
_OF_SOME: Final = tuple(dimension for dimension in DIMENSIONS.values() if dimension.of_some)
"""Dimensions that not all attentions have."""

Ratios = Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...], BeforeValidator(as_tuple)]
Variants = Annotated[tuple[Variant, ...], BeforeValidator(as_tuple), Field(min_length=1)]
Patterns = Annotated[tuple[PatternType, ...], BeforeValidator(as_tuple), Field(min_length=1)]
Ends = Annotated[tuple[Edges, ...], BeforeValidator(as_tuple), Field(min_length=1)]


class Space(Value):
    """Which values of each dimension are allowed; None leaves a dimension free.

    Without `variants`, attentions that have none of the dimensions that are restricted are left out.
    Adaptive attention is tried only where `variants` names it: its scorer has to be trained before it
    attends to what the quality model says.
    """

    variants: Variants | None = None
    patterns: Patterns | None = None
    """Patterns of block_sparse."""
    block_sizes: Counts | None = None
    edges: Ends | None = None
    """Where windows may end; None for blocks, and where kernels have windows of their own, tokens too."""
    windows: Counts | None = None
    """Windows in tokens."""
    global_tokens: Counts | None = None
    ratios: Ratios | None = None
    """Fractions of blocks kept."""
    branches: Counts | None = None
    """Numbers of branches."""
    segments: Counts | None = None
    """Segment lengths of all branches: with them there is nothing else about lengths to choose."""
    rates: Counts | None = None
    """Rates of all branches, not falling."""
    workspaces: Counts | None = None
    """Workspaces in bytes."""
    backend: Backend | None = None
    """None for `auto`, and, where that would be FlexAttention, `sdpa` too."""
    pool: Switch = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in DIMENSIONS:
            if getattr(self, name) == ():
                raise ValueError(f"{name} allows nothing; give at least one value, or leave it out")
        lists = [self.workspaces, *(getattr(self, dimension.field) for dimension in _OF_SOME)]
        if math.prod(len(values) for values in lists if values) > MOST_VALUES:
            raise ValueError(
                f"the lists have more than {MOST_VALUES:,} combinations, and all are looked at; give fewer"
            )
        counts = {len(values) for values in (self.segments, self.rates) if values is not None}
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
        if self.backend == "flex" and self.edges == ("token",):
            raise ValueError(
                "FlexAttention's windows end at blocks; leave out backend='flex', or allow edges='block' too"
            )
        for name, kinds in ((dimension.field, dimension.kinds) for dimension in _OF_SOME):
            if getattr(self, name) is not None and not set(kinds) & set(self.kinds):
                raise ValueError(
                    f"{name} are of {' and '.join(kinds)}, and none of those is allowed; "
                    f"leave {name} out, or allow one"
                )
        return self

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """Attentions that are allowed, block-sparse ones by their pattern."""
        variants, patterns = self.variants, self.patterns or get_args(PatternType)
        restricted = [one for one in _OF_SOME if getattr(self, one.field) is not None]

        def allowed(kind: AttentionKind) -> bool:
            if is_sparse(kind) and kind not in patterns:
                return False
            if self.backend and unfit_attention(self.backend, variant_of(kind), pattern_of(kind)):
                return False
            if kind == "dilated" and self.rates and self.rates[0] != 1:
                return False
            if variants is not None:
                return variant_of(kind) in variants
            return kind != "adaptive" and (not restricted or any(kind in one.kinds for one in restricted))

        return tuple(filter(allowed, KINDS))

    def ends(self, windows: bool) -> tuple[Edges, ...]:
        """Edges of windows to try on a device whose kernels have windows of their own (`windows`) or not."""
        if self.edges is not None:
            return self.edges
        return ("block", "token") if windows and self.backend != "flex" else ("block",)

    def backends(self, flex: bool) -> tuple[Backend, ...]:
        """Backends to try on a device that has FlexAttention (`flex`) or not."""
        if self.backend is not None:
            return (self.backend,)
        return ("auto", "sdpa") if flex else ("auto",)
