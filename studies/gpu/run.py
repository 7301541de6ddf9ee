"""A run: step after step until all is done or the minutes are over, every row kept as it is made.

Rows are kept by label, each with the code, versions and driver that it was made with. A step whose row was
made with what is here now is done; another is made anew when its turn comes. What fails is a row too; a step
that the end of the minutes, or an interrupt, cuts off is not, and comes first the next time.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any, Final

from attention.errors import AttentionPlannerError, UnavailableError
from planner.files import make_folder
from planner.measuring.measure import Device
from studies.bench.records import Row, as_json, progress, write
from studies.gpu.page import page
from studies.gpu.results import SAME, calibrated, is_current
from studies.gpu.steps import PlannedRow, Tools, known_card, steps
from studies.gpu.worker import Worker, short

CLOSING: Final = 0.03
"""Share of the minutes that is kept for the calibration and the page."""
FACTS_SECONDS: Final = 120.0


class TimeUpError(BaseException):
    """What was allowed is over; no error that a step may catch."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeUpError in here after so many seconds."""

    def ring(_: int, __: FrameType | None) -> None:
        raise TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def facts_of(device: Device, worker: Worker, seconds: float) -> Row:
    """Where this is. UnavailableError if there is no such device, or it takes longer to say so."""
    try:
        with within(min(FACTS_SECONDS, seconds)):
            found = worker.ask("studies.gpu.facts", "facts", device=device)
    except TimeUpError:
        raise UnavailableError(f"{device} was not there after {min(FACTS_SECONDS, seconds):.0f} s") from None
    if found.pop("outcome") != "ok":
        raise UnavailableError(found["message"])
    return found


def begin(path: Path, command: str, facts: Row) -> Row:
    """What the file has, under the facts of now; nothing if there is no file yet. AttentionPlannerError for a
    file that is something else."""
    rows: dict[str, Row] = {}
    sessions: list[Row] = []
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            rows, sessions = dict(there["rows"]), list(there["sessions"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise AttentionPlannerError(
                f"{path} is not what an earlier run left ({error}); move it away, or choose another --out"
            ) from None
    make_folder(path, "the data")
    return {"command": command, "environment": facts, "sessions": sessions, "rows": rows}


def is_done(content: Row, step: PlannedRow) -> bool:
    """Whether there is a row of this step that was made with what is here now."""
    row = content["rows"].get(step.label)
    return row is not None and is_current(content, row)


def carry_out(
    content: Row, todo: Sequence[PlannedRow], tools: Tools, seconds: float, keep: Callable[[Row], None]
) -> bool:
    """Makes the rows that are not there, one after the other for so many seconds; `keep` gets the content
    after each. Whether it was interrupted."""
    begun, made = monotonic(), 0
    session: Row = {"date": date.today().isoformat(), "rows": 0, "minutes": 0.0}
    content["sessions"].append(session)
    interrupted = False
    with progress() as bar:
        task = bar.add_task("", total=len(todo), completed=sum(is_done(content, step) for step in todo))
        for step in todo:
            left = seconds - (monotonic() - begun)
            if left <= 0:
                break
            if is_done(content, step):
                continue
            bar.update(task, description=step.label[:60])
            started = monotonic()
            try:
                row = _made(step, tools, left)
            except KeyboardInterrupt:
                interrupted = True
            if interrupted or row is None:
                tools.end()
                break
            made += 1
            session |= {"rows": made, "minutes": round((monotonic() - begun) / 60, 2)}
            content["rows"][step.label] = {
                "part": step.part,
                "name": step.name,
                **step.about,
                **{name: content["environment"][name] for name in SAME},
                "date": date.today().isoformat(),
                "took": round(monotonic() - started, 3),
                **row,
            }
            keep(content)
            bar.advance(task)
    session["minutes"] = round((monotonic() - begun) / 60, 2)
    return interrupted


def _made(step: PlannedRow, tools: Tools, left: float) -> Row | None:
    """The row of a step, whatever it meets; None if the end of the run cut it off."""
    try:
        with within(min(step.seconds, left)):
            return step.make(tools)
    except TimeUpError:
        tools.end()
        if left <= step.seconds:
            return None
        return {"outcome": "timeout", "message": f"not done after {step.seconds:g} s"}
    except (AttentionPlannerError, OSError, RuntimeError, ValueError) as error:
        tools.end()
        return {"outcome": "error", "message": f"{type(error).__name__}: {short(error)}"}


def run(device: Device, minutes: float, out: Path, chosen: Callable[[PlannedRow], bool] | None = None) -> Row:
    """A run on a device, its data and page in the folder `out`; what it has by its end. `chosen`: which of
    the steps there are."""
    begun = monotonic()
    tools = Tools(device)
    try:
        facts = facts_of(device, tools.worker, 60 * minutes)
        todo = [step for step in steps(device, known_card(facts)) if chosen is None or chosen(step)]
        base = out / f"gpu.{facts['machine']}"
        path = base.with_name(f"{base.name}.json")
        command = f"python -m studies.gpu --device {device}"
        content = begin(path, command, facts)

        def keep(content: Row) -> None:
            write(path, as_json(content))

        left = 60 * minutes * (1 - CLOSING) - (monotonic() - begun)
        interrupted = carry_out(content, todo, tools, left, keep)
    finally:
        tools.end()
    told: dict[str, Any] = {"interrupted": interrupted, "files": [path]}
    content["calibration"] = calibrated(content)
    content["missing"] = [step.label for step in todo if not is_done(content, step)]
    keep(content)
    text = base.with_name(f"{base.name}.md")
    write(text, page(content))
    told["files"].append(text)
    return content | told
