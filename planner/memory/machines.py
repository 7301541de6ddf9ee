"""Memory that one call of a fused kernel allocates, on whichever machine. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from attention.config import Backend
from attention.sizes.arrays import Count, any_of, each, maximum, minimum, up, where
from attention.sizes.release import cpu_takes_groups
from attention.sizes.shape import Windows
from attention.sizes.whole_calls import CUDNN_TOKENS, LEAST_KEYS, has_cudnn, has_flash
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
    """1 if out and its gradient lie in memory as [N, T, H, D], else 0."""
    masked: Count = 0
    """Rows of an additive mask [rows, K], 0 for none."""
    mask_keys: Count = 1 << 62
    """Keys that a call with a mask has at most."""
    unmasked: Count = 1
    """0 if all such calls have a mask, else 1."""
    sizes: tuple[tuple[Count, Count, Count], ...] = ()
    """(views, queries, keys) of such calls that differ, in place of the ones above, where that matters."""
    fewer: Count = 0
    """Keys by which one such call after the other has fewer; 0 if all have as many."""
    packed: bool = False
    """Whether keys and values of all views and heads lie in one piece."""
    whole: Count = 0
    """1 if backward gets the log-sum-exp in one piece, as forward gave it, else 0."""
    groups: Count | None = None
    """Key and value heads; None for as many as heads."""
    reversed: bool = False
    """Whether the kernel is given its operands in reverse order; see `attention.ops.kernels.windowed`."""
    tokens_first: bool = False
    """Whether operands whose D is padded are padded as [N, T, H, D]."""
    gathers_heads: bool = False
    """Whether flash attention takes the query heads of a kv head for queries, where there is one query."""

    @property
    def kv_heads(self) -> Count:
        return self.heads if self.groups is None else self.groups


def _sizes(call: KernelCall) -> dict[str, Count]:
    """Sizes that every kernel takes under the same names."""
    return {"heads": call.heads, "queries": call.queries, "keys": call.keys, "itemsize": call.itemsize}


class Bytes(NamedTuple):
    """Bytes of a call's results, and of the scratch that it takes besides while it runs; tensor by tensor."""

    result: tuple[Count, ...]
    scratch: tuple[Count, ...]
    copies: tuple[Count, ...] = ()
    """What it takes besides, from before its results on: copies of operands."""
    before: tuple[Count, ...] = ()
    """Scratch that goes before `scratch` comes."""
    steps: tuple[cuda_kernels.KernelStep, ...] = ()
    """Where it is made of plain products, all of that as it comes, in place of the two."""


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

    def windows(self, head_dim: int, itemsize: int) -> Windows:
        """Those that its kernel takes for such numbers; see `attention.ops.kernels.windows_of`."""
        ...

    def cudnn_from(self, head_dim: int, itemsize: int, backend: Backend) -> int:
        """Queries and keys from which calls go to cuDNN's attention, 0 for none; see
        `attention.ops.cudnn.takes_from`."""
        ...

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

    def workspace(self) -> Count:
        """What the library that makes products keeps from a thread's first product on."""
        ...

    def multiplies(self, itemsize: int) -> bool:
        """Whether attention over such numbers is made by that library."""
        ...

    def column_sum(self, rows: Count, columns: Count, itemsize: int) -> tuple[Count, ...]:
        """What the sum over the rows of [rows, columns] takes besides its result."""
        ...

    def best_of(self, slices: Count, size: Count, kept: Count, itemsize: int) -> tuple[Count, ...]:
        """What choosing the `kept` best of each of `slices` rows of `size`, and sorting them by place, takes
        besides its results."""
        ...

    def listed(self, positions: Count) -> Count:
        """What the list of so many gathered positions takes of the device's memory."""
        ...


@dataclass(frozen=True)
class Cpu:
    """A CPU: the threads that an operator uses, the 16-bit types it has a matrix unit for, and the unit by
    which oneDNN makes products of `dtype`, None where it makes none."""

    threads: int
    units: frozenset[str] = frozenset()
    dtype: str = "float32"
    products: Unit | None = None
    groups: bool = True
    """Whether its attention takes fewer kv heads than heads, see `attention.sizes.release`."""

    def windows(self, head_dim: int, itemsize: int) -> Windows:
        return "none"

    def cudnn_from(self, head_dim: int, itemsize: int, backend: Backend) -> int:
        return 0

    def forward(self, call: KernelCall) -> Bytes:
        result, scratch = cpu_kernels.forward_bytes(
            **_sizes(call),
            views=call.views,
            head_dim=call.head_dim,
            threads=self.threads,
            causal=call.causal,
            packs=self.dtype in self.units,
            float16=self.dtype == "float16",
        )
        return Bytes((result,), (scratch,))

    def backward(self, call: KernelCall) -> Bytes:
        result, scratch = cpu_kernels.backward_bytes(
            **_sizes(call),
            kv_heads=call.kv_heads,
            views=call.views,
            head_dim=call.head_dim,
            threads=self.threads,
            dense_grad=call.dense,
        )
        return Bytes((result,), (scratch,))

    def workspace(self) -> Count:
        return 0

    def multiplies(self, itemsize: int) -> bool:
        return False

    def column_sum(self, rows: Count, columns: Count, itemsize: int) -> tuple[Count, ...]:
        return (0,)

    def best_of(self, slices: Count, size: Count, kept: Count, itemsize: int) -> tuple[Count, ...]:
        return (0,)

    def listed(self, positions: Count) -> Count:
        return 0  # it is NumPy's

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
        cpu_takes_groups(),
    )


