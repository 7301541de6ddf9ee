"""Commands that predict, choose and measure: options in, a call of the library, data on stdout and all else
on stderr."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner.calibrate import RUNS
from planner.command import (
    CRASHED,
    DONE,
    INTERRUPTED,
    NOTHING_FITS,
    WRONG,
    command,
    ink,
    print_data,
    progress_line,
    steps,
)
from planner.options import (
    AnyLength,
    Asked,
    Format,
    Given,
    Place,
    Sizes,
    flags,
    say,
)
from planner.options_search import Allowed, Card, Gates
from planner.recommend import TRIALS as SEARCHED
from planner.tune import RUNS as TUNED_RUNS
from planner.tune import TIMEOUT, TRIALS
from planner.units import parse_bytes, parse_count
from planner.workload import Workload

MOST_TRIALS: Final = 100_000
LONGEST: Final = 1e6
"""Seconds, of any run: twelve days."""


@command("recommend", "planner recommend --vram 8GB --seq 131072")
def recommend(
    *,
    seq: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Tokens: 131072, 128K or 1M. [default: the most that fit]"),
    ] = None,
    card: Card,
    given: Given,
    objective: Annotated[
        Literal["speed", "seq", "quality"] | None,
        typer.Option(help="What to make best. [default: speed; without --seq the length]"),
    ] = None,
    sizes: Asked,
    gates: Gates,
    space: Allowed,
    trials: Annotated[
        int, typer.Option(min=0, max=MOST_TRIALS, help="Of Optuna, after the grid.")
    ] = SEARCHED,
    sampler: Annotated[
        str, typer.Option(metavar="NAME", help="tpe, random, nsga2, nsga3, cmaes, ...")
    ] = "tpe",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the sampler.")] = 0,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Keep trials: a journal file, or sqlite:///FILE.")
    ] = None,
    study: Annotated[str | None, typer.Option(metavar="NAME", help="Their name in the storage.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Run the picks on this device too.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the Pareto set, as .png or .svg.")
    ] = None,
    format: Annotated[
        Literal["table", "json", "yaml", "py"], typer.Option("--format", help="How to print.")
    ] = "table",
) -> int:
    """Choose the attention that fits.

    The fastest whose upper bound of memory is within the budget and that still attends to enough; without
    --seq, the one with the longest sequence. Needs no GPU. Where nothing fits, the exit code is 3, and what
    would fit is named.
    """
    from planner import recommend as choose
    from planner.search.relax import NothingFitsError

    if verify and format == "py":
        raise ConfigError(
            "--verify says how the picks ran, which --format py does not; choose another format"
        )
    if idle := given & {"sampler", "seed", "study"} if not trials else set():
        raise ConfigError(f"{flags(idle)}: of trials, and --trials 0 asks for none; remove one of them")
    asked = sizes.model_dump(exclude={"seq", "weights"})
    # With the length free every candidate's longest sequence is looked for, which takes seconds.
    waits = progress_line("looking for the longest sequence") if seq is None else contextlib.nullcontext()
    try:
        with waits:
            found = choose(
                card.budget, seq, objective=objective, gpu=card.device, space=space, trials=trials,
                sampler=sampler, seed=seed, storage=storage, study=study,  # type: ignore[arg-type]
                **gates, **asked, **card.options,
            )  # fmt: skip
    except NothingFitsError as error:
        say(str(error))
        return NOTHING_FITS
    checked = None
    if verify:
        from planner.verification import verify as run

        with steps() as progress:
            checked = run(found, progress=progress)
    if plot is not None:
        from planner.report.plot import plot_pareto

        plot_pareto(found, plot)
    if format == "py":
        from planner.report.snippet import snippet

        typer.echo(snippet(found.config, found.workload))
    elif format == "table":
        from planner.report.recommend import recommend_text, verified_text

        typer.echo(recommend_text(found, ink()))
        if checked is not None:
            typer.echo("\n" + verified_text(checked))
    else:
        data = found.model_dump(mode="json")
        if checked is not None:
            data["verified"] = [one.model_dump(mode="json") for one in checked]
        print_data(data, format)
    if plot is not None:
        say(f"the Pareto set was drawn in {plot}")
    return DONE


@command("tune", "planner tune --vram 1GB --seq 4K --trials 5")
def tune(
    *,
    vram: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory to fit: 8GB, 7.75GiB.", show_default=False)
    ],
    seq: Annotated[
        str, typer.Option(metavar="TOKENS", help="Tokens: 131072, 128K or 1M.", show_default=False)
    ],
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
    trials: Annotated[int, typer.Option(min=1, max=MOST_TRIALS, help="Configs to measure.")] = TRIALS,
    timeout: Annotated[float, typer.Option(max=LONGEST, help="Seconds that one may take.")] = TIMEOUT,
    runs: Annotated[int, typer.Option(min=1, help="Warm calls of each that are timed.")] = TUNED_RUNS,
    sizes: Asked,
    gates: Gates,
    space: Allowed,
    sampler: Annotated[str, typer.Option(metavar="NAME", help="As for `recommend`.")] = "tpe",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the sampler.")] = 0,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where trials are kept. [default: a journal in the data folder]"),
    ] = None,
    study: Annotated[str | None, typer.Option(metavar="NAME", help="Their name in the storage.")] = None,
    append: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Add every measurement to this file of records.")
    ] = None,
    learn: Annotated[
        bool, typer.Option("--learn", help="Correct the calibration's speeds by what was measured.")
    ] = False,
    format: Annotated[
        Literal["table", "json", "yaml", "py"], typer.Option("--format", help="How to print.")
    ] = "table",
) -> int:
    """Find the fastest by running them here.

    What `recommend` says is measured first, then what Optuna suggests from there, each in a process of its
    own. Trials are kept as they end: after Ctrl-C, or a crash, the same command goes on where it stopped.
    """
    from planner import tune as run
    from planner.report.tune import said, tuned_text
    from planner.search.relax import NothingFitsError

    try:
        found = run(
            vram, seq, device=device, trials=trials, timeout=timeout, runs=runs, sampler=sampler,  # type: ignore[arg-type]
            seed=seed, storage=storage, study=study, records=append, learn=learn,
            progress=lambda now: say(said(now)) if now.last is not None else None,
            space=space, **gates, **sizes.model_dump(exclude={"seq", "weights"}),
        )  # fmt: skip
    except NothingFitsError as error:
        say(str(error))
        return NOTHING_FITS
    if format == "py":
        from planner.report.snippet import snippet

        typer.echo(snippet(found.config, found.workload))
    elif format == "table":
        typer.echo(tuned_text(found))
    else:
        print_data(found.model_dump(mode="json"), format)
    best, most = found.best.seconds, gates["max_seconds"]
    if best is not None and most is not None and best > most:
        # The gate is of what is predicted: it says what is worth measuring.
        say(f"note: the fastest takes {best:.3g} s, more than the {most:g} s of --max-seconds")
    if found.interrupted:
        say("interrupted; every finished trial is kept, and the same command goes on from there")
    return INTERRUPTED if found.interrupted else DONE


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
    from planner.report import tables as report

    cards = known() if name is None else matching(name)
    if format != "table":
        print_data([report.gpu_data(gpu) for gpu in cards], format)
    else:
        report.show(report.gpu_card(cards[0]) if len(cards) == 1 else report.gpu_table(cards))
    return DONE


@command("estimate", "planner estimate --variant dense --seq 32K --vram 8GB --mode training")
def estimate(
    *,
    given: Given,
    workload: Workload,
    config: AttentionConfig,
    place: Place,
    lines: Annotated[bool, typer.Option("--lines", help="Show every buffer alive at the peak.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the waterfall, as .png or .svg.")
    ] = None,
    format: Format = "table",
) -> int:
    """Predict the memory of one attention, without running it.

    No GPU is needed. What it takes is shown share by share, with an upper bound and how sure that is.
    """
    from planner.memory.estimate import estimate as predict

    found = predict(config, workload, place.device, **place.options)
    if plot is not None:
        from planner.report.plot import plot as draw

        draw(found, plot, place.budget)
    if format == "table":
        from planner.report.estimate import estimate_text

        typer.echo(estimate_text(found, place.budget, lines=lines, ink=ink()))
    else:
        print_data(found.model_dump(mode="json"), format)
        if "vram" in given and place.budget is not None:
            say(f"the upper bound is {'within' if found.upper <= place.budget else 'above'} --vram")
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
    config: AttentionConfig,
    place: Place,
    format: Format = "table",
) -> int:
    """Find the longest sequence that fits.

    It is a multiple of the block size, and fits at the upper bound. Where not even one block fits, the exit
    code is 3, and options that would change that are named.
    """
    from planner.longest import longest

    found = longest(config, workload, parse_bytes(vram, "--vram"), place.device, place.options)
    fits = found.fits
    if format == "table":
        from planner.report.estimate import longest_text

        typer.echo(longest_text(found))
    else:
        data = {
            "seq": fits.workload.seq if fits else 0,
            "budget": found.budget,
            "fits": fits.model_dump(mode="json") if fits else None,
            "beyond": found.beyond.model_dump(mode="json"),
            "relaxations": list(found.relaxations),
        }
        print_data(data, format)
    if fits is None:
        say(f"nothing fits {vram}; what would: {', or '.join(found.relaxations)}")
    return DONE if fits else NOTHING_FITS


@command("compare", "planner compare docs/examples/small.json docs/examples/large.json --seq 128K")
def compare(
    *,
    given: Given,
    a: Annotated[Path, typer.Argument(metavar="A.json", help="A config, an estimate or a measurement.")],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="The same.")],
    seq: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Tokens: 131072, 128K or 1M; for configs.")
    ] = None,
    workload: Sizes,
    place: Place,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw both side by side, as .png or .svg.")
    ] = None,
    format: Format = "table",
) -> int:
    """Show what one attention takes more than another, and why.

    Sizes and device are for configs; estimates and measurements have their own.
    """
    from planner.comparison import compare as differences
    from planner.comparison import comparison_data, comparison_text, side
    from planner.memory.estimate import MemoryEstimate
    from planner.memory.estimate import estimate as predict

    def estimated(config: AttentionConfig) -> MemoryEstimate:
        if seq is None:
            raise ConfigError("a config needs --seq, e.g. --seq 128K")
        asked = workload.model_copy(update={"seq": parse_count(seq, "--seq")})
        return predict(config, asked, place.device, **place.options)

    used: list[AttentionConfig] = []

    def noted(config: AttentionConfig) -> MemoryEstimate:
        used.append(config)
        return estimated(config)

    sides = side(a, noted), side(b, noted)
    idle = given - {"a", "b", "plot", "format"}
    if idle and not used:
        raise ConfigError(
            f"{flags(idle)}: for configs, and both files have figures of their own; remove them"
        )
    found = differences(*sides)
    if plot is not None:
        from planner.report.plot_compare import plot_comparison

        plot_comparison(found, (a.name, b.name), plot)
    if format == "table":
        typer.echo(comparison_text(found, (a.name, b.name)))
    else:
        print_data(comparison_data(found), format)
    if plot is not None:
        say(f"the comparison was drawn in {plot}")
    return DONE


@command("measure", "planner measure --variant block_sparse --pattern local_window --seq 16K")
def measure(
    *,
    workload: Workload,
    config: AttentionConfig,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
    timeout: Annotated[float, typer.Option(max=LONGEST, help="Seconds for everything.")] = 120,
    runs: Annotated[int, typer.Option(max=1_000_000, help="Warm calls that are timed.")] = 3,
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
    from planner.measure import measure as run
    from planner.report import tables as report

    cap_bytes = None if cap is None else parse_bytes(cap, "--cap")
    with progress_line(f"measuring {config.variant} at {workload.seq:,} tokens on {device}"):
        found = run(config, workload, device, timeout=timeout, runs=runs, cap_bytes=cap_bytes)
    if format == "table":
        report.show(report.measurement_table(found))
    else:
        print_data(report.measurement_data(found), format)
    if append is not None:
        from planner import records

        records.append(append, found)
        say(f"the record was added to {append}")
    return {"crash": CRASHED, "error": WRONG}.get(found.kind, DONE)


@command("calibrate", "planner calibrate --device cpu")
def calibrate(
    *,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What to measure.")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to keep it. [default: where predictions look first]"),
    ] = None,
    runs: Annotated[int, typer.Option(help="Runs, each in a process of its own.")] = RUNS,
    seed: Annotated[int, typer.Option(help="Which runs, of all that there are.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="Of the CPU's operators. [default: torch's choice]")
    ] = None,
    speed: Annotated[
        bool, typer.Option(help="Time runs too, after those that memory is measured in.")
    ] = True,
    format: Format = "table",
) -> int:
    """Measure this device, so that predictions know how sure they are.

    Takes some minutes. Every run is kept as it ends: after an interruption the same command goes on where
    it stopped.
    """
    from planner.calibrate import calibrate as run
    from planner.calibration import as_record, own_path
    from planner.report.calibration import calibration_table

    try:
        with steps() as progress:
            found = run(
                device, seed=seed, runs=runs, progress=progress, path=out, threads=threads, speed=speed
            )
    except KeyboardInterrupt:
        say("what was measured is kept; the same command goes on from there")
        raise
    if format == "table":
        from planner.report.tables import show

        show(calibration_table(found))
    else:
        print_data(as_record(found), format)
    if found.speed is not None:
        say(found.speed.summary())
    say(f"the calibration was saved as {out or own_path(found.device)}")
    return DONE
