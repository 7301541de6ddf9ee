"""What a call of an attention kernel takes on a GPU: how much there is to do, and what a unit of it costs on
a card. Ints, or arrays of many calls. Imports no torch.

    seconds = sum over UNITS of (units of a call) (seconds a unit on the card)

    work     pairs of query and key x channels, as the busiest multiprocessor has them
    pairs    pairs of query and key, likewise: the softmax
    numbers  of q, k, v and out, at their type
    calls    1: the launch, and the first and the last tile

A thread block computes a tile of queries (backward: of keys), and a multiprocessor takes one after the other.
With fewer tiles than multiprocessors some idle; under a causal mask tiles differ, and the last to end is on
average half of the longest behind the others. Seconds a unit follow from the card's peaks, its clock times
its multiprocessors, its bandwidth, and a few coefficients for each kernel and generation of cards, which
`python -m studies.bench.published_fit` fits to published measurements.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from attention.errors import ConfigError
from attention.sizes.arrays import Amount, ceil_div, maximum, minimum, where
from attention.sizes.whole_calls import has_flash
from planner.gpus import Gpu
from planner.workload import ITEMSIZE

Direction = Literal["forward", "backward"]
STEPS: Final[tuple[Direction, Direction]] = ("forward", "backward")
KERNELS: Final = ("flash2", "cudnn", "efficient64", "efficient128", "efficient256", "flex", "plain")
"""FlashAttention-2, cuDNN's attention, the efficient kernel as it is compiled for up to 64, up to 128 and
more channels, compiled FlexAttention, and matrix products."""
UNITS: Final = ("work", "pairs", "numbers", "calls")
UNIT_NAMES: Final = tuple(f"{kernel}.{unit}" for kernel in KERNELS for unit in UNITS)
"""Names of the totals of work on a GPU's kernels."""

TILE: Final = {"efficient64": 64, "efficient128": 64, "efficient256": 32}
"""Queries of a thread block where they are not 128."""
KEY_STEP: Final = 128
"""Keys by which masks are rounded: what is masked within a step is computed."""
LAUNCHES: Final = {("flash2", "backward"): 3, ("cudnn", "backward"): 3, ("efficient", "backward"): 2}
"""Kernels that a call launches where it is not one: what comes before and after the products."""
LEAST_SPLIT: Final = 256
"""Keys that FlashAttention-2 gives a thread block at least where it splits them among idle
multiprocessors."""
BEHIND: Final = 0.5
"""Share of a longest tile by which the last multiprocessor ends after the others under a causal mask: what
list scheduling of tiles loses on average."""

ABOVE_PEAK: Final = 1.1
"""Times a card's peak that a kernel may reach: cards boost beyond the clock that their peak is of."""

LIKE: Final = {5: 6, 11: 10}
"""Generations of which nothing was published, by their major, and the one that they are taken to be like:
Maxwell as Pascal, Thor as Blackwell of data centres."""

COEFFICIENTS: Final = Path(__file__).parents[1] / "data" / "gpu_seconds.json"
Coefficients = Mapping[str, float]
"""By name, `flash2 forward work ampere`."""


UNSEEN: Final = "unseen"
"""The class of what was predicted without a measurement of its kernel on a card of its generation."""


class Term(NamedTuple):
    """A part of what a unit costs."""

    coefficient: str
    unit: str
    scale: float
    """Seconds a unit where the coefficient is 1."""


def family_of(kernel: str) -> str:
    """The kernel without the channels that it is compiled for."""
    return kernel.rstrip("0123456789") if kernel.startswith("efficient") else kernel


def kernel_name(capability: tuple[int, int], head_dim: int, itemsize: int) -> str:
    """The kernel that torch runs attention on where neither cuDNN nor FlexAttention does."""
    if itemsize == 8:
        return "plain"
    return "flash2" if has_flash(capability, head_dim, itemsize) else efficient_kernel(head_dim)


def efficient_kernel(head_dim: int) -> str:
    """The efficient kernel as it is compiled for so many channels."""
    return f"efficient{64 if head_dim <= 64 else 128 if head_dim <= 128 else 256}"


def visible_keys(
    queries: Amount, keys: Amount, left: Amount | None, right: Amount | None, step: int = KEY_STEP
) -> Amount:
    """Keys that a query sees on average of a window of so many behind and ahead of it (None: all), half a
    step of the kernel's keys more at each of its edges."""
    if left is None:
        return keys if right is None else causal_keys(keys, step)
    left, right = minimum(left, keys - 1), keys - 1 if right is None else minimum(right, keys)
    # Near either end of the sequence a window is cut: by half of its side's keys on average.
    cut = (left * (left + 1) + right * (right + 1)) / 2 / queries
    return minimum(maximum(left + right + 1 - cut, 1) + step, keys)


