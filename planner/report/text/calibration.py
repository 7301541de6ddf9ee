"""A calibration as a table of at most 80 columns. Imports rich and no torch."""

from __future__ import annotations

from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.calibration import Calibration
from planner.units import format_bytes


def calibration_table(found: Calibration) -> RenderableType:
    """The device, its terms, how far held-out runs were off, and the bound that follows."""
    margin, confidence = found.margin()
    where = [found.capability, f"{found.threads} threads" if found.threads else None]
    rows = [
        ("of", ", ".join([found.name, *filter(None, where)])),
        ("torch", found.torch),
        ("fitted to", f"{found.fitted} runs of up to {found.fitted_longest:,} tokens"),
        ("held out", f"{len(found.errors)} runs of up to {found.domain.longest:,} tokens"),
        ("without figures", f"{found.failed} runs"),
        ("beside each plan", format_bytes(found.terms.overhead)),
        *([("context", format_bytes(found.terms.context))] if found.terms.context is not None else []),
        (
            "held-out errors",
            f"median {median(found.errors):+.3%}, {found.errors[0]:+.3%} to {found.errors[-1]:+.3%}",
        ),
        ("margin", f"{max(margin, 0):.3%}, not exceeded in {confidence:.1%} of cases"),
        ("covers", ", ".join((*found.domain.variants, *found.domain.dtypes, *found.domain.modes))),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return Group(Text(f"calibration of {found.device}", style="bold"), table)
