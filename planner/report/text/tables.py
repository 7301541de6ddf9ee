"""Cards and measurements as plain data, and as tables of at most 80 columns.

Imports rich and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import groupby
from typing import cast, get_args

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.gpus import GIB, Gpu, backends, caution, torch_builds
from planner.measuring.measure import Measurement
from planner.report.text.formats import Plain
from planner.report.text.words import attention, task
from planner.units import format_bytes
from planner.workload import Dtype

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
_SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
# (heading, width) of a row of `gpu_table`; together with a space between them, 80.
_COLUMNS = [
    ("name", 23),
    ("--gpu", 14),
    ("GiB", 3),
    ("usable", 6),
    ("GB/s", 5),
    *((_SHORT[d], 5) for d in DTYPES),
]


def show(what: RenderableType) -> None:
    """Prints to stdout."""
    Console(highlight=False).print(what)


# Cards.


def gpu_data(gpu: Gpu) -> dict[str, Plain]:
    """A card's figures and their sources; rates and kernels by dtype."""
    data = {field.name: getattr(gpu, field.name) for field in fields(gpu)}
    return data | {
        "aliases": list(gpu.aliases),
        "capability": _capability(gpu),
        "rates": dict(gpu.rates),
        "backends": {dtype: list(backends(gpu, dtype)) for dtype in DTYPES},
        "torch": torch_builds(gpu),
        "caution": caution(gpu),
    }


def gpu_table(cards: Sequence[Gpu]) -> RenderableType:
    """Cards by architecture: memory as sold and as usable, bandwidth, peak TFLOP/s by dtype, kernels."""
    parts: list[RenderableType] = [_gpu_rows([], header=True)]
    for title, group in groupby(cards, key=_family):
        parts += [Text(f"\n{title}", style="bold"), _gpu_rows(group)]
    parts.append(Text("\nGiB: as sold; usable: GiB that CUDA reports. fp16 to fp64: peak TFLOP/s."))
    return Group(*parts)


def gpu_card(gpu: Gpu) -> RenderableType:
    """One card in full, a line each figure, with its sources."""
    rates = (f"{_SHORT[dtype]} {_figure(gpu.rates[dtype], 10**12)}" for dtype in DTYPES)
    kernels = (f"{_SHORT[dtype]}: {', '.join(backends(gpu, dtype))}" for dtype in DTYPES)
    level2 = f"{gpu.l2_bytes / 2**20:g} MiB" if gpu.l2_bytes else "-"
    kind = f"{gpu.memory_type}, error correction {'on' if gpu.ecc else 'off'}"
    rows = [
        ("write it as", " | ".join((gpu.key, *gpu.aliases))),
        ("architecture", f"{gpu.architecture}, compute capability {_capability(gpu)}"),
        ("memory as sold", f"{gpu.nominal_bytes / GIB:g} GiB ({gpu.nominal_bytes:,} bytes); {kind}"),
        ("usable memory", f"{gpu.usable_bytes / GIB:.2f} GiB ({gpu.usable_bytes:,} bytes)"),
        ("", gpu.usable_source),
        ("bandwidth", f"{_figure(gpu.bandwidth, 10**9)} GB/s"),
        ("peak TFLOP/s", ", ".join(rates)),
        ("multiprocessors", f"{_figure(gpu.sm_count, 1)}; level-2 cache {level2}"),
        ("kernels", "\n".join(kernels)),
        ("PyTorch", torch_builds(gpu)),
        ("source", gpu.source),
        *([("caution", warned)] if (warned := caution(gpu)) else []),
    ]
    return Group(Text(gpu.name, style="bold"), _pairs(rows))


def _family(gpu: Gpu) -> str:
    kernels = ", ".join(backends(gpu, "float16"))
    return f"{gpu.architecture}, compute capability {_capability(gpu)}; fp16 by {kernels}"


