"""The decorator that makes a function a command of `planner`: its options, help, errors and progress.

A command is a function under `@command`. A parameter that is annotated with a type of `_BUILDERS` stands for
the options of that type's builder, so that every command takes a config or a workload the same way.

Importing this and asking for help loads no torch; what a command alone needs it imports itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import typer
from typer.core import TyperGroup

from attention.config import AttentionConfig
from attention.errors import AttentionPlannerError, StorageError
from planner.cli.options import (
    AnyLength,
    Given,
    GivenSizes,
    Place,
    Unweighted,
    build_any_length,
    build_config,
    build_place,
    build_sizes,
    build_unweighted,
    build_workload,
    say,
)
from planner.cli.options_choose import Allowed, Card, Conditions, build_card, build_conditions, build_space
from planner.cli.options_ranks import Ranks, build_ranks
from planner.cli.options_show import Pictured, View, build_pictured, build_view
from planner.files import reading_once
from planner.workload import Workload

DONE: Final = 0
CRASHED: Final = 1
WRONG: Final = 2
NOTHING_FITS: Final = 3
INTERRUPTED: Final = 130

_COMMANDS: Final[dict[str, Callable[[], Any]]] = {}
"""Functions that make a command with its options, by its name."""


class _Made(Mapping[str, Any]):
    """The commands, each made when it is asked for: some have fifty options, and most are not called."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = _COMMANDS[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


class _Group(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Made()  # type: ignore[assignment] # nothing is added to it


app = typer.Typer(
    name="planner",
    cls=_Group,
    help="Finds the attention that fits a GPU, and says how fast it is and what it attends to.",
    epilog="\b\nExample:\n  planner estimate --variant dense --seq 4096 --vram 8GB",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help is half as long, and loads no rich
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _together() -> None:
    """A callback without effect: with it, one command alone would still be called by its name."""


_BUILDERS: Final[dict[Any, Callable[..., Any]]] = {
    AttentionConfig: build_config,
    Workload: build_workload,
    AnyLength: build_any_length,
    Place: build_place,
    Ranks: build_ranks,
    Card: build_card,
    GivenSizes: build_sizes,
    Unweighted: build_unweighted,
    Conditions: build_conditions,
    Allowed: build_space,
    Pictured: build_pictured,
    View: build_view,
}


# Commands.


def command(
    name: str, example: str, *, takes_the_rest: bool = False
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a function as a command; what it returns is the exit code. `takes_the_rest`: from its first
    argument on, all that follows is that argument's.

    Options of equal name are one option, that each builder gets. A parameter that is annotated with `Given`
    gets the names of the options that the command line has. An error of the project's tree becomes one line
    and exit code 2, or 1 where it was not the request that was wrong.
    """

    def made(function: Callable[..., int]) -> Any:
        parameters = inspect.signature(function, eval_str=True).parameters
        builders = {name: _BUILDERS.get(each.annotation) for name, each in parameters.items()}
        options: dict[str, inspect.Parameter] = {}
        needs: dict[str, set[str]] = {}
        called = [name for name, each in parameters.items() if each.annotation is Given]
        for parameter, builder in builders.items():
            if parameter in called:
                options[parameter] = parameters[parameter].replace(annotation=typer.Context)
                continue
            theirs = _options(builder) if builder else {}
            needs[parameter] = set(theirs)
            for option in theirs.values() if builder else [parameters[parameter]]:
                options.setdefault(option.name, option)

        @functools.wraps(function)
        def run(**values: Any) -> None:
            for name in called:
                values[name] = _option_names(values[name])
            try:
                with reading_once():
                    arguments = {
                        name: builder(**{one: values[one] for one in needs[name]})
                        if builder
                        else values[name]
                        for name, builder in builders.items()
                    }
                    code = function(**arguments)
            except AttentionPlannerError as error:
                say(f"error: {error}")
                code = CRASHED if isinstance(error, StorageError) else WRONG
            except KeyboardInterrupt:
                say("interrupted")
                code = INTERRUPTED
            raise typer.Exit(code)

        run.__signature__ = inspect.Signature(list(options.values()))  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in options.values()}
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        settings = {"allow_interspersed_args": not takes_the_rest}
        epilog, first = f"\b\nExample:\n  {example}", _first(function)
        alone.command(name, context_settings=settings, epilog=epilog, short_help=first)(run)
        return typer.main.get_command(alone)

    def register(function: Callable[..., int]) -> Callable[..., int]:
        _COMMANDS[name] = functools.partial(made, function)
        return function

    return register


def _option_names(context: typer.Context) -> Given:
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    return Given(frozenset(name for name, source in sources if source and source.name == "COMMANDLINE"))


@functools.cache
def _options(builder: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A builder's parameters, which many commands have: their annotations are evaluated once."""
    return inspect.signature(builder, eval_str=True).parameters


def _first(function: Callable[..., Any]) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def ink() -> str:
    """The character that bars are drawn with: a full block where stdout can show it."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        "\u2588".encode(encoding)
    except (LookupError, UnicodeEncodeError):
        return "#"
    return "\u2588"


def print_data(data: Any, format: str) -> None:
    from planner.report.text.formats import as_json, as_yaml

    typer.echo({"json": as_json, "yaml": as_yaml}[format](data))


@contextlib.contextmanager
def progress_line(what: str) -> Iterator[None]:
    """A line on stderr while something takes its time; nothing where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


@contextlib.contextmanager
def steps() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, moved by (steps done, steps in all, what comes next); nothing where stderr is no
    terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def moved(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield moved