def units_of(capability: str) -> frozenset[str]:
    """The 16-bit types that a CPU has a matrix unit for, of a measurement's `capability`."""
    float16 = "AMX with float16" in capability
    return frozenset(["bfloat16"] * ("AMX" in capability) + ["float16"] * float16)


def _channels(call: KernelCall) -> int:
    """Channels that fused kernels are given; see `attention.ops.kernels.aligned_channels`."""
    return up(call.head_dim, 8)


def _largest(call: KernelCall) -> KernelCall:
    """The call of its sizes that has most scores."""
    for views, queries, keys in call.sizes[:1]:
        call = call._replace(views=views, queries=queries, keys=keys)
    for views, queries, keys in call.sizes[1:]:
        more = views * queries * keys > call.views * call.queries * call.keys
        call = call._replace(
            views=where(more, views, call.views),
            queries=where(more, queries, call.queries),
            keys=where(more, keys, call.keys),
        )
    return call


def _products(call: KernelCall) -> cuda_kernels.Products:
    """Sizes of a call that is made of plain products."""
    lanes, e = call.views * call.heads, call.itemsize
    copies = (call.views > 1) * (call.heads > 1) * 1
    return cuda_kernels.Products(
        queries=lanes * call.queries * call.head_dim * e,
        keys=lanes * call.keys * call.head_dim * e,
        scores=lanes * call.queries * call.keys * e,
        rows=lanes * call.queries * e,
        hidden=call.queries * call.keys * call.causal,
        copies=copies * (call.queries > 1),
        copies_keys=copies * (call.keys > 1) * (not call.packed),
    )


def _applies(call: KernelCall, number: int) -> Count:
    """1 if some such call runs on the kernel of this place among several in `Cuda.kernels`, else 0."""
    return (call.masked > 0) * 1 if number else maximum(call.unmasked, (call.masked == 0) * 1)


def _mask_copy(kernel: cuda_kernels.KernelName, call: KernelCall) -> Count:
    """The mask with rows as the efficient kernel wants them; see `attention.ops.kernels.aligned_bias`."""
    return (
        call.masked * up(minimum(call.keys, call.mask_keys), 8) * call.itemsize
        if kernel == "efficient"
        else 0
    )


_AHEAD = 10
"""Tensors that a backward call makes before its results, at most: operands and a mask as the kernel wants
them, and what `cuda_kernels.backward_stages` has first."""