def _gpu_rows(cards: Iterable[Gpu], *, header: bool = False) -> Table:
    table = Table(box=None, show_header=header, padding=(0, 1, 0, 0), pad_edge=False)
    for number, (heading, width) in enumerate(_COLUMNS):
        table.add_column(heading, width=width, justify="left" if number < 2 else "right")
    for gpu in cards:
        name = gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
        memory = f"{gpu.nominal_bytes / GIB:g}", f"{gpu.usable_bytes / GIB:.2f}"
        rates = (_figure(gpu.rates[dtype], 10**12) for dtype in DTYPES)
        table.add_row(name, gpu.key, *memory, _figure(gpu.bandwidth, 10**9), *rates)
    return table


def _capability(gpu: Gpu) -> str:
    return f"{gpu.capability[0]}.{gpu.capability[1]}"


def _figure(value: float | None, unit: int) -> str:
    """A figure in `unit` with about three digits, at most five characters; `-` if there is none."""
    if value is None:
        return "-"
    scaled = value / unit
    if scaled >= 100:
        return f"{scaled:,.0f}"
    return f"{scaled:.3g}" if scaled >= 1 else f"{scaled:.3f}"


# Measurements.


def measurement_data(measurement: Measurement) -> Plain:
    """The record, as it is kept in files of records."""
    return cast(Plain, json.loads(measurement.to_json()))


def measurement_table(measurement: Measurement) -> RenderableType:
    """The config and workload, each figure there is, and where it was measured; or why there are none."""
    head = [Text(attention(measurement.config), style="bold"), Text(task(measurement.workload))]
    if measurement.kind == "ok":
        rows = [("time", _time(measurement))]
        return Group(*head, _figures(measurement), _pairs(rows + _where(measurement)))
    rows = [(measurement.kind, measurement.message or "")]
    rows += [("asked for last", _bytes(measurement.requested))] if measurement.requested is not None else []
    rows += [("free then", _bytes(measurement.available))] if measurement.available is not None else []
    return Group(*head, _pairs(rows + _where(measurement)))


def _figures(measurement: Measurement) -> Table:
    seen_by = "with the planned context" if measurement.is_dry else "seen by the driver"
    rows = [
        ("allocated, first call", measurement.allocated),
        ("allocated, warm call", measurement.allocated_warm),
        ("reserved by the caching allocator", measurement.reserved),
        (f"device peak, {seen_by}", measurement.device_peak),
        ("context, planned" if measurement.is_dry else "context", measurement.context),
        ("resident, above the start", measurement.resident),
        ("floor: q + k + v + out", measurement.workload.floor),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    for name, count in rows:
        if count is not None:
            table.add_row(name, format_bytes(count), f"{count:,} bytes" if count >= 1000 else "")
    return table


def _time(measurement: Measurement) -> str:
    if measurement.seconds is None:
        return "none: a dry run, kernels did nothing"
    spread = f", spread {measurement.spread:.1%}" if measurement.spread is not None else ""
    return f"{measurement.seconds:.4g} s, median of {measurement.runs} warm calls{spread}"


def _where(measurement: Measurement) -> list[tuple[str, str]]:
    """The cap and the environment, without what the record does not have."""
    place = measurement.environment
    software = [
        ("torch", place.torch),
        ("CUDA", place.cuda),
        ("driver", place.driver),
        ("Python", place.python),
    ]
    rows: dict[str, list[str | None]] = {
        "held to": [_bytes(measurement.cap_bytes)] if measurement.cap_bytes is not None else [],
        "device": [place.device or measurement.device, place.capability]
        + ([f"{place.threads} threads"] if place.threads else []),
        "software": [*(f"{name} {version}" for name, version in software if version), place.system],
        "kernel": [place.backend, place.kernel],
        "settings": [f"{name}={value}" for name, value in place.settings.items()],
        "date": [place.date],
    }
    lines = {name: [value for value in values if value] for name, values in rows.items()}
    return [(name, ", ".join(values)) for name, values in lines.items() if values]


def _bytes(count: int) -> str:
    return f"{format_bytes(count)} ({count:,} bytes)"


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table
