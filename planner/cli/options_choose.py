"""Options of the commands that choose: a place named by card, what may be chosen. Imports no torch;
see `planner.cli.options`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NewType

import typer

from attention.config import Backend, Switch
from attention.errors import ConfigError
from planner.cli.options import Place, build_place, counts
from planner.question.asked import LAYERS, MIN_MASS
from planner.units import parse_bytes

if TYPE_CHECKING:
    from planner.question.space import Space

Card = NewType("Card", Place)
"""A place that a recommendation is for: named with `--gpu`, or generic."""


def build_card(*, gpu: str | None, **given: Any) -> Card:
    """The place that these options describe. Takes what `build_place` does, the device as `gpu`."""
    if gpu is None and given["vram"] is None:
        raise ConfigError(
            "the memory is missing: pass --vram, e.g. --vram 8GB, or a card, e.g. --gpu gtx1080"
        )
    if gpu is not None and gpu.lower() == "cpu" and given["vram"] is None:
        raise ConfigError("the memory is missing: with --gpu cpu pass --vram, e.g. --vram 8GB")
    return Card(build_place(device=gpu, **given))


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


Gates = NewType("Gates", dict[str, Any])
"""What an answer has to keep to beside the memory, as `planner.recommend` and `planner.tune` take it."""


def build_gates(
    *,
    reserve: Annotated[
        str, typer.Option(metavar="SIZE", help="Of the memory, for the rest of the model: 1.5GB.")
    ] = "0",
    layers: Annotated[
        int, typer.Option(min=0, help="Of the model: in so many each token must hear of all. 0: no matter.")
    ] = LAYERS,
    min_mass: Annotated[
        float, typer.Option(min=0, max=1, help="Least share of dense attention's mass. 0: no matter.")
    ] = MIN_MASS,
    max_seconds: Annotated[float | None, typer.Option(help="Most seconds of a call, predicted.")] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where attention's mass lies. [default: balanced]")
    ] = None,
    profile_from: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same, measured: q and k in .npz or .safetensors.")
    ] = None,
    causal: Annotated[bool | None, typer.Option()] = None,
) -> Gates:
    """What these options ask for; the profile of a file is measured, causally or not."""
    if profile is not None and profile_from is not None:
        raise ConfigError("--profile and --profile-from say the same thing twice; remove one")
    known: Any = profile
    if profile_from is not None:
        from planner.quality.profile_file import profile_from as measured

        known = measured(profile_from, bool(causal))
    return Gates(
        {"reserve": reserve, "layers": layers or None, "min_mass": min_mass or None,
         "max_seconds": max_seconds, "profile": known}
    )  # fmt: skip


Allowed = NewType("Allowed", "Space")
"""A space, named without loading what it is made of."""


def _list(help: str) -> Any:
    return typer.Option(metavar="LIST", help=help)


def build_space(
    *,
    variant: Annotated[str | None, _list("Only dense, dilated, block_sparse, adaptive.")] = None,
    pattern: Annotated[str | None, _list("Only local_window, global_local, dilated_sparse.")] = None,
    block_size: Annotated[str | None, _list("Only these: 64,128.")] = None,
    window: Annotated[str | None, _list("Only these, in tokens: 1K,4K.")] = None,
    global_tokens: Annotated[str | None, _list("Only these: 64,256.")] = None,
    sparsity: Annotated[str | None, _list("Only these fractions of blocks kept: 0.01,0.1.")] = None,
    branches: Annotated[str | None, _list("Only so many branches: 2,3.")] = None,
    segments: Annotated[str | None, _list("Exactly these segment lengths: 2K,8K.")] = None,
    rates: Annotated[str | None, _list("Exactly these dilation rates: 1,4.")] = None,
    workspace: Annotated[str | None, _list("Only these sizes: 1MiB,16MiB.")] = None,
    backend: Annotated[Backend | None, typer.Option(help="Only this backend.")] = None,
    pool: Annotated[Switch, typer.Option(help="Keep scratch buffers between calls.")] = "auto",
) -> Allowed:
    """What may be chosen, as these options restrict it."""
    from planner.question.space import Space

    given: dict[str, Any] = {
        "variants": _names(variant),
        "patterns": _names(pattern),
        "block_sizes": counts(block_size, "--block-size") or None,
        "windows": counts(window, "--window") or None,
        "global_tokens": counts(global_tokens, "--global-tokens") or None,
        "ratios": _floats(sparsity, "--sparsity"),
        "branches": counts(branches, "--branches") or None,
        "segments": counts(segments, "--segments") or None,
        "rates": counts(rates, "--rates") or None,
        "workspaces": _sizes(workspace, "--workspace"),
        "backend": backend,
    }
    return Allowed(Space(pool=pool, **{name: value for name, value in given.items() if value is not None}))


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _floats(text: str | None, what: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(map(float, text.split(",")))
    except ValueError:
        raise ConfigError(f"{what} {text!r} is not a list of numbers; write e.g. 0.01,0.1") from None


def _sizes(text: str | None, what: str) -> tuple[int, ...] | None:
    return None if text is None else tuple(parse_bytes(part, what) for part in text.split(","))
