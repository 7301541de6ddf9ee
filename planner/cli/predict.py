"""The commands that predict: gpus, estimate, max-seq and compare. Options in, a call of the library, data on
stdout and all else on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner.cli.app import DONE, NOTHING_FITS, command, ink, print_data
from planner.cli.options import AnyLength, Format, Given, GivenSizes, Place, flags, say
from planner.cli.options_ranks import Ranks
from planner.units import parse_bytes, parse_count
from planner.workload import Workload


@command("gpus", "planner gpus --name 'rtx 40'")
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
    from planner.gpus import known, matching
    from planner.report.text import tables

    cards = known() if name is None else matching(name)
    if format != "table":
        print_data([tables.gpu_data(gpu) for gpu in cards], format)
    else:
        tables.show(tables.gpu_card(cards[0]) if len(cards) == 1 else tables.gpu_table(cards))
    return DONE


@command("estimate", "planner estimate --variant dense --seq 32K --vram 8GB --mode training")
def estimate(
    *,
    option_names: Given,
    workload: Workload,
    ranks: Ranks,
    config: AttentionConfig,
    place: Place,
    lines: Annotated[bool, typer.Option("--lines", help="Show every buffer alive at the peak.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the waterfall, as .png or .svg.")
    ] = None,
    format: Format = "table",
) -> int:
    """Predict the memory and the time of one attention, without running it.

    No GPU is needed. The peak is shown share by share, with an upper bound and how certain that is.

    With --gpus it is that of the GPU that needs most, beside what GPUs exchange and the seconds that takes:
    add --device h100-sxm --gpus 16 --link nvlink4,ndr --node 8.
    """
    from planner.api import estimate as predict

    workload = ranks.shared(workload)
    prediction = predict(config, workload, place.device, **ranks.links, **place.options)
    if plot is not None:
        from planner.report.plot.estimate import plot as draw

        draw(prediction, plot, place.budget)
    if format == "table":
        from planner.report.text.estimate import estimate_text

        typer.echo(estimate_text(prediction, place.budget, lines=lines, ink=ink()))
    else:
        print_data(prediction.model_dump(mode="json"), format)
        if "vram" in option_names and place.budget is not None:
            say(f"the upper bound is {'within' if prediction.upper <= place.budget else 'above'} --vram")
    if plot is not None:
        say(f"the waterfall was drawn in {plot}")
    return DONE


@command("max-seq", "planner max-seq --vram 8GB --variant dense")
def max_seq(
    *,
    vram: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory to fit: 8GB, 7.75GiB.", show_default=False)
    ],
    workload: AnyLength,
    ranks: Ranks,
    config: AttentionConfig,
    place: Place,
    format: Format = "table",
) -> int:
    """Find the longest sequence that fits.

    It is a multiple of the block size, and fits at the upper bound. If not even one block fits, the exit code
    is 3, and the options with which one would fit are printed. With --gpus the budget is that of each.
    """
    from planner.answers.shared import with_sharing
    from planner.question.relaxation import spelt
    from planner.search.longest import longest

    sized_workload = ranks.shared(workload)
    answer = longest(config, sized_workload, parse_bytes(vram, "--vram"), place.device, place.options)
    if answer.fits is not None:
        read = {name: place.options.get(name) for name in ("calibration", "threads")}
        shared = with_sharing(answer.fits, place.device, **ranks.links, **read)
        answer = answer._replace(fits=shared)
    fits, changes = answer.fits, [spelt(change, exactly=True) for change in answer.relaxations]
    if format == "table":
        from planner.report.text.estimate import longest_text

        typer.echo(longest_text(answer))
    else:
        data = {
            "seq": fits.workload.seq if fits else 0,
            "budget": answer.budget,
            "fits": fits.model_dump(mode="json") if fits else None,
            "beyond": answer.beyond.model_dump(mode="json"),
            "relaxations": changes,
        }
        print_data(data, format)
    if fits is None:
        say(f"nothing fits {vram}; what would: {', or '.join(changes)}")
    return DONE if fits else NOTHING_FITS


@command("compare", "planner compare docs/examples/small.json docs/examples/large.json --seq 128K")
def compare(
    *,
    option_names: Given,
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A config, an estimate or a measurement.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="The same.")],
    seq: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Tokens: 131072, 128K or 1M; for configs.")
    ] = None,
    workload: GivenSizes,
    ranks: Ranks,
    place: Place,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw both side by side, as .png or .svg.")
    ] = None,
    format: Format = "table",
) -> int:
    """Compare the memory, buffer by buffer, and the time of two attentions.

    Sizes and device are for configs; estimates and measurements have their own.
    """
    from planner.answers.comparison import compare as differences
    from planner.answers.comparison import side
    from planner.api import estimate as predict
    from planner.memory.estimate import MemoryEstimate
    from planner.report.text.compare import comparison_data, comparison_text

    def estimated(config: AttentionConfig) -> MemoryEstimate:
        if seq is None and workload.documents is None:
            raise ConfigError("a config needs --seq, e.g. --seq 128K")
        sized_workload = ranks.shared(workload)
        if seq is not None:
            sized_workload = sized_workload.model_copy(update={"seq": parse_count(seq, "--seq")})
        return predict(config, sized_workload, place.device, **ranks.links, **place.options)

    used: list[AttentionConfig] = []

    def noted(config: AttentionConfig) -> MemoryEstimate:
        used.append(config)
        return estimated(config)

    sides = side(a, noted), side(b, noted)
    idle = option_names - {"a", "b", "plot", "format"}
    if idle and not used:
        raise ConfigError(
            f"{flags(idle)}: for configs, and both files have figures of their own; remove them"
        )
    comparison = differences(*sides)
    if plot is not None:
        from planner.report.plot.compare import plot_comparison

        plot_comparison(comparison, (a.name, b.name), plot)
    if format == "table":
        typer.echo(comparison_text(comparison, (a.name, b.name)))
    else:
        print_data(comparison_data(comparison), format)
    if plot is not None:
        say(f"the comparison was drawn in {plot}")
    return DONE
