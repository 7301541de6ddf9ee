"""The `planner` command: options in, a call of the library, data on stdout and all else on stderr.

A command is a function under `@_command`. A parameter that is annotated with a type of `_BUILDERS` stands
for the options of that type's builder, so that every command takes a config or a workload the same way.

Importing this and asking for help loads no torch; what a command alone needs it imports itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from attention.config import AttentionConfig
from attention.errors import AttentionPlannerError
from planner.options import Format, build_config, build_workload, say
from planner.units import parse_bytes
from planner.workload import Workload

DONE: Final = 0
CRASHED: Final = 1
WRONG: Final = 2
INTERRUPTED: Final = 130

app = typer.Typer(
    name="planner",
    help="Says which attention fits a GPU, how fast it is and what it attends to.",
    epilog="\b\nExample:\n  planner measure --variant dense --seq 4096",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help is half as long, and loads no rich
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a measured process crashed, 2 the request is wrong,
    130 interrupted."""
    app(prog_name="planner")


@app.callback()
def _together() -> None:
    """With a callback, one command alone would still be called by its name."""


_BUILDERS: Final[dict[Any, Callable[..., Any]]] = {AttentionConfig: build_config, Workload: build_workload}


# Commands.


def _command(name: str, example: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a function as a command; what it returns is the exit code.

    Options of equal name are one option, that each builder gets. An error of the project's tree becomes
    one line and exit code 2.
    """

    def register(function: Callable[..., int]) -> Callable[..., int]:
        taken = inspect.signature(function, eval_str=True).parameters
        builders = {name: _BUILDERS.get(each.annotation) for name, each in taken.items()}
        options: dict[str, inspect.Parameter] = {}
        needs: dict[str, set[str]] = {}
        for parameter, builder in builders.items():
            theirs = inspect.signature(builder, eval_str=True).parameters if builder else {}
            needs[parameter] = set(theirs)
            for option in theirs.values() if builder else [taken[parameter]]:
                options.setdefault(option.name, option)

        @functools.wraps(function)
        def run(**given: Any) -> None:
            try:
                arguments = {
                    name: builder(**{one: given[one] for one in needs[name]}) if builder else given[name]
                    for name, builder in builders.items()
                }
                code = function(**arguments)
            except AttentionPlannerError as error:
                say(f"error: {error}")
                code = WRONG
            except KeyboardInterrupt:
                say("interrupted")
                code = INTERRUPTED
            raise typer.Exit(code)

        run.__signature__ = inspect.Signature(list(options.values()))  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in options.values()}
        app.command(name, epilog=f"\b\nExample:\n  {example}", short_help=_first(function))(run)
        return function

    return register


def _first(function: Callable[..., Any]) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _print(data: Any, format: str) -> None:
    from planner.formats import as_json, as_yaml

    typer.echo({"json": as_json, "yaml": as_yaml}[format](data))


@_command("gpus", "planner gpus --name 'rtx 40'")
def gpus(
    *,
    name: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A card, or a part of many cards' names.")
    ] = None,
    format: Format = "table",
) -> int:
    """List the known cards: memory, bandwidth, peak rates, kernels.

    One card is shown in full, with the sources of its figures; JSON and YAML always have them.
    """
    from planner import report
    from planner.gpus import known, matching

    cards = known() if name is None else matching(name)
    if format != "table":
        _print([report.gpu_data(gpu) for gpu in cards], format)
    else:
        report.show(report.gpu_card(cards[0]) if len(cards) == 1 else report.gpu_table(cards))
    return DONE


@_command("measure", "planner measure --variant block_sparse --pattern local_window --seq 16K")
def measure(
    *,
    workload: Workload,
    config: AttentionConfig,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
    timeout: Annotated[float, typer.Option(help="Seconds for everything.")] = 120,
    runs: Annotated[int, typer.Option(help="Warm calls that are timed.")] = 3,
    cap: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Hold the run to so much memory: 8GB, 500MiB.")
    ] = None,
    append: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Add the record to this file, a line of JSON each.")
    ] = None,
    format: Format = "table",
) -> int:
    """Run one attention; print its memory and time.

    It runs in a process of its own. Running out of memory or of time is a result too, and exits 0. A crash
    exits 1, and what the library refuses 2.
    """
    from planner import report
    from planner.measure import measure as run

    cap_bytes = None if cap is None else parse_bytes(cap, "--cap")
    with _progress(f"measuring {config.variant} at {workload.seq:,} tokens on {device}"):
        found = run(config, workload, device, timeout=timeout, runs=runs, cap_bytes=cap_bytes)
    if format == "table":
        report.show(report.measurement_table(found))
    else:
        _print(report.measurement_data(found), format)
    if append is not None:
        from planner import records

        records.append(append, found)
        say(f"the record was added to {append}")
    return {"crash": CRASHED, "error": WRONG}.get(found.kind, DONE)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """A line on stderr while something takes its time; nothing where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
