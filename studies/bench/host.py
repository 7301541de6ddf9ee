"""The host's time of a small call: every attention beside torch's `scaled_dot_product_attention`, on a CPU.

    python -m studies.bench.host

Both are given q, k and v as [batch, tokens, heads, channels] and give the output so, in inference, on one
thread, whose processor time counts. Blocks of calls go by turns in one process, so that what else the machine
does falls on all alike. Of each attention: its least time a call of all blocks, and that beside the least of
torch's; and the median of the blocks' ratios, which on a busy machine is higher, for Python's code is larger
than the processor's caches.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from datetime import date
from statistics import median
from time import thread_time
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention import build
from attention.config import AdaptiveConfig, AttentionConfig, SparsePatternConfig

SIZES: Final = ((16, 2, 8), (128, 8, 64))
"""(tokens, heads, channels): one in which the kernel takes hardly any time, and one of a small model."""
CALLS: Final = 10
"""Of a block."""
ROUNDS: Final = 100


class HostTime(NamedTuple):
    """The host's time of one attention."""

    name: str
    causal: bool
    least: float
    """Seconds a call."""
    ratio: float
    """Of the least time to that of torch's."""
    median: float
    """Of the ratios of all rounds."""


def configs(tokens: int, heads: int, channels: int) -> dict[str, AttentionConfig]:
    """Every attention, at sizes that suit so few tokens."""
    block = tokens // 4

    def pattern(kind: Any, size: int, **fields: Any) -> AttentionConfig:
        branches: dict[str, Any] = {"segment_lengths": (tokens // 2, tokens), "dilation_rates": (1, 2)}
        return AttentionConfig(
            variant="block_sparse",
            pattern=SparsePatternConfig(pattern_type=kind, block_size=size, **fields),
            **(branches if kind == "dilated_sparse" else {}),
        )

    return {
        "dense": AttentionConfig(variant="dense"),
        "dilated, one branch": AttentionConfig(
            variant="dilated", segment_lengths=(tokens,), dilation_rates=(1,)
        ),
        "dilated, two branches": AttentionConfig(
            variant="dilated", segment_lengths=(tokens // 2, tokens), dilation_rates=(1, 2)
        ),
        "local_window, one tile": pattern("local_window", tokens, local_window_size=tokens),
        "local_window, four blocks": pattern("local_window", block, local_window_size=2 * block),
        "local_window, to the token": pattern(
            "local_window", block, local_window_size=2 * block, edges="token"
        ),
        "global_local": pattern("global_local", block, local_window_size=block, global_tokens=block),
        "dilated_sparse": pattern("dilated_sparse", block, sparsity_ratio=0.5),
        "adaptive": AttentionConfig(
            variant="adaptive",
            pattern=SparsePatternConfig(block_size=block, sparsity_ratio=0.5),
            adaptive=AdaptiveConfig(num_heads=heads, head_dim=channels),
        ),
    }


def torchs(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Torch's own attention over tensors as this library has them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)


def measured(tokens: int, heads: int, channels: int, rounds: int) -> list[HostTime]:
    """The host's times at one size, torch's first."""
    q, k, v = (torch.randn(1, tokens, heads, channels) for _ in range(3))
    modules: dict[str, Callable[..., Any]] = {"torch": torchs}
    modules |= {name: build(config) for name, config in configs(tokens, heads, channels).items()}
    runs = {(name, causal): module for causal in (False, True) for name, module in modules.items()}
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in runs}
    with torch.no_grad():
        for (_, causal), module in runs.items():
            for _ in range(3):  # what is decided once, and what caches keep from the second time on
                module(q, k, v, is_causal=causal)
        for _ in range(rounds):
            for (name, causal), module in runs.items():
                begin = thread_time()
                for _ in range(CALLS):
                    module(q, k, v, is_causal=causal)
                times[name, causal].append((thread_time() - begin) / CALLS)
    found = []
    for (name, causal), mine in times.items():
        base = times["torch", causal]
        ratios = [one / other for one, other in zip(mine, base, strict=True)]
        found.append(HostTime(name, causal, min(mine), min(mine) / min(base), median(ratios)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"blocks of calls of each (default: {ROUNDS})"
    )
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {date.today()}, one thread")
    for tokens, heads, channels in SIZES:
        print(f"\n{tokens} tokens x {heads} heads x {channels} channels, float32, inference")
        print(f"{'':30}{'':8}{'least, us':>10}{'ratio':>8}{'median ratio':>14}")
        for row in measured(tokens, heads, channels, rounds):
            causal = "causal" if row.causal else ""
            print(f"{row.name:30}{causal:8}{1e6 * row.least:>10.1f}{row.ratio:>8.2f}{row.median:>14.2f}")


if __name__ == "__main__":
    main()
