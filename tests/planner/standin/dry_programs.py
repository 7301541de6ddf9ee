"""What is run on cards that are not there. Each function is a task of its own process; needs torch alone."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

MIB = 1 << 20


def properties() -> dict[str, Any]:
    assert torch.cuda.is_available()
    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": found.name,
        "capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "total": found.total_memory,
        "l2": found.L2_cache_size,
        "shared": [found.shared_memory_per_block_optin, found.shared_memory_per_multiprocessor],
        "threads": found.max_threads_per_multi_processor,
        "registers": found.regs_per_multiprocessor,
        "warp": found.warp_size,
        "free": free,
        "mem_total": total,
        "count": torch.cuda.device_count(),
    }


def allocated_and_reserved(sizes: list[int]) -> list[list[int]]:
    """Of one allocation of each size, in an empty allocator."""
    found = []
    for size in sizes:
        torch.cuda.empty_cache()
        held = torch.empty(size, dtype=torch.uint8, device="cuda")
        found.append([torch.cuda.memory_allocated(), torch.cuda.memory_reserved()])
        del held
    return found


def sdpa_units(backend: str, dtype: str, shape: list[int], gradient: bool) -> list[float]:
    """Peak above the inputs of the forward pass, and of the backward pass above what is held before it, each
    in units of an operand's bytes."""
    kind = getattr(torch, dtype)
    q, k, v = (torch.randn(shape, device="cuda", dtype=kind, requires_grad=gradient) for _ in range(3))
    unit = math.prod(shape) * q.element_size()
    with sdpa_kernel(getattr(SDPBackend, backend)):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = F.scaled_dot_product_attention(q, k, v)
        found = [(torch.cuda.max_memory_allocated() - before) / unit]
        if gradient:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.autograd.grad(out, (q, k, v), out.detach())
            found.append((torch.cuda.max_memory_allocated() - before) / unit)
    return found


def kernels_of_default_sdpa(log: str, dtype: str) -> list[str]:
    """Names of the kernels that SDPA launches where nobody chose."""
    q, k, v = (torch.randn(1, 8, 1024, 64, device="cuda", dtype=getattr(torch, dtype)) for _ in range(3))
    F.scaled_dot_product_attention(q, k, v)
    __import__("sitecustomize").report(torch)  # which writes what it has of the log
    with open(log, encoding="utf-8") as file:
        return [line.split("\t")[0] for line in file]


def workspaces() -> list[int]:
    """Bytes that stay after a matrix product forward, and what a backward pass adds."""
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    y = x @ x
    forward = torch.cuda.memory_allocated() - before - y.numel() * 4
    y.sum().backward()
    x.grad, held = None, forward + before + y.numel() * 4
    return [forward, torch.cuda.memory_allocated() - held]


def training(steps: int = 3) -> list[Any]:
    """A small transformer layer under autocast with AdamW and a scaler."""
    layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True).cuda()
    optimizer = torch.optim.AdamW(layer.parameters())
    scaler = torch.amp.GradScaler()
    for _ in range(steps):
        with torch.autocast("cuda", dtype=torch.float16):
            out = layer(torch.randn(4, 16, 64, device="cuda"))
            loss = F.cross_entropy(out.flatten(0, 1), torch.randint(0, 64, (64,)).cuda())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [math.isfinite(loss.item()), len(optimizer.state), torch.cuda.max_memory_allocated() > 0]


def tables() -> list[Any]:
    """What the host has written comes back; what kernels would have written is zero."""
    labels = torch.full((512,), -100).cuda()
    copied = labels.clone()  # a kernel or a copy on the device
    answer = [labels.cpu().tolist() == [-100] * 512, torch.tensor([1.5, 2.0]).cuda()[1].item()]
    del labels, copied
    loss = torch.empty((), device="cuda")  # where the labels were
    whole = torch.empty(4 * MIB, device="cuda").cpu()
    return [*answer, math.isfinite(loss.item()), bool(whole.isfinite().all())]


def large_copies() -> list[Any]:
    """3 GiB go to the device and back in pieces, without holding as much RAM."""
    pieces = [torch.ones(16 * MIB, dtype=torch.uint8).cuda() for _ in range(192)]
    large = torch.ones(256 * MIB, dtype=torch.uint8).cuda().cpu()
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return [pieces[-1].cpu().sum().item() == 16 * MIB, int(large.max()), resident / MIB]


