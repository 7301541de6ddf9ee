"""Options that commands share, and what they describe: a workload, a config. Imports no torch.

A builder's parameters are the options; `planner.cli.app` gives them to each command that takes what it
builds.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NewType

import typer

from attention.config import AdaptiveConfig, AttentionConfig, Edges, PatternType, SparsePatternConfig, Variant
from attention.errors import ConfigError, shortened
from planner.files import read_json
from planner.units import parse_bytes, parse_count
from planner.workload import MOST_DOCUMENTS, Dtype, Mode, Workload

if TYPE_CHECKING:
    from planner.gpus import Gpu

QueriesOption = Annotated[
    str | None, typer.Option(metavar="TOKENS", help="Tokens that ask, the last: 1 to decode. [default: all]")
]
DocumentsOption = Annotated[
    str | None, typer.Option(metavar="LIST", help="Lengths of packed documents: 4096,8192 or 4Kx8.")
]
Format = Annotated[Literal["table", "json", "yaml"], typer.Option("--format", help="How to print.")]


def _size(field: str, help: str) -> Any:
    """An option for a field of a workload, whose default is the file's, or else the field's own."""
    default = Workload.model_fields[field].default
    return typer.Option(help=f"{help} [default: {default}]", show_default=False)


MOST_SAID: Final = 2000
"""Characters of one line on stderr."""
FILE: Final = "An AttentionConfig, or what a command printed as JSON; replaces the options of a config."


def build_workload(
    *,
    seq: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Tokens: 131072, 128K (x 1,024) or 1M.", show_default=False),
    ] = None,
    batch: Annotated[int | None, _size("batch", "Sequences.")] = None,
    heads: Annotated[int | None, _size("heads", "Query heads.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key and value heads, dividing --heads. [default: as --heads]")
    ] = None,
    head_dim: Annotated[int | None, _size("head_dim", "Channels a head.")] = None,
    dtype: Annotated[Dtype | None, _size("dtype", "Type of q, k, v.")] = None,
    mode: Annotated[Mode | None, _size("mode", "Forward alone, or forward and backward.")] = None,
    causal: Annotated[
        bool | None, typer.Option("--causal", help="Causal mask: queries attend to no later keys.")
    ] = None,
    weights: Annotated[
        bool | None, typer.Option("--weights", help="Return the attention weights too.")
    ] = None,
    queries: QueriesOption = None,
    documents: DocumentsOption = None,
    sinks: Annotated[
        bool | None, typer.Option("--sinks", help="A learned sink of each head joins its softmax.")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help=FILE)] = None,
) -> Workload:
    """The workload that these options describe; what they leave open is the file's, where it has one."""
    options: dict[str, Any] = {
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": dtype,
        "mode": mode,
        "causal": causal,
        "weights": weights,
        "queries": None if queries is None else parse_count(queries, "--queries"),
        "documents": None if documents is None else document_lengths(documents),
        "sinks": sinks,
        "seq": None if seq is None else parse_count(seq, "--seq"),
    }
    fields = {name: value for name, value in options.items() if value is not None}
    if "documents" in fields:
        fields.setdefault("seq", sum(fields["documents"]))
    fields = {**known_workload(config), **fields}
    if "seq" not in fields:
        raise ConfigError("the length is missing: pass --seq, e.g. --seq 128K")
    return Workload(**fields)


def known_workload(path: Path | None, named: str = "--config ") -> dict[str, Any]:
    """The workload that a file has beside its config; nothing without a file, or where it has none."""
    workload = None if path is None else _read(path, named).get("workload")
    return workload if isinstance(workload, dict) else {}


AnyLength = NewType("AnyLength", Workload)
"""A workload whose length is for the command to fill in."""
GivenSizes = NewType("GivenSizes", Workload)
"""A workload of options alone, without a file, whose length is for the command to fill in, unless there are
documents, which fix it."""
Unweighted = NewType("Unweighted", GivenSizes)
"""A workload that does not ask for the weights."""


Given = NewType("Given", frozenset[str])
"""Names of the options that the command line has, whatever their values."""


