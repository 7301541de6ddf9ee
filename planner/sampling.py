"""Samples that are spread evenly and are the same every time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GOLDEN: Final = 0.6180339887498949
"""Multiples of it fall evenly into every interval, modulo 1 (Weyl): without a period that residues could
have."""


def golden(number: Any, start: float = 0.0) -> Any:
    """The `number`-th point of an even sequence in [0, 1); a number, or an array of them."""
    return (number * GOLDEN + start) % 1


def stratified(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n], one point of each of n strata of width 1; `places` [n], where in it, from 0 to 1."""
    import numpy as np  # which `golden` of a number does not need

    return np.arange(places.size) + places
