"""How fast is each attention against its peers, and how lean? `planner study peers`

Ratios in one process run: against compiled FlexAttention on the same layout, against dense SDPA, a
training step against its forward, and the CPU's fused kernel backward against forward. Medians of
several runs, ours and the peer's in turn. And what each allocates at its peak beside q, k and v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attention import AdaptiveConfig, AttentionConfig, SparsePatternConfig, build, build_layout
from attention.adaptive import AdaptiveAttention
from attention.ops import flex, kernels
from attention.pool import buffers_for
from planner.measuring.footprint import footprint
from planner.report.plot.figure import BLUE, MUTED, ORANGE, RED, named, title
from studies.bench.records import Job, Row, markdown, timed, versus
from studies.bench.study import Findings, Results, Scope, Study, rounded_up

HEADS, HEAD_DIM = 8, 64
SEQ, LONG, QUICK = 16_384, 65_536, 2048
LONG_HEADS = 2
"""At the longest, dense attention of more heads takes minutes a run on two cores."""
DTYPES = (torch.float32, torch.bfloat16)
BLOCKS, KEPT = (64, 128, 256), (3, 9)
RUNS, QUICK_RUNS = 5, 2
"""Number of counted runs of each side."""
MIB = 1 << 20
BRANCHES: dict[str, Any] = {"segment_lengths": [2048, 4096, 8192], "dilation_rates": [1, 2, 4]}
PATTERNS = ("local_window", "dilated_sparse, 1 branch", "dilated_sparse, 3 branches", "adaptive")
GATHERED = PATTERNS[2:]
TRAINED = ("local_window", "dilated_sparse, 3 branches", "dilated, 3 branches")


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


class Sides(NamedTuple):
    """Ours and compiled FlexAttention, over the same blocks of the same inputs."""

    config: AttentionConfig
    ours: Callable[[], object]
    peer: Callable[[], object]
    inputs: list[Tensor]
    """q, k, v, heads first."""
    active: int
    """Number of active blocks of head 0."""
    lists: int
    """Bytes of our lists of blocks: 0 with a layout, those of the chosen lists for adaptive."""
    mask: int
    """Bytes of the peer's BlockMask."""


def sides(pattern: str, dtype: torch.dtype, block: int, kept: int, device: torch.device, seq: int) -> Sides:
    """Both sides, ready to run. For adaptive the lists are chosen beforehand, on both sides: the comparison
    is of attention over arbitrary lists."""
    config = config_for(pattern, block, kept, seq)
    if device.type == "cuda":
        config = AttentionConfig(**{**config.model_dump(), "backend": "sdpa"})
    module = build(config, device)
    q, k, v = _inputs(seq, dtype, device)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    lists = 0
    ours: Callable[[], object]
    if isinstance(module, AdaptiveAttention):
        chosen = module.select(q, k)
        mask, active = _mask_of_lists(chosen[0], block, device), chosen[0, 0].numel()
        lists = chosen.nbytes
        ours = lambda: module.over(q, k, v, chosen)  # noqa: E731
    else:
        layout = build_layout(config, seq, False)
        mask = flex.block_mask(layout, False, flex.block_lists(layout, False, device))
        active = layout.active
        ours = lambda: module(q, k, v)  # noqa: E731
    told = flex.options(q, block)
    options = {"kernel_options": told} if told else {}
    peer = lambda: flex.compiled()(*heads_first, block_mask=mask, **options)  # noqa: E731
    held = sum(part.nbytes for part in mask.as_tuple(flatten=True) if isinstance(part, Tensor))
    return Sides(config, ours, peer, heads_first, active, lists, held)


