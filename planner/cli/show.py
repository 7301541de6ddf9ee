"""The commands that show: show, the attention mask of a config, and report, an answer as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner.cli.app import DONE, command, ink, print_data
from planner.cli.options import Format, Given, flags, say
from planner.cli.options_show import Pictured, View
from planner.workload import Workload


@command("show", "planner show docs/examples/large.json --seq 128K --causal")
def show(
    *,
    option_names: Given,
    view: View,
    config: Pictured,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="How mass is spread over distance. [default: balanced]")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the layout, as .png or .svg.")
    ] = None,
    format: Format = "table",
) -> int:
    """Draw the attention mask of a config.

    For a dilated attention this is the mask of its first head, and the positions that the other heads attend
    to. An adaptive attention chooses its blocks at run time: only their number is known.

    With --gpus it is which GPU holds which tokens, and how many bytes each sends to which other.
    """
    if view.gpus > 1:
        return _show_shared(config, view, plot, format, option_names)
    from planner.quality.profiles import DEFAULT, preset
    from planner.report.seen import seen, seen_data

    idle = option_names & _idle(config, file="config" in option_names)
    if idle:
        say(f"note: without effect here: {flags(idle)}")
    layout = seen(config, view, preset(profile or DEFAULT))
    if plot is not None:
        from planner.report.plot.layout import plot_layout

        plot_layout(layout, plot)
    if format == "table":
        from planner.report.text.layout import seen_text

        typer.echo(seen_text(layout, ink()))
    else:
        print_data(seen_data(layout), format)
    if plot is not None:
        say(f"the layout was drawn in {plot}")
    return DONE


def _show_shared(
    config: AttentionConfig, view: Workload, plot: Path | None, format: Format, option_names: frozenset[str]
) -> int:
    from planner.report.ranks import shared, shared_data

    if "profile" in option_names:
        say("note: without effect with several GPUs: --profile")
    found = shared(config, view)
    if plot is not None:
        from planner.report.plot.ranks import plot_shared

        plot_shared(found, plot)
    if format == "table":
        from planner.report.text.ranks import shared_text

        typer.echo(shared_text(found, ink()))
    else:
        print_data(shared_data(found), format)
    if plot is not None:
        say(f"who holds and sends what was drawn in {plot}")
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
        str | None, typer.Option(metavar="URL", help="Instead of a file: the storage of `tune`'s trials.")
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the trials in the storage.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("report.html"),
) -> int:
    """Make an answer a page to read, print and send.

    One file of HTML that needs nothing else: the answer, where the budget goes, why, what else there is, the
    attention mask, the program, and where the figures are from. An existing file is replaced.
    """
    if (file is None) == (storage is None) or (storage is None) != (study is None):
        raise ConfigError("name one answer: either a file, or --storage URL and --study NAME")
    if file is not None and out.exists() and out.samefile(file):
        raise ConfigError(
            f"--out {out} is the answer itself, which the page would replace; name another file"
        )
    from planner.files import write_whole
    from planner.report.page.answer import answer_page

    write_whole(out, answer_page(file, storage, study).encode(), "--out")
    say(f"the report was written to {out}")
    return DONE
