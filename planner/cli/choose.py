"""The commands that choose: recommend and tune."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Literal

import typer

from attention.errors import ConfigError
from planner.cli.app import DONE, INTERRUPTED, NOTHING_FITS, command, ink, print_data, progress_line, steps
from planner.cli.options import Given, Unweighted, flags, say
from planner.cli.options_choose import Allowed, Card, Conditions
from planner.cli.options_ranks import Ranks
from planner.question.asked import TRIALS
from planner.question.runs import MAXIMUM_TIMEOUT, MAXIMUM_TRIALS, TRIAL_RUNS, TRIAL_TIMEOUT, TUNING_TRIALS


@command("recommend", "planner recommend --vram 8GB --seq 131072")
def recommend(
    *,
    seq: Annotated[
        str | None,
        typer.Option(metavar="TOKENS", help="Tokens: 131072, 128K or 1M. [default: the most that fit]"),
    ] = None,
    card: Card,
    option_names: Given,
    objective: Annotated[
        Literal["speed", "seq", "quality"] | None,
        typer.Option(help="What to optimise. [default: speed; without --seq the length]"),
    ] = None,
    sizes: Unweighted,
    ranks: Ranks,
    gates: Conditions,
    space: Allowed,
    trials: Annotated[
        int, typer.Option(min=0, max=MAXIMUM_TRIALS, help="Optuna trials after the grid.")
    ] = TRIALS,
    sampler: Annotated[
        str, typer.Option(metavar="NAME", help="tpe, random, nsga2, nsga3, cmaes, ...")
    ] = "tpe",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Random seed of the sampler.")] = 0,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Keep trials: a journal file, or sqlite:///FILE.")
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the trials in the storage.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Run the picks on this device too.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the Pareto front, as .png or .svg.")
    ] = None,
    format: Annotated[
        Literal["table", "json", "yaml", "py"], typer.Option("--format", help="How to print.")
    ] = "table",
) -> int:
    """Choose the attention that fits.

    The fastest whose upper bound of memory is within the budget and that passes the gates of mass and reach;
    without --seq, the one with the longest sequence. Needs no GPU. If nothing fits, the exit code is 3, and
    the changes with which something would fit are printed.
    """
    from planner import recommend as recommendation_for
    from planner.search.relax import NothingFitsError

    if verify and (ranks.gpus or 1) > 1:
        raise ConfigError("--verify runs the picks on one device; leave it out where --gpus says several")
    if verify and format == "py":
        raise ConfigError(
            "--verify says how the picks ran, which --format py does not; choose another format"
        )
    if idle := option_names & {"sampler", "seed", "study"} if not trials else set():
        raise ConfigError(f"{flags(idle)}: for trials only, and --trials 0 asks for none; remove one of them")
    fields = ranks.shared(sizes).model_dump(exclude={"seq", "weights"})
    searches = seq is None and sizes.documents is None
    # With the length free the longest sequence of every candidate is searched for, which takes seconds.
    waits = progress_line("searching for the longest sequence") if searches else contextlib.nullcontext()
    try:
        with waits:
            recommendation = recommendation_for(
                card.budget,
                seq,
                objective=objective,
                gpu=card.device,
                space=space,
                trials=trials,
                sampler=sampler,  # type: ignore[arg-type]
                seed=seed,
                storage=storage,
                study=study,
                **ranks.links,
                **gates,
                **fields,
                **card.options,
            )
    except NothingFitsError as error:
        say(str(error))
        return NOTHING_FITS
    checked = None
    if verify:
        from planner.search.verify import verify as run

        with steps() as progress:
            checked = run(recommendation, progress=progress)
    if plot is not None:
        from planner.report.plot.estimate import plot_pareto

        plot_pareto(recommendation, plot)
    if format == "py":
        from planner.report.text.snippet import snippet

        typer.echo(snippet(recommendation.config, recommendation.workload))
    elif format == "table":
        from planner.report.text.recommend import recommend_text, verified_text

        typer.echo(recommend_text(recommendation, ink()))
        if checked is not None:
            typer.echo("\n" + verified_text(checked))
    else:
        data = recommendation.model_dump(mode="json")
        if checked is not None:
            data["verified"] = [one.model_dump(mode="json") for one in checked]
        print_data(data, format)
    if plot is not None:
        say(f"the Pareto front was drawn in {plot}")
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
    trials: Annotated[
        int, typer.Option(min=1, max=MAXIMUM_TRIALS, help="Configs to measure.")
    ] = TUNING_TRIALS,
    timeout: Annotated[
        float, typer.Option(max=MAXIMUM_TIMEOUT, help="Maximum seconds of one trial.")
    ] = TRIAL_TIMEOUT,
    runs: Annotated[int, typer.Option(min=1, help="Timed warm calls of each config.")] = TRIAL_RUNS,
    sizes: Unweighted,
    gates: Conditions,
    space: Allowed,
    sampler: Annotated[str, typer.Option(metavar="NAME", help="As for `recommend`.")] = "tpe",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Random seed of the sampler.")] = 0,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Where trials are kept. [default: a journal in the data folder]"),
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the trials in the storage.")
    ] = None,
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
    """Find the fastest attention by running candidates here.

    The answer of `recommend` is measured first, then the configs that Optuna suggests from there, each in a
    process of its own. Every trial is saved when it ends: after Ctrl-C, or a crash, the same command
    continues where it stopped.
    """
    from planner import tune as run
    from planner.report.text.tune import progress_text, tuned_text
    from planner.search.relax import NothingFitsError

    try:
        tuning = run(
            vram,
            seq,
            device=device,
            trials=trials,
            timeout=timeout,
            runs=runs,
            sampler=sampler,  # type: ignore[arg-type]
            seed=seed,
            storage=storage,
            study=study,
            records=append,
            learn=learn,
            progress=lambda now: say(progress_text(now)) if now.last is not None else None,
            space=space,
            **gates,
            **sizes.model_dump(exclude={"seq", "weights"}),
        )
    except NothingFitsError as error:
        say(str(error))
        return NOTHING_FITS
    if format == "py":
        from planner.report.text.snippet import snippet

        typer.echo(snippet(tuning.config, tuning.workload))
    elif format == "table":
        typer.echo(tuned_text(tuning))
    else:
        print_data(tuning.model_dump(mode="json"), format)
    best, maximum = tuning.best.seconds, gates["max_seconds"]
    if best is not None and maximum is not None and best > maximum:
        # The gate is on the predicted time: it says which configs are worth measuring.
        say(f"note: the fastest takes {best:.3g} s, more than the {maximum:g} s of --max-seconds")
    if tuning.interrupted:
        say("interrupted; every finished trial is kept, and the same command continues from there")
    return INTERRUPTED if tuning.interrupted else DONE
