"""CPU instructions by which oneDNN makes products of 16-bit matrices."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

Unit: TypeAlias = Literal["avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"]
"""Instructions by which oneDNN makes products of 16-bit matrices; named as Linux names them."""
UNITS: Final[dict[str, tuple[Unit, ...]]] = {
    "bfloat16": ("amx_bf16", "avx512_bf16"),
    "float16": ("amx_fp16", "avx512_fp16"),
}
"""Units for each dtype, in the order in which oneDNN prefers them."""
