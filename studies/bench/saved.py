"""What a layer with a sliding window keeps for backward: this library's, and torch's attention under a mask.

    python -m studies.bench.saved

Models in transformers run such layers with `scaled_dot_product_attention` and a mask of all queries and
keys, and with as many kv heads as heads. Counted are the bytes of distinct storages that autograd saves, q,
k, v and out among them, of a layer of 8:2 heads x 64 channels with a window of 1,024 tokens, causal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention import build
from attention.config import AttentionConfig, SparsePatternConfig

WINDOW: Final = 1024
HEADS, KV_HEADS, CHANNELS = 8, 2, 64
LENGTHS: Final = (2048, 4096, 8192, 16_384)


class Saved(NamedTuple):
    """Bytes that are saved for backward at one length."""

    tokens: int
    ours: int
    torchs: int


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in a call."""
    storages: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = run()
    total = sum(x.untyped_storage().nbytes() for x in storages.values())
    del out
    return total


def saved(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Saved:
    """What both save at a length."""
    q = torch.randn(1, tokens, HEADS, CHANNELS, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, tokens, KV_HEADS, CHANNELS, dtype=dtype, requires_grad=True) for _ in range(2))
    pattern = SparsePatternConfig(
        pattern_type="local_window", block_size=128, local_window_size=WINDOW - 1, edges="token"
    )
    module = build(AttentionConfig(variant="block_sparse", pattern=pattern))

    def masked() -> Tensor:
        places = torch.arange(tokens)
        apart = places[:, None] - places
        mask = (apart >= 0) & (apart < WINDOW)
        del apart
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 2).transpose(1, 2) for x in (k, v))
        return scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask[None, None])

    return Saved(tokens, saved_bytes(lambda: module(q, k, v, is_causal=True)), saved_bytes(masked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="tokens of the sequences")
    lengths = parser.parse_args().lengths
    print(f"torch {torch.__version__}, bfloat16, {HEADS}:{KV_HEADS} heads x {CHANNELS}, window {WINDOW}")
    print(f"{'tokens':>8}{'window, MB':>14}{'torch with a mask, MB':>24}{'ratio':>8}")
    for tokens in lengths:
        row = saved(tokens)
        ratio = row.torchs / row.ours
        print(f"{tokens:>8,}{row.ours / 1e6:>14.1f}{row.torchs / 1e6:>24.1f}{ratio:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
