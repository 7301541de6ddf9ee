"""Configurations: frozen, strict values that say which attention is meant. Imports no torch.

A config is checked when it is built (`AttentionConfig(...)`, `from_json`) and can be trusted
afterwards. Every refusal is a `ConfigError` that says what was asked, what arrived and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import from_json

from attention.errors import ConfigError, shortened

SCHEMA_VERSION: Final = 1
MIB = 1 << 20
SAID: Final = 6
"""Faults of one value that an error lists."""

Variant = Literal["dense", "dilated", "block_sparse", "adaptive"]
PatternType = Literal["local_window", "global_local", "dilated_sparse"]
Edges = Literal["block", "token"]
Backend = Literal["auto", "sdpa", "flex", "flash", "cudnn"]
Switch = Literal["auto", "on", "off"]
ExchangeKind = Literal["auto", "keys", "heads"]
ShardKind = Literal["contiguous", "zigzag"]
Travel = Literal["auto", "float32"]

PATTERN_TYPES: tuple[str, ...] = get_args(PatternType)

# What each pattern and variant reads; everything else a config carries is `inert`.
_PATTERN_READS = {
    "local_window": {"block_size", "local_window_size", "edges"},
    "global_local": {"block_size", "local_window_size", "global_tokens", "edges"},
    "dilated_sparse": {"block_size", "sparsity_ratio", "segment_lengths", "dilation_rates"},
}
_ADAPTIVE_READS = {"block_size", "sparsity_ratio"}


def _sentence(error: ValidationError) -> str:
    """A pydantic error as lines of 'field: what was wrong (got what)'."""
    lines = []
    details = error.errors(include_url=False)
    for detail in details[:SAID]:
        where = ".".join(str(part) for part in detail["loc"]) or "config"
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "value_error":
            lines.append(message if not detail["loc"] else f"{where}: {message}")
        elif detail["type"] == "extra_forbidden":
            lines.append(f"{where}: no such option; check the spelling or remove it")
        elif detail["type"] == "missing":
            lines.append(f"{where}: is required")
        elif detail["type"] == "less_than_equal" and detail["ctx"]["le"] >= MOST_HEADS:
            got = shortened(repr(detail["input"]), 80)
            lines.append(
                f"{where}: at most {detail['ctx']['le']:,}, beyond which plans take hours, got {got}"
            )
        else:
            lines.append(f"{where}: {message}, got {shortened(repr(detail['input']), 80)}")
    lines = [shortened(line, 600) for line in lines]
    if len(details) > SAID:
        lines.append(f"and {len(details) - SAID:,} more like these")
    return "; ".join(lines)


class Value(BaseModel):
    """Base of all config values: frozen, strict, no unknown fields, errors from the project's tree."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        defer_build=True,  # a validator takes milliseconds to make, and a command needs few of them
    )

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: {_sentence(error)}") from None

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """pydantic's, with this project's error."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise ConfigError(f"{cls.__name__}: {_sentence(error)}") from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """The value with some fields changed, checked as a new one is. Frozen, so never deep."""
        return type(self)(**{**dict(self), **(update or {})})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The value that `to_json` wrote; `ConfigError` if the text is not one."""
        try:
            data = from_json(text)
        except ValueError as error:
            raise ConfigError(f"{cls.__name__}: Invalid JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{cls.__name__}: expected a JSON object, got {type(data).__name__}")
        return cls(**data)

    def to_json(self, *, indent: int | None = None) -> str:
        """The value as JSON; `from_json` gives an equal value back."""
        return self.model_dump_json(indent=indent)


def as_tuple(value: Any) -> Any:
    """JSON has lists only: one where a tuple is wanted is taken as such; for a `BeforeValidator`."""
    return tuple(value) if isinstance(value, list) else value


def _plain_int(value: Any) -> Any:
    if type(value) is not int:  # a Literal compares by ==, and True == 1.0 == 1
        raise ValueError(f"must be an integer, got {value!r}")
    return value


