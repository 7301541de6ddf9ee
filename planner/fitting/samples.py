"""Random configs and workloads, the same for the same seed: what predictions are compared with
measurements on. Imports no torch.

Sizes are what people use and what goes wrong: powers of two, one more than a multiple, 1, 7, 17. A sample
whose work or memory is beyond a bound is drawn again, as the same kind, so that kinds stay balanced.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeVar, get_args

from attention.config import (
    AdaptiveConfig,
    AttentionConfig,
    MultiheadConfig,
    PatternType,
    SparsePatternConfig,
    Switch,
)
from attention.errors import ConfigError
from planner.workload import Dtype, Mode, Workload

T = TypeVar("T")

SampleKind = Literal[
    "dense", "dilated", "local_window", "global_local", "dilated_sparse", "adaptive", "multihead", "weights"
]
KINDS: Final[tuple[SampleKind, ...]] = get_args(SampleKind)
"""Attentions, block-sparse ones by their pattern; `multihead`, any of them between projections, and
`weights`, a block-sparse one whose weights are asked for."""
PLAIN: Final[tuple[SampleKind, ...]] = ("dense", "dilated", "local_window", "global_local", "dilated_sparse")
"""Kinds without parts of their own beside the attention."""
SPARSE: Final[tuple[SampleKind, ...]] = ("local_window", "global_local", "dilated_sparse")

WORK: Final = 1 << 31
"""Pairs x channels: a second or so on two cores, all of a measurement's calls together."""
FLOOR_BYTES: Final = 1 << 29
"""Most bytes in q, k, v and out."""
STEPS: Final = 120
"""Most kernel calls, about: what is cut small takes its time without much work."""
HEAD_DIMS: Final = (8, 16, 24, 32, 40, 64, 64, 64, 80, 96, 128, 128)
BATCHES: Final = (1, 1, 2, 3)
BACKWARD_WORK: Final = 3.5
"""Work of a forward and a backward in forwards."""
TRIES: Final = 1000
"""Draws of one sample before its bounds are taken to be impossible."""


class Sample(NamedTuple):
    """A config and the workload to run it on."""

    config: AttentionConfig
    workload: Workload


def samples(
    seed: int,
    *,
    shortest: int = 1,
    longest: int = 16_384,
    work: float = WORK,
    floor_bytes: int = FLOOR_BYTES,
    steps: float = STEPS,
    kinds: Sequence[SampleKind] = KINDS,
    head_dims: Sequence[int] = HEAD_DIMS,
    batches: Sequence[int] = BATCHES,
) -> Iterator[Sample]:
    """Samples without end, the kinds in turn; sequences of `shortest` to `longest` tokens. What is in
    `head_dims` or `batches` several times is drawn as often.

    The n-th sample depends on the arguments alone. ConfigError if nothing lies within the bounds.
    """
    if not 1 <= shortest <= longest:
        raise ConfigError(f"shortest must be from 1 to longest={longest}, got {shortest}")
    number = 0
    while True:
        rng = random.Random(f"{seed} {number}")
        draw = _Draw(rng, kinds[number % len(kinds)], (shortest, longest), head_dims, batches)
        yield _within(draw, (work, floor_bytes, steps))
        number += 1


class _Draw(NamedTuple):
    """What a sample is drawn from."""

    rng: random.Random
    kind: SampleKind
    lengths: tuple[int, int]
    head_dims: Sequence[int]
    batches: Sequence[int]


def _within(draw: _Draw, bounds: tuple[float, int, float]) -> Sample:
    for _ in range(TRIES):
        sample = _sample(draw, _tokens(draw.rng, *draw.lengths))
        sizes = work_of(*sample), sample.workload.floor, steps_of(*sample)
        if all(size <= bound for size, bound in zip(sizes, bounds, strict=True)):
            return sample
    work, floor_bytes, steps = bounds
    raise ConfigError(
        f"no {draw.kind} sample of at least {draw.lengths[0]:,} tokens is within work={work:g}, "
        f"floor_bytes={floor_bytes:,} and steps={steps:g}; allow more, or shorter ones"
    )