@dataclass(frozen=True)
class Cuda:
    """An NVIDIA GPU."""

    capability: tuple[int, int]
    multiprocessors: int = 108
    """How many there are; kernels that would leave some idle cut their work further."""
    cudnn: bool = True
    """Whether cuDNN is there; in a dry run it is not."""

    def windows(self, head_dim: int, itemsize: int) -> Windows:
        if itemsize == 8:
            return "none"
        return "any" if has_flash(self.capability, head_dim, itemsize) else "causal"

    def cudnn_from(self, head_dim: int, itemsize: int, backend: Backend) -> int:
        if backend == "flash" or not (self.cudnn and has_cudnn(self.capability, head_dim, itemsize)):
            return 0
        return LEAST_KEYS if backend == "cudnn" else CUDNN_TOKENS

    def kernels(self, call: KernelCall) -> tuple[cuda_kernels.KernelName, ...]:
        """The kernels that calls of this size run on, see `attention.ops.kernels.choose`; the second only
        for those with an additive mask, which flash does not take."""
        if not has_flash(self.capability, call.head_dim, call.itemsize):
            return ("efficient",)
        return ("flash", "efficient") if any_of(call.masked > 0) else ("flash",)

    def forward(self, call: KernelCall) -> Bytes:
        if call.itemsize == 8:
            return Bytes((), (), steps=cuda_kernels.plain_forward(_products(_largest(call))))
        alone = (call.views, call.queries, call.keys)
        calls = [
            call._replace(views=views, queries=queries, keys=keys)
            for views, queries, keys in call.sizes or (alone,)
        ]
        out, lse, *scratch = cuda_kernels.largest(
            tuple(taken for one in calls for taken in self._forward(one))
        )
        return Bytes((out, lse), tuple(scratch[4:]), tuple(scratch[:4]))

    def _forward(self, call: KernelCall) -> tuple[tuple[Count, ...], ...]:
        """Out, log-sum-exp and scratch of a call by each of the kernels that it may run on."""
        dim = _channels(call)
        rows = call.views * call.heads * call.queries
        both = call.views * call.kv_heads * call.keys
        kernels = self.kernels(call)
        each_kernel = []
        for number, kernel in enumerate(kernels):
            first, *lines = cuda_kernels.forward_lines(
                kernel,
                **_sizes(call),
                batch=call.views,
                head_dim=dim,
                multiprocessors=self.multiprocessors,
                fewer=call.fewer,
                kv_heads=call.kv_heads if call.gathers_heads else None,
            )
            applies = 1 if len(kernels) == 1 else _applies(call, number)
            pads = 0 if dim == call.head_dim and not call.reversed else dim * call.itemsize
            ahead = (rows * pads, both * pads, both * pads, _mask_copy(kernel, call))
            taken = (rows * dim * call.itemsize, first.bytes, *ahead, *(line.bytes for line in lines))
            each_kernel.append(tuple(count * applies for count in taken))
        return tuple(each_kernel)

    def backward(self, call: KernelCall) -> Bytes:
        if call.itemsize == 8:
            return Bytes((), (), steps=cuda_kernels.plain_backward(_products(call)))
        dim = _channels(call)
        rows = call.views * call.heads * call.queries * dim * call.itemsize
        both = call.views * call.kv_heads * call.keys * dim * call.itemsize
        dense, pads = call.dense, 0
        if dim != call.head_dim:  # all operands are copied, in tiles heads before tokens
            dense, pads = call.tokens_first | (call.heads == 1) | (call.queries == 1), 1
        if call.reversed:
            dense, pads = 1, 1
        turned = call.views * call.heads * call.queries * cuda_process.FLOAT32 * call.reversed
        scratch: list[tuple[Count, ...]] = []
        kernels = self.kernels(call)
        for number, kernel in enumerate(kernels):
            ahead, *stages = cuda_kernels.backward_stages(
                kernel,
                **_sizes(call),
                batch=call.views,
                head_dim=dim,
                capability=self.capability,
                dense=dense,
                whole=call.whole,
                kv_heads=call.groups,
            )
            applies = 1 if len(kernels) == 1 else _applies(call, number)
            operands = (rows * pads,) * 3 + (both * pads,) * 2 + (_mask_copy(kernel, call) + turned,)
            before_results = operands + tuple(line.bytes for line in ahead)
            before_results += (0,) * (_AHEAD - len(before_results))
            for stage in stages:
                taken = (*before_results, *(line.bytes for line in stage))
                scratch.append(tuple(count * applies for count in taken))
        results = (rows, both, both)
        before: tuple[Count, ...] = ()
        if len(kernels) == 1 and len(scratch) > 1:
            before, *scratch = scratch
            before = before[_AHEAD:]
        most = cuda_kernels.largest(tuple(scratch))
        return Bytes(results, most[_AHEAD:], most[:_AHEAD], before)

    def product(
        self,
        rows: Count,
        inner: Count,
        columns: Count,
        transposed: bool = False,
        second_transposed: bool = False,
    ) -> Count:
        return 0  # cuBLAS works in its workspace

    def workspace(self) -> Count:
        return cuda_process.blas_workspace(self.capability).bytes

    def multiplies(self, itemsize: int) -> bool:
        return itemsize == 8

    def column_sum(self, rows: Count, columns: Count, itemsize: int) -> tuple[Count, ...]:
        def one(rows: int, columns: int) -> tuple[int, int]:
            return cuda_kernels.column_sum(rows, columns, itemsize, self.capability, self.multiprocessors)

        rows, columns = rows + 0 * columns, columns + 0 * rows
        return each(one, rows > 0, (0, 0), rows, columns)

    def best_of(self, slices: Count, size: Count, kept: Count, itemsize: int) -> tuple[Count, ...]:
        def one(slices: int, size: int) -> tuple[int, ...]:
            return cuda_kernels.best_of(slices, size, itemsize, self.multiprocessors)

        slices, size = slices + 0 * size, size + 0 * slices
        choosing = each(one, slices > 0, (0,) * 8, slices, size)
        return cuda_kernels.largest((choosing, (8 * kept,)))  # sorting: the places of a row

    def listed(self, positions: Count) -> Count:
        return 8 * positions

    def flex(self, call: KernelCall) -> FlexBytes:
        sizes: dict[str, Any] = {**_sizes(call), "batch": call.views, "head_dim": call.head_dim}
        forward = cuda_kernels.forward_lines("flex", **sizes)
        _, back = cuda_kernels.backward_stages("flex", capability=self.capability, **sizes)
        return FlexBytes(forward[0].bytes, cuda_process.total(forward[1:]), cuda_process.total(back))
