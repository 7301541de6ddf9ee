"""Attention in a process of dry runs: captured in a CUDA graph, and as far as cuDNN's operators go there."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch


def run(config: dict[str, Any], workload: dict[str, Any], packages: str) -> bool:
    """Whether the stream is in a capture while the call runs. Whoever waits for the GPU in there, or copies
    to it from memory that is not pinned, is refused. `packages` is where the project's needs are."""
    sys.path.append(packages)  # behind this Python's own, whose torch is another
    from attention.config import AttentionConfig
    from attention.ops.kernels import TRUST
    from planner.measuring.call import call_of
    from planner.workload import Workload

    call = call_of(AttentionConfig(**config), Workload(**workload), torch.device("cuda"))
    call()
    os.environ.pop(TRUST)  # kernels must not be held against their definition from here on
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
        capturing = torch.cuda.is_current_stream_capturing()
    graph.replay()
    return capturing


def cudnn_over_nothing(packages: str) -> list[list[int]]:
    """Sizes of the gradients that torch's operator of cuDNN's attention returns for no batch items: cuDNN is
    not there, and is not asked then."""
    sys.path.append(packages)
    from attention.ops import cudnn

    q, k = (
        torch.zeros(0, 1024, heads, 64, dtype=torch.float16, device="cuda").transpose(1, 2)
        for heads in (4, 2)
    )
    lse = torch.zeros(0, 4, 1024, device="cuda")
    return [list(x.shape) for x in cudnn.backward(q, q, k, k, q, lse, scale=0.1, left=None, right=0)]
