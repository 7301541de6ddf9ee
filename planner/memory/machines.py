"""Memory that one call of a fused kernel allocates, on whichever machine. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from attention.sizes.arrays import Count, any_of, each, maximum, up
from planner.memory import cpu_kernels, cuda_kernels, cuda_process
from planner.memory.onednn.units import UNITS, Unit


class KernelCall(NamedTuple):
    """One kernel call: N views, H heads, T queries, K keys, D channels."""

    views: Count
    heads: Count
    queries: Count
    keys: Count
    head_dim: Count
    itemsize: int
    causal: bool = False
    dense: Count = 0
    """1 if the gradient of out lies in memory as [N, T, H, D], else 0."""
    masked: Count = 0
    """Rows of an additive mask [rows, K], 0 for none."""


def _sizes(call: KernelCall) -> dict[str, Count]:
    """Sizes that every kernel takes under the same names."""
    return {"heads": call.heads, "queries": call.queries, "keys": call.keys, "itemsize": call.itemsize}


class Bytes(NamedTuple):
    """Bytes of a call's result, and of the scratch that it takes besides while it runs."""

    result: Count
    scratch: Count


class FlexBytes(NamedTuple):
    """What compiled FlexAttention takes beside its results."""

    saved: Count
    """For its backward."""
    forward: Count
    """While it runs."""
    backward: Count
    """While its backward runs."""


class Machine(Protocol):
    """A device's kernels."""

    def forward(self, call: KernelCall) -> Bytes: ...
    def backward(self, call: KernelCall) -> Bytes: ...
    def flex(self, call: KernelCall) -> FlexBytes: ...

    def product(
        self,
        rows: Count,
        inner: Count,
        columns: Count,
        transposed: bool = False,
        second_transposed: bool = False,
    ) -> Count:
        """Bytes that [rows, inner] @ [inner, columns] takes besides its result; `transposed`: the first is a
        transposed view, `second_transposed`: the second is."""
        ...


@dataclass(frozen=True)
class Cpu:
    """A CPU: the threads that an operator uses, the 16-bit types it has a matrix unit for, and the unit by
    which oneDNN makes products of `dtype`, None where it makes none."""

    threads: int
    units: frozenset[str] = frozenset()
    dtype: str = "float32"
    products: Unit | None = None

    def forward(self, call: KernelCall) -> Bytes:
        return Bytes(
            *cpu_kernels.forward_bytes(
                **_sizes(call),
                views=call.views,
                head_dim=call.head_dim,
                threads=self.threads,
                causal=call.causal,
                packs=self.dtype in self.units,
                float16=self.dtype == "float16",
            )
        )

    def backward(self, call: KernelCall) -> Bytes:
        return Bytes(
            *cpu_kernels.backward_bytes(
                **_sizes(call),
                views=call.views,
                head_dim=call.head_dim,
                threads=self.threads,
                dense_grad=call.dense,
            )
        )

    def flex(self, call: KernelCall) -> FlexBytes:
        raise AssertionError("compiled FlexAttention runs on CUDA only")

    def product(
        self,
        rows: Count,
        inner: Count,
        columns: Count,
        transposed: bool = False,
        second_transposed: bool = False,
    ) -> Count:
        unit = self.products
        if unit is None:
            return 0
        from planner.memory.onednn import gemm  # loads NumPy, which no other estimate needs

        def one(rows: int, inner: int, columns: int) -> tuple[int]:
            return (
                gemm.scratch_bytes(unit, rows, inner, columns, self.threads, transposed, second_transposed),
            )

        return each(one, 1 + 0 * (rows + inner + columns), (0,), rows, inner, columns)[0]


def this_cpu(dtype: str = "float32") -> Cpu:
    """The CPU at hand, as torch would use it: a thread a core that this process may run on."""
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                flags = set(line.split())
                break
    except OSError:
        pass  # not Linux: no matrix unit that torch would use either
    units = {name for name, flag in (("bfloat16", "amx_bf16"), ("float16", "amx_fp16")) if flag in flags}
    here = (unit for unit in UNITS.get(dtype, ()) if unit in flags)
    setting = os.environ.get("OMP_NUM_THREADS", "")
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Cpu(
        int(setting) if setting.isdigit() and int(setting) else cores,
        frozenset(units),
        dtype,
        next(here, None),
    )


def units_of(capability: str) -> frozenset[str]:
    """The 16-bit types that a CPU has a matrix unit for, of a measurement's `capability`."""
    float16 = "AMX with float16" in capability
    return frozenset(["bfloat16"] * ("AMX" in capability) + ["float16"] * float16)


FLASH_CHANNELS = 256
"""The most that flash attention takes."""


def _mask_copy(kernel: cuda_kernels.KernelName, call: KernelCall) -> Count:
    """The mask with rows as the efficient kernel wants them; see `attention.ops.kernels._aligned`."""
    return call.masked * up(call.keys, 8) * call.itemsize if kernel == "efficient" else 0


@dataclass(frozen=True)
class Cuda:
    """An NVIDIA GPU."""

    capability: tuple[int, int]

    def kernels(self, call: KernelCall) -> tuple[cuda_kernels.KernelName, ...]:
        """The kernels that calls of this size run on, see `attention.ops.kernels.choose`; the second only
        for those with an additive mask, which flash does not take."""
        if call.itemsize == 8:
            return ("plain",)
        if self.capability < (8, 0) or call.itemsize != 2 or call.head_dim > FLASH_CHANNELS:
            return ("efficient",)
        return ("flash", "efficient") if any_of(call.masked > 0) else ("flash",)

    def forward(self, call: KernelCall) -> Bytes:
        out = call.views * call.heads * call.queries * call.head_dim * call.itemsize
        results, scratch = [], []
        for number, kernel in enumerate(self.kernels(call)):
            lines = cuda_kernels.forward_lines(
                kernel, **_sizes(call), batch=call.views, head_dim=up(call.head_dim, 8)
            )
            applies = 1 if number == 0 else (call.masked > 0) * 1
            results.append((out + lines[0].bytes) * applies)
            scratch.append((cuda_process.total(lines[1:]) + _mask_copy(kernel, call)) * applies)
        return Bytes(maximum(*results), maximum(*scratch))

    def backward(self, call: KernelCall) -> Bytes:
        dim = up(call.head_dim, 8)
        scratch = []
        for number, kernel in enumerate(self.kernels(call)):
            lines = cuda_kernels.backward_lines(
                kernel,
                **_sizes(call),
                batch=call.views,
                kv_heads=call.heads,
                head_dim=dim,
                capability=self.capability,
            )
            applies = 1 if number == 0 else (call.masked > 0) * 1
            scratch.append((cuda_process.total(lines) + _mask_copy(kernel, call)) * applies)
        result = call.views * call.heads * (call.queries + 2 * call.keys) * dim * call.itemsize
        return Bytes(result, maximum(*scratch))

    def product(
        self,
        rows: Count,
        inner: Count,
        columns: Count,
        transposed: bool = False,
        second_transposed: bool = False,
    ) -> Count:
        return 0  # cuBLAS works in a workspace of its own, which is a line of the device's

    def flex(self, call: KernelCall) -> FlexBytes:
        sizes = {**_sizes(call), "batch": call.views, "head_dim": call.head_dim}
        forward = cuda_kernels.forward_lines("flex", **sizes)
        back = cuda_kernels.backward_lines("flex", kv_heads=call.heads, capability=self.capability, **sizes)
        return FlexBytes(forward[0].bytes, cuda_process.total(forward[1:]), cuda_process.total(back))
