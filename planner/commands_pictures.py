"""Commands that show: studies, reports, layouts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner.command import DONE, INTERRUPTED, WRONG, command, ink, print_data
from planner.options import Format, Given, flags, say
from planner.options_pictures import Pictured, View

OUT: Final = "study-results"


@command("study", "planner study min-mass --quick")
def study(
    *,
    given: Given,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Studies, or `all`.", show_default=False)
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the studies and what each asks.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few and small cases: all in minutes.")] = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")] = "cpu",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for what it writes.")] = Path(OUT),
    format: Annotated[
        Literal["table", "json", "yaml"], typer.Option("--format", help="How to print.")
    ] = "table",
) -> int:
    """Answer a question by running it: data, a picture, three sentences.

    Every row is kept as it ends: after an interruption the same command goes on where it stopped, as long as
    version and machine are the same. A study of which no case ran says why and writes nothing; the others go
    on, and the exit code is 2.
    """
    # Studies are built on the planner, not the other way round: this is the one door up, by name.
    catalogue: Any = import_module("studies.catalogue")
    if list_:
        if idle := given - {"list_", "format"}:
            raise ConfigError(
                f"{flags(idle - {'names'}) or 'NAME'}: --list runs nothing; remove one of the two"
            )
        if format == "table":
            for name, question in catalogue.QUESTIONS.items():
                typer.echo(f"{name:<18} {question}")
        else:
            print_data(dict(catalogue.QUESTIONS), format)
        return DONE
    if not names:
        raise ConfigError("no study was named; `planner study --list` has them, `planner study all` runs all")
    asked = catalogue.names(tuple(names))
    if device == "cuda" and not import_module("torch").cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    studies: Any = import_module("studies.study")
    records: Any = import_module("studies.records")
    asked = studies.able(asked, device, "all" in names)
    place = import_module("torch").device(device)
    answers, code = [], DONE
    for name in asked:
        try:
            answer = studies.run(name, device=place, quick=quick, out=out)
        except records.NothingRanError as error:  # the others may have something to say
            say(f"error: {error}")
            code = WRONG
            continue
        except KeyboardInterrupt:
            say(f"interrupted; what is done is kept in {out}, and the same command goes on from there")
            return INTERRUPTED
        answers.append(answer)
        if format == "table":
            typer.echo(f"{name}: {catalogue.QUESTIONS[name]}")
            for line in (*answer.said, *studies.did_not_run(answer.failed), *answer.files):
                typer.echo(f"  {line}")
    for answer in answers:
        records.settle(answer.files[0])
    if format != "table":
        print_data(
            [
                {
                    "study": a.name,
                    "said": list(a.said),
                    "failed": dict(a.failed),
                    "files": list(map(str, a.files)),
                }
                for a in answers
            ],
            format,
        )
    return code


@command("show", "planner show docs/examples/large.json --seq 128K --causal")
def show(
    *,
    given: Given,
    view: View,
    config: Pictured,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where attention's mass lies. [default: balanced]")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the layout, as .png or .svg.")
    ] = None,
    format: Format = "table",
) -> int:
    """Picture which tokens an attention lets see which.

    Of a dilated attention what its first head sees is drawn, and which positions the others take. What an
    adaptive one sees is chosen at run time: of it only the budget is known.
    """
    from planner.quality.profiles import DEFAULT, preset
    from planner.report.layout import seen, seen_data

    idle = given & _idle(config, file="config" in given)
    if idle:
        say(f"note: without effect here: {flags(idle)}")
    found = seen(config, view, preset(profile or DEFAULT))
    if plot is not None:
        from planner.report.plot_layout import plot_layout

        plot_layout(found, plot)
    if format == "table":
        from planner.report.layout_text import seen_text

        typer.echo(seen_text(found, ink()))
    else:
        print_data(seen_data(found), format)
    if plot is not None:
        say(f"the layout was drawn in {plot}")
    return DONE


def _idle(config: AttentionConfig, *, file: bool) -> frozenset[str]:
    """Options of `show` that this config does not read."""
    if config.variant == "adaptive":
        return frozenset({"profile", "heads", "head_dim"} if file else {"profile"})
    return frozenset({"head_dim"} if config.variant == "dilated" else {"head_dim", "heads"})


@command("report", "planner report answer.json --out report.html")
def report(
    *,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE", help="What `recommend` or `tune` printed as JSON.", show_default=False
        ),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="In place of a file, where `tune` keeps trials.")
    ] = None,
    study: Annotated[str | None, typer.Option(metavar="NAME", help="Their name in the storage.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("report.html"),
) -> int:
    """Make an answer a page to read, print and send.

    One file of HTML that needs nothing else: the answer, where the budget goes, why, what else there is, who
    sees whom, the program, and where the figures are from. A file that is there is replaced.
    """
    if (file is None) == (storage is None) or (storage is None) != (study is None):
        raise ConfigError("name one answer: either a file, or --storage URL and --study NAME")
    if file is not None and out.exists() and out.samefile(file):
        raise ConfigError(
            f"--out {out} is the answer itself, which the page would replace; name another file"
        )
    from planner.report.files import write_whole
    from planner.report.page import answer_page

    write_whole(out, answer_page(file, storage, study).encode(), "--out")
    say(f"the report was written to {out}")
    return DONE
