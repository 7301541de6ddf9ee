"""Modules from configs, and the three factories that take arguments as papers and reports write them.

build                            any config
create_dilated_attention         dilated attention by kind
create_block_sparse_attention    block-sparse attention by variant
create_multihead_block_sparse    the same between projections
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attention.adaptive import AdaptiveAttention
from attention.config import (
    AdaptiveConfig,
    AttentionConfig,
    ExchangeKind,
    MultiheadConfig,
    ShardingConfig,
    SparsePatternConfig,
)
from attention.errors import ConfigError, UnavailableError
from attention.module import Attention
from attention.multihead import MultiheadAttention

EXCHANGES: dict[str, ExchangeKind] = {"ring": "keys", "distributed": "auto"}
"""What moves in the kinds and variants that share a sequence."""


def build(
    config: AttentionConfig, device: torch.device | str | None = None, process_group: Any = None
) -> nn.Module:
    """The module that `config` describes, its parameters (if any) on `device`.

    With `config.sharding` it is shared by the ranks of `process_group`: a torch.distributed group, a
    DeviceMesh of one dimension, or None for the default group. All of them build it. Where nothing is
    initialised, or a rank is alone, it is the module of one device.
    """
    if not isinstance(config, AttentionConfig):
        raise ConfigError(f"build takes an AttentionConfig, got {type(config).__name__}")
    if process_group is not None and config.sharding is None:
        raise ConfigError(
            "process_group was given for a config without sharding, which is for one device; pass "
            "sharding=ShardingConfig() to AttentionConfig, or no process_group"
        )
    if device is not None:
        device = _device(device)
    attention = _attention(config, process_group)
    module = MultiheadAttention(config, attention) if config.multihead else attention
    return module if device is None else module.to(device)


def _attention(config: AttentionConfig, process_group: Any) -> nn.Module:
    """The attention without projections."""
    if config.sharding is not None and torch.distributed.is_available():
        from attention.sharding.groups import ring_of
        from attention.sharding.module import ShardedAttention

        transport = ring_of(process_group, config.sharding)
        if transport is not None:
            return ShardedAttention(config, transport)
    return AdaptiveAttention(config) if config.adaptive else Attention(config)


def _device(device: torch.device | str) -> torch.device:
    """The device, if there is one by this name."""
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device must be one of torch's, such as 'cpu' or 'cuda', got {device!r}"
        ) from error
    if resolved.type not in ("cpu", "cuda", "meta"):
        raise UnavailableError(f"this library runs on 'cpu' and 'cuda', got device {str(device)!r}")
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise UnavailableError(
                f"device {str(device)!r} is not to be had: torch {torch.__version__} finds {count} CUDA "
                "devices here; use 'cpu', or a build of torch and a machine that have it"
            )
    return resolved


def create_dilated_attention(
    kind: str = "improved",
    *,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    device: torch.device | str | None = None,
    process_group: Any = None,
    **options: Any,
) -> nn.Module:
    """Dilated attention. kind: "improved" on one device, "ring" over the ranks of `process_group`, between
    which keys move.

    `options` are fields of AttentionConfig; `enable_memory_pool=True|False` is taken for `pool`. Of "ring"
    they may be fields of ShardingConfig, or all of those as `sharding=ShardingConfig(...)`.

    create_dilated_attention("improved", segment_lengths=[2048, 4096], dilation_rates=[1, 2])
    create_dilated_attention("ring", segment_lengths=[2048, 4096], dilation_rates=[1, 2], ring_size=8)
    """
    if kind not in ("improved", "ring"):
        raise ConfigError(f"kind must be 'improved' or 'ring', got {kind!r}")
    options = _renamed(options)
    config = AttentionConfig(
        variant="dilated",
        segment_lengths=_sequence(segment_lengths),
        dilation_rates=_sequence(dilation_rates),
        sharding=_sharding(options, kind),
        **options,
    )
    return build(config, device, process_group)


def create_block_sparse_attention(
    variant: str = "base",
    *,
    segment_lengths: Sequence[int] = (),
    dilation_rates: Sequence[int] = (),
    sparsity_ratio: float | None = None,
    device: torch.device | str | None = None,
    process_group: Any = None,
    **options: Any,
) -> nn.Module:
    """Block-sparse attention. variant: "base", "adaptive", "multihead"; or, over the ranks of
    `process_group`, "ring", between which keys move, and "distributed", between which keys or heads do.

    Fields of SparsePatternConfig may stand among the options, or all together as
    `sparse_config=SparsePatternConfig(...)`; "adaptive" takes `num_heads` and `head_dim`, "multihead"
    takes `embed_dim` and `num_heads`. Fields of ShardingConfig may stand among those of "ring" and
    "distributed", and for all variants together as `sharding=ShardingConfig(...)`. The rest are fields of
    AttentionConfig.

    create_block_sparse_attention("base", segment_lengths=[2048], dilation_rates=[1], sparsity_ratio=0.01)
    """
    if variant not in ("base", "adaptive", "multihead", *EXCHANGES):
        raise ConfigError(
            f"variant must be one of 'base', 'ring', 'adaptive', 'multihead', 'distributed', got {variant!r}"
        )
    options = _renamed(options)
    pattern = _pattern(options, sparsity_ratio)
    parts: dict[str, Any] = {}
    if variant == "adaptive":
        parts["adaptive"] = AdaptiveConfig(
            **_fields_of(options, AdaptiveConfig, {"num_heads": 8, "head_dim": 64})
        )
    if variant == "multihead":
        parts["multihead"] = MultiheadConfig(**_fields_of(options, MultiheadConfig))
    config = AttentionConfig(
        variant="adaptive" if variant == "adaptive" else "block_sparse",
        segment_lengths=_sequence(segment_lengths),
        dilation_rates=_sequence(dilation_rates),
        pattern=pattern,
        sharding=_sharding(options, variant),
        **parts,
        **options,
    )
    return build(config, device, process_group)


def create_multihead_block_sparse(
    embed_dim: int,
    num_heads: int,
    *,
    segment_lengths: Sequence[int] = (),
    dilation_rates: Sequence[int] = (),
    sparsity_ratio: float | None = None,
    **options: Any,
) -> nn.Module:
    """Multihead block-sparse attention, usable where `torch.nn.MultiheadAttention(batch_first=True)` is.

    create_multihead_block_sparse(512, 8, segment_lengths=[8192], dilation_rates=[1], sparsity_ratio=0.05)
    """
    return create_block_sparse_attention(
        "multihead",
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        sparsity_ratio=sparsity_ratio,
        embed_dim=embed_dim,
        num_heads=num_heads,
        **options,
    )


def _sequence(values: Any) -> tuple[int, ...]:
    """Any sequence as a tuple; what is none is left to the config to refuse."""
    return tuple(values) if isinstance(values, Sequence) else values


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with the reports' `enable_memory_pool` as `pool`."""
    options = dict(options)
    if "enable_memory_pool" in options:
        if "pool" in options:
            raise ConfigError("enable_memory_pool and pool are the same option; pass one of them")
        options["pool"] = "on" if options.pop("enable_memory_pool") else "off"
    return options


