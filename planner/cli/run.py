"""The commands that run something: measure, calibrate and study."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from attention.config import AttentionConfig
from attention.errors import ConfigError
from planner.cli.app import CRASHED, DONE, INTERRUPTED, WRONG, command, print_data, progress_line, steps
from planner.cli.options import Format, Given, flags, say
from planner.question.runs import CALIBRATION_RUNS, MAXIMUM_TIMEOUT
from planner.units import parse_bytes
from planner.workload import Workload


@command("measure", "planner measure --variant block_sparse --pattern local_window --seq 16K")
def measure(
    *,
    workload: Workload,
    config: AttentionConfig,
    device: Annotated[
        str,
        typer.Option(metavar="DEVICE", help="Where to run: cpu, cuda, or dry:NAME, a card that is not here."),
    ] = "cpu",
    timeout: Annotated[
        float, typer.Option(max=MAXIMUM_TIMEOUT, help="Maximum seconds of the whole run.")
    ] = 120,
    runs: Annotated[int, typer.Option(max=1_000_000, help="Timed warm calls.")] = 3,
    cap: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Limit the memory of the run: 8GB, 500MiB.")
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
    from planner.measuring.measure import measure as run
    from planner.report.text import tables

    cap_bytes = None if cap is None else parse_bytes(cap, "--cap")
    with progress_line(f"measuring {config.variant} at {workload.seq:,} tokens on {device}"):
        measurement = run(config, workload, device, timeout=timeout, runs=runs, cap_bytes=cap_bytes)
    if format == "table":
        tables.show(tables.measurement_table(measurement))
    else:
        print_data(tables.measurement_data(measurement), format)
    if append is not None:
        from planner.measuring import records

        records.append(append, measurement)
        say(f"the record was added to {append}")
    return {"crash": CRASHED, "error": WRONG}.get(measurement.kind, DONE)


@command("calibrate", "planner calibrate --device cpu")
def calibrate(
    *,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What to measure.")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File to save it in. [default: where predictions look first]"),
    ] = None,
    runs: Annotated[int, typer.Option(help="Runs, each in a process of its own.")] = CALIBRATION_RUNS,
    seed: Annotated[int, typer.Option(help="Random seed by which runs are drawn.")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the CPU's operators. [default: torch's choice]")
    ] = None,
    speed: Annotated[bool, typer.Option(help="Time runs too, after those that measure memory.")] = True,
    format: Format = "table",
) -> int:
    """Measure this device, so that predictions have measured margins.

    Takes some minutes. Every run is saved when it ends: after an interruption the same command continues
    where it stopped.
    """
    from planner import calibrate as run
    from planner.calibration import as_record, own_path
    from planner.report.text.calibration import calibration_table

    try:
        with steps() as progress:
            calibration = run(
                device, seed=seed, runs=runs, progress=progress, path=out, threads=threads, speed=speed
            )
    except KeyboardInterrupt:
        say("what was measured is kept; the same command continues from there")
        raise
    if format == "table":
        from planner.report.text.tables import show

        show(calibration_table(calibration))
    else:
        print_data(as_record(calibration), format)
    if calibration.speed is not None:
        say(calibration.speed.summary())
    say(f"the calibration was saved as {out or own_path(calibration.device)}")
    return DONE


OUT: Final = "study-results"


@command("study", "planner study min-mass --quick")
def study(
    *,
    option_names: Given,
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

    Every row is saved when it ends: after an interruption the same command continues where it stopped, as
    long as version and machine are the same. A study none of whose cases ran says why and writes nothing; the
    others go on, and the exit code is 2.
    """
    # Studies are built on the planner, not the other way round: this is the one door up, by name.
    catalogue: Any = import_module("studies.bench.catalogue")
    if list_:
        if idle := option_names - {"list_", "format"}:
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
        raise ConfigError(
            "no study was named; `planner study --list` lists them, `planner study all` runs all"
        )
    chosen = catalogue.names(tuple(names))
    if device == "cuda" and not import_module("torch").cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; use --device cpu")
    studies: Any = import_module("studies.bench.study")
    records: Any = import_module("studies.bench.records")
    chosen = studies.able(chosen, device, "all" in names)
    place = import_module("torch").device(device)
    answers, code = [], DONE
    for name in chosen:
        try:
            answer = studies.run(name, device=place, quick=quick, out=out)
        except records.NothingRanError as error:  # the others may have something to say
            say(f"error: {error}")
            code = WRONG
            continue
        except KeyboardInterrupt:
            say(f"interrupted; what is done is kept in {out}, and the same command continues from there")
            return INTERRUPTED
        answers.append(answer)
        if format == "table":
            typer.echo(f"{name}: {catalogue.QUESTIONS[name]}")
            for line in (*answer.findings, *studies.did_not_run(answer.failed), *answer.files):
                typer.echo(f"  {line}")
    for answer in answers:
        records.settle(answer.files[0])
    if format != "table":
        print_data(
            [
                {
                    "study": a.name,
                    "said": list(a.findings),
                    "failed": dict(a.failed),
                    "files": list(map(str, a.files)),
                }
                for a in answers
            ],
            format,
        )
    return code