def flex_row(
    pattern: str, dtype: torch.dtype, block: int, kept: int, device: torch.device, runs: int, seq: int = SEQ
) -> Row:
    """Ours against compiled FlexAttention over the same blocks."""
    both = sides(pattern, dtype, block, kept, device, seq)
    with torch.no_grad():
        mine, theirs, ratio = versus(both.ours, both.peer, device, runs)
    flops = 4 * both.active * block * block * HEADS * HEAD_DIM
    return {
        "part": "flex",
        "seq": seq,
        "pattern": pattern,
        "dtype": _name(dtype),
        "block": block,
        "kept": kept,
        "gflops": flops / mine / 1e9,
        "flex_gflops": flops / theirs / 1e9,
        "ratio": ratio,
    }


def bare_row(pattern: str, dtype: torch.dtype, block: int, kept: int, runs: int, seq: int = SEQ) -> Row:
    """The CPU's fused kernel without this project against compiled FlexAttention over as many blocks: with
    keys and values that lie ready, in the cache if they fit, and copying them first by a list, at random.
    Either takes as many rows a call as is fastest."""
    cpu = torch.device("cpu")
    both = sides(pattern, dtype, block, kept, cpu, seq)
    blocks = seq // block
    _, keys, values = (x[0].transpose(0, 1).contiguous() for x in both.inputs)
    heads = HEADS if pattern == "adaptive" else 1  # with lists of their own

    def alone(rows: int, copies: bool) -> Callable[[], None]:
        q = torch.randn(rows, block, HEADS, HEAD_DIM).to(dtype).transpose(1, 2)
        held = torch.randn(2, rows * kept * block * heads, HEADS // heads, HEAD_DIM).to(dtype)
        if heads > 1:
            k, v = held.view(2, rows, HEADS, kept * block, HEAD_DIM)
        else:
            k, v = held.view(2, rows, kept * block, HEADS, HEAD_DIM).transpose(2, 3)
        chosen = torch.rand(blocks, heads, blocks).argsort(-1)[..., :kept].sort(-1).values
        tokens = (chosen[..., None] * block + torch.arange(block)).flatten(2) * heads
        lists = (tokens + torch.arange(heads)[:, None]).view(-1, len(held[0]))

        def run() -> None:
            for wanted in lists:
                if copies:
                    for source, target in zip((keys, values), held, strict=True):
                        torch.index_select(source.view(-1, *target.shape[1:]), 0, wanted, out=target)
                kernels.forward(q, k, v, scale=HEAD_DIM**-0.5)

        return run

    ratios = {"in_place": 0.0, "copied": 0.0}
    with torch.no_grad():
        for name in ratios:
            runs_of = (versus(alone(rows, name == "copied"), both.peer, cpu, runs) for rows in (2, 4, 8))
            ratios[name] = max(ratio for *_, ratio in runs_of)
    return {
        "part": "bare",
        "seq": seq,
        "pattern": pattern,
        "dtype": _name(dtype),
        "block": block,
        "kept": kept,
        **ratios,
    }


def memory_row(
    pattern: str, dtype: torch.dtype, block: int, kept: int, device: torch.device, seq: int = SEQ
) -> Row:
    """Peak bytes allocated beside q, k and v in a forward call: ours with its lists, FlexAttention with its
    BlockMask, whose CPU kernel packs all keys and values anew, and dense SDPA."""
    both = sides(pattern, dtype, block, kept, device, seq)
    q, k, v = both.inputs
    dense = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)  # noqa: E731
    with torch.no_grad():
        both.peer()  # compiles
        both.ours()
        buffers_for(both.config).release()  # a cold start, so that the pool's growth counts
        mine, theirs, plain = (footprint(run, device).peak for run in (both.ours, both.peer, dense))
    return {
        "part": "memory",
        "seq": seq,
        "pattern": pattern,
        "dtype": _name(dtype),
        "block": block,
        "kept": kept,
        "out": q.nbytes,
        "ours": mine + both.lists,
        "flex": theirs + both.mask,
        "mask": both.mask,
        "dense": plain,
    }


