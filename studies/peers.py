"""How fast is each attention against its peers? `planner study peers`

Ratios in one process run: against compiled FlexAttention on the same layout, against dense SDPA, a
training step against its forward, and the CPU's fused kernel backward against forward. Medians of
several runs, ours and the peer's in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from attention import (
    AdaptiveConfig,
    AttentionConfig,
    SparsePatternConfig,
    build,
    build_layout,
)
from attention.adaptive import AdaptiveAttention
from attention.ops import flex, kernels
from planner.report.figure import COLORS, RED, title
from studies.records import Row, Step, markdown, timed, versus
from studies.study import Rows, Said, Scope, Study

HEADS, HEAD_DIM = 8, 64
SEQ, LONG = 16_384, 65_536
LONG_HEADS = 2
"""At the longest, dense attention of more heads takes minutes a run on two cores."""
DTYPES = (torch.float32, torch.bfloat16)
BLOCKS, KEPT = (64, 128, 256), (3, 9)
RUNS = 5
"""Counted runs of each side."""
BRANCHES: dict[str, Any] = {"segment_lengths": [2048, 4096, 8192], "dilation_rates": [1, 2, 4]}
PATTERNS = ("local_window", "dilated_sparse, 1 branch", "dilated_sparse, 3 branches", "adaptive")


def config_for(pattern: str, block: int, kept: int, seq: int = SEQ) -> AttentionConfig:
    """A pattern with `kept` blocks a row."""
    ratio = kept * block / seq
    if pattern == "local_window":
        window = SparsePatternConfig(
            pattern_type="local_window", block_size=block, local_window_size=(kept - 1) * block
        )
        return AttentionConfig(variant="block_sparse", pattern=window)
    sparse = SparsePatternConfig(block_size=block, sparsity_ratio=ratio)
    if pattern == "adaptive":
        sizes = AdaptiveConfig(num_heads=HEADS, head_dim=HEAD_DIM)
        return AttentionConfig(variant="adaptive", pattern=sparse, adaptive=sizes)
    branches = BRANCHES if "3" in pattern else {"segment_lengths": [4096], "dilation_rates": [1]}
    return AttentionConfig(variant="block_sparse", pattern=sparse, **branches)


def flex_row(pattern: str, dtype: torch.dtype, block: int, kept: int, device: torch.device, runs: int) -> Row:
    """Ours against compiled FlexAttention over the same blocks. For adaptive the lists are chosen
    beforehand, on both sides: what is compared is attention over arbitrary lists."""
    config = config_for(pattern, block, kept)
    if device.type == "cuda":
        config = AttentionConfig(**{**config.model_dump(), "backend": "sdpa"})
    module = build(config, device)
    q, k, v = _inputs(SEQ, dtype, device)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    ours: Callable[[], object]
    if isinstance(module, AdaptiveAttention):
        chosen = module.select(q, k)
        mask, active = _mask_of_lists(chosen[0], block, device), chosen[0, 0].numel()
        ours = lambda: module.over(q, k, v, chosen)  # noqa: E731
    else:
        layout = build_layout(config, SEQ, False)
        mask = flex.block_mask(layout, False, flex.block_lists(layout, False, device))
        active = layout.active
        ours = lambda: module(q, k, v)  # noqa: E731
    peer = lambda: flex.compiled()(*heads_first, block_mask=mask)  # noqa: E731
    with torch.no_grad():
        mine, theirs, ratio = versus(ours, peer, device, runs)
    flops = 4 * active * block * block * HEADS * HEAD_DIM
    return {
        "part": "flex",
        "pattern": pattern,
        "dtype": _name(dtype),
        "block": block,
        "kept": kept,
        "gflops": flops / mine / 1e9,
        "flex_gflops": flops / theirs / 1e9,
        "ratio": ratio,
    }


def dense_row(dtype: torch.dtype, block: int, kept: float, device: torch.device, runs: int) -> Row:
    """A window of `kept` of all blocks against dense SDPA at 65,536 tokens: our time / dense time."""
    config = AttentionConfig(
        variant="block_sparse",
        segment_lengths=(LONG,),
        dilation_rates=(1,),
        pattern=SparsePatternConfig(block_size=block, sparsity_ratio=kept),
    )
    module = build(config, device)
    q, k, v = _inputs(LONG, dtype, device, LONG_HEADS if device.type == "cpu" else HEADS)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    dense = lambda: torch.nn.functional.scaled_dot_product_attention(q_, k_, v_)  # noqa: E731
    with torch.no_grad():
        module(q, k, v)
        pairs = [(timed(lambda: module(q, k, v), device), timed(dense, device)) for _ in range(runs)]
    return {
        "part": "dense",
        "dtype": _name(dtype),
        "heads": q.shape[2],
        "block": block,
        "sparsity": 1 - kept,
        "ratio": median(a / b for a, b in pairs),
        "seconds": median(a for a, _ in pairs),
        "dense_seconds": median(b for _, b in pairs),
    }


def training_row(
    pattern: str, dtype: torch.dtype, block: int, kept: int, device: torch.device, runs: int
) -> Row:
    """A training step (forward and backward) against the forward alone: step / forward."""
    if pattern == "dilated, 3 branches":
        config = AttentionConfig(variant="dilated", **BRANCHES)
    else:
        config = config_for(pattern, block, kept)
    module = build(config, device)
    q, k, v = (x.requires_grad_() for x in _inputs(SEQ, dtype, device))
    grad = torch.randn_like(q)

    def forward() -> None:
        with torch.no_grad():
            module(q, k, v)

    def step() -> None:
        q.grad = k.grad = v.grad = None
        module(q, k, v).backward(grad)

    seconds, _, ratio = versus(forward, step, device, runs)
    return {
        "part": "training", "attention": pattern, "dtype": _name(dtype), "block": block, "kept": kept,
        "forward_seconds": seconds, "ratio": ratio,
    }  # fmt: skip


def kernel_row(dtype: torch.dtype, queries: int, keys: int, runs: int) -> Row:
    """The CPU's fused kernel alone: its rates forward and backward, and backward time / forward time."""
    views = max(512 // queries, 1)
    q, grad = torch.randn(2, views, queries, HEADS, HEAD_DIM).to(dtype).transpose(2, 3)
    k, v = torch.randn(2, views, keys, HEADS, HEAD_DIM).to(dtype).transpose(2, 3)
    scale = HEAD_DIM**-0.5
    out, lse = kernels.forward(q, k, v, scale=scale)
    forward = lambda: kernels.forward(q, k, v, scale=scale)  # noqa: E731
    backward = lambda: kernels.backward(grad, q, k, v, out, lse, scale=scale)  # noqa: E731
    seconds, back_seconds, ratio = versus(forward, backward, torch.device("cpu"), runs)
    flops = 4 * views * queries * keys * HEADS * HEAD_DIM
    return {
        "part": "kernels", "dtype": _name(dtype), "queries": queries, "keys": keys,
        "forward_gflops": flops / seconds / 1e9,
        "backward_gflops": 2.5 * flops / back_seconds / 1e9, "ratio": ratio,
    }  # fmt: skip


def _inputs(seq: int, dtype: torch.dtype, device: torch.device, heads: int = HEADS) -> list[Tensor]:
    return [torch.randn(1, seq, heads, HEAD_DIM, dtype=dtype, device=device) for _ in range(3)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mask_of_lists(lists: Tensor, block: int, device: torch.device) -> Any:
    """The BlockMask of [H, blocks, kept] lists, one a head."""
    from torch.nn.attention.flex_attention import BlockMask

    heads, rows, kept = lists.shape
    indices = torch.zeros(1, heads, rows, rows, dtype=torch.int32, device=device)
    indices[..., :kept] = lists
    counts = torch.full((1, heads, rows), kept, dtype=torch.int32, device=device)
    none = torch.zeros_like(counts)
    return BlockMask.from_kv_blocks(
        none, torch.zeros_like(indices), counts, indices, BLOCK_SIZE=block, compute_q_blocks=False
    )


def of_part(rows: Rows, part: str) -> Rows:
    """Those of one comparison: `kernels`, `flex`, `dense` or `training`."""
    return [row for row in rows if row["part"] == part]


def flex_table(rows: Rows) -> str:
    rows = of_part(rows, "flex")
    return markdown(
        (
            [
                r["pattern"],
                r["dtype"],
                r["block"],
                r["kept"],
                f"{r['gflops']:,.0f}",
                f"{r['flex_gflops']:,.0f}",
                f"{r['ratio']:.2f}",
            ]
            for r in rows
        ),
        ["pattern", "dtype", "block", "blocks a row", "GFLOP/s", "FlexAttention", "ratio"],
    )


def summary_table(rows: Rows) -> str:
    """Worst cell and geometric mean of each pattern."""
    rows = of_part(rows, "flex")

    def line(pattern: str, dtype: str) -> list[str]:
        ratios = [r["ratio"] for r in rows if r["pattern"] == pattern and r["dtype"] == dtype]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        return [pattern, dtype, f"{min(ratios):.2f}", f"{mean:.2f}"]

    pairs = dict.fromkeys((r["pattern"], r["dtype"]) for r in rows)
    return markdown((line(*pair) for pair in pairs), ["pattern", "dtype", "worst cell", "geometric mean"])


def dense_table(rows: Rows) -> str:
    rows = of_part(rows, "dense")
    return markdown(
        (
            [
                r["dtype"],
                r["heads"],
                r["block"],
                f"{r['sparsity']:.0%}",
                f"{r['seconds']:.2f}",
                f"{r['dense_seconds']:.2f}",
                f"{r['ratio']:.3f}",
            ]
            for r in rows
        ),
        ["dtype", "heads", "block", "sparsity", "seconds", "dense seconds", "of dense time"],
    )


def training_table(rows: Rows) -> str:
    rows = of_part(rows, "training")
    return markdown(
        ([r["attention"], r["dtype"], r["block"], r["kept"], f"{r['ratio']:.2f}"] for r in rows),
        ["attention", "dtype", "block", "blocks a row", "step / forward"],
    )


def kernels_table(rows: Rows) -> str:
    rows = of_part(rows, "kernels")
    return markdown(
        (
            [r["dtype"], r["queries"], r["keys"], f"{r['forward_gflops']:.0f}",
             f"{r['backward_gflops']:.0f}", f"{r['ratio']:.1f}"]
            for r in rows
        ),
        ["dtype", "queries", "keys", "forward GFLOP/s", "backward GFLOP/s", "backward / forward time"],
    )  # fmt: skip


def _flex_steps(device: torch.device, runs: int, quick: bool) -> Iterator[Step]:
    for pattern in PATTERNS:
        for dtype in DTYPES:
            for block in BLOCKS[1:2] if quick else BLOCKS:
                for kept in KEPT[:1] if quick else KEPT:
                    label = f"{pattern} {_name(dtype)} {block} x {kept}"
                    yield label, partial(flex_row, pattern, dtype, block, kept, device, runs)


def _dense_steps(device: torch.device, runs: int, quick: bool) -> Iterator[Step]:
    for dtype in () if quick else DTYPES[::-1]:
        for block, kept in ((128, 0.1), (256, 0.1), (128, 0.8)):
            label = f"dense {_name(dtype)} {block}, {1 - kept:.0%} sparse"
            yield label, partial(dense_row, dtype, block, kept, device, runs)


def _kernel_steps(device: torch.device, runs: int, quick: bool) -> Iterator[Step]:
    """Of the CPU alone."""
    for dtype in () if device.type != "cpu" else (*DTYPES, torch.float16):
        for queries, keys in ((64, 576),) if quick else ((64, 576), (128, 1152), (256, 2304), (2048, 2048)):
            label = f"kernel {_name(dtype)} {queries} x {keys}"
            yield label, partial(kernel_row, dtype, queries, keys, runs)


def _training_steps(device: torch.device, runs: int, quick: bool) -> Iterator[Step]:
    for dtype in DTYPES:
        for pattern in ("local_window", "dilated_sparse, 3 branches", "dilated, 3 branches"):
            for block in BLOCKS[1:2] if quick or pattern.startswith("dilated,") else BLOCKS:
                label = f"training {pattern} {_name(dtype)} {block}"
                yield label, partial(training_row, pattern, dtype, block, KEPT[1], device, runs)


def steps(scope: Scope) -> list[Step]:
    # Every layout is compiled for itself.
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 256
    parts = (_kernel_steps, _flex_steps, _dense_steps, _training_steps)
    return [step for part in parts for step in part(scope.device, RUNS, scope.quick)]


def draw(figure: Any, rows: Rows) -> None:
    """Ours against FlexAttention, cell by cell."""
    flex_rows = of_part(rows, "flex")
    axes = figure.add_subplot()
    for place, pattern in enumerate(PATTERNS):
        for shift, color, dtype in ((-0.15, COLORS[0], "float32"), (0.15, COLORS[1], "bfloat16")):
            mine = [row for row in flex_rows if row["pattern"] == pattern and row["dtype"] == dtype]
            axes.scatter([row["ratio"] for row in mine], [place + shift] * len(mine), color=color, s=24,
                         label=dtype if place == 0 else None)  # fmt: skip
    axes.axvline(1, color=RED, linewidth=1)
    axes.set_yticks(range(len(PATTERNS)), PATTERNS)
    axes.invert_yaxis()
    axes.set(xlabel="FlexAttention's time / ours: right of 1, ours is faster", xlim=(0, None))
    axes.grid(axis="x")
    axes.legend(loc="lower right")
    title(figure, "Against compiled FlexAttention over the same blocks", f"{SEQ:,} tokens, 8 heads x 64")


def said(rows: Rows) -> Said:
    ratios = [row["ratio"] for row in of_part(rows, "flex")]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return Said(
        "Asked: how fast is each attention against compiled FlexAttention and against dense SDPA?",
        f"Found: {mean:.2f} times FlexAttention's speed in the geometric mean over {len(ratios)} layouts, "
        f"{min(ratios):.2f} in the worst.",
        "The seeds compare implementations with each other, one Python step a block pair, never with a peer.",
    )


STUDY = Study(
    steps,
    {
        "peers-kernels": kernels_table,
        "peers-flex": flex_table,
        "peers-flex-summary": summary_table,
        "peers-dense": dense_table,
        "peers-training": training_table,
    },
    draw,
    said,
)
