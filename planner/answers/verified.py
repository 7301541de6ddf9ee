"""A pick as it ran. Imports no torch."""

from __future__ import annotations

from attention.config import Value


class Verified(Value):
    """One pick, predicted and measured."""

    role: str
    kind: str
    """How the run ended: see `Measurement.kind`."""
    message: str | None
    upper: int
    """The upper bound: bytes that the run was predicted not to exceed."""
    allocated: int | None
    """Bytes at the peak: on a GPU what the card lost, where the driver tells."""
    predicted: float
    """Predicted seconds."""
    seconds: float | None