# Bounds are far beyond what anybody builds: within them every figure is exact and found in seconds.
MOST_TOKENS: Final = 1 << 40
MOST_HEADS: Final = 1 << 16
MOST_CHANNELS: Final = 1 << 20
"""The channels of a head."""
MOST_BRANCHES: Final = 16
"""Most branches of a config: finding the keys that several share takes a time that grows by factors with each
further branch."""
MOST_BYTES: Final = 1 << 60
LONGEST_WAIT: Final = 12 * 3600
"""Seconds."""

Positive = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Heads = Annotated[int, Field(ge=1, le=MOST_HEADS)]
Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
Counts = Annotated[tuple[Tokens, ...], BeforeValidator(as_tuple)]
Branches = Annotated[tuple[Tokens, ...], BeforeValidator(as_tuple), Field(max_length=MOST_BRANCHES)]


class SparsePatternConfig(Value):
    """Which blocks a block-sparse attention keeps.

    Fields that a pattern does not read are allowed and have no effect, so that one set of values
    can be tried over all patterns; `AttentionConfig.inert` names them.
    """

    pattern_type: PatternType = "dilated_sparse"
    """`local_window`, `global_local` or `dilated_sparse`."""
    sparsity_ratio: float = Field(default=0.1, gt=0.0, le=1.0)
    """Fraction of blocks *kept* a row: 0.01 is "99% sparse". Read by dilated_sparse and adaptive."""
    block_size: Tokens = 128
    """Tokens per block."""
    local_window_size: Tokens = 512
    """Tokens of the window, centred; causal: before the query. Whole blocks to a side count, and the query's
    own block is always kept. Read by local_window, global_local."""
    global_tokens: Tokens = 64
    """First tokens, which are seen by all and, if not causal, see all; rounded up to blocks unless edges are
    tokens. Read by global_local."""
    edges: Edges = "block"
    """Where windows and global tokens end. `block`: at blocks, as above. `token`: query q sees key k if
    0 <= q - k <= local_window_size (causal), or |q - k| <= local_window_size // 2, and blocks are no more
    than how the work is cut. Read by local_window, global_local."""


class AdaptiveConfig(Value):
    """Size of the scorer that chooses an adaptive attention's blocks."""

    num_heads: Heads
    """Query heads: each has projections of its own."""
    head_dim: Channels
    """Channels a head."""
    score_dim: Channels | None = None
    """Channels in which block summaries are compared; None for `head_dim`."""


class MultiheadConfig(Value):
    """Projections around the attention, as in `torch.nn.MultiheadAttention(batch_first=True)`."""

    embed_dim: Annotated[int, Field(ge=1, le=MOST_HEADS * MOST_CHANNELS)]
    """Channels of the model; a multiple of `num_heads`."""
    num_heads: Heads
    """Query heads."""
    kv_heads: Heads | None = None
    """Key and value heads, dividing `num_heads`; None for as many as query heads."""
    bias: bool = True
    """Whether the projections have biases."""
    checkpoint: bool = False
    """Recompute the whole module in backward (gradient checkpointing): time for memory."""

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got embed_dim={self.embed_dim} and "
                f"num_heads={self.num_heads}; choose e.g. embed_dim="
                f"{math.ceil(self.embed_dim / self.num_heads) * self.num_heads}"
            )
        if self.kv_heads is not None and self.num_heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide num_heads, got kv_heads={self.kv_heads} and num_heads={self.num_heads}"
            )
        return self


class ShardingConfig(Value):
    """How one sequence is shared by the ranks of a process group, each of which holds some of its tokens."""

    ring_size: Annotated[int, Field(ge=1, le=MOST_HEADS)] | None = None
    """Ranks that share a sequence; None for all of the group. It divides the group, whose consecutive ranks
    then form rings that are data-parallel to each other."""
    exchange: ExchangeKind = "auto"
    """What moves between ranks. `keys`: the keys and values that a rank's queries see. `heads`: all of q, k,
    v and out, so that each rank has some heads of the whole sequence; kv_heads must be a multiple of the
    ranks. `auto`: `heads` for adaptive attention and where fewer bytes move so, else `keys`."""
    shards: ShardKind = "contiguous"
    """`contiguous`: a run of tokens a rank. `zigzag`: two runs, one from the front and one from the back,
    which evens out the work of causal dense attention; for variant `dense` alone."""
    timeout_s: float = Field(default=600, ge=0.1, le=LONGEST_WAIT)
    """Seconds that a call waits for other ranks before it is an error. With NCCL the group's own timeout ends
    the process; this one holds for all else."""
    travel: Travel = "auto"
    """Numbers in which gradients of keys and values travel: `auto` for the type of k and v, or `float32`,
    which doubles the bytes of 16-bit ones."""


