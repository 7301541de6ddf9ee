"""The workload of an attention: sizes, dtype, mode, and what it asks for beside them. Imports no torch."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from attention.config import (
    MOST_HEADS,
    MOST_TOKENS,
    AttentionConfig,
    Channels,
    Heads,
    Tokens,
    Value,
    as_tuple,
)
from attention.errors import ConfigError
from attention.features import NAMES, Feature, together, unfit_feature
from attention.sizes.arrays import Count, ceil_div
from planner.units import LARGEST

Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Mode = Literal["inference", "training"]

ITEMSIZE: Final[dict[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# Far beyond what anybody runs; within them every figure is exact and found in seconds.
MOST_BATCH: Final = 1 << 20
MOST_COUNTED: Final = 1 << 30
"""Tokens, where the weights are asked for: their blocks are counted row by row."""
MOST_GPUS: Final = MOST_HEADS
MOST_DOCUMENTS: Final = 1 << 16
"""Documents of a sequence: each is a call of the program at least, and a plan looks at every call."""

DocumentLengths = Annotated[tuple[Tokens, ...], BeforeValidator(as_tuple)]


class Workload(Value):
    """One call of an attention: q [batch, queries, heads, head_dim]; k and v [batch, seq, ...] with
    `kv_heads` heads.

    Fields that came later (`queries`, `documents`, `sinks`, `gpus`) are written as JSON where they are given,
    so that what was written before, and fingerprints of it, stay as they are.
    """

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
    queries: Tokens | None = None
    """Tokens that ask, the last of the sequence: 1 where a model decodes with a cache. None for all of
    them."""
    documents: DocumentLengths | None = None
    """Lengths of the documents that are packed into each sequence, one behind the other, `seq` tokens in
    all: no token sees one of another document. Padding is a document too. None for one document."""
    sinks: bool = False
    """Whether each head has a learned sink: a logit that joins its softmax without a value."""
    gpus: Annotated[int, Field(ge=1, le=MOST_GPUS)] = 1
    """Devices that share the call, a rank on each: `seq` and `batch` are of all together."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ITEMSIZE[self.dtype]

    @property
    def groups(self) -> int:
        """Key and value heads, given or not."""
        return self.kv_heads or self.heads

    @property
    def query_tokens(self) -> int:
        """Tokens that ask, given or not."""
        return self.queries or self.seq

    def least_blocks(self, unit: Count) -> Count:
        """Blocks of `unit` tokens of the shortest sequence that has all tokens that ask, at least one;
        `seq` is not read. Also of an array of units."""
        return ceil_div(self.queries or 1, unit)

    @property
    def is_plain(self) -> bool:
        """Whether all tokens ask, in one document, without sinks."""
        return self.query_tokens == self.seq and self.documents is None and not self.sinks

    @property
    def is_cut(self) -> bool:
        """Whether a program is cut for it: to the last queries, or to several documents."""
        return self.query_tokens < self.seq or len(self.documents or ()) > 1

    @property
    def floor(self) -> int:
        """Bytes of q, k, v and out: nothing runs below it."""
        return self.floor_at(self.seq)

    def floor_at(self, seq: Count) -> Count:
        """`floor` at another length, or at many; `seq` of the workload is not read."""
        if self.queries is None:
            return seq * self._a_token
        rows = self.queries * self.heads + seq * self.groups
        return 2 * self.batch * rows * self.head_dim * self.itemsize

    @property
    def _a_token(self) -> int:
        """Bytes that each token takes of the floor, where all ask."""
        return 2 * self.batch * (self.heads + self.groups) * self.head_dim * self.itemsize

    @property
    def most_tokens(self) -> int:
        """The longest sequence that a call like this is planned for."""
        return min(MOST_COUNTED if self.weights else MOST_TOKENS, LARGEST // self._a_token)

    @model_serializer(mode="wrap")
    def _written(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The fields, those that came later only where they are given."""
        fields: dict[str, Any] = written(self)
        return {name: value for name, value in fields.items() if value != _LATER.get(name, _ALWAYS)}

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
        self._check_queries()
        self._check_documents()
        return self

    def _check_queries(self) -> None:
        if self.queries is None:
            return
        if self.queries > self.seq:
            raise ValueError(
                f"queries are the last tokens of the sequence, at most seq={self.seq:,} of them, got "
                f"queries={self.queries:,}"
            )
        if self.weights and self.queries < self.seq:
            raise ValueError("weights=True is for as many queries as tokens; leave out queries or weights")

    def _check_documents(self) -> None:
        if self.documents is None:
            return
        if not 1 <= len(self.documents) <= MOST_DOCUMENTS:
            raise ValueError(
                f"documents are 1 to {MOST_DOCUMENTS:,} lengths, got {len(self.documents):,}; leave them out "
                "for one document"
            )
        if sum(self.documents) != self.seq:
            raise ValueError(
                f"documents must add up to seq: they have {sum(self.documents):,} tokens in all, "
                f"seq={self.seq:,}"
            )
        if self.weights:
            raise ValueError("weights=True is for one document; leave out documents or weights")


_ALWAYS: Final = object()
_LATER: Final = {"queries": None, "documents": None, "sinks": False, "gpus": 1}
"""Fields that came later, each with what it is where it is not given."""


def features_of(workload: Workload) -> tuple[Feature, ...]:
    """The features that a workload has. One document is none."""
    there: dict[Feature, bool] = {
        "queries": workload.query_tokens < workload.seq,
        "documents": len(workload.documents or ()) > 1,
        "sinks": workload.sinks,
        "weights": workload.weights,
    }
    return tuple(feature for feature, given in there.items() if given)


def refuse_features(config: AttentionConfig, workload: Workload) -> None:
    """ConfigError where the config does not take what the workload has, as the library has it, or not
    together."""
    features = features_of(workload)
    for feature in features:
        why = unfit_feature(config, feature)
        if config.multihead and feature == "queries":
            why = "an attention between projections has as many queries as keys"
        if why:
            raise ConfigError(f"{NAMES[feature]}: not taken by this attention: {why}")
    for one, other in combinations(features, 2):
        if why := together(one, other):
            raise ConfigError(f"{NAMES[one]} and {NAMES[other]} do not go together: {why}")
