"""Work in closed form against the programs that the library runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from edges import WINDOWED, by_token

from attention import (
    AdaptiveConfig,
    AttentionConfig,
    MultiheadConfig,
    SparsePatternConfig,
    block_sparse,
    dilated,
    token_window,
)
from attention.block_sparse import chosen_tiles
from attention.layout import build_layout, row_blocks
from attention.ops.program import Gather
from attention.sizes.row_bounds import chosen_rows, rows_of
from attention.sizes.shape import Shape
from attention.sizes.tiles import sparse_extent
from attention.sizes.token_tiles import token_window_of
from planner.configs import Columns, columns_of
from planner.fitting.speed_runs import timing_samples
from planner.memory.cut_programs import cut_program
from planner.memory.dispatch import goes_apart, kernel_of, shape_of
from planner.memory.machines import Cpu, Cuda
from planner.speed.calls import Calls
from planner.speed.rates import default_cpu_rates
from planner.speed.work import NAMES, backward, cpu_kernel, forward, gpu_kernel, work_of
from planner.workload import Workload

KERNEL = cpu_kernel(2)
MACHINE = Cpu(2, dtype="float32")
KINDS = ("dilated", "local_window", "global_local", "dilated_sparse", "adaptive")


def chosen(config, shape: Shape, causal: bool) -> list:
    """Tiles of an adaptive attention with some choice of blocks."""
    size = config.pattern.block_size
    blocks = -(-shape.seq // size)
    kept = min(row_blocks(config.pattern.sparsity_ratio, blocks), blocks)
    lists = np.full((shape.heads, blocks, kept), -1, np.int64)
    for row in range(blocks):
        count = min(row + 1, kept) if causal else kept
        lists[:, row, :count] = np.arange(row + 1)[-count:] if causal else np.arange(count)
    return list(chosen_tiles(lists, chosen_rows(size, kept), shape))


def real(config, workload, shape: Shape) -> tuple[list[Calls], int]:
    """The calls of the program that runs, one by one, and its tiles."""
    largest = (1, 1)  # of a gather
    if config.pattern is not None:
        rows = rows_of(config, workload.seq, workload.causal)
        kinds = {kind.name: kind for kind in sparse_extent(rows, shape).kinds}
        largest = kinds["lists"].largest
    if config.variant == "adaptive":
        tiles = chosen(config, shape, workload.causal)
    elif config.token_edges:
        tiles = list(token_window.tiles(token_window_of(config, workload.causal), shape))
    elif config.variant == "block_sparse":
        layout = build_layout(config, workload.seq, workload.causal)
        tiles = list(block_sparse.tiles(layout, rows, shape))
    else:
        tiles = list(dilated.tiles(shape.within(config.branches), shape))
    return calls_of(tiles, shape, largest), len(tiles)


def calls_of(tiles, shape: Shape, largest: tuple[int, int] = (1, 1)) -> list[Calls]:
    """The calls of tiles; `largest`: (views, keys) of the program's largest gather."""
    calls = []
    for tile in tiles:
        for call in tile.calls:
            span, keys = call.queries[0], call.keys
            gathers = isinstance(keys, Gather)
            calls.append(
                Calls(
                    1,
                    span.batch,
                    span.heads,
                    span.length,
                    keys.length,
                    len(call.queries),
                    groups=None if gathers and keys.blocks.ndim > 2 else min(span.heads, shape.kv_heads),
                    causal=int(call.mask == "causal"),
                    later=int(tile.merge and not call.first),
                    step=0 if gathers or not keys.overlaps else keys.batch_step,
                    unit=keys.size if gathers else 0,
                    largest=largest if gathers else (1, 1),
                )
            )
    return calls


def samples(kind: str, count: int, seed: int = 7):
    return islice(timing_samples("cpu", seed, [kind]), count)


def both(config, workload):
    """[(exact, closed form)] of the forward and the backward of one batch item."""
    workload = workload.model_copy(update={"mode": "training", "batch": 1})
    machine = replace(MACHINE, dtype=workload.dtype)
    columns = columns_of(config, workload.seq)
    shape = shape_of(columns, workload, machine)
    if goes_apart(columns, workload, machine):
        return []
    work = work_of(columns, workload, machine, KERNEL, apart=False)
    assert work.backward is not None
    return [
        (forward(*real(config, workload, shape), shape, KERNEL), work.forward),
        (backward(*real(config, workload, shape.backward()), shape.backward(), KERNEL), work.backward),
    ]


EXACT = ("work", "pairs", "gathered", "summed", "widened")


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_are_what_the_programs_do(kind):
    assert_close(kind, samples(kind, 40))


@pytest.mark.parametrize("kind", WINDOWED)
def test_closed_forms_of_windows_that_end_at_the_token_are_what_the_programs_do(kind):
    drawn = enumerate(samples(kind, 40))
    assert_close(kind, (sample._replace(config=by_token(sample.config, n % 41 - 20)) for n, sample in drawn))


