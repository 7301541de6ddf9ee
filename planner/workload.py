"""The workload of an attention: sizes, dtype, mode. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from attention.config import MOST_TOKENS, Channels, Heads, Tokens, Value
from planner.units import LARGEST

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Mode = Literal["inference", "training"]

ITEMSIZE: Final[dict[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# Far beyond what anybody runs; within them every figure is exact and found in seconds.
MOST_BATCH: Final = 1 << 20
MOST_COUNTED: Final = 1 << 30
"""Tokens, where the weights are asked for: their blocks are counted row by row."""


class Workload(Value):
    """One call of an attention: q [batch, seq, heads, head_dim]; k and v with `kv_heads` heads."""

    seq: Tokens
    """Tokens of a sequence."""
    batch: Annotated[int, Field(ge=1, le=MOST_BATCH)] = 1
    heads: Heads = 8
    """Query heads."""
    kv_heads: Heads | None = None
    """Key and value heads, dividing `heads`; None for as many."""
    head_dim: Channels = 64
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
        return self.seq * self._a_token

    @property
    def _a_token(self) -> int:
        """Bytes that each token takes of the floor."""
        return 2 * self.batch * (self.heads + self.groups) * self.head_dim * self.itemsize

    @property
    def most_tokens(self) -> int:
        """The longest sequence that a call like this is planned for."""
        return min(MOST_COUNTED if self.weights else MOST_TOKENS, LARGEST // self._a_token)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must divide heads, got kv_heads={self.kv_heads} and heads={self.heads}"
            )
        if self.seq > self.most_tokens:
            why = f"q, k, v and out would take {self.floor:,} bytes, and nothing above 2^60 is planned for"
            if self.floor <= LARGEST:
                why = "weights are counted row by row"
            raise ValueError(f"at most {self.most_tokens:,} tokens, got {self.seq:,}: {why}")
        return self