def dense_row(
    dtype: torch.dtype, block: int, kept: float, device: torch.device, runs: int, seq: int = LONG
) -> Row:
    """A window of `kept` of all blocks against dense SDPA: our time / dense time."""
    config = AttentionConfig(
        variant="block_sparse",
        segment_lengths=(seq,),
        dilation_rates=(1,),
        pattern=SparsePatternConfig(block_size=block, sparsity_ratio=kept),
    )
    module = build(config, device)
    q, k, v = _inputs(seq, dtype, device, LONG_HEADS if device.type == "cpu" else HEADS)
    q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
    dense = lambda: torch.nn.functional.scaled_dot_product_attention(q_, k_, v_)  # noqa: E731
    with torch.no_grad():
        module(q, k, v)
        pairs = [(timed(lambda: module(q, k, v), device), timed(dense, device)) for _ in range(runs)]
    return {
        "part": "dense",
        "seq": seq,
        "dtype": _name(dtype),
        "heads": q.shape[2],
        "block": block,
        "sparsity": 1 - kept,
        "ratio": median(a / b for a, b in pairs),
        "seconds": median(a for a, _ in pairs),
        "dense_seconds": median(b for _, b in pairs),
    }


def training_row(
    pattern: str, dtype: torch.dtype, block: int, kept: int, device: torch.device, runs: int, seq: int = SEQ
) -> Row:
    """A training step (forward and backward) against the forward alone: step / forward."""
    if pattern == "dilated, 3 branches":
        config = AttentionConfig(variant="dilated", **BRANCHES)
    else:
        config = config_for(pattern, block, kept, seq)
    module = build(config, device)
    q, k, v = (x.requires_grad_() for x in _inputs(seq, dtype, device))
    grad = torch.randn_like(q)

    def forward() -> None:
        with torch.no_grad():
            module(q, k, v)

    def step() -> None:
        q.grad = k.grad = v.grad = None
        module(q, k, v).backward(grad)

    seconds, _, ratio = versus(forward, step, device, runs)
    return {
        "part": "training",
        "seq": seq,
        "attention": pattern,
        "dtype": _name(dtype),
        "block": block,
        "kept": kept,
        "forward_seconds": seconds,
        "ratio": ratio,
    }


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
        "part": "kernels",
        "dtype": _name(dtype),
        "queries": queries,
        "keys": keys,
        "forward_gflops": flops / seconds / 1e9,
        "backward_gflops": 2.5 * flops / back_seconds / 1e9,
        "ratio": ratio,
    }


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


def of_part(rows: Results, part: str) -> Results:
    """The rows of one comparison: `kernels`, `flex`, `bare`, `dense`, `training` or `memory`."""
    return [row for row in rows if row["part"] == part]


def flex_table(rows: Results) -> str:
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


def summary_table(rows: Results) -> str:
    """Markdown: the worst ratio and the geometric mean of each pattern."""
    rows = of_part(rows, "flex")

    def line(pattern: str, dtype: str) -> list[str]:
        ratios = [r["ratio"] for r in rows if r["pattern"] == pattern and r["dtype"] == dtype]
        return [pattern, dtype, f"{min(ratios):.2f}", f"{_mean(ratios):.2f}"]

    pairs = dict.fromkeys((r["pattern"], r["dtype"]) for r in rows)
    return markdown((line(*pair) for pair in pairs), ["pattern", "dtype", "worst cell", "geometric mean"])