def causal_keys(keys: Amount, step: int = KEY_STEP) -> Amount:
    """The same under a causal mask over as many keys as queries: whole steps of keys, those ahead left
    out."""
    full = keys // step
    return (full * (full + 1) / 2 * step**2 + (keys - full * step) * keys) / keys


def call_units(
    kernel: str,
    step: Direction,
    *,
    lanes: Amount,
    kv_lanes: Amount,
    queries: Amount,
    keys: Amount,
    visible: Amount,
    causal: Amount,
    head_dim: Amount,
    workers: int,
) -> dict[str, Amount]:
    """UNITS of one call of `lanes` views and heads (`kv_lanes` of keys), of whose `keys` each query computes
    `visible` on average, on `workers` multiprocessors. `causal`: 1 under a causal mask."""
    tile = TILE.get(kernel, 128)
    # The longest tile: all keys of some queries, and in backward all queries of some keys.
    rows, across = (queries, keys) if step == "forward" else (keys, queries)
    seen = where(causal, across, visible * (queries / keys if step == "backward" else 1))
    pairs = lanes * queries * visible
    longest: Amount = workers * minimum(rows, tile) * seen
    if kernel == "flash2" and step == "forward":
        longest = where(
            lanes * ceil_div(rows, tile) < workers, longest * minimum(LEAST_SPLIT, seen) / seen, longest
        )
    busiest = maximum(pairs + BEHIND * causal * minimum(longest, pairs), longest)
    numbers = 2 * (lanes * queries + kv_lanes * keys) * head_dim
    return {"work": busiest * head_dim, "pairs": busiest, "numbers": numbers, "calls": 1}


def card_class(gpu: Gpu) -> str:
    """The generation of a card's tensor cores, as kernels see it."""
    major, minor = gpu.capability
    if major == 10 and minor >= 3:
        return "blackwell ultra"
    names = {6: "pascal", 7: "volta", 8: "ampere", 9: "hopper", 10: "blackwell", 12: "geforce blackwell"}
    major = LIKE.get(major, major)
    if major not in names:
        raise ConfigError(
            f"the speed of attention on {gpu.name} is not known; calibrate, or name another card"
        )
    return names[major]


def terms(kernel: str, step: Direction, gpu: Gpu, dtype: str, known: Coefficients) -> list[Term]:
    """The terms of what the kernel's units cost on a card with known peaks. Those of backward are in units of
    forward's costs, for which `known` has the coefficients; FlexAttention's in FlashAttention-2's, in float32
    in the efficient kernel's."""
    family = family_of(kernel)
    memory = Term(f"{family} {step} numbers", "numbers", ITEMSIZE[dtype] / _known(gpu, gpu.bandwidth))
    launch = Term(f"{family} {step} calls", "calls", 1e-6 * LAUNCHES.get((family, step), 1))
    kind = card_class(gpu)
    if family == "flex":
        like = "efficient128" if dtype == "float32" else "flash2"
        same = kernel_costs(like, step, gpu, dtype, known)
        return [Term(f"flex {step} times", unit, cost) for unit, cost in same.items()]
    if step == "backward":
        ahead = _forward_costs(kernel, gpu, dtype, known)
        wide = " wide" if kernel == "efficient256" else ""
        work = Term(f"{family} backward work{wide} {kind}", "work", ahead["work"])
        return [work, Term(f"{family} backward pairs", "pairs", ahead["pairs"]), memory, launch]
    return [*_forward(kernel, family, kind, gpu, dtype), memory, launch]


def _forward(kernel: str, family: str, kind: str, gpu: Gpu, dtype: str) -> list[Term]:
    single = _known(gpu, gpu.rates.get("float32"))
    lanes = 64 if gpu.capability in ((6, 0), (7, 0), (7, 5), (8, 0)) else 128
    cycle = 2 * lanes / single
    """Seconds of a clock cycle, shared by all multiprocessors."""
    name = f"{family} forward"
    half = gpu.rates.get("float16")
    if family == "cudnn":
        tensor = kind.removesuffix(" ultra")
        return [
            Term(f"{name} work {tensor}", "work", 4 / _known(gpu, half)),
            Term(f"{name} pairs {kind}", "pairs", cycle),
        ]
    if family == "flash2":
        generation = {"geforce blackwell": "ampere", "blackwell ultra": "blackwell"}.get(kind, kind)
        return [
            Term(f"{name} work {generation}", "work", 4 / _known(gpu, half)),
            Term(f"{name} channels", "work", cycle),
            Term(f"{name} pairs", "pairs", cycle),
        ]
    if kind in ("pascal", "volta"):
        tensors = kind == "volta" and dtype != "float32"
        work = Term(
            f"{name} work {kind}{' single' * (kind == 'volta' and not tensors)}",
            "work",
            4 / (_known(gpu, half) if tensors else single),
        )
        # Pascal computes in float32, and converts what it reads in 16 bits.
        half_pairs = " half" if kind == "pascal" and dtype != "float32" else ""
        return [work, Term(f"{name} pairs {kind}{half_pairs}", "pairs", cycle)]
    # In float32 three products in TF32, which has half the rate of 16 bits, make one.
    peak = (half / 6 if half else single) if dtype == "float32" else _known(gpu, half)
    memory = "large" if gpu.capability in ((8, 0), (9, 0), (10, 0), (10, 3)) else "small"
    one = " single" * (dtype == "float32")
    if kernel == "efficient256":
        return [
            Term(f"{name} work wide{one} {kind}", "work", 4 / peak),
            Term(f"{name} channels wide {memory}", "work", cycle),
        ]
    return [
        Term(f"{name} work{one} {kind}", "work", 4 / peak),
        Term(f"{name} pairs{one} {kernel.removeprefix('efficient')} {memory}", "pairs", cycle),
    ]


