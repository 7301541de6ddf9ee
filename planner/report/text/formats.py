"""Plain data (mappings, lists, text, numbers, None) as JSON or YAML text, in ASCII for any terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

Plain: TypeAlias = Mapping[str, "Plain"] | Sequence["Plain"] | str | int | float | bool | None

# Text that YAML 1.1 and 1.2 both read as that text without quotes.
_BARE = re.compile(r"[A-Za-z/][\w ./()+-]*(?<! )", re.ASCII)
_NOT_TEXT = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}


def as_json(data: Plain) -> str:
    """JSON, indented, without a newline at the end."""
    return json.dumps(data, indent=2, allow_nan=False)


def as_yaml(data: Plain) -> str:
    """YAML in block style, lists of scalars in one line, without a newline at the end."""
    return "\n".join(_block(data))


def _block(data: Plain) -> Iterator[str]:
    """The lines of a value that begins a line."""
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            if _nested(value):
                yield f"{_scalar(key)}:"
                yield from (f"  {line}" for line in _block(value))
            else:
                yield f"{_scalar(key)}: {_inline(value)}"
    elif isinstance(data, Sequence) and _nested(data):
        for value in data:
            first, *rest = _block(value)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
    else:
        yield _inline(data)


def _nested(value: Plain) -> bool:
    """Whether a value takes lines of its own: a mapping with entries, or a list of more than scalars."""
    if isinstance(value, Mapping):
        return bool(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    return any(isinstance(one, Mapping | Sequence) and not isinstance(one, str) for one in value)


def _inline(value: Plain) -> str:
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_scalar(one) for one in value)}]"
    return _scalar(value)


def _scalar(value: Plain) -> str:
    if isinstance(value, str):
        if _BARE.fullmatch(value) and value.lower() not in _NOT_TEXT:
            return value
        # JSON's quotes are YAML's, but for its pairs of \u escapes.
        quoted = json.dumps(value, ensure_ascii=False)
        return "".join(c if c.isascii() and c.isprintable() else f"\\U{ord(c):08X}" for c in quoted)
    text = json.dumps(value, allow_nan=False)
    if isinstance(value, float) and "e" in text and "." not in text:
        return text.replace("e", ".0e")  # YAML 1.1 takes 1e+16 for text
    return text
