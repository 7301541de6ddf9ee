"""Whole-number arithmetic on ints or on NumPy int64 arrays alike, so that one expression sizes one
config or a hundred thousand. Imports no torch, and NumPy only when given its arrays.

Conditions are 0 or 1 and multiply: there is no `if` on a count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Count: TypeAlias = int
"""An int, or an int64 array of many: every expression here and in what builds on it is the same for
both. Typed as int, because that is what all but the planner's array evaluation pass."""
Amount: TypeAlias = Any
"""A number, whole or a mean, or an array of many: a `Count` for callers that pass arrays and means too."""
Ints: TypeAlias = "NDArray[np.int64]"
Floats: TypeAlias = "NDArray[np.float64]"


def ceil_div(a: Count, b: Count) -> Count:
    """a / b rounded up."""
    return -(-a // b)


def up(a: Count, b: Count) -> Count:
    """`a` rounded up to a multiple of `b`."""
    return -(-a // b) * b


def minimum(first: Count, *others: Count) -> Count:
    """The smallest of the arguments, of arrays entry by entry."""
    for other in others:
        first = _numpy().minimum(first, other) if _many(first) or _many(other) else min(first, other)
    return first


def maximum(first: Count, *others: Count) -> Count:
    """The largest of the arguments, of arrays entry by entry."""
    for other in others:
        first = _numpy().maximum(first, other) if _many(first) or _many(other) else max(first, other)
    return first


def where(condition: Count, then: Count, otherwise: Count) -> Count:
    """`then` where `condition` holds, else `otherwise`; both are computed."""
    if _many(condition):
        return _numpy().where(condition, then, otherwise)  # type: ignore[no-any-return]
    return then if condition else otherwise


def any_of(condition: Count) -> bool:
    """Whether a condition holds, or for arrays, anywhere."""
    return bool(_numpy().any(condition) if _many(condition) else condition)


def each(
    function: Callable[..., tuple[int, ...]], condition: Count, otherwise: Sequence[Count], *arguments: Count
) -> tuple[Count, ...]:
    """`function` of ints, one by one, where `condition` holds; else `otherwise`."""
    if not _many(condition):
        return function(*arguments) if condition else tuple(otherwise)
    numpy = _numpy()
    columns = [numpy.array(numpy.broadcast_to(one, condition.shape)) for one in otherwise]  # type: ignore[attr-defined]
    where = numpy.flatnonzero(condition)
    if not where.size:
        return tuple(columns)
    inputs = [numpy.broadcast_to(one, condition.shape)[where] for one in arguments]  # type: ignore[attr-defined]
    # Candidates share their sizes: each combination is computed once.
    rows, back = numpy.unique(numpy.stack(inputs, axis=1), axis=0, return_inverse=True)
    values = zip(*(function(*row) for row in rows.tolist()), strict=True)
    for column, values_of_rows in zip(columns, values, strict=True):
        column[where] = numpy.array(values_of_rows)[back.ravel()]
    return tuple(columns)


def floor_power_of_two(a: Count) -> Count:
    """The largest power of two up to `a`, which is at least 1 and below 2^53."""
    if type(a) is int:
        return 1 << (a.bit_length() - 1)
    exponent = _numpy().frexp(a)[1] - 1
    return 1 << exponent.astype("int64")  # type: ignore[no-any-return]


def floor_root(a: Count) -> Count:
    """The square root of `a`, which is below 2^52, rounded down."""
    if type(a) is int:
        return math.isqrt(a)
    return _numpy().sqrt(a).astype("int64")  # type: ignore[no-any-return]


def floor(value: float) -> Count:
    """The largest whole number up to `value`, below 2^53; also of an array."""
    if type(value) is float:
        return math.floor(value)
    return _numpy().floor(value).astype("int64")  # type: ignore[no-any-return]


def lcm(a: Count, b: Count) -> Count:
    """The least common multiple."""
    if type(a) is int and type(b) is int:
        return math.lcm(a, b)
    return _numpy().lcm(a, b)  # type: ignore[no-any-return]


def gcd(a: Count, b: Count) -> Count:
    """The greatest common divisor; of 0 and a number, that number."""
    if type(a) is int and type(b) is int:
        return math.gcd(a, b)
    return _numpy().gcd(a, b)  # type: ignore[no-any-return]


def ascending(*counts: Count) -> Sequence[Count]:
    """The arguments from the smallest to the largest, of arrays entry by entry."""
    if any(map(_many, counts)):
        numpy = _numpy()
        return numpy.sort(numpy.stack(numpy.broadcast_arrays(*counts)), axis=0)  # type: ignore[no-any-return]
    return sorted(counts)


def _many(count: Count) -> bool:
    """Whether `count` is an array or a scalar of NumPy."""
    return hasattr(count, "dtype")


def _numpy() -> Any:
    import numpy

    return numpy


def row_blocks(ratio: float, blocks: Count) -> Count:
    """Blocks that a row may keep of `blocks`: a fraction `ratio` of them, at least one."""
    return maximum(floor(ratio * blocks + 0.5), 1)