def work_of(config: AttentionConfig, workload: Workload) -> float:
    """Pairs of query and key x channels, and half as much again for each matrix of projections' size;
    in training with the backward. Roughly proportional to the time."""
    total = active_pairs(config, workload) * workload.heads * workload.head_dim
    if config.multihead:
        total += 2 * workload.seq * config.multihead.embed_dim**2
    return total * workload.batch * (BACKWARD_WORK if workload.mode == "training" else 1)


def steps_of(config: AttentionConfig, workload: Workload) -> float:
    """Kernel calls, about: rates have calls of their own, shared kv heads too, some rows of blocks, and
    what exceeds the workspace is cut."""
    apart = workload.heads if workload.groups < workload.heads else 1
    cuts = 8 * workload.floor / config.workspace_bytes
    rates = sum(config.dilation_rates) if config.variant == "dilated" else 1
    rows = workload.seq / config.pattern.block_size if config.pattern else 0
    times = 2 if workload.mode == "training" else 1
    return times * (workload.batch * (apart * rates + 0.1 * rows) + cuts)


def active_pairs(config: AttentionConfig, workload: Workload) -> float:
    """Pairs of query and key that one head of one sequence computes, about."""
    seq = workload.seq
    share = 0.5 if workload.causal else 1.0
    if config.variant == "dense":
        return share * seq * seq
    if config.variant == "dilated":
        return share * sum(seq * max(min(length, seq) / rate, 1) / rate for length, rate in config.branches)
    assert config.pattern is not None
    return _sparse_pairs(config, config.pattern, seq, share)