def _mean(ratios: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def bare_table(rows: Results) -> str:
    """Markdown, as multiples of FlexAttention's speed: the bare kernel's, that after copies, and ours."""
    ours = {_cell(r): f"{r['ratio']:.2f}" for r in of_part(rows, "flex")}
    return markdown(
        (
            [*_cell(r), f"{r['in_place']:.2f}", f"{r['copied']:.2f}", ours.get(_cell(r), "")]
            for r in of_part(rows, "bare")
        ),
        ["pattern", "dtype", "block", "blocks a row", "keys in place", "copied first", "ours"],
    )


def _cell(row: Row) -> tuple[str, str, int, int]:
    return row["pattern"], row["dtype"], row["block"], row["kept"]


def dense_table(rows: Results) -> str:
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


def training_table(rows: Results) -> str:
    rows = of_part(rows, "training")
    return markdown(
        ([r["attention"], r["dtype"], r["block"], r["kept"], f"{r['ratio']:.2f}"] for r in rows),
        ["attention", "dtype", "block", "blocks a row", "step / forward"],
    )


def kernels_table(rows: Results) -> str:
    rows = of_part(rows, "kernels")
    return markdown(
        (
            [
                r["dtype"],
                r["queries"],
                r["keys"],
                f"{r['forward_gflops']:.0f}",
                f"{r['backward_gflops']:.0f}",
                f"{r['ratio']:.1f}",
            ]
            for r in rows
        ),
        ["dtype", "queries", "keys", "forward GFLOP/s", "backward GFLOP/s", "backward / forward time"],
    )


def memory_table(rows: Results) -> str:
    """Markdown: MiB of each side at its peak."""
    return markdown(
        (
            [
                r["pattern"],
                r["dtype"],
                f"{r['seq']:,}",
                *(f"{r[what] / MIB:.2f}" for what in ("out", "ours", "flex", "mask", "dense")),
            ]
            for r in of_part(rows, "memory")
        ),
        [
            "pattern",
            "dtype",
            "tokens",
            "output MiB",
            "peak MiB",
            "FlexAttention",
            "its BlockMask",
            "dense SDPA",
        ],
    )


def _patterns(quick: bool) -> tuple[str, ...]:
    """The patterns of a scope; each is compiled for itself, which takes seconds."""
    return PATTERNS[:1] if quick else PATTERNS


def _flex_steps(device: torch.device, runs: int, quick: bool) -> Iterator[Job]:
    seq = QUICK if quick else SEQ
    for pattern in _patterns(quick):
        for dtype in DTYPES:
            for block in BLOCKS[1:2] if quick else BLOCKS:
                for kept in KEPT[:1] if quick else KEPT:
                    label = f"{pattern} {_name(dtype)} {block} x {kept}"
                    yield label, partial(flex_row, pattern, dtype, block, kept, device, runs, seq)


def _bare_steps(device: torch.device, runs: int, quick: bool) -> Iterator[Job]:
    """Steps on the CPU alone, with layouts that are compiled already: those whose blocks ours gathers."""
    for pattern in () if device.type != "cpu" else PATTERNS[:1] if quick else GATHERED:
        for dtype in DTYPES:
            for block in BLOCKS[1:2] if quick else BLOCKS:
                for kept in KEPT[:1] if quick else KEPT:
                    label = f"bare {pattern} {_name(dtype)} {block} x {kept}"
                    case = (pattern, dtype, block, kept, runs, QUICK if quick else SEQ)
                    yield label, partial(bare_row, *case)


def _memory_steps(device: torch.device, runs: int, quick: bool) -> Iterator[Job]:
    """Steps with layouts that are compiled already."""
    for pattern in _patterns(quick):
        for dtype in DTYPES:
            label = f"memory {pattern} {_name(dtype)}"
            case = (pattern, dtype, BLOCKS[1], KEPT[0], device, QUICK if quick else SEQ)
            yield label, partial(memory_row, *case)


def _dense_steps(device: torch.device, runs: int, quick: bool) -> Iterator[Job]:
    seq = QUICK if quick else LONG
    for dtype in DTYPES[::-1]:
        for block, kept in ((128, 0.1), (256, 0.1), (128, 0.8)):
            label = f"dense {_name(dtype)} {block}, {1 - kept:.0%} sparse"
            yield label, partial(dense_row, dtype, block, kept, device, runs, seq)


def _kernel_steps(device: torch.device, runs: int, quick: bool) -> Iterator[Job]:
    """Steps on the CPU alone."""
    for dtype in () if device.type != "cpu" else (*DTYPES, torch.float16):
        for queries, keys in ((64, 576),) if quick else ((64, 576), (128, 1152), (256, 2304), (2048, 2048)):
            label = f"kernel {_name(dtype)} {queries} x {keys}"
            yield label, partial(kernel_row, dtype, queries, keys, runs)


def _training_steps(device: torch.device, runs: int, quick: bool) -> Iterator[Job]:
    seq = QUICK // 4 if quick else SEQ
    for dtype in DTYPES:
        for pattern in TRAINED[:1] if quick else TRAINED:
            for block in BLOCKS[1:2] if quick or pattern.startswith("dilated,") else BLOCKS:
                label = f"training {pattern} {_name(dtype)} {block}"
                kept = KEPT[0] if quick else KEPT[1]
                yield label, partial(training_row, pattern, dtype, block, kept, device, runs, seq)


def steps(scope: Scope) -> list[Job]:
    """Quick, 2,048 tokens, one block size, and one pattern that is compiled."""
    # Every layout is compiled for itself.
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 256
    parts = (_kernel_steps, _flex_steps, _bare_steps, _memory_steps, _dense_steps, _training_steps)
    runs = QUICK_RUNS if scope.quick else RUNS
    return [step for part in parts for step in part(scope.device, runs, scope.quick)]


SIDES = (("float32", BLUE, -0.16), ("bfloat16", ORANGE, 0.16))
"""Colour and place of each dtype in every panel."""


def draw(figure: Any, rows: Results) -> None:
    """Above: against FlexAttention, against dense SDPA. Below: training, and what is allocated."""
    figure.set_size_inches(10.5, 7.5)
    panels = {"flex": _draw_flex, "dense": _draw_dense, "training": _draw_training, "memory": _draw_memory}
    for axes, (part, draw_part) in zip(figure.subplots(2, 2).ravel(), panels.items(), strict=True):
        mine = of_part(rows, part)
        if mine:
            draw_part(axes, mine)
        else:
            axes.set(title=f"{part}: nothing ran", xticks=[], yticks=[])
    title(figure, "Speed and memory against FlexAttention and dense SDPA", f"{HEADS} heads x {HEAD_DIM}")


def _draw_flex(axes: Any, rows: Results) -> None:
    _dots(axes, rows, "pattern")
    axes.axvline(1, color=RED, linewidth=1)
    axes.set(
        title=f"against compiled FlexAttention, {rows[0]['seq']:,} tokens",
        xlabel="its time / ours: right of 1, ours is faster",
        xlim=(0, max(1.1, axes.get_xlim()[1])),
    )


def _draw_training(axes: Any, rows: Results) -> None:
    _dots(axes, rows, "attention")
    axes.set(title=f"training, {rows[0]['seq']:,} tokens", xlabel="time of a step / time of its forward")


def _dots(axes: Any, rows: Results, group: str) -> list[str]:
    """A dot for each row's ratio, the groups one below the other, the dtypes named at the last dots of the
    first group. Gives the groups."""
    groups = list(dict.fromkeys(row[group] for row in rows))
    for dtype, color, shift in SIDES:
        mine = [row for row in rows if row["dtype"] == dtype]
        places = [groups.index(row[group]) + shift for row in mine]
        axes.scatter([row["ratio"] for row in mine], places, color=color, s=24)
        beside = [row["ratio"] for row in mine if row[group] == groups[0]]
        if beside:
            named(axes, max(beside), shift, dtype, color)
    _groups(axes, groups)
    axes.set_xlim(0, 1.25 * max(row["ratio"] for row in rows))
    return groups


def _groups(axes: Any, groups: list[str]) -> None:
    axes.set_yticks(range(len(groups)), [name.replace(", ", ",\n") for name in groups])
    axes.set_ylim(len(groups) - 0.5, -0.6)
    axes.grid(axis="x")


def _draw_dense(axes: Any, rows: Results) -> None:
    """Our time as a share of dense time, by sparsity and block, with a bar at the share of blocks kept."""
    cases = [row | {"case": f"{row['sparsity']:.0%} left out, block {row['block']}"} for row in rows]
    groups = _dots(axes, cases, "case")
    for row in cases:
        place = groups.index(row["case"])
        axes.plot([1 - row["sparsity"]] * 2, [place - 0.3, place + 0.3], color=MUTED, linewidth=2)
    axes.axvline(1, color=RED, linewidth=1)
    heads, seq = rows[0]["heads"], rows[0]["seq"]
    maximum = max(1.0, *(row["ratio"] for row in rows))
    axes.set(
        title=f"against dense SDPA, {seq:,} tokens, {heads} heads",
        xscale="log",
        xlabel="our time / its time; grey: share of blocks kept",
        xlim=(0.03, 2.5 * maximum),
    )
    ticks = [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if tick < 2.5 * maximum]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


WHO = (("ours", "ours", "o"), ("dense", "dense SDPA", "s"), ("flex", "FlexAttention", "X"))
"""Field, name and marker of each side of the comparison of memory."""


def _draw_memory(axes: Any, rows: Results) -> None:
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    for who, name, marker in WHO:
        axes.scatter([], [], color=MUTED, marker=marker, s=28, label=name)
        for dtype, color, shift in SIDES:
            mine = [row for row in rows if row["dtype"] == dtype]
            places = [patterns.index(row["pattern"]) + shift for row in mine]
            axes.scatter([row[who] / row["out"] for row in mine], places, color=color, marker=marker, s=28)
    _groups(axes, patterns)
    maximum = max(row[who] / row["out"] for row in rows for who, *_ in WHO)
    axes.set(
        title=f"allocated beside q, k, v, {rows[0]['seq']:,} tokens",
        xlim=(0, 1.1 * maximum),
        xlabel="peak, lists and mask included, in outputs",
    )
    axes.legend(loc="center", bbox_to_anchor=(0.62, 0.5), handletextpad=0.1)


def findings(rows: Results) -> Findings:
    ratios = [row["ratio"] for row in of_part(rows, "flex")]
    sparse = [row for row in of_part(rows, "dense") if row["sparsity"] > 0.5]
    held = of_part(rows, "memory")
    clauses = []
    if ratios:
        clauses.append(
            f"{_mean(ratios):.2f} times FlexAttention's speed in the geometric mean over {len(ratios)} "
            f"layouts, {min(ratios):.2f} in the worst"
        )
    if sparse:
        shares = [row["ratio"] for row in sparse]
        clauses.append(
            f"a tenth of the blocks takes {min(shares):.1%} to {max(shares):.1%} of dense SDPA's time at "
            f"{sparse[0]['seq']:,} tokens"
        )

    def maximum(who: str, dtype: str) -> str:
        return f"{rounded_up(max(row[who] / row['out'] for row in held if row['dtype'] == dtype), 2):.2f}"

    dtypes = list(dict.fromkeys(row["dtype"] for row in held))
    leanness = "; ".join(
        f"in {dtype} {maximum('ours', dtype)}, dense SDPA {maximum('dense', dtype)}, FlexAttention with its "
        f"mask {maximum('flex', dtype)}"
        for dtype in dtypes
    )
    if held:
        clauses.append(f"beside q, k and v ours allocates at most so many times the output: {leanness}")
    return Findings(
        "Asked: how fast and how lean is each attention against compiled FlexAttention and dense SDPA?",
        f"Found: {'; '.join(clauses) or 'neither peer ran beside it'}.",
        "The original project compares implementations with each other, one Python step a block pair, never "
        "with a peer.",
    )


STUDY = Study(
    steps,
    {
        "peers-kernels": kernels_table,
        "peers-flex": flex_table,
        "peers-flex-summary": summary_table,
        "peers-bare": bare_table,
        "peers-dense": dense_table,
        "peers-training": training_table,
        "peers-memory": memory_table,
    },
    draw,
    findings,
    independent=True,
)
