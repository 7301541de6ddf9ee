"""Decoding of one token with a window, beside torch's attention over the window's keys alone, on a CPU.

    python -m studies.bench.decoding

Both get the caches of keys and values as they are, [batch, tokens, kv_heads, channels], on one thread, whose
processor time counts; they go by turns. `same length`: one call again and again, as the layers of a model
make it. `next token`: every call has a key more, of which nothing was decided before. Beside the times, the
bytes that a call takes above its inputs. What a GPU would launch is told by `planner estimate --queries 1`.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from datetime import date
from statistics import median
from time import thread_time
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from attention import build
from attention.config import AttentionConfig, Edges, PatternType, SparsePatternConfig

WINDOW: Final = 1024
"""Keys that a query sees, its own among them."""
CACHES: Final = (8192, 131_072)
"""Tokens of key and value caches."""
HEADS, KV_HEADS, CHANNELS = 32, 8, 128
ROUNDS: Final = 40


class Decoded(NamedTuple):
    """What decoding one token takes, at one length of the cache."""

    name: str
    tokens: int
    same: float
    """Seconds of a call, where an equal one came before."""
    following: float
    """Seconds of a call with a key more than the one before."""
    peer: float
    """Seconds of torch's attention over the window's keys."""
    held: int
    """Bytes that a call takes above its inputs."""


def configs() -> dict[str, AttentionConfig]:
    """Windows with edges at tokens and at blocks, with and without global tokens."""

    def pattern(kind: PatternType, edges: Edges) -> AttentionConfig:
        window = WINDOW - 1 if edges == "token" else WINDOW
        fields = SparsePatternConfig(
            pattern_type=kind, block_size=128, local_window_size=window, global_tokens=128, edges=edges
        )
        return AttentionConfig(variant="block_sparse", pattern=fields)

    kinds: tuple[PatternType, ...] = ("local_window", "global_local")
    edges: tuple[Edges, ...] = ("token", "block")
    return {f"{kind}, edges={edge}": pattern(kind, edge) for kind in kinds for edge in edges}


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own attention of one query over the keys of its window."""
    q, k, v = (x.transpose(1, 2) for x in (q, k[:, -WINDOW:], v[:, -WINDOW:]))
    return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def decoded(name: str, module: nn.Module, tokens: int, dtype: torch.dtype, rounds: int) -> Decoded:
    """The times of a module at one length of the cache."""
    q = torch.randn(1, 1, HEADS, CHANNELS, dtype=dtype)
    k, v = (torch.randn(1, tokens + rounds + 3, KV_HEADS, CHANNELS, dtype=dtype) for _ in range(2))

    def seconds(call: Callable[[], object]) -> float:
        begin = thread_time()
        call()
        return thread_time() - begin

    def at(length: int) -> Tensor:
        out: Tensor = module(q, k[:, :length], v[:, :length], is_causal=True)
        return out

    times: list[tuple[float, float, float]] = []
    with torch.no_grad():
        for n in range(rounds + 3):
            peer = seconds(lambda n=n: torchs(q, k[:, : tokens + n], v[:, : tokens + n]))  # type: ignore[misc]
            following = seconds(lambda n=n: at(tokens + n))  # type: ignore[misc]
            same = seconds(lambda n=n: at(tokens + n))  # type: ignore[misc]
            times.append((same, following, peer))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            at(tokens)
    held = sum(max(event.self_cpu_memory_usage, 0) for event in record.key_averages())
    same, following, peer = (median(column) for column in zip(*times[3:], strict=True))
    return Decoded(name, tokens, same, following, peer, held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"calls of each (default: {ROUNDS})")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {date.today()}, one thread")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"\none token, {HEADS}:{KV_HEADS} heads x {CHANNELS} channels, window {WINDOW}, {dtype}")
        print(f"{'':28}{'cache':>9}{'same length':>13}{'next token':>12}{'bytes':>10}")
        for name, config in configs().items():
            rows = [decoded(name, build(config), tokens, dtype, rounds) for tokens in CACHES]
            for row in rows:
                ratios = f"{row.same / row.peer:>11.2f} x{row.following / row.peer:>10.2f} x"
                print(f"{row.name:28}{row.tokens:>9,}{ratios}{row.held:>10,}", flush=True)
            longest = rows[-1].same / rows[0].same
            print(f"{'':28}{'':>9}  the longer cache takes {longest:.2f} times the shorter one")


if __name__ == "__main__":
    main()
