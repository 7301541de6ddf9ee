"""One call of a config's module on a workload: what is measured. Imports no torch until it is made."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attention.config import AttentionConfig
from planner.workload import Workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from attention.pool import Buffers


@dataclass(frozen=True)
class ModuleCall:
    """A module with what it is called on."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    grad: Tensor | None
    workload: Workload
    buffers: Buffers
    documents: Tensor | None = None
    sinks: Tensor | None = None

    def __call__(self) -> object:
        """One call, and in training its backward. Gives everything that a caller would hold."""
        import torch

        q, k, v = self.inputs * (3 // len(self.inputs))
        given = {"documents": self.documents, "sinks": self.sinks}
        features = {name: x for name, x in given.items() if x is not None}
        with torch.set_grad_enabled(self.grad is not None):
            result = self.module(
                q,
                k,
                v,
                is_causal=self.workload.causal,
                return_attention_weights=self.workload.weights,
                **features,
            )
        out = result[0] if isinstance(result, tuple) else result
        if self.grad is not None:
            out.backward(self.grad)
        return result

    def drop_gradients(self) -> None:
        for tensor in (*self.inputs, *self.module.parameters(), *self._extra):
            tensor.grad = None

    def start_cold(self) -> None:
        """Nothing is left of earlier calls."""
        self.drop_gradients()
        gc.collect()
        self.buffers.release()

    @property
    def _extra(self) -> tuple[Tensor, ...]:
        """What is given beside q, k and v."""
        return tuple(x for x in (self.documents, self.sinks) if x is not None)

    @property
    def nbytes(self) -> int:
        """Bytes allocated between calls: parameters, inputs, the incoming gradient."""
        tensors = [*self.inputs, *self.module.parameters(), *self.module.buffers(), *self._extra]
        if self.grad is not None:
            tensors.append(self.grad)
        storages = (x.untyped_storage() for x in tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def call_of(config: AttentionConfig, workload: Workload, device: torch.device) -> ModuleCall:
    """The module of a config in the workload's dtype, on random inputs; the same numbers each time. On a rank
    of several GPUs' workload inputs are its own tokens."""
    import torch

    from attention.factories import build
    from attention.pool import buffers_for

    torch.manual_seed(0)
    dtype, training = getattr(torch, workload.dtype), workload.mode == "training"
    # On the way to the device in one step: made there in float32, it would leave holes in the allocator.
    module = build(config, torch.device("cpu")).to(device=device, dtype=dtype)

    def normal(tokens: int, *sizes: int, requires_grad: bool = False) -> Tensor:
        where = (workload.batch, tokens, *sizes)
        return torch.randn(where, dtype=dtype, device=device, requires_grad=requires_grad)

    seq, asking = workload.seq, workload.query_tokens
    if workload.gpus > 1:
        seq = asking = len(module.positions(seq))  # type: ignore[operator]
    if config.multihead:
        inputs: tuple[Tensor, ...] = (normal(seq, config.multihead.embed_dim, requires_grad=training),)
        grad = normal(seq, config.multihead.embed_dim) if training else None
    else:
        rows = ((asking, workload.heads), (seq, workload.groups), (seq, workload.groups))
        inputs = tuple(normal(*row, workload.head_dim, requires_grad=training) for row in rows)
        grad = normal(asking, workload.heads, workload.head_dim) if training else None
    documents = sinks = None
    if workload.documents is not None:
        numbers = torch.arange(len(workload.documents), dtype=torch.int32)
        of_tokens = numbers.repeat_interleave(torch.tensor(workload.documents))
        documents = of_tokens.expand(workload.batch, -1).contiguous().to(device)
    if workload.sinks:
        sinks = torch.randn(workload.heads, dtype=dtype, device=device, requires_grad=training)
    return ModuleCall(module, inputs, grad, workload, buffers_for(config), documents, sinks)
