"""The dimensions of the search space, a row each, under every name that they have: a field of `Space`, an
option, a parameter of trials, a field of a config. Checks, options, the command that repeats an answer,
suggestions and steps read them here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple, get_args

from attention.config import AttentionConfig, PatternType, SparsePatternConfig, Variant

AttentionKind = Literal["dense", "dilated", "local_window", "global_local", "dilated_sparse", "adaptive"]
"""An attention as the search tells them apart: a variant, block-sparse ones by their pattern."""
KINDS: Final[tuple[AttentionKind, ...]] = get_args(AttentionKind)

Written = Literal["names", "counts", "shares", "bytes", "name"]
"""The values that an option takes: a list of such, or one name."""
Stride = Literal["doubling", "blocks", "share", "rates"]
"""How a value changes by a step: times a power of two; in whole blocks; up to 1; but for rates of 1."""


class Dimension(NamedTuple):
    """One thing that a search may choose."""

    field: str
    """Name of the field of `Space` that holds the allowed values."""
    option: str
    """Option of the command line."""
    written: Written
    help: str
    """Help of the option."""
    kinds: tuple[AttentionKind, ...] = KINDS
    """Attentions that have it."""
    parameter: str = ""
    """Name of the parameter of trials, and of the column of candidates; empty where there is none or more
    than one. Stored studies have it."""
    attribute: str = ""
    """Name of the field of a config or of its pattern; empty where other dimensions decide it."""
    step: Stride | None = None
    """How a step changes the value; None if no step does."""

    @property
    def argument(self) -> str:
        """The option as a parameter of a function: block_size."""
        return self.option.removeprefix("--").replace("-", "_")

    @property
    def of_some(self) -> bool:
        """Whether not all attentions have it."""
        return self.kinds != KINDS

    def of(self, config: AttentionConfig) -> Any:
        """The dimension's value in a config."""
        return getattr(config.pattern if self._of_pattern else config, self.attribute)

    def changed(self, config: AttentionConfig, value: Any) -> AttentionConfig:
        """A config with another value of this dimension."""
        update: dict[str, Any] = {self.attribute: value}
        if self._of_pattern:
            assert config.pattern is not None
            update = {"pattern": config.pattern.model_copy(update=update)}
        return config.model_copy(update=update)

    @property
    def _of_pattern(self) -> bool:
        return self.attribute in SparsePatternConfig.model_fields


_PATTERNS: Final[tuple[AttentionKind, ...]] = ("local_window", "global_local", "dilated_sparse")
_WINDOWED: Final[tuple[AttentionKind, ...]] = ("local_window", "global_local")
_BRANCHED: Final[tuple[AttentionKind, ...]] = ("dilated", "dilated_sparse")

# In the order of Space's fields, of options in --help and of an answer's steps.
_ALL: Final = (
    Dimension("variants", "--variant", "names", "Only dense, dilated, block_sparse, adaptive."),
    Dimension(
        "patterns", "--pattern", "names", "Only local_window, global_local, dilated_sparse.", _PATTERNS
    ),
    Dimension(
        "block_sizes",
        "--block-size",
        "counts",
        "Only these: 64,128.",
        (*_PATTERNS, "adaptive"),
        parameter="block_size",
        attribute="block_size",
        step="doubling",
    ),
    Dimension(
        "edges",
        "--edges",
        "names",
        "Windows that end at these: block, token.",
        _WINDOWED,
        parameter="edges",
        attribute="edges",
    ),
    Dimension(
        "windows",
        "--window",
        "counts",
        "Only these, in tokens: 1K,4K.",
        _WINDOWED,
        parameter="window",
        attribute="local_window_size",
        step="blocks",
    ),
    Dimension(
        "global_tokens",
        "--global-tokens",
        "counts",
        "Only these: 64,256.",
        ("global_local",),
        parameter="global_tokens",
        attribute="global_tokens",
        step="blocks",
    ),
    Dimension(
        "ratios",
        "--sparsity",
        "shares",
        "Only these fractions of blocks kept: 0.01,0.1.",
        ("dilated_sparse", "adaptive"),
        parameter="sparsity_ratio",
        attribute="sparsity_ratio",
        step="share",
    ),
    Dimension(
        "branches", "--branches", "counts", "Only so many branches: 2,3.", _BRANCHED, parameter="branches"
    ),
    Dimension(
        "segments",
        "--segments",
        "counts",
        "Exactly these segment lengths: 2K,8K.",
        _BRANCHED,
        attribute="segment_lengths",
        step="blocks",
    ),
    Dimension(
        "rates",
        "--rates",
        "counts",
        "Exactly these dilation rates: 1,4.",
        _BRANCHED,
        attribute="dilation_rates",
        step="rates",
    ),
    Dimension(
        "workspaces",
        "--workspace",
        "bytes",
        "Only these sizes: 1MiB,16MiB.",
        parameter="workspace",
        attribute="workspace_bytes",
        step="doubling",
    ),
    Dimension("backend", "--backend", "name", "Only this backend.", parameter="backend", attribute="backend"),
    Dimension("pool", "--pool", "name", "Keep scratch buffers between calls.", attribute="pool"),
)
DIMENSIONS: Final[dict[str, Dimension]] = {dimension.field: dimension for dimension in _ALL}
"""Dimensions by field of `Space`."""


def dimensions_of(kind: AttentionKind) -> Iterator[Dimension]:
    """The dimensions that an attention has."""
    return (dimension for dimension in DIMENSIONS.values() if kind in dimension.kinds)


def attention_kind(config: AttentionConfig) -> AttentionKind:
    """Which attention a config is."""
    if config.variant == "block_sparse":
        assert config.pattern is not None
        return config.pattern.pattern_type
    return config.variant


def variant_of(kind: AttentionKind) -> Variant:
    return "block_sparse" if is_sparse(kind) else kind  # type: ignore[return-value]


def pattern_of(kind: AttentionKind) -> PatternType | None:
    return kind if is_sparse(kind) else None  # type: ignore[return-value]


def is_sparse(kind: AttentionKind) -> bool:
    """Whether it is a pattern of block_sparse."""
    return kind in get_args(PatternType)
