"""Bytes and counts as people write them: `8GB` is 8 x 10^9, `8GiB` is 8 x 2^30, `128K` is 131,072."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from attention.errors import ConfigError, shortened

_BYTES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_COUNTS = {"": 1, "K": 2**10, "M": 2**20}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", re.ASCII)
LARGEST = 2**60
"""Nothing that is planned for is larger than this, in bytes or tokens."""


def parse_bytes(text: str | int, what: str = "size") -> int:
    """Bytes of `8GB`, `7.75 GiB`, `512MiB` or a plain number, fractions of a byte left out; ConfigError for
    anything else."""
    return _parse(text, _BYTES, False, what, "e.g. 8GB (8 x 10^9 bytes), 7.75GiB or 500MB")


def parse_count(text: str | int, what: str = "count") -> int:
    """Tokens of `131072`, `128K` (x 1,024) or `1M` (x 1,048,576); ConfigError for anything else,
    among it what is no whole number of tokens."""
    return _parse(text, _COUNTS, True, what, "e.g. 131072, 128K (x 1,024) or 1M (x 1,048,576)")


def _parse(text: str | int, units: dict[str, int], whole: bool, what: str, example: str) -> int:
    if isinstance(text, bool) or not isinstance(text, str | int):
        raise ConfigError(
            f"{what} must be a number or text, got {shortened(repr(text), 60)}; write {example}"
        )
    text = str(text)
    match = _NUMBER.fullmatch(text)
    if match is None or match[2].upper() not in units:
        raise ConfigError(f"{what} {text[:60]!r} is not understood; write {example}")
    if len(match[1]) > 30:
        raise ConfigError(f"{what} {text[:60]!r} is too large; write {example}")
    # In floats 2.01GB were a byte less.
    exact = Fraction(match[1]) * units[match[2].upper()]
    if whole and exact.denominator != 1:
        raise ConfigError(f"{what} must be a whole number, got {text[:60]!r}; write {example}")
    value = math.floor(exact)
    if not 0 < value <= LARGEST:
        raise ConfigError(f"{what} must be above 0 and at most 2^60, got {text[:60]!r}; write {example}")
    return value


def format_bytes(count: float, digits: int = 2) -> str:
    """Bytes for people, in decimal units as cards are sold: 8.00 GB, 16.8 MB, 512 B."""
    for unit in ("TB", "GB", "MB", "KB"):
        if abs(count) >= _BYTES[unit]:
            return f"{count / _BYTES[unit]:,.{digits}f} {unit}"
    return f"{count:,.0f} B"


def bytes_option(count: int) -> str:
    """Bytes as an option takes them, 5.22GB: with two digits, and never less than `count`."""
    for unit in ("TB", "GB", "MB", "KB"):
        if count >= _BYTES[unit]:
            return f"{-(-100 * count // _BYTES[unit]) / 100:.2f}{unit}"
    return str(count)
