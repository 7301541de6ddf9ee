"""Options of commands that picture a config: a file or options, and over how many tokens. Imports no torch;
see `planner.cli.options`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Final, NewType, TypeAlias

import typer

from attention.config import AttentionConfig
from planner.cli.options import DocumentsOption, QueriesOption, build_config, document_lengths, known_workload
from planner.units import parse_count
from planner.workload import Workload

SEQ: Final = 4096
"""Tokens, where nobody says how many."""

Pictured = NewType("Pictured", AttentionConfig)
"""A config whose file is an argument."""
View = NewType("View", Workload)
"""Over what a config is pictured."""

_File: TypeAlias = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="A config, or what a command printed as JSON.", show_default=False),
]


def build_pictured(**options: Any) -> Pictured:
    """The config of the file, or the one that options describe. Takes what `build_config` does."""
    return Pictured(build_config(named="", **options))


_of_config = inspect.signature(build_config, eval_str=True)
build_pictured.__signature__ = _of_config.replace(  # type: ignore[attr-defined]
    parameters=[
        option.replace(annotation=_File) if name == "config" else option
        for name, option in _of_config.parameters.items()
    ]
)


def build_view(
    *,
    config: _File = None,
    seq: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help=f"Tokens: 4096, 128K or 1M. [default: the file's, or {SEQ}]"),
    ] = None,
    causal: Annotated[
        bool | None, typer.Option("--causal", help="Causal mask: queries attend to no later keys.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads. [default: the file's, or 8]")] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs that share it: who holds and sends what. [default: the file's]")
    ] = None,
    queries: QueriesOption = None,
    documents: DocumentsOption = None,
) -> View:
    """The workload that these options describe; what they leave open is the file's, where it has one."""
    defaults = known_workload(config, named="")
    sizes = ("batch", "kv_heads", "head_dim", "dtype", "mode", "gpus")
    lengths = defaults.get("documents") if documents is None else document_lengths(documents)
    length = defaults.get("seq", SEQ) if documents is None else sum(lengths or ())
    fields: dict[str, Any] = {
        **{name: defaults[name] for name in sizes if name in defaults},
        **({} if gpus is None else {"gpus": gpus}),
        "seq": length if seq is None else parse_count(seq, "--seq"),
        "causal": defaults.get("causal", False) if causal is None else causal,
        "heads": defaults.get("heads", Workload.model_fields["heads"].default) if heads is None else heads,
        "queries": defaults.get("queries") if queries is None else parse_count(queries, "--queries"),
        "documents": lengths,
    }
    return View(Workload(**fields))
