"""Options that commands share, and what they describe: a workload, a config. Imports no torch.

A builder's parameters are the options; `planner.cli` gives them to each command that takes what it builds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attention.config import AdaptiveConfig, AttentionConfig, PatternType, SparsePatternConfig, Variant
from attention.errors import ConfigError
from planner.units import parse_count
from planner.workload import Dtype, Mode, Workload

Format = Annotated[Literal["table", "json", "yaml"], typer.Option("--format", help="How to print.")]


def build_workload(
    *,
    seq: Annotated[
        str, typer.Option(metavar="TOKENS", help="Tokens: 131072, 128K (x 1,024) or 1M.", show_default=False)
    ],
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key and value heads, dividing --heads. [default: as --heads]")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Channels a head.")] = 64,
    dtype: Annotated[Dtype, typer.Option(help="Type of q, k, v.")] = "float16",
    mode: Annotated[Mode, typer.Option(help="Forward alone, or forward and backward.")] = "inference",
    causal: Annotated[bool, typer.Option("--causal", help="Queries see no later keys.")] = False,
    weights: Annotated[bool, typer.Option("--weights", help="Ask for the weights too.")] = False,
) -> Workload:
    """The workload that these options describe."""
    return Workload(
        seq=parse_count(seq, "--seq"),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        mode=mode,
        causal=causal,
        weights=weights,
    )


def build_config(
    *,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An AttentionConfig as JSON; replaces the options below."),
    ] = None,
    variant: Annotated[Variant | None, typer.Option(help="Which attention.")] = None,
    pattern: Annotated[
        PatternType | None, typer.Option(help="Blocks kept. [default: dilated_sparse]")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens a block. [default: 128]")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a local window. [default: 512]")] = None,
    global_tokens: Annotated[
        int | None, typer.Option(help="First tokens that see all and are seen. [default: 64]")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of blocks kept, 0.01 to keep 1%. [default: 0.1]")
    ] = None,
    segments: Annotated[
        str | None, typer.Option(metavar="LIST", help="Segment length of each branch: 2048,4096 or 2K,4K.")
    ] = None,
    rates: Annotated[
        str | None, typer.Option(metavar="LIST", help="Dilation rate of each branch: 1,2.")
    ] = None,
    heads: Annotated[int, typer.Option()] = 8,
    head_dim: Annotated[int, typer.Option()] = 64,
) -> AttentionConfig:
    """The config of a file, or the one that these options describe.

    Heads and their size are the workload's; an adaptive config's scorer takes them over.
    """
    blocks: dict[str, Any] = {
        "pattern_type": pattern,
        "block_size": block_size,
        "local_window_size": window,
        "global_tokens": global_tokens,
        "sparsity_ratio": sparsity,
    }
    blocks = {name: value for name, value in blocks.items() if value is not None}
    branches: dict[str, Any] = {
        "segment_lengths": _counts(segments, "--segments"),
        "dilation_rates": _counts(rates, "--rates"),
    }
    if config is not None:
        if variant is not None or blocks or any(branches.values()):
            raise ConfigError("--config has the whole config; remove --variant and its options, or --config")
        return _checked(_read_config(config))
    if variant is None:
        raise ConfigError("no attention was chosen; pass e.g. --variant dense, or --config FILE")
    parts: dict[str, Any] = {}
    if blocks or variant in ("block_sparse", "adaptive"):
        parts["pattern"] = SparsePatternConfig(**blocks)
    if variant == "adaptive":
        parts["adaptive"] = AdaptiveConfig(num_heads=heads, head_dim=head_dim)
    return _checked(AttentionConfig(variant=variant, **branches, **parts))


def _read_config(path: Path) -> AttentionConfig:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from None
    try:
        return AttentionConfig.from_json(text)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None


def _checked(config: AttentionConfig) -> AttentionConfig:
    """The config; fields without effect are named on stderr."""
    if config.inert:
        say(f"note: without effect here: {', '.join(config.inert)}")
    return config


def _counts(text: str | None, what: str) -> tuple[int, ...]:
    """`2048,4096` or `2K,4K`; nothing given is no branch."""
    return tuple(parse_count(part, what) for part in text.split(",")) if text is not None else ()


def say(line: str) -> None:
    """One line on stderr, whatever breaks it had."""
    typer.echo(f"planner: {' '.join(line.split())}", err=True)
