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

    def __call__(self) -> object:
        """One call, and in training its backward. Gives everything that a caller would hold."""
        import torch

        q, k, v = self.inputs * (3 // len(self.inputs))
        with torch.set_grad_enabled(self.grad is not None):
            result = self.module(
                q, k, v, is_causal=self.workload.causal, return_attention_weights=self.workload.weights
            )
        out = result[0] if isinstance(result, tuple) else result
        if self.grad is not None:
            out.backward(self.grad)
        return result

    def drop_gradients(self) -> None:
        for tensor in (*self.inputs, *self.module.parameters()):
            tensor.grad = None

    def start_cold(self) -> None:
        """Nothing is left of earlier calls."""
        self.drop_gradients()
        gc.collect()
        self.buffers.release()

    @property
    def nbytes(self) -> int:
        """Bytes allocated between calls: parameters, inputs, the incoming gradient."""
        tensors = [*self.inputs, *self.module.parameters(), *self.module.buffers()]
        if self.grad is not None:
            tensors.append(self.grad)
        storages = (x.untyped_storage() for x in tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def call_of(config: AttentionConfig, workload: Workload, device: torch.device) -> ModuleCall:
    """The module of a config in the workload's dtype, on random inputs; the same numbers each time."""
    import torch

    from attention.factories import build
    from attention.pool import buffers_for

    torch.manual_seed(0)
    dtype, training = getattr(torch, workload.dtype), workload.mode == "training"
    # On the way to the device in one step: made there in float32, it would leave holes in the allocator.
    module = build(config, torch.device("cpu")).to(device=device, dtype=dtype)

    def normal(*sizes: int, requires_grad: bool = False) -> Tensor:
        where = (workload.batch, workload.seq, *sizes)
        return torch.randn(where, dtype=dtype, device=device, requires_grad=requires_grad)

    if config.multihead:
        inputs: tuple[Tensor, ...] = (normal(config.multihead.embed_dim, requires_grad=training),)
        grad = normal(config.multihead.embed_dim) if training else None
    else:
        heads = (workload.heads, workload.groups, workload.groups)
        inputs = tuple(normal(n, workload.head_dim, requires_grad=training) for n in heads)
        grad = normal(workload.heads, workload.head_dim) if training else None
    return ModuleCall(module, inputs, grad, workload, buffers_for(config))