def _fields_of(
    options: dict[str, Any], part: type[Any], defaults: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Moves the fields of `part` out of `options`."""
    return {**(defaults or {}), **{name: options.pop(name) for name in part.model_fields if name in options}}


def _sharding(options: dict[str, Any], kind: str) -> ShardingConfig | None:
    """How the sequence is shared, moved out of the options: whole, or by its fields where the kind shares
    it."""
    whole = options.pop("sharding", None)
    if whole is not None and not isinstance(whole, ShardingConfig):
        raise ConfigError(f"sharding must be a ShardingConfig, got {type(whole).__name__}")
    if kind not in EXCHANGES:
        return whole
    fields = _fields_of(options, ShardingConfig)
    if whole is not None and fields:
        raise ConfigError(
            f"sharding was given whole and by {', '.join(sorted(fields))}; put those into sharding"
        )
    sharding = whole or ShardingConfig(**fields)
    if sharding.exchange == "auto":
        return sharding.model_copy(update={"exchange": EXCHANGES[kind]})
    if EXCHANGES[kind] not in ("auto", sharding.exchange):
        raise ConfigError(
            f"{kind!r} moves {EXCHANGES[kind]}, got exchange={sharding.exchange!r}; leave it out, or give "
            "sharding=ShardingConfig(...) to a config of one's own and build that"
        )
    return sharding


def _pattern(options: dict[str, Any], sparsity_ratio: float | None) -> SparsePatternConfig:
    """The pattern among the options: whole, or by its fields, never both."""
    whole, again = options.pop("sparse_config", None), options.pop("pattern", None)
    if whole is not None and again is not None:
        raise ConfigError("sparse_config and pattern are the same option; pass one of them")
    whole = again if whole is None else whole
    fields = _fields_of(options, SparsePatternConfig)
    if sparsity_ratio is not None:
        fields["sparsity_ratio"] = sparsity_ratio
    if whole is None:
        return SparsePatternConfig(**fields)
    if fields:
        raise ConfigError(
            f"the pattern was given whole and by {', '.join(sorted(fields))}; put those into sparse_config"
        )
    if not isinstance(whole, SparsePatternConfig):
        raise ConfigError(f"sparse_config must be a SparsePatternConfig, got {type(whole).__name__}")
    return whole
