"""Files that commands write beside what they print."""

from __future__ import annotations

import contextlib
from pathlib import Path

from attention.errors import AttentionPlannerError


def write_whole(path: Path, data: bytes, what: str) -> None:
    """The file appears whole or not at all, and until then keeps what it had; `what`: the option that named
    it, for the AttentionPlannerError."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    except OSError as error:
        raise AttentionPlannerError(f"{what} {path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