def assert_close(kind, drawn):
    errors: dict[str, list[float]] = {}
    rates = default_cpu_rates(MACHINE)
    for sample in drawn:
        for step, (exact, close) in zip(("forward", "backward"), both(*sample), strict=False):
            for name in EXACT:
                if exact[name]:
                    errors.setdefault(name, []).append(abs(close[name] / exact[name] - 1))
                else:
                    assert close[name] < 0.05 * exact["work"], name
            # What a last, short block or segment changes by a call matters by the time that it takes.
            costs = rates.costs(step, sample.workload.dtype)
            seconds = [
                sum(cost * total[name] for name, cost in costs.items() if exact[name])
                for total in (close, exact)
            ]
            errors.setdefault("seconds", []).append(abs(seconds[0] / seconds[1] - 1))
    assert {"work", "pairs", "seconds"} <= errors.keys()
    # Of dilated_sparse few rows are looked at, which over few blocks may be others than most.
    bound = 0.25 if kind == "dilated_sparse" else 0.1
    for name, found in errors.items():
        assert np.median(found) <= 0.005, name
        assert np.quantile(found, 0.9) <= bound, name


def test_dense_attention_with_shared_heads_is_a_program_where_the_kernel_takes_none():
    config, workload = (
        AttentionConfig(variant="dense"),
        Workload(seq=3000, heads=8, kv_heads=2, dtype="float32"),
    )
    columns, machine = columns_of(config, workload.seq), replace(MACHINE, groups=False)
    assert goes_apart(columns, workload, MACHINE)
    assert not goes_apart(columns, workload, machine)
    work = work_of(columns, workload, machine, KERNEL, apart=False)
    alone = workload.model_copy(update={"kv_heads": None})
    assert goes_apart(columns, alone, MACHINE)
    whole = work_of(columns, alone, MACHINE, KERNEL, apart=True)
    assert work.forward["work"] == pytest.approx(whole.forward["work"], rel=0.01)
    assert work.forward["launches"] > whole.forward["launches"] == 1


def test_flex_is_one_call_where_its_lists_are_short_beside_the_floor():
    seq = np.array([1 << 18, 1 << 20])
    columns = Columns("block_sparse", "global_local", seq=seq, block_size=128, window=1024, global_tokens=64)
    workload, ampere = Workload(seq=1), Cuda((8, 0))
    for at, apart in enumerate((True, False)):
        one = columns_of(columns.config(at, workload), int(seq[at]))
        work = work_of(one, workload, ampere, gpu_kernel(100), apart=apart)
        assert (work.forward["flex.work"] > 0, work.forward["flash2.work"] > 0) == (apart, not apart)


def test_a_causal_kernel_computes_whole_blocks_of_keys():
    config = AttentionConfig(variant="dense")
    for seq, share in ((512, 1.0), (1024, 0.75), (5120, 0.55)):
        pairs = [
            work_of(
                columns_of(config, seq),
                Workload(seq=seq, dtype="float32", causal=causal),
                MACHINE,
                KERNEL,
                apart=True,
            ).forward["pairs"]
            for causal in (True, False)
        ]
        assert pairs[0] / pairs[1] == pytest.approx(share)


def test_idle_workers_count():
    config, workload = AttentionConfig(variant="dense"), Workload(seq=16, heads=3, dtype="float32")
    columns = columns_of(config, 16)
    two, one = (
        work_of(columns, workload, MACHINE, cpu_kernel(threads), apart=True).forward["work"]
        for threads in (2, 1)
    )
    assert two / one == pytest.approx(4 / 3)


def test_a_batch_is_as_many_programs():
    columns = Columns("block_sparse", "local_window", seq=4096, block_size=64, window=512)
    once, thrice = (
        work_of(columns, Workload(seq=1, batch=batch, dtype="float32"), MACHINE, KERNEL, apart=False).forward
        for batch in (1, 3)
    )
    for name in NAMES:
        assert thrice[name] == pytest.approx((1 if name == "passes" else 3) * once[name]), name


def test_a_checkpoint_runs_the_forward_twice():
    totals = []
    for checkpoint in (False, True):
        config = AttentionConfig(
            variant="dense", multihead=MultiheadConfig(embed_dim=512, num_heads=8, checkpoint=checkpoint)
        )
        workload = Workload(seq=256, mode="training", dtype="float32")
        totals.append(work_of(columns_of(config, 256), workload, MACHINE, KERNEL, apart=True))
    assert totals[1].forward["work"] == 2 * totals[0].forward["work"]
    assert totals[1].backward == totals[0].backward
    assert totals[0].forward["matmul"] == 256 * 512 * 512 * 4


