"""What a shared library says of itself: what it is linked to, and the symbols that it takes of others.

Reads the section table of 64-bit little-endian ELF libraries, as much as the stand-in has to know.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Final, NamedTuple

_DYNAMIC, _SYMBOLS, _NEEDS, _NUMBERS = 6, 11, 0x6FFFFFFE, 0x6FFFFFFF  # types of sections
_NEEDED: Final = 1  # tag of a dynamic entry
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")


class Library(NamedTuple):
    """The dynamic symbols of one library."""

    needed: tuple[str, ...]
    """Names of the libraries that it is linked to."""
    versions: dict[str, frozenset[str]]
    """Symbol versions that it expects, by the library that it expects them of."""
    wanted: dict[str, str]
    """Undefined symbols, each with the version that it is asked for in; empty for any."""
    given: frozenset[str]
    """Symbols that it defines."""


class _Section(NamedTuple):
    offset: int
    size: int
    link: int


def read(path: Path) -> Library:
    """The library at `path`; a ValueError where it is no 64-bit little-endian ELF library."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        if image[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is no 64-bit little-endian ELF file")
        return _read(image)


def _read(image: mmap.mmap) -> Library:
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    rows = [_SECTION.unpack_from(image, table + size * index) for index in range(count)]
    sections = [_Section(row[4], row[5], row[6]) for row in rows]
    by_type = {row[1]: section for row, section in zip(rows, sections, strict=True)}

    def text(section: _Section, at: int) -> str:
        """A string of the string section that `section` is linked to."""
        start = sections[section.link].offset + at
        return image[start : image.find(b"\0", start)].decode()

    versions: dict[str, set[str]] = {}
    numbered: dict[int, str] = {}
    if needs := by_type.get(_NEEDS):
        at = needs.offset
        while True:
            _, entries, library, first, following = struct.unpack_from("<HHIII", image, at)
            names = versions.setdefault(text(needs, library), set())
            entry = at + first
            for _ in range(entries):
                _, _, number, name, step = struct.unpack_from("<IHHII", image, entry)
                numbered[number] = text(needs, name)
                names.add(numbered[number])
                entry += step
            if not following:
                break
            at += following

    wanted, given = {}, set()
    symbols, numbers = by_type[_SYMBOLS], by_type.get(_NUMBERS)
    for index in range(symbols.size // _SYMBOL.size):
        at, _, _, home, _, _ = _SYMBOL.unpack_from(image, symbols.offset + index * _SYMBOL.size)
        if home:
            given.add(text(symbols, at))
        elif at:
            number = struct.unpack_from("<H", image, numbers.offset + 2 * index)[0] if numbers else 0
            wanted[text(symbols, at)] = numbered.get(number & 0x7FFF, "")

    dynamic = by_type[_DYNAMIC]
    entries = (struct.unpack_from("<QQ", image, dynamic.offset + 16 * i) for i in range(dynamic.size // 16))
    needed = tuple(text(dynamic, value) for tag, value in entries if tag == _NEEDED)
    return Library(needed, {name: frozenset(of) for name, of in versions.items()}, wanted, frozenset(given))