def _known(gpu: Gpu, peak: float | None) -> float:
    if not peak:
        raise ConfigError(f"a peak rate of {gpu.name} is not known, so its speed is not; calibrate")
    return peak


def _costs(parts: list[Term], known: Coefficients) -> dict[str, float]:
    costs = dict.fromkeys(UNITS, 0.0)
    for term in parts:
        costs[term.unit] += known.get(term.coefficient, 0.0) * term.scale
    return costs


def _forward_costs(kernel: str, gpu: Gpu, dtype: str, known: Coefficients) -> dict[str, float]:
    """Forward's costs: with 128 channels at most so much faster than the peak, which the coefficients of a
    generation would not keep on a card with few tensor cores for its clock, such as an H20."""
    costs = _costs(terms(kernel, "forward", gpu, dtype, known), known)
    peak = gpu.rates.get(dtype) if dtype != "float32" and gpu.capability >= (7, 0) else None
    if peak:
        costs["work"] = max(costs["work"], 4 / (ABOVE_PEAK * peak) - costs["pairs"] / 128)
    return costs


def kernel_costs(
    kernel: str, step: Direction, gpu: Gpu, dtype: str, known: Coefficients | None = None
) -> dict[str, float]:
    """Seconds of each of UNITS of a kernel's call on a card; ConfigError where its peaks are not known."""
    known = coefficients() if known is None else known
    if step == "forward" and kernel != "flex":
        return _forward_costs(kernel, gpu, dtype, known)
    return _costs(terms(kernel, step, gpu, dtype, known), known)


class Fitted(NamedTuple):
    """What `python -m studies.bench.published_fit` found."""

    coefficients: Coefficients
    unseen: frozenset[str]
    """Coefficients that no measurement tells about: they are as others that are like them."""
    ranges: Mapping[str, tuple[float, float]]
    """(low, high) of published / predicted seconds by class, of four in five held-out measurements."""


@cache
def fitted() -> Fitted:
    """The fit that comes with this package."""
    data: dict[str, Any] = json.loads(COEFFICIENTS.read_text(encoding="utf-8"))
    ranges = {kind: (low, high) for kind, (low, high) in data["ranges"].items()}
    return Fitted(data["coefficients"], frozenset(data["unseen"]), ranges)


def coefficients() -> Coefficients:
    """Those that come with this package."""
    return fitted().coefficients


def range_of(kernel: str, step: Direction, gpu: Gpu, dtype: str) -> tuple[float, float]:
    """(low, high) of published / predicted of a kernel on a card: of its kind's held-out errors, each from a
    fit without the file that it is of; where no measurement of such a card tells about it, those of others in
    that place."""
    found = fitted()
    names = {term.coefficient for term in terms(kernel, step, gpu, dtype, found.coefficients)}
    unseen = gpu.capability[0] in LIKE or names & found.unseen
    return found.ranges[UNSEEN if unseen else f"{family_of(kernel)} {step}"]


class SequenceCall(NamedTuple):
    """One call of a kernel over whole sequences."""

    kernel: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    queries: int
    keys: int
    causal: bool = False
    window: int | None = None
    """Keys behind a query that it sees, and unless causal as many ahead; None for all."""

    def units(self, step: Direction, gpu: Gpu) -> dict[str, Amount]:
        """Of its forward or its backward."""
        left = self.window
        right = 0 if self.causal else left
        return call_units(
            self.kernel,
            step,
            lanes=self.batch * self.heads,
            kv_lanes=self.batch * self.kv_heads,
            queries=self.queries,
            keys=self.keys,
            visible=visible_keys(self.queries, self.keys, left, right),
            causal=int(self.causal and left is None),
            head_dim=self.head_dim,
            workers=gpu.sm_count or 1,
        )


def kernel_seconds(
    call: SequenceCall, step: Direction, gpu: Gpu, known: Coefficients | None = None
) -> Amount:
    """Seconds of the card for one call's forward or backward, its host's part apart."""
    costs = kernel_costs(call.kernel, step, gpu, call.dtype, known)
    return sum(count * costs[unit] for unit, count in call.units(step, gpu).items())