@pytest.mark.parametrize("capability, takes", [((9, 0), 1), ((10, 3), 1), ((8, 0), 0), ((12, 0), 0)])
def test_cudnns_calls_are_those_that_flash_attention_has_without_it(capability, takes):
    workload = Workload(seq=1, heads=8, kv_heads=2, dtype="bfloat16", mode="training", causal=True)
    window = Columns("block_sparse", "local_window", seq=4096, block_size=64, window=512)
    several = np.array([256, 4096])
    for columns, share in ((Columns("dense", seq=several), np.array([0, takes])), (window, 0)):
        flash, here = (
            work_of(columns, workload, Cuda(capability, cudnn=cudnn), gpu_kernel(100), apart=False)
            for cudnn in (False, True)
        )
        for one, other in ((flash.forward, here.forward), (flash.backward, here.backward)):
            for name in NAMES:
                kernel, _, unit = name.partition(".")
                expected = np.asarray(one[f"flash2.{unit}" if kernel == "cudnn" else name])
                expected = expected * {"cudnn": share, "flash2": 1 - np.asarray(share)}.get(kernel, 1)
                # Of few tiles flash attention splits the keys, and cuDNN's is not known to.
                np.testing.assert_allclose(other[name], expected, err_msg=name, rtol=0.5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", ["block_sparse", "adaptive"])
def test_lists_on_a_gpu_are_the_calls_that_the_kernel_choice_counts(variant, causal):
    pattern = SparsePatternConfig(pattern_type="dilated_sparse", block_size=64, sparsity_ratio=0.1)
    fields = {"segment_lengths": (2048, 16384), "dilation_rates": (1, 4)}
    if variant == "adaptive":
        fields = {"adaptive": AdaptiveConfig(num_heads=8, head_dim=64)}
    config = AttentionConfig(variant=variant, pattern=pattern, backend="sdpa", **fields)
    machine = Cuda((8, 0))
    for seq in (1000, 16384, 65_500):
        workload = Workload(seq=seq, kv_heads=2, causal=causal, mode="training", dtype="bfloat16")
        work = work_of(columns_of(config, seq), workload, machine, gpu_kernel(108), apart=False)
        assert work.forward["launches"] == kernel_of(config, workload, machine).calls
        for total in (work.forward, work.backward):
            assert total["gathers"] <= total["launches"]
            assert total["gathered"] > 0


def totals(config, workload, machine=MACHINE):
    columns = columns_of(config, workload.seq)
    apart = bool(goes_apart(columns, workload, machine))
    kernel = KERNEL if isinstance(machine, Cpu) else gpu_kernel(132)
    return work_of(columns, workload, machine, kernel, apart=apart)


CUT = [
    AttentionConfig(variant="dense"),
    AttentionConfig(variant="dilated", segment_lengths=[512, 2048], dilation_rates=[1, 4]),
    *(
        AttentionConfig(
            variant="block_sparse",
            pattern=SparsePatternConfig(block_size=64, local_window_size=256, **fields),
            segment_lengths=branches,
            dilation_rates=branches and [1, 2],
        )
        for fields, branches in (
            ({"pattern_type": "local_window"}, ()),
            ({"pattern_type": "local_window", "edges": "token"}, ()),
            ({"pattern_type": "global_local", "global_tokens": 64}, ()),
            ({"pattern_type": "dilated_sparse", "sparsity_ratio": 0.05}, [1024, 4096]),
        )
    ),
]


def cut_calls(config, workload, shape):
    """`real`, of the program that is cut."""
    columns = columns_of(config, workload.seq)
    forms = shape_of(columns, workload, MACHINE)
    program = cut_program(config, workload, forms)
    return calls_of(program.tiles(0, shape), shape)


@pytest.mark.parametrize("config", CUT)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "fields", [{"queries": 512}, {"queries": 4096}, {"documents": (2048, 4096, 1024, 1024)}]
)
def test_work_of_cut_programs_is_about_what_they_do(config, causal, fields):
    workload = Workload(seq=8192, heads=4, head_dim=64, dtype="float32", causal=causal, **fields)
    if goes_apart(columns_of(config, workload.seq), workload, MACHINE):
        return
    shape = shape_of(columns_of(config, workload.seq), workload, MACHINE)
    exact = forward(cut_calls(config, workload, shape), 1, shape, KERNEL)
    closed = totals(config, workload).forward
    for name in ("work", "pairs"):
        assert closed[name] == pytest.approx(exact[name], rel=0.35), name
    assert closed["tokens"] == exact["tokens"]


@pytest.mark.parametrize("config", CUT)
def test_all_queries_and_one_document_are_the_whole_work(config):
    plain = Workload(seq=4096, heads=4, mode="training", causal=True)
    for fields in ({"queries": 4096}, {"documents": (4096,)}):
        assert totals(config, plain.model_copy(update=fields)) == totals(config, plain)


def test_many_cut_candidates_are_as_one_by_one():
    windows = np.array([128, 256, 1024])
    columns = Columns("block_sparse", "local_window", seq=4096, block_size=64, window=windows)
    for fields in ({"queries": 100}, {"documents": (1024, 3072)}, {"sinks": True}):
        workload = Workload(seq=4096, heads=4, mode="training", causal=True, **fields)
        together = work_of(columns, workload, MACHINE, KERNEL, apart=False)
        for at, window in enumerate(windows.tolist()):
            one = totals(columns.config(at, workload), workload)
            for many, few in zip(together, one, strict=True):
                for name in NAMES:
                    assert np.broadcast_to(many[name], 3)[at] == pytest.approx(few[name]), (name, window)
