"""The command that repeats an answer, from what a caller of `planner.recommend` or `planner.tune` wrote.

What has no text (a profile that was measured, a calibration in memory) is FILE there. Where trials are kept
is left out: a storage's address may have a password in it. Answers hold this command wherever they are asked
for, and so it is made here, below search and command line alike. Imports no torch.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from planner import gpus
from planner.question.asked import LAYERS, MIN_MASS, TRIALS
from planner.question.dimensions import DIMENSIONS
from planner.units import parse_bytes, parse_count
from planner.workload import Workload

if TYPE_CHECKING:
    from planner.question.space import Space

_SIZES: Final = ("batch", "heads", "kv_heads", "head_dim", "dtype", "mode", "queries")
_SHARED: Final = {"gpus": 1, "link": None, "node": None}
_PLAIN: Final = {
    "max_seconds": None,
    "sampler": "tpe",
    "seed": 0,
    "allocator": "",
    "display": "headless",
    "threads": None,
}
"""Defaults of what is written as it is."""
_SHORTER: Final = {"others_bytes": "others", "context_bytes": "context"}
"""Arguments whose options have other names."""


def option(name: str) -> str:
    """An argument of `planner.recommend`, or a field of `Space`, as the command line has it: --head-dim."""
    if name in DIMENSIONS:
        return DIMENSIONS[name].option
    return f"--{_SHORTER.get(name, name).replace('_', '-')}"


def recommend_command(vram: str | int | None, seq: str | int | None, options: Mapping[str, Any]) -> str:
    """The command line of `planner recommend` for a call of `planner.recommend`; `options`: see
    `planner.question.asked.Asked`."""
    gpu = options.get("gpu")
    card = gpus.find(gpu) if isinstance(gpu, str) and gpu != "cpu" else gpu
    named = [] if card is None else ["--gpu", "cpu" if card == "cpu" else card.key]
    if isinstance(card, gpus.Gpu):
        named = named if card in gpus.known() else []
        whole = vram is not None and parse_bytes(vram, "vram") == card.usable_bytes
        vram = None if named and whole else vram
    parts = ["planner", "recommend", *_budget(vram, seq), *named]
    usual = "seq" if seq is None else "speed"
    if options.get("objective") not in (None, usual):
        parts += ["--objective", options["objective"]]
    if options.get("trials", TRIALS) != TRIALS:
        parts += ["--trials", str(options["trials"])]
    for name, default in _SHARED.items():
        if options.get(name, default) != default:
            parts += [option(name), str(options[name])]
    return shlex.join([*parts, *_question(options)])


def tune_command(
    vram: str | int,
    seq: str | int,
    device: str,
    measured: Mapping[str, tuple[Any, Any]],
    options: Mapping[str, Any],
) -> str:
    """The command line of `planner tune` for a call of `planner.tune`; `measured`: numbers that only tuning
    takes, by option, (value, default) each."""
    parts = ["planner", "tune", *_budget(vram, seq)]
    if device != "cpu":
        parts += ["--device", device]
    for name, (value, default) in measured.items():
        if value != default:
            parts += [name, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join([*parts, *_question(options)])


def _budget(vram: str | int | None, seq: str | int | None) -> Iterator[str]:
    if vram is not None:
        yield from ("--vram", _bytes(parse_bytes(vram, "vram")))
    if seq is not None:
        yield from ("--seq", _rounded(parse_count(seq, "seq"), {"M": 1 << 20, "K": 1 << 10}))


def _question(options: Mapping[str, Any]) -> Iterator[str]:
    """Sizes, gates, restrictions and place, which both commands take."""
    for name in _SIZES:
        if options.get(name) not in (None, Workload.model_fields[name].default):
            yield from (option(name), str(options[name]))
    if options.get("causal"):
        yield "--causal"
    if options.get("documents") is not None:
        yield from ("--documents", documents_option(options["documents"]))
    if options.get("sinks"):
        yield "--sinks"
    if str(options.get("reserve", 0)) != "0":
        yield from ("--reserve", _bytes(parse_bytes(options["reserve"], "reserve")))
    for name, usual in (("layers", LAYERS), ("min_mass", MIN_MASS)):
        value = options.get(name, usual)
        if value != usual:
            yield from (option(name), str(value or 0))
    for name, default in _PLAIN.items():
        if options.get(name, default) != default:
            yield from (option(name), str(options[name]))
    for name in _SHORTER:
        if options.get(name):
            yield from (option(name), _bytes(options[name]))
    if options.get("calibration") is not None:
        yield from ("--calibration", "FILE")
    yield from _profile(options.get("profile"))
    if options.get("space") is not None:
        yield from _restrictions(options["space"])


def documents_option(lengths: Iterable[int]) -> str:
    """Lengths of documents as the command line has them, equal ones that follow each other together:
    4096x2,8192."""
    runs = [(length, sum(1 for _ in run)) for length, run in itertools.groupby(lengths)]
    return ",".join(f"{length}x{count}" if count > 1 else f"{length}" for length, count in runs)


def _profile(profile: Any) -> Iterator[str]:
    if isinstance(profile, str):
        yield from ("--profile", profile)
    elif profile is not None:
        from planner.quality.profiles import PRESETS

        preset = PRESETS.get(profile.name) == profile
        yield from ("--profile", profile.name) if preset else ("--profile-from", "FILE")


def _restrictions(space: Space) -> Iterator[str]:
    fields = type(space).model_fields
    # Sizes in bytes come last, as they always have.
    for dimension in sorted(DIMENSIONS.values(), key=lambda one: one.written == "bytes"):
        allowed = getattr(space, dimension.field)
        if allowed != fields[dimension.field].default:
            text = _bytes if dimension.written == "bytes" else str
            yield from (
                dimension.option,
                ",".join(map(text, allowed)) if isinstance(allowed, tuple) else allowed,
            )


def _bytes(count: int) -> str:
    """A number of bytes in the largest unit of which it is a whole number."""
    units = {"TB": 10**12, "GB": 10**9, "GiB": 1 << 30, "MB": 10**6, "MiB": 1 << 20, "KiB": 1 << 10}
    return _rounded(count, units)


def _rounded(count: int, units: Mapping[str, int]) -> str:
    for unit, size in units.items():
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
