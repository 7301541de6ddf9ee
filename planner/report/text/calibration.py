"""A calibration as a table of at most 80 columns. Imports rich and no torch."""

from __future__ import annotations

from statistics import median

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.calibration import Calibration
from planner.units import format_bytes


def calibration_table(calibration: Calibration) -> RenderableType:
    """The device, its memory terms, the errors on held-out runs, and the margin that follows from them."""
    margin, confidence = calibration.margin()
    errors = calibration.errors
    where = [calibration.capability, f"{calibration.threads} threads" if calibration.threads else None]
    rows = [
        ("device", ", ".join([calibration.name, *filter(None, where)])),
        ("torch", calibration.torch),
        ("fitted to", f"{calibration.fitted} runs of up to {calibration.fitted_longest:,} tokens"),
        ("held out", f"{len(errors)} runs of up to {calibration.domain.longest:,} tokens"),
        ("failed", f"{calibration.failed} runs"),
        ("overhead", format_bytes(calibration.terms.overhead)),
        *(
            [("context", format_bytes(calibration.terms.context))]
            if calibration.terms.context is not None
            else []
        ),
        ("held-out errors", f"median {median(errors):+.3%}, {errors[0]:+.3%} to {errors[-1]:+.3%}"),
        ("margin", f"{max(margin, 0):.3%}, not exceeded in {confidence:.1%} of cases"),
        (
            "covers",
            ", ".join((*calibration.domain.variants, *calibration.domain.dtypes, *calibration.domain.modes)),
        ),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return Group(Text(f"calibration of {calibration.device}", style="bold"), table)
