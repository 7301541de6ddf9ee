"""A pick as it ran. Imports no torch."""

from __future__ import annotations

from attention.config import Value


class Verified(Value):
    """One pick, predicted and measured."""

    role: str
    kind: str
    """As `Measurement.kind`."""
    message: str | None
    upper: int
    """Bytes that were predicted not to be exceeded."""
    allocated: int | None
    """Bytes at the peak: on a GPU what the card lost, where the driver tells."""
    predicted: float
    """Seconds."""
    seconds: float | None
