"""How many kernels a call launches on a GPU: counted in a dry run, in which they do nothing.

    python -m studies.bench.launches --gpu a100-sxm4-80gb

One training step of each case: kernels in all, those that multiply queries and keys (flash, efficient,
FlexAttention), and the forward's share of both; and the most that forward holds in q, k, v and out together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

from attention.config import AdaptiveConfig, AttentionConfig, SparsePatternConfig
from planner import gpus
from planner.standin.environment import environment
from planner.standin.install import torch_for
from planner.standin.interpreter import interpreter

LOG: Final = "LAUNCHES_LOG"
ATTENTION: Final = (
    "flash_fwd_kernel",
    "flash_fwd_splitkv_kernel",
    "dq_dk_dv",
    "fmha_cutlass",
    "flex_attention",
)
"""What the names of kernels have in them that multiply queries and keys."""
RATES: Final[dict[str, Any]] = {"segment_lengths": (2048, 8192, 32_768), "dilation_rates": (1, 2, 4)}


class Counted(NamedTuple):
    config: AttentionConfig
    seq: int
    heads: int
    kv_heads: int


def _pattern(kind: Any, **branches: Any) -> AttentionConfig:
    pattern = SparsePatternConfig(
        pattern_type=kind, block_size=128, local_window_size=1024, global_tokens=128, sparsity_ratio=0.05
    )
    return AttentionConfig(variant="block_sparse", pattern=pattern, backend="sdpa", **branches)


def _adaptive(heads: int) -> AttentionConfig:
    pattern = SparsePatternConfig(block_size=128, sparsity_ratio=0.05)
    sizes = AdaptiveConfig(num_heads=heads, head_dim=128)
    return AttentionConfig(variant="adaptive", pattern=pattern, adaptive=sizes, backend="sdpa")


CASES: Final = {
    "dense": Counted(AttentionConfig(variant="dense"), 32_768, 64, 8),
    "dilated": Counted(AttentionConfig(variant="dilated", **RATES), 32_768, 32, 8),
    "local_window": Counted(_pattern("local_window"), 131_072, 32, 8),
    "global_local": Counted(_pattern("global_local"), 131_072, 32, 8),
    "dilated_sparse": Counted(_pattern("dilated_sparse", **RATES), 32_768, 32, 8),
    "adaptive": Counted(_adaptive(32), 32_768, 32, 8),
}


def counted(card: str, names: list[str]) -> list[dict[str, Any]]:
    """A row for each case, causal and not."""
    torch, ahead = torch_for(interpreter(sys.executable))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "launches"
        variables = environment(gpus.find(card), torch=torch, ahead=ahead, launches=log)
        command = [sys.executable, "-m", "studies.bench.launches", "--inside", *names]
        done = subprocess.run(
            command, env=variables | {LOG: str(log)}, stdout=subprocess.PIPE, text=True, check=True
        )
    return [json.loads(line) for line in done.stdout.splitlines()]


def _inside(names: list[str]) -> None:
    """In the dry run: runs the cases and prints a line of JSON for each."""
    import torch

    from attention import build

    log = Path(os.environ[LOG])
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16

    def kernels() -> tuple[int, int]:
        lines = log.read_text().splitlines() if log.exists() else []
        return len(lines), sum(any(name in line for name in ATTENTION) for line in lines)

    for name in names:
        config, seq, heads, kv_heads = CASES[name]
        module = build(config).to("cuda", dtype)
        for causal in (True, False):
            sizes = [(1, seq, count, 128) for count in (heads, kv_heads, kv_heads)]
            q, k, v = (torch.empty(size, dtype=dtype, device="cuda", requires_grad=True) for size in sizes)
            start = kernels()
            inputs, before = q.nbytes + k.nbytes + v.nbytes, torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            out = module(q, k, v, is_causal=causal)
            taken = inputs + torch.cuda.max_memory_allocated() - before
            held = taken / (inputs + q.nbytes)
            middle = kernels()
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
            end = kernels()
            row = {"case": name, "seq": seq, "heads": heads, "kv_heads": kv_heads, "causal": causal}
            row |= {"forward": middle[0] - start[0], "forward attention": middle[1] - start[1]}
            row |= {"step": end[0] - start[0], "step attention": end[1] - start[1], "held": round(held, 3)}
            print(json.dumps(row), flush=True)
            del q, k, v, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"cases: {', '.join(CASES)} (default: all)")
    parser.add_argument("--gpu", default="a100-sxm4-80gb", help="the card (default: a100-sxm4-80gb)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.names or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if given.inside:
        _inside(names)
        return
    print(f"{'':16}{'':12}{'forward':>9}{'attention':>11}{'step':>9}{'attention':>11}{'held':>7}")
    for row in counted(given.gpu, names):
        figures = (row["forward"], row["forward attention"], row["step"], row["step attention"])
        print(
            f"{row['case']:16}{'causal' if row['causal'] else '':12}"
            f"{figures[0]:>9,}{figures[1]:>11,}{figures[2]:>9,}{figures[3]:>11,}{row['held']:>7}"
        )


if __name__ == "__main__":
    main()
