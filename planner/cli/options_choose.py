"""Options of the commands that choose: a place named by card, what may be chosen. Imports no torch;
see `planner.cli.options`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NewType

import typer

from attention.config import Backend, Switch
from attention.errors import ConfigError
from planner.cli.options import Place, build_place, counts
from planner.question.asked import LAYERS, MIN_MASS
from planner.question.dimensions import DIMENSIONS, Dimension, Written
from planner.units import parse_bytes

if TYPE_CHECKING:
    from planner.question.space import Space

Card = NewType("Card", Place)
"""A place that a recommendation is for: named with `--gpu`, or generic."""


def build_card(*, gpu: str | None, **options: Any) -> Card:
    """The place that these options describe. Takes what `build_place` does, the device as `gpu`."""
    if gpu is None and options["vram"] is None:
        raise ConfigError(
            "the memory is missing: pass --vram, e.g. --vram 8GB, or a card, e.g. --gpu gtx1080"
        )
    if gpu is not None and gpu.lower() == "cpu" and options["vram"] is None:
        raise ConfigError("the memory is missing: with --gpu cpu pass --vram, e.g. --vram 8GB")
    return Card(build_place(device=gpu, **options))


_of_place = inspect.signature(build_place, eval_str=True)
build_card.__signature__ = _of_place.replace(  # type: ignore[attr-defined]
    parameters=[
        option.replace(
            name="gpu",
            annotation=Annotated[
                str | None,
                typer.Option(metavar="NAME", help="A card, see `planner gpus`; or cpu. [default: generic]"),
            ],
        )
        if name == "device"
        else option
        for name, option in _of_place.parameters.items()
    ]
)


Conditions = NewType("Conditions", dict[str, Any])
"""Conditions of an answer beside the memory, as options of `planner.recommend` and `planner.tune`."""


def build_conditions(
    *,
    reserve: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory kept for the rest of the model: 1.5GB.")
    ] = "0",
    layers: Annotated[
        int,
        typer.Option(
            min=0, help="Layers of the model, within which every token is reached. 0: no such gate."
        ),
    ] = LAYERS,
    min_mass: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum share of dense attention's mass. 0: no such gate.")
    ] = MIN_MASS,
    max_seconds: Annotated[float | None, typer.Option(help="Maximum predicted seconds of a call.")] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="How mass is spread over distance. [default: balanced]")
    ] = None,
    profile_from: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure the profile from q and k in .npz or .safetensors."),
    ] = None,
    causal: Annotated[bool | None, typer.Option()] = None,
) -> Conditions:
    """The conditions that these options describe; the profile of a file is measured, causally or not."""
    if profile is not None and profile_from is not None:
        raise ConfigError("--profile and --profile-from say the same thing twice; remove one")
    source: Any = profile
    if profile_from is not None:
        from planner.quality.profile_file import profile_from as read_profile

        source = read_profile(profile_from, bool(causal))
    return Conditions(
        {
            "reserve": reserve,
            "layers": layers or None,
            "min_mass": min_mass or None,
            "max_seconds": max_seconds,
            "profile": source,
        }
    )


Allowed = NewType("Allowed", "Space")
"""A space, named without loading what it is made of."""


def build_space(**options: Any) -> Allowed:
    """The search space, as the options of all dimensions restrict it."""
    from planner.question.space import Space

    values = {
        dimension.field: _READ[dimension.written](options[dimension.argument], dimension.option)
        for dimension in DIMENSIONS.values()
        if dimension.argument in options
    }
    return Allowed(Space(**{field: value for field, value in values.items() if value is not None}))


_NAMES: Final[dict[str, tuple[Any, str | None]]] = {
    "backend": (Backend | None, None),
    "pool": (Switch, "auto"),
}
"""(type, default) of options that take one name."""


def _parameter(dimension: Dimension) -> inspect.Parameter:
    """The option of a dimension."""
    metavar = None if dimension.written == "name" else "LIST"
    kind, default = _NAMES.get(dimension.field, (str | None, None))
    option = typer.Option(metavar=metavar, help=dimension.help)
    return inspect.Parameter(
        dimension.argument,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, option],
    )


build_space.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    list(map(_parameter, DIMENSIONS.values()))
)


def _names(text: str | None, what: str) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _shares(text: str | None, what: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(map(float, text.split(",")))
    except ValueError:
        raise ConfigError(f"{what} {text!r} is not a list of numbers; write e.g. 0.01,0.1") from None


def _sizes(text: str | None, what: str) -> tuple[int, ...] | None:
    return None if text is None else tuple(parse_bytes(part, what) for part in text.split(","))


_READ: Final[dict[Written, Callable[[Any, str], Any]]] = {
    "names": _names,
    "counts": lambda text, what: counts(text, what) or None,
    "shares": _shares,
    "bytes": _sizes,
    "name": lambda text, what: text,
}
"""(text, option) -> the value that an option has."""
