"""Configs of one kind as columns, one config as columns of one: what the models of memory, speed and quality
take. Imports no torch, and no NumPy: a column is an int, or an array that the caller made.

columns = Columns("block_sparse", "local_window", seq=131072, block_size=sizes, window=windows)
columns.config(7, workload)
columns_of(config, seq=131072)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from attention.config import (
    MIB,
    AdaptiveConfig,
    AttentionConfig,
    Backend,
    Edges,
    MultiheadConfig,
    PatternType,
    ShardingConfig,
    SparsePatternConfig,
    Switch,
    Variant,
)
from attention.errors import ConfigError
from attention.sizes.arrays import Ints, ceil_div, row_blocks
from attention.sizes.row_bounds import Rows, chosen_rows, pattern_rows
from planner.workload import Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Column: TypeAlias = "int | Ints"
"""One value for all candidates, or an array with one each."""


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Candidates of one kind, column by column; what each column means is in `AttentionConfig`.

    A column that the variant or the pattern does not read is not looked at. Values are taken as checked:
    they are what configs could have.
    """

    variant: Variant
    pattern_type: PatternType | None = None
    """The pattern of block_sparse candidates; None for other variants."""
    seq: Column = 0
    block_size: Column = 1
    window: Column = 0
    """Tokens of the window: `local_window_size`."""
    global_tokens: Column = 0
    edges: Edges = "block"
    """Where windows and global tokens end; see `token_edges`."""
    sparsity_ratio: float | NDArray[np.float64] = 1.0
    lengths: tuple[Column, ...] = ()
    """Segment lengths, a column a branch."""
    rates: tuple[Column, ...] = ()
    """Dilation rates, a column a branch; no candidate's falls from one branch to the next."""
    workspace: Column = 16 * MIB
    """Bytes of the workspace: `workspace_bytes`."""
    backend: Backend = "auto"
    pool: Switch = "auto"
    pool_bytes: int | None = None
    score_dim: int | None = None
    """Channels of an adaptive attention's scores; None for the workload's head_dim."""
    multihead: MultiheadConfig | None = None
    """Its heads and channels are the workload's."""
    cache_entries: int = 100
    cache_bytes: int = 64 * MIB
    sharding: ShardingConfig | None = None
    """How ranks share a sequence; None for the defaults where some do."""
    _rows: dict[bool, Rows] = field(default_factory=dict, init=False, repr=False)
    _size: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = {column.size for column in self._arrays()}
        if len(sizes) > 1:
            raise ConfigError(f"columns must be equally long, got {sorted(sizes)} candidates")
        object.__setattr__(self, "_size", *sizes or (1,))
        if len(self.lengths) != len(self.rates):
            raise ConfigError(f"got {len(self.lengths)} columns of lengths and {len(self.rates)} of rates")

    def __len__(self) -> int:
        """Candidates; 1 if no column is an array."""
        return self._size

    def take(self, which: slice | Ints) -> Columns:
        """Some of the candidates."""

        def some(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(some, value))
            return value[which] if _is_array(value) else value

        part = Columns(**{name: some(getattr(self, name)) for name in _FIELDS})
        part._rows.update({causal: Rows(*map(some, rows)) for causal, rows in self._rows.items()})
        return part

    @property
    def token_edges(self) -> bool:
        """Whether the candidates are windows, global tokens or not, that end at the token."""
        return self.edges == "token" and self.pattern_type in ("local_window", "global_local")

    @property
    def branches(self) -> tuple[tuple[Any, Any], ...]:
        """(segment length, dilation rate) of each branch; dense attention is one as long as the sequence."""
        if self.variant == "dense":
            return ((self.seq, 1),)
        return tuple(zip(self.lengths, self.rates, strict=True))

    def rows(self, causal: bool) -> Rows:
        """The widest rows of block_sparse candidates, or of what adaptive ones choose; computed once, which
        may take longer than all that builds on them."""
        if causal not in self._rows:
            untyped: Any = self
            if self.variant == "adaptive":
                chosen = row_blocks(untyped.sparsity_ratio, ceil_div(untyped.seq, untyped.block_size))
                self._rows[causal] = chosen_rows(untyped.block_size, chosen)
            else:
                self._rows[causal] = pattern_rows(
                    self.pattern_type,
                    untyped.block_size,
                    untyped.seq,
                    causal,
                    window=untyped.window,
                    global_tokens=untyped.global_tokens,
                    ratio=untyped.sparsity_ratio,
                    lengths=untyped.lengths,
                    rates=untyped.rates,
                    edges=self.edges,
                )
        return self._rows[causal]

    def _arrays(self) -> Iterator[NDArray[Any]]:
        for name in _FIELDS:
            value = getattr(self, name)
            for column in value if isinstance(value, tuple) else (value,):
                if _is_array(column):
                    yield column

    def config(self, at: int, workload: Workload) -> AttentionConfig:
        """The config of one candidate; an adaptive one's scorer takes heads and channels of `workload`."""

        def one(column: Any) -> Any:
            return column[at].item() if _is_array(column) else column

        parts: dict[str, Any] = {}
        if self.variant == "block_sparse":
            reads = _READS[self.pattern_type or "dilated_sparse"]
            parts["pattern"] = SparsePatternConfig(
                pattern_type=self.pattern_type or "dilated_sparse",
                block_size=one(self.block_size),
                **{field: one(getattr(self, name)) for name, field in reads.items()},
            )
        elif self.variant == "adaptive":
            parts["pattern"] = SparsePatternConfig(
                block_size=one(self.block_size), sparsity_ratio=one(self.sparsity_ratio)
            )
            parts["adaptive"] = AdaptiveConfig(
                num_heads=workload.heads, head_dim=workload.head_dim, score_dim=self.score_dim
            )
        if self.variant == "dilated" or self.pattern_type == "dilated_sparse":
            parts["segment_lengths"] = tuple(map(one, self.lengths))
            parts["dilation_rates"] = tuple(map(one, self.rates))
        return AttentionConfig(
            variant=self.variant,
            workspace_bytes=one(self.workspace),
            backend=self.backend,
            pool=self.pool,
            pool_bytes=self.pool_bytes,
            multihead=self.multihead,
            cache_entries=self.cache_entries,
            cache_bytes=self.cache_bytes,
            sharding=self.sharding,
            **parts,
        )