def flags(names: Iterable[str]) -> str:
    """Options by name as they are written: --head-dim, --seq."""
    return ", ".join(f"--{name.rstrip('_').replace('_', '-')}" for name in sorted(names))


def build_any_length(**options: Any) -> AnyLength:
    """The workload that these options describe, no longer than the tokens that ask. Takes what
    `build_workload` does, but `seq` and what fixes it."""
    given = known_workload(options.get("config"))
    if given.get("documents"):
        raise ConfigError(
            f"--config {options['config']}: its workload has documents, which fix the length; remove them"
        )
    shortest = options.get("queries") or str(given.get("queries") or 1)
    return AnyLength(build_workload(seq=shortest, **options))


def build_sizes(**options: Any) -> GivenSizes:
    """The workload that these options describe, as long as its documents, or no longer than the tokens that
    ask. Takes what `build_workload` does, but `seq` and `config`."""
    seq = None if options.get("documents") else options.get("queries") or "1"
    return GivenSizes(build_workload(seq=seq, **options))


def build_unweighted(**options: Any) -> Unweighted:
    """The workload that these options describe. Takes what `build_sizes` does, but `weights`."""
    return Unweighted(build_sizes(**options))


def without(builder: Callable[..., Any], *names: str) -> inspect.Signature:
    """A builder's signature less some options."""
    signature = inspect.signature(builder, eval_str=True)
    return signature.replace(
        parameters=[one for name, one in signature.parameters.items() if name not in names]
    )


build_any_length.__signature__ = without(build_workload, "seq", "documents")  # type: ignore[attr-defined]
build_sizes.__signature__ = without(build_workload, "seq", "config")  # type: ignore[attr-defined]
build_unweighted.__signature__ = without(build_workload, "seq", "config", "weights")  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Place:
    """Where memory is predicted for, and within which budget."""

    device: str | Gpu
    """`cpu` or a card."""
    budget: int | None
    """Bytes of the budget, or else of the card; None on a CPU without a budget."""
    options: dict[str, Any]
    """Options of `planner.estimate` beside the device."""


def build_place(
    *,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cpu, or a GPU. [default: cpu; with --vram a generic card]"),
    ] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to fit: 8GB, 7.75GiB. [default: the card's]")
    ] = None,
    allocator: Annotated[
        str, typer.Option(metavar="TEXT", help="Settings as in PYTORCH_CUDA_ALLOC_CONF.", show_default=False)
    ] = "",
    display: Annotated[
        Literal["headless", "desktop"], typer.Option(help="Whether the card drives a display.")
    ] = "headless",
    others: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of other processes on the card. [default: 0]")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Measured size of the CUDA context. [default: a known one]"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Threads of a CPU's operators. [default: as torch has]"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Calibration to use. [default: your own, or a shipped one]"),
    ] = None,
) -> Place:
    """The place that these options describe."""
    from planner import gpus
    from planner.calibration import load

    budget = None if vram is None else parse_bytes(vram, "--vram")
    card: str | Gpu = device or "cpu"
    if device is None and budget is not None:
        card = gpus.generic(budget)
    elif card != "cpu":
        card = gpus.find(str(card))
        if budget is not None:
            gpus.check_budget(card, budget, "--vram")
    options: dict[str, Any] = {"calibration": None if calibration is None else load(calibration)}
    if isinstance(card, str):
        gpu_options = {"--allocator": allocator, "--others": others, "--context": context}
        wrong = [name for name, value in gpu_options.items() if value] + ["--display"] * (
            display != "headless"
        )
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: for a GPU only; name one with --device, or give --vram")
        return Place(card, budget, options | {"threads": threads})
    if threads is not None:
        raise ConfigError("--threads is for a CPU only; remove it, or --device and --vram")
    options |= {
        "allocator": allocator,
        "display": display,
        "others_bytes": 0 if others is None else parse_bytes(others, "--others"),
        "context_bytes": None if context is None else parse_bytes(context, "--context"),
    }
    return Place(card, card.usable_bytes if budget is None else budget, options)