def _sparse_pairs(config: AttentionConfig, pattern: SparsePatternConfig, seq: int, share: float) -> float:
    size = pattern.block_size
    padded = -(-seq // size) * size
    if config.variant == "adaptive":
        return min(max(pattern.sparsity_ratio * padded, size), padded) * padded
    if pattern.pattern_type == "dilated_sparse":
        kept = max(pattern.sparsity_ratio * padded, size)
        reachable = sum(min(length, padded) / rate for length, rate in config.branches) * share + size
        return min(kept, reachable, padded) * padded
    window = min(pattern.local_window_size + size, padded) * padded
    if pattern.pattern_type == "local_window":
        return window
    return window + 2 * share * min(pattern.global_tokens + size, padded) * padded


def _tokens(rng: random.Random, shortest: int, longest: int) -> int:
    """Log-uniform, more than half of them round or just beside it."""
    if shortest == 1 and rng.random() < 0.1:
        return min(rng.choice((1, 7, 17)), longest)
    tokens = round(math.exp(rng.uniform(math.log(shortest), math.log(longest))))
    if rng.random() < 0.6:
        unit = rng.choice((16, 64, 128, 1024))
        tokens = max(tokens // unit, 1) * unit + rng.choice((0, 0, 1))
    return min(max(tokens, shortest), longest)


def _sample(draw: _Draw, seq: int) -> Sample:
    rng, kind = draw.rng, draw.kind
    heads, head_dim = rng.choice((1, 2, 3, 4, 8, 12)), rng.choice(draw.head_dims)
    sizes: dict[str, Any] = {"heads": heads, "head_dim": head_dim}
    shared = [count for count in range(1, sizes["heads"] + 1) if sizes["heads"] % count == 0]
    kv_heads = rng.choice((None, rng.choice(shared)))
    base = kind
    if kind == "multihead":
        base = rng.choice((*PLAIN, "adaptive"))
    elif kind == "weights":
        base = rng.choice(SPARSE)
    parts = _attention(rng, base, seq, sizes)
    if kind == "multihead":
        parts["multihead"] = MultiheadConfig(
            embed_dim=sizes["heads"] * sizes["head_dim"],
            num_heads=sizes["heads"],
            kv_heads=kv_heads,
            bias=rng.random() < 0.5,
            checkpoint=rng.random() < 0.2,
        )
    workload = Workload(
        seq=seq,
        batch=rng.choice(draw.batches),
        kv_heads=kv_heads,
        dtype=_one(rng, get_args(Dtype)),
        mode=_one(rng, get_args(Mode)),
        causal=rng.random() < 0.5,
        weights=kind == "weights",
        **sizes,
    )
    return Sample(AttentionConfig(**parts, **_settings(rng)), workload)


def _settings(rng: random.Random) -> dict[str, Any]:
    return {
        "workspace_bytes": rng.choice((1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 24, 1 << 26)),
        "pool": _one(rng, get_args(Switch)),
        "pool_bytes": rng.choice((None, None, 1 << 20, 1 << 26)),
        "cache_entries": rng.choice((100, 100, 0)),
        "cache_bytes": rng.choice((1 << 26, 1 << 26, 1 << 16)),
    }


def _attention(rng: random.Random, kind: SampleKind, seq: int, sizes: dict[str, int]) -> dict[str, Any]:
    """Fields of an AttentionConfig of this kind, without the settings."""
    if kind == "dense":
        return {"variant": "dense"}
    if kind == "dilated":
        lengths, rates = _branches(rng, rng.choice((64, 256, 1000, 1024, 2048)), seq)
        covered = 1 in rates
        return {
            "variant": "dilated",
            "segment_lengths": lengths,
            "dilation_rates": rates,
            "uncovered": "refuse" if covered else "zero",
        }
    block = rng.choice((16, 32, 64, 64, 128, 128, 256))
    if kind == "adaptive":
        pattern = SparsePatternConfig(block_size=block, sparsity_ratio=_ratio(rng))
        scorer = AdaptiveConfig(
            num_heads=sizes["heads"], head_dim=sizes["head_dim"], score_dim=rng.choice((None, 8, 32))
        )
        return {"variant": "adaptive", "pattern": pattern, "adaptive": scorer}
    branches: dict[str, Any] = {}
    if kind == "dilated_sparse":
        lengths, rates = _branches(rng, block * rng.choice((2, 4, 8, 16)), seq)
        branches = {"segment_lengths": lengths, "dilation_rates": rates}
    return {"variant": "block_sparse", "pattern": _pattern(rng, kind, block), **branches}


def _pattern(rng: random.Random, kind: Any, block: int) -> SparsePatternConfig:
    pattern_type: PatternType = kind
    if pattern_type == "dilated_sparse":
        return SparsePatternConfig(pattern_type=pattern_type, block_size=block, sparsity_ratio=_ratio(rng))
    window = rng.choice((1, block, 2 * block, 3 * block, 256, 512, 1024, 4096))
    if pattern_type == "local_window":
        return SparsePatternConfig(pattern_type=pattern_type, block_size=block, local_window_size=window)
    tokens = rng.choice((1, block, block + 1, 3 * block))
    return SparsePatternConfig(
        pattern_type=pattern_type, block_size=block, local_window_size=window, global_tokens=tokens
    )


def _ratio(rng: random.Random) -> float:
    return rng.choice((0.001, 0.01, 0.05, 0.1, 0.3, 1.0))


def _branches(rng: random.Random, base: int, seq: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(segment lengths, rates): mostly doubling as papers have them, else any."""
    count = rng.randint(1, 4)
    lengths = tuple(base * 2**i for i in range(count))
    if rng.random() < 0.7:
        return lengths, tuple(2**i for i in range(count))
    return lengths, tuple(rng.randint(1, 6) for _ in range(count))


def _one(rng: random.Random, values: tuple[T, ...]) -> T:
    return rng.choice(values)


__all__ = ["KINDS", "PLAIN", "Sample", "SampleKind", "active_pairs", "samples", "steps_of", "work_of"]