def _is_array(column: Any) -> bool:
    """Whether a column has a value for each candidate; a NumPy scalar is one value for all."""
    return getattr(column, "ndim", 0) > 0


_FIELDS: tuple[str, ...] = tuple(one.name for one in fields(Columns) if one.init)

_READS: dict[PatternType, dict[str, str]] = {
    "local_window": {"window": "local_window_size", "edges": "edges"},
    "global_local": {"window": "local_window_size", "global_tokens": "global_tokens", "edges": "edges"},
    "dilated_sparse": {"sparsity_ratio": "sparsity_ratio"},
}
"""Columns that each pattern reads beside the block size, and their names in its config."""


def columns_of(config: AttentionConfig, seq: int) -> Columns:
    """One config as columns of one candidate, none of them an array."""
    pattern = config.pattern
    sizes: dict[str, Any] = {}
    if pattern is not None:
        sizes = {
            "block_size": pattern.block_size,
            "window": pattern.local_window_size,
            "global_tokens": pattern.global_tokens,
            "sparsity_ratio": pattern.sparsity_ratio,
            "edges": pattern.edges,
        }
    return Columns(
        config.variant,
        pattern.pattern_type if pattern is not None and config.variant == "block_sparse" else None,
        seq=seq,
        lengths=config.segment_lengths,
        rates=config.dilation_rates,
        workspace=config.workspace_bytes,
        backend=config.backend,
        pool=config.pool,
        pool_bytes=config.pool_bytes,
        score_dim=config.adaptive.score_dim if config.adaptive else None,
        multihead=config.multihead,
        cache_entries=config.cache_entries,
        cache_bytes=config.cache_bytes,
        sharding=config.sharding,
        **sizes,
    )