def build_config(
    *,
    named: str = "--config ",
    config: Annotated[Path | None, typer.Option(metavar="FILE", help=FILE)] = None,
    variant: Annotated[Variant | None, typer.Option(help="Which attention.")] = None,
    pattern: Annotated[
        PatternType | None, typer.Option(help="Which blocks are kept. [default: dilated_sparse]")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens a block. [default: 128]")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a local window. [default: 512]")] = None,
    global_tokens: Annotated[
        int | None, typer.Option(help="First tokens, which every query attends to. [default: 64]")
    ] = None,
    edges: Annotated[
        Edges | None, typer.Option(help="Where windows and global tokens end. [default: block]")
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
    heads: Annotated[int | None, typer.Option()] = None,
    head_dim: Annotated[int | None, typer.Option()] = None,
) -> AttentionConfig:
    """The config of a file, or the one that these options describe.

    Heads and their size are the workload's; an adaptive config's scorer takes them over. `named`: how errors
    call the file.
    """
    blocks: dict[str, Any] = {
        "pattern_type": pattern,
        "block_size": block_size,
        "local_window_size": window,
        "global_tokens": global_tokens,
        "edges": edges,
        "sparsity_ratio": sparsity,
    }
    blocks = {name: value for name, value in blocks.items() if value is not None}
    branches: dict[str, Any] = {
        "segment_lengths": counts(segments, "--segments"),
        "dilation_rates": counts(rates, "--rates"),
    }
    if config is not None:
        if variant is not None or blocks or any(branches.values()):
            what = named.strip() or "the file"
            raise ConfigError(f"{what} has the whole config; remove --variant and its options, or {what}")
        return _checked(_read_config(config, named))
    if variant is None:
        raise ConfigError(f"no attention was chosen; pass e.g. --variant dense, or {named}FILE")
    parts: dict[str, Any] = {}
    if blocks or variant in ("block_sparse", "adaptive"):
        parts["pattern"] = SparsePatternConfig(**blocks)
    if variant == "adaptive":
        usual = Workload(seq=1)
        parts["adaptive"] = AdaptiveConfig(
            num_heads=usual.heads if heads is None else heads,
            head_dim=usual.head_dim if head_dim is None else head_dim,
        )
    return _checked(AttentionConfig(variant=variant, **branches, **parts))


build_config.__signature__ = without(build_config, "named")  # type: ignore[attr-defined]


def _read_config(path: Path, named: str) -> AttentionConfig:
    data = _read(path, named)
    fields = data.get("config", data)
    try:
        return AttentionConfig(**fields) if isinstance(fields, dict) else AttentionConfig.from_json("0")
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{named}{path}: {error}") from None


def _read(path: Path, named: str) -> dict[str, Any]:
    """The JSON object of a file: a config, or a command's output, which has the config under `config`."""
    data = read_json(path, named)
    if not isinstance(data, dict):
        raise ConfigError(
            f"{named}{path}: AttentionConfig: expected a JSON object, got {type(data).__name__}"
        )
    return data


def _checked(config: AttentionConfig) -> AttentionConfig:
    """The config; fields without effect are named on stderr."""
    if config.inert:
        say(f"note: without effect here: {', '.join(config.inert)}")
    return config


def counts(text: str | None, what: str) -> tuple[int, ...]:
    """`2048,4096` or `2K,4K`; nothing given is no branch."""
    return tuple(parse_count(part, what) for part in text.split(",")) if text is not None else ()


def document_lengths(text: str, what: str = "--documents") -> tuple[int, ...]:
    """`4096,8192`, `4K,8K`, and with `x` and a number so many of a length: `4Kx8`. See
    `planner.question.command.documents_option`."""
    lengths: tuple[int, ...] = ()
    for part in text.split(","):
        length, many, times = part.lower().partition("x")
        count = parse_count(times, what) if many else 1
        if len(lengths) + count > MOST_DOCUMENTS:
            raise ConfigError(f"{what} takes at most {MOST_DOCUMENTS:,} documents, got more")
        lengths += (parse_count(length, what),) * count
    return lengths


def say(line: str) -> None:
    """One line on stderr, whatever breaks it had, of a length that can be read."""
    with contextlib.suppress(OSError):  # there is nobody left to tell
        typer.echo(f"planner: {shortened(' '.join(line.split()), MOST_SAID)}", err=True)
