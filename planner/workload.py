"""What an attention is asked to do: sizes, dtype, mode. Imports no torch."""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import model_validator

from attention.config import Positive, Value

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Mode = Literal["inference", "training"]

ITEMSIZE: Final[dict[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Workload(Value):
    """One call of an attention: q [batch, seq, heads, head_dim]; k and v with `kv_heads` heads."""

    seq: Positive
    """Tokens."""
    batch: Positive = 1
    heads: Positive = 8
    """Query heads."""
    kv_heads: Positive | None = None
    """Key and value heads, dividing `heads`; None for as many."""
    head_dim: Positive = 64
    """Channels a head."""
    dtype: Dtype = "float16"
    mode: Mode = "inference"
    """`inference`: a forward without gradients. `training`: a forward and a backward."""
    causal: bool = False
    weights: bool = False
    """Whether the attention weights are asked for too, as active blocks."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def groups(self) -> int:
        """Key and value heads, given or not."""
        return self.kv_heads or self.heads

    @property
    def floor(self) -> int:
        """Bytes of q, k, v and out: nothing runs below it."""
        return 2 * self.batch * self.seq * (self.heads + self.groups) * self.head_dim * self.itemsize

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads, got kv_heads={self.kv_heads} and heads={self.heads}"
            )
        return self
