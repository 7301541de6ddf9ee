"""The command that runs a user's own program: dry-run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from attention.errors import ConfigError
from planner.cli.app import DONE, command, print_data
from planner.cli.options import Format, say


@command("dry-run", "planner dry-run --gpu rtx4090 -- python train.py --batch 4", takes_the_rest=True)
def dry_run(
    *,
    program: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND...", help="As in a shell.", show_default=False)
    ] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="The card: see `planner gpus`.")] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a card. [default: what the card reports]")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Cards of this kind.")] = 1,
    allocator: Annotated[
        str | None, typer.Option(metavar="TEXT", help="As PYTORCH_CUDA_ALLOC_CONF: expandable_segments:True.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="End it after so many optimizer steps. [default: never]")
    ] = None,
    snapshot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a snapshot for PyTorch's memory viewer.")
    ] = None,
    install: Annotated[
        bool, typer.Option("--install", help="First make a CUDA build of torch, where there is none.")
    ] = False,
    index: Annotated[
        str | None, typer.Option(metavar="URL", help="Where --install finds torch. [default: PyPI]")
    ] = None,
    format: Format = "table",
) -> int:
    """Run your own program on a card that is not there; print the memory it takes.

    Torch's allocator and operators are real, kernels do nothing: bytes are true, values are garbage. Exits 3
    where memory runs out, else as the program does. Linux x86-64.
    """
    from planner.programs.run import dry_run as run
    from planner.standin import install as private
    from planner.standin.interpreter import interpreter, python_of

    if index is not None and not install:
        raise ConfigError("--index says where --install finds torch; give both or none")
    if install:
        python = interpreter(python_of(program) if program else sys.executable)
        if python.cuda is not None:
            say(f"{python.path} has a CUDA build of torch, {python.torch}; nothing is to be made")
        else:
            say(f"the CUDA build is in {private.install(python, say, index=index or private.INDEX)}")
        if gpu is None:
            return DONE
    if gpu is None:
        raise ConfigError("--gpu is missing: which card? `planner gpus` has them")
    stdout = sys.stderr if format != "table" else None
    found = run(
        program or [],
        gpu=gpu,
        vram=vram,
        allocator=allocator,
        gpus=gpus,
        snapshot=snapshot,
        steps=steps,
        stdout=stdout,
    )
    if format == "table":
        from planner.report.text.dry_run import dry_run_text

        typer.echo(dry_run_text(found))
    else:
        print_data(found.model_dump(mode="json"), format)
    return found.exit_code
