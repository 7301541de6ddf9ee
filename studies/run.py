"""Runs one attention and prints its time and peak memory: `python -m studies.run --seq 131072`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from attention import AttentionConfig, AttentionPlannerError, SparsePatternConfig, build
from planner.footprint import footprint
from studies.records import at_least_one, environment, present_device, timed

MIB = 1 << 20
DEFAULT = AttentionConfig(
    variant="block_sparse",
    segment_lengths=(2048, 4096, 8192),
    dilation_rates=(1, 2, 4),
    pattern=SparsePatternConfig(block_size=128, sparsity_ratio=0.01),
)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 done, 2 the request is wrong."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (AttentionPlannerError, OSError, RuntimeError) as error:
        Console(stderr=True).print(f"[red]error:[/] {error}", highlight=False)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    config = AttentionConfig.from_json(Path(options.config).read_bytes()) if options.config else DEFAULT
    device, dtype = options.device, getattr(torch, options.dtype)
    sizes = (options.batch, options.seq, options.heads, options.head_dim)
    module = build(config, device)
    q, k, v = (torch.randn(sizes, dtype=dtype, device=device) for _ in range(3))

    with torch.inference_mode(), Console(stderr=True).status("running"):
        taken = footprint(lambda: module(q, k, v, is_causal=options.causal), device)
        seconds = median(timed(lambda: module(q, k, v, is_causal=options.causal), device) for _ in range(3))
    inputs = 3 * q.numel() * q.element_size()
    floor = inputs + q.numel() * q.element_size()

    where = environment(device)
    table = Table(title=f"{config.variant}, {options.seq:,} tokens, {options.dtype}", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_row("time, median of 3", f"{seconds:.3f} s")
    table.add_row("tokens a second", f"{options.batch * options.seq / seconds:,.0f}")
    table.add_row("peak allocated, q, k, v and out included", f"{(inputs + taken.peak) / MIB:,.1f} MiB")
    table.add_row("floor: q + k + v + out", f"{floor / MIB:,.1f} MiB")
    table.add_row("above the floor", f"{(inputs + taken.peak - floor) / MIB:,.1f} MiB")
    Console(width=80).print(table)
    Console(width=80).print(f"{where['device']}; torch {where['torch']}", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m studies.run",
        description="Run one attention forward and print its time and peak memory.",
        epilog="example: python -m studies.run --seq 131072 --dtype float32 --causal",
    )
    parser.add_argument("--seq", type=at_least_one, default=131072, help="tokens (default 131072)")
    parser.add_argument("--batch", type=at_least_one, default=1, help="sequences (default 1)")
    parser.add_argument("--heads", type=at_least_one, default=8, help="heads (default 8)")
    parser.add_argument("--head-dim", type=at_least_one, default=64, help="channels a head (default 64)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32", "float64"])
    parser.add_argument("--device", type=present_device, default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--causal", action="store_true", help="attend to the past only")
    parser.add_argument("--config", help="an AttentionConfig as JSON (default: three branches, 1%% kept)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
