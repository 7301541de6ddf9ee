"""What is decided about a call by the sizes of its tensors, once for all calls of these sizes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

from attention.config import AttentionConfig
from attention.ops import cudnn, kernels
from attention.ops.execute import Problem
from attention.pool import Buffers
from attention.sizes.row_bounds import Rows
from attention.sizes.shape import Shape, Windows

MOST = 32
"""Signatures of which a module keeps what is decided, at most some tens of kilobytes each."""


class Decided(NamedTuple):
    """What the checked inputs of a call decide. Holds no tensor and no layout."""

    config: AttentionConfig
    buffers: Buffers
    backend: str
    """`sdpa` or `flex`."""
    shape: Shape
    problem: Problem | None
    """What is computed; None where that depends on values."""
    rows: Rows | None
    """Of the layout by which each call makes the problem's tiles; None where they come from none."""
    windows: Windows
    """Those that the kernel took for q."""
    cut: bool = False
    """Whether its program is cut, to the last queries or to documents: cuDNN's attention has no part."""


class Decisions:
    """The `Decided` of a module's last calls by their `attention.inputs.signature`. A copy or pickle begins
    anew. Threads may share it: what two of them decide at once is equal."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Decided] = {}

    def get(
        self, signature: Hashable | None, config: AttentionConfig, buffers: Buffers, q: Tensor, k: Tensor
    ) -> Decided | None:
        """What was decided for these, and for what kernels for q and k take now; None if nothing was."""
        try:
            decided = self._kept.get(signature)
        except TypeError:  # a size that stands for any
            return None
        if decided is None or decided.config is not config or decided.buffers is not buffers:
            return None
        shape = decided.shape
        if decided.windows != kernels.windows_of(q):
            return None
        if decided.cut:
            return decided
        cudnn_from = cudnn.takes_from(q, k, shape.causal, config.backend)
        return decided if shape.cudnn_from == cudnn_from else None

    def keep(self, signature: Hashable | None, decided: Decided) -> None:
        """Keeps it in place of the oldest."""
        try:
            hash(signature)
        except TypeError:
            return
        if signature is None:
            return
        for oldest in list(self._kept)[: max(len(self._kept) + 1 - MOST, 0)]:
            self._kept.pop(oldest, None)
        self._kept[signature] = decided

    def __reduce__(self) -> tuple[type[Decisions], tuple[()]]:
        return Decisions, ()
