"""Options of commands that plan for several GPUs: how many, and what joins them. Imports no torch; see
`planner.cli.options`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from attention.errors import ConfigError
from planner.workload import Workload


@dataclass(frozen=True)
class Ranks:
    """How many GPUs share a call, and what joins them."""

    gpus: int | None
    """None for as many as the file has, or one."""
    links: dict[str, Any]
    """Options of `planner.estimate`: `link` and `node`."""

    def shared(self, workload: Workload) -> Workload:
        """The workload on these GPUs; ConfigError for links that nobody needs."""
        if self.gpus is not None:
            workload = Workload(**{**workload.model_dump(), "gpus": self.gpus})
        given = [f"--{name}" for name, value in self.links.items() if value is not None]
        if given and workload.gpus == 1:
            raise ConfigError(f"{', '.join(given)}: for several GPUs; add --gpus, e.g. --gpus 8")
        return workload


def build_ranks(
    *,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs that share the call: sizes are of all together. [default: 1]")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What joins them: nvlink4, or nvlink4,ndr with --node. [default: the card's]"
        ),
    ] = None,
    node: Annotated[int | None, typer.Option(help="GPUs of a node, where --link has two names.")] = None,
) -> Ranks:
    """The GPUs that these options describe."""
    return Ranks(gpus, {"link": link, "node": node})