class AttentionConfig(Value):
    """One attention, completely: what it computes, on which backend, with how much scratch."""

    schema_version: Annotated[Literal[1], BeforeValidator(_plain_int)] = SCHEMA_VERSION
    """Version of this schema; another version is refused rather than guessed at."""
    variant: Variant
    """`dense`, `dilated`, `block_sparse` or `adaptive`."""
    segment_lengths: Branches = ()
    """Tokens a segment, one per branch. Read by dilated and by the dilated_sparse pattern."""
    dilation_rates: Branches = ()
    """Dilation of each branch; as many as `segment_lengths`."""
    pattern: SparsePatternConfig | None = None
    """The blocks kept. Required by block_sparse and adaptive, refused elsewhere."""
    adaptive: AdaptiveConfig | None = None
    """The scorer. Required by adaptive, refused elsewhere."""
    multihead: MultiheadConfig | None = None
    """Wrap the attention in projections; None for attention over q, k, v alone."""
    uncovered: Literal["refuse", "zero"] = "refuse"
    """What to do where no dilated branch covers a (position, head): refuse the config, or yield zero."""
    scale: float | None = Field(default=None, gt=0.0)
    """Factor on q k^T; None for 1 / sqrt(head_dim)."""
    backend: Backend = "auto"
    """`sdpa` (fused SDPA over views and gathers), `flex` (compiled FlexAttention, CUDA 8.0 and up)
    or `auto` (`flex` where it runs and its lists of blocks take at most a sixteenth of q, k, v and
    out, else `sdpa`); `flash` or `cudnn` for `sdpa` by that kernel alone, on CUDA, where it can
    (`flash`: all but dilated_sparse and adaptive; `cudnn`: dense and dilated). Never silently
    replaced: what cannot run is refused."""
    workspace_bytes: int = Field(default=16 * MIB, ge=64 * 1024, le=MOST_BYTES)
    """Scratch that one call may hold at a time; chunk sizes follow from it."""
    pool: Switch = "auto"
    """Keep scratch buffers between calls: `auto` from 4,096 tokens, `on`, `off`."""
    pool_bytes: int | None = Field(default=None, ge=1, le=MOST_BYTES)
    """Bound of the pool; None for what one call needs, within a share of the free memory."""
    cache_entries: int = Field(default=100, ge=0, le=MOST_BYTES)
    """Layouts, indices and masks kept, each kind; 0 turns the caches off."""
    cache_bytes: int = Field(default=64 * MIB, ge=0, le=MOST_BYTES)
    """Bytes that each kind of cache may hold."""
    sharding: ShardingConfig | None = None
    """How the sequence is shared by the ranks of a process group; None for one device."""

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """(segment length, dilation rate) of each branch."""
        return tuple(zip(self.segment_lengths, self.dilation_rates, strict=True))

    @property
    def token_edges(self) -> bool:
        """Whether it is a window, global tokens or not, that ends at the token."""
        pattern = self.pattern
        return (
            self.variant == "block_sparse"
            and pattern is not None
            and pattern.pattern_type != "dilated_sparse"
            and pattern.edges == "token"
        )

    @property
    def inert(self) -> tuple[str, ...]:
        """Names of the pattern and branch fields that differ from their defaults and have no effect."""
        if self.pattern is None:
            return ()
        if self.variant == "adaptive":
            reads = _ADAPTIVE_READS
        else:
            reads = _PATTERN_READS[self.pattern.pattern_type] | {"pattern_type"}
        fields = type(self.pattern).model_fields
        changed = {name for name in fields if getattr(self.pattern, name) != fields[name].default}
        changed |= {name for name in ("segment_lengths", "dilation_rates") if getattr(self, name)}
        return tuple(sorted(changed - reads))

    @model_serializer(mode="wrap")
    def _written(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The fields, those that came later only where they are given."""
        fields: dict[str, Any] = written(self)
        if fields.get("sharding", self) is None:
            del fields["sharding"]
        return fields

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_parts(self)
        _check_branches(self)
        _check_sharding(self)
        return self


def _check_parts(config: AttentionConfig) -> None:
    """Each variant has the parts that it needs and none that it cannot use."""
    needs = {"pattern": ("block_sparse", "adaptive"), "adaptive": ("adaptive",)}
    for part, variants in needs.items():
        present = getattr(config, part) is not None
        if config.variant in variants and not present:
            raise ValueError(f"variant {config.variant!r} needs {part}=..., got none; pass {part}")
        if config.variant not in variants and present:
            raise ValueError(
                f"variant {config.variant!r} takes no {part}; remove it or use variant={variants[0]!r}"
            )
    if config.uncovered == "zero" and config.variant != "dilated":
        raise ValueError(
            f"uncovered='zero' is for variant 'dilated', got variant {config.variant!r}; remove it"
        )
    if config.multihead and config.adaptive:
        expected = (config.multihead.num_heads, config.multihead.head_dim)
        got = (config.adaptive.num_heads, config.adaptive.head_dim)
        if expected != got:
            raise ValueError(
                f"adaptive and multihead disagree on (heads, head_dim): {got} and {expected}; "
                "give both the same"
            )


def _check_branches(config: AttentionConfig) -> None:
    """Branches are paired, fit their blocks, and cover every position."""
    lengths, rates = config.segment_lengths, config.dilation_rates
    if len(lengths) != len(rates):
        raise ValueError(
            f"segment_lengths and dilation_rates pair up, got {len(lengths)} and {len(rates)} of them "
            f"({list(lengths)} and {list(rates)}); give as many rates as lengths"
        )
    if config.variant == "dense" and lengths:
        raise ValueError(
            f"variant 'dense' has no segments, got segment_lengths={list(lengths)}; "
            "remove them or use variant='dilated'"
        )
    reads = config.variant == "dilated" or (
        config.variant == "block_sparse"
        and config.pattern is not None
        and config.pattern.pattern_type == "dilated_sparse"
    )
    if reads and not lengths:
        what = "variant 'dilated'" if config.variant == "dilated" else "pattern 'dilated_sparse'"
        raise ValueError(
            f"{what} needs at least one branch, got none; pass segment_lengths=[2048], dilation_rates=[1]"
        )
    if config.variant == "dilated":
        for length, rate in config.branches:
            if rate > length:
                raise ValueError(
                    f"dilation rate {rate} exceeds its segment length {length}, so some heads would "
                    f"attend to nothing; use a rate of at most {length}"
                )
        if config.uncovered == "refuse" and 1 not in rates:
            raise ValueError(
                f"dilation_rates={list(rates)} leave positions without output, because no branch has "
                "rate 1; add a branch with rate 1, or pass uncovered='zero' to get zeros there"
            )
    elif reads and config.pattern is not None:
        block = config.pattern.block_size
        for length in lengths:
            if length % block:
                below, above = length // block * block, math.ceil(length / block) * block
                raise ValueError(
                    f"segment length {length} is not a multiple of block_size {block}; use "
                    + (f"{below} or {above}" if below else f"{above}")
                    + ", or another block size"
                )


def _check_sharding(config: AttentionConfig) -> None:
    """The attention can be shared as asked for."""
    sharding = config.sharding
    if sharding is None:
        return
    if sharding.shards == "zigzag" and config.variant != "dense":
        raise ValueError(
            f"shards='zigzag' is for variant 'dense', got variant {config.variant!r}, whose work is even "
            "over runs of tokens; use shards='contiguous'"
        )
    if sharding.exchange != "keys":
        return
    if config.variant == "adaptive":
        raise ValueError(
            "exchange='keys' is not for variant 'adaptive', whose blocks are chosen from all of q and k; use "
            "exchange='heads' or 'auto'"
        )
    if config.backend not in ("auto", "sdpa"):
        raise ValueError(
            f"exchange='keys' runs parts of a sequence, which backend={config.backend!r} does not; use "
            "backend='auto' or 'sdpa', or exchange='heads'"
        )
