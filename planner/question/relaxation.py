"""Relaxations: changes of a question with which something fits, where nothing does, and their text.

`planner.search` finds them; `NothingFitsError` and the command line say them alike, and so the words lie
below both. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from planner.question.command import option
from planner.units import bytes_option, format_bytes
from planner.workload import Workload


class Relaxation(NamedTuple):
    """One change of a question with which something fits."""

    what: str
    """An argument of `planner.recommend` or `planner.estimate`; or `workspace_bytes`, of the config."""
    value: int | float | str
    """The value with which something fits."""

    def applied(self, workload: Workload) -> Workload:
        """A workload with this change, which is of one of its fields."""
        return workload.model_copy(update={self.what: self.value})


def cheaper(workload: Workload) -> Iterator[Relaxation]:
    """Changes of a workload's mode and dtype that take less memory."""
    if workload.mode == "training":
        yield Relaxation("mode", "inference")
    if workload.itemsize > 2:
        yield Relaxation("dtype", "float16")


def spelt(change: Relaxation, *, exactly: bool = False) -> str:
    """A change as an option, with what to know about it: `--vram 9.76GB (needs 9.76 GB)`. `exactly`: memory
    to the byte, and not in two digits that are enough."""
    what, value = change
    if what == "vram":
        count = int(value)
        needed = f"({format_bytes(count)})" if exactly else f"(needs {format_bytes(count)})"
        return f"{option(what)} {count if exactly else bytes_option(count)} {needed}"
    if what == "workspace_bytes":
        return f"a config with workspace_bytes={value}"
    if what == "others_bytes" and not value:
        return "no others on the card"
    return f"{option(what)} {f'{value:.6g}' if isinstance(value, float) else value}"