def loader() -> int:
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.randn(64, 8), torch.arange(64))
    total = 0
    for inputs, labels in DataLoader(data, batch_size=16, num_workers=1, pin_memory=True):
        assert inputs.is_pinned()
        total += int(labels.cuda(non_blocking=True).cpu().sum())
    return total


def graph() -> list[Any]:
    """A graph with a side stream, captured and replayed."""
    captured = torch.cuda.CUDAGraph()
    x = torch.randn(32, 32, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x @ x
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(captured):
        inside = torch.cuda.is_current_stream_capturing()
        y = (x @ x).relu()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            z = y + 1
        torch.cuda.current_stream().wait_stream(side)
    captured.replay()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    end.record()
    end.synchronize()
    return [inside, torch.cuda.is_current_stream_capturing(), z.sum().item(), begin.elapsed_time(end) > 0]


def snapshot() -> list[Any]:
    torch.cuda.memory._record_memory_history(stacks="python")
    held = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
    found = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    actions = [entry["action"] for entry in found["device_traces"][0]]
    frames = [frame["name"] for entry in found["device_traces"][0] for frame in entry["frames"]]
    return [
        actions,
        "snapshot" in frames,
        [segment["total_size"] for segment in found["segments"]],
        held.numel(),
    ]


def expandable() -> list[Any]:
    first, second = (torch.empty(30 * MIB, dtype=torch.uint8, device="cuda") for _ in range(2))
    del first
    third = torch.empty(25 * MIB, dtype=torch.uint8, device="cuda")
    kinds = {segment["is_expandable"] for segment in torch.cuda.memory._snapshot()["segments"]}
    return [list(kinds), torch.cuda.memory_reserved() // MIB, second.numel() + third.numel()]


def fill() -> int:
    """Allocates until memory runs out."""
    held = [torch.empty(64 * MIB, dtype=torch.uint8, device="cuda") for _ in itertools.count()]
    return len(held)


def fill_and_say() -> list[int]:
    """[bytes allocated, bytes free] when memory ran out."""
    held = []
    try:
        while True:
            held.append(torch.empty(64 * MIB, dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError:
        return [len(held) * 64 * MIB, torch.cuda.mem_get_info()[0]]


def two_devices() -> list[Any]:
    a = torch.ones(1000, device="cuda:0")
    b = a.to("cuda:1")
    with torch.cuda.device(1):
        c = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    allocated = [torch.cuda.memory_allocated(device) for device in range(2)]
    return [str(b.device), str(c.device), allocated, torch.cuda.can_device_access_peer(0, 1)]


def convolution() -> list[int]:
    return list(torch.nn.Conv2d(3, 8, 3).cuda()(torch.randn(2, 3, 32, 32, device="cuda")).shape)


def solver() -> Any:
    return torch.linalg.cholesky(torch.eye(64, device="cuda").expand(4, 64, 64).clone()).shape


def operators() -> list[Any]:
    x = torch.randn(1000, device="cuda")
    return [
        list(x.sort()[0].shape),
        x.topk(5)[1].tolist(),
        list(torch.nonzero(x).shape),
        list(x.cumsum(0).shape),
        list(torch.randperm(100, device="cuda").shape),
        torch.multinomial(torch.ones(10, device="cuda"), 3).tolist(),
        list(F.embedding(torch.zeros(5, dtype=torch.long, device="cuda"), x[:, None]).shape),
    ]


def compiled() -> list[Any]:
    """Through Inductor and Triton, forward and backward."""
    f = torch.compile(lambda x: (x.sin() + x.cos()).sum(-1))
    x = torch.randn(128, 1024, device="cuda", requires_grad=True)
    y = f(x)
    y.sum().backward()
    return [list(y.shape), list(x.grad.shape)]


def compiled_flex() -> list[Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 1024, 1024, device="cuda")
    q, k, v = (
        torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    out = torch.compile(flex_attention)(q, k, v, block_mask=mask)
    out.sum().backward()
    return [list(out.shape), list(q.grad.shape)]


def fails() -> None:
    raise ValueError("of the program")


def ends() -> None:
    os._exit(7)
