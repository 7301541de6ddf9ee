"""Samples to time: configs and workloads over all that seconds depend on, the same for the same seed. Imports
no torch.

Kinds, dtypes and modes take turns, so that every combination of them occurs about equally often; sizes are
drawn. Each call is given as many tokens as make its work about the one that was drawn, so that a call takes
tenths of a second at most and overheads show in the smaller ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, Final, get_args

from attention.config import AdaptiveConfig, AttentionConfig, MultiheadConfig, SparsePatternConfig
from planner.fitting.samples import BACKWARD_WORK, Sample, work_of
from planner.measuring.measure import Device
from planner.workload import Dtype, Mode, Workload

KINDS: Final = ("local_window", "dilated", "dilated_sparse", "dense", "global_local", "adaptive", "multihead")
"""Kinds of attention; see `planner.fitting.samples.SampleKind`."""
INSIDE: Final = ("local_window", "dilated", "dilated_sparse", "dense")
"""Kinds that are tried between projections."""
DTYPES: Final[tuple[Dtype, ...]] = ("float32", "bfloat16", "float16")
WORK: Final[dict[Device, tuple[float, float]]] = {"cpu": (1e8, 1.5e9), "cuda": (1e11, 5e12)}
"""Least and most of a forward, as `planner.fitting.samples.work_of` has it: on two cores 8 to 150 ms."""
SLOW: Final[dict[Dtype, float]] = {"float32": 1.0, "bfloat16": 0.7, "float16": 0.4}
"""Share of that work on a CPU, whose kernels are slower in 16 bits unless it has a matrix unit."""
FLOOR_BYTES: Final[dict[Device, int]] = {"cpu": 1 << 28, "cuda": 1 << 32}
WIDEST: Final[dict[Device, int]] = {"cpu": 256, "cuda": 4096}
"""Channels around a multihead attention: a CPU's 16-bit matrix products can take seconds."""
SHORTEST, LONGEST = 256, 1 << 20
LONGER: Final = 4.0
"""Times the work of every second held-out run."""
TRIES: Final = 20
BLOCKS: Final = (16, 32, 64, 128, 256, 512)


def timing_samples(
    device: Device, seed: int, kinds: Sequence[str] = KINDS, longer: float = 1.0
) -> Iterator[Sample]:
    """Samples without end; the n-th depends on the arguments alone. Every second one has `longer` times the
    work."""
    number = 0
    while True:
        rng = random.Random(f"speed {seed} {number}")
        dtype = DTYPES[number % len(DTYPES)]
        # A period of 7 kinds, 3 dtypes and 2 modes, in which all their combinations occur.
        kind = kinds[number % len(kinds)]
        mode: Mode = get_args(Mode)[number // len(DTYPES) % 2]
        for _ in range(TRIES):
            sample = _sized(rng, device, kind, dtype, mode, longer if number % 2 else 1.0)
            pattern, parts = sample.config.pattern, sample.config.multihead
            if parts is not None and parts.embed_dim > WIDEST[device]:
                continue
            if pattern is None or sample.workload.seq >= 4 * pattern.block_size:
                break  # else it would be dense attention by another name
        yield sample
        number += 1


def workload_of(rng: random.Random, dtype: Dtype, mode: Mode, seq: int = SHORTEST) -> Workload:
    """A workload of drawn heads and channels."""
    heads = rng.choice((1, 2, 4, 8, 8, 12, 16))
    return Workload(
        seq=seq,
        batch=rng.choice((1, 1, 1, 2)),
        heads=heads,
        kv_heads=rng.choice((None, None, None, max(heads // 4, 1))),
        head_dim=rng.choice((32, 64, 64, 128)),
        dtype=dtype,
        mode=mode,
        causal=rng.random() < 0.4,
    )


def config_of(rng: random.Random, kind: str, workload: Workload) -> AttentionConfig:
    """A config of a kind for a workload, whose tokens it does not depend on."""
    multihead = None
    if kind == "multihead":
        multihead = MultiheadConfig(
            embed_dim=workload.heads * workload.head_dim, num_heads=workload.heads, kv_heads=workload.kv_heads
        )
        kind = rng.choice(INSIDE)
    return AttentionConfig(multihead=multihead, **_parts(rng, kind, workload))


def _parts(rng: random.Random, kind: str, workload: Workload) -> dict[str, Any]:
    if kind == "dense":
        return {"variant": "dense"}
    block = rng.choice(BLOCKS)
    if kind == "dilated":
        return {"variant": kind, **_branches(rng, rng.choice((128, 512, 1024, 2048, 3000, 4096)))}
    if kind == "adaptive":
        scorer = AdaptiveConfig(num_heads=workload.heads, head_dim=workload.head_dim)
        pattern = SparsePatternConfig(
            block_size=max(block, 32), sparsity_ratio=rng.choice((0.02, 0.05, 0.1, 0.2))
        )
        return {"variant": kind, "pattern": pattern, "adaptive": scorer}
    parts: dict[str, Any] = {"variant": "block_sparse"}
    fields: dict[str, Any] = {"pattern_type": kind, "block_size": block}
    if kind == "dilated_sparse":
        fields["sparsity_ratio"] = rng.choice((0.01, 0.02, 0.05, 0.1, 0.2, 0.5))
        parts |= _branches(rng, block * rng.choice((4, 8, 16, 32)))
    else:
        fields["local_window_size"] = round(block * math.exp2(rng.uniform(0, 4)))
    if kind == "global_local":
        fields["global_tokens"] = rng.choice((1, block, 2 * block))
    return {**parts, "pattern": SparsePatternConfig(**fields)}


def _branches(rng: random.Random, base: int) -> dict[str, Any]:
    count = rng.randint(1, 4)
    lengths = tuple(base * 2**i for i in range(count))
    rates = tuple(2**i for i in range(count))
    if rng.random() < 0.2:
        rates = (1, *sorted(rng.randint(1, 6) for _ in range(count - 1)))
    return {"segment_lengths": lengths, "dilation_rates": rates}


def _sized(rng: random.Random, device: Device, kind: str, dtype: Dtype, mode: Mode, longer: float) -> Sample:
    """A sample of about the work that is drawn."""
    work = longer * math.exp(rng.uniform(*map(math.log, WORK[device])))
    work *= (BACKWARD_WORK if mode == "training" else 1) * (SLOW[dtype] if device == "cpu" else 1)
    workload = workload_of(rng, dtype, mode)
    config = config_of(rng, kind, workload)
    low, high = math.log2(SHORTEST), math.log2(LONGEST)
    for _ in range(12):
        middle = (low + high) / 2
        tried = workload.model_copy(update={"seq": round(2**middle)})
        if work_of(config, tried) > work or tried.floor > FLOOR_BYTES[device]:
            high = middle
        else:
            low = middle
    seq = round(2**low)
    unit = rng.choice((1, 64, 512))
    return Sample(config, workload.model_copy(update={"seq": max(seq // unit, 1) * unit}))
