"""What a device takes for itself and what kernels allocate, against values computed by hand."""

import dataclasses

import numpy as np
import pytest

from attention import ConfigError
from planner.gpus import find, known
from planner.memory.cuda_kernels import (
    Products,
    backward_stages,
    column_sum,
    forward_lines,
    largest,
    plain_backward,
    plain_forward,
    splits,
)
from planner.memory.cuda_process import DeviceLine, blas_workspace, device_lines, total

MIB = 1 << 20
KERNELS = ["flash", "efficient", "flex"]


def sizes(lines):
    return {line.name: line.bytes for line in lines}


def every_line(kernel, **call):
    """Of all stages of a backward call of one stage after its results."""
    ahead, stage = backward_stages(kernel, **call)
    return *ahead, *stage


def test_a_headless_card_has_only_a_context():
    lines = device_lines("Turing")
    assert sizes(lines) == {"CUDA context": 644_245_095, "display": 0, "other processes": 0}
    assert not any(line.inside_allocator for line in lines)
    assert lines[0].source.startswith("judgement")


def test_contexts_that_were_seen_are_used():
    assert device_lines("Ada")[0].bytes == 426 * MIB
    assert device_lines("Blackwell")[0].bytes == 635 * MIB
    measured = device_lines("Ada", context_bytes=300 * MIB)[0]
    assert (measured.bytes, measured.source) == (300 * MIB, "measured on this device")
    assert device_lines("Ada", context_bytes=0)[0].bytes == 0


def test_a_desktop_and_others_take_their_share():
    lines = device_lines("Pascal", display="desktop", others_bytes=1000)
    assert total(lines) == 644_245_095 + 966_367_642 + 1000
    assert lines[1].source.startswith("judgement")


@pytest.mark.parametrize("wrong", [{"display": "tv"}, {"others_bytes": -1}, {"context_bytes": -1}])
def test_nonsense_about_the_device_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        device_lines("Ada", **wrong)


@pytest.mark.parametrize(
    "capability, each",
    [
        ((6, 1), 8_519_680),
        ((7, 5), 8_519_680),
        ((8, 9), 8_519_680),
        ((9, 0), 32 * MIB),
        ((10, 0), 32 * MIB),
        ((12, 0), 32 * MIB),
        ((10, 3), 32 * MIB),
        ((11, 0), 8_519_680),
        ((12, 1), 32 * MIB),
    ],
)
def test_library_workspaces_by_capability(capability, each):
    line = blas_workspace(capability)
    assert (line.name, line.bytes, line.inside_allocator) == ("cuBLAS workspace", each, True)


SHAPE = {"batch": 1, "heads": 16, "queries": 131_072, "keys": 131_072, "head_dim": 64, "itemsize": 2}
ODD = {"batch": 3, "heads": 4, "queries": 1000, "keys": 500, "head_dim": 40, "itemsize": 2}


def test_flash_at_131072_tokens():
    found = sizes(forward_lines("flash", **SHAPE))
    assert found == {
        "log-sum-exp": 8 * MIB,
        "sums of parts of the keys": 0,
        "log-sum-exp of parts of the keys": 0,
        "random state": 16,
        "random offset": 8,
    }
    found = sizes(every_line("flash", **SHAPE))
    assert {name: count for name, count in found.items() if count} == {
        "random state": 16,
        "softmax_d": 8 * MIB,
        "dq_accum": 512 * MIB,
    }


def test_flash_rounds_queries_to_128_and_channels_to_32_or_64():
    for head_dim, channels in ((40, 64), (72, 96), (128, 128), (136, 192), (160, 192), (200, 256)):
        found = sizes(every_line("flash", **(ODD | {"head_dim": head_dim})))
        assert found["softmax_d"] == 4 * 3 * 4 * 1024
        assert found["dq_accum"] == 4 * 3 * 4 * 1024 * channels


def test_flash_copies_what_lies_apart():
    found = sizes(every_line("flash", dense=0, whole=False, **ODD))
    assert found["gradient of out in one piece"] == found["out in one piece"] == 3 * 4 * 1000 * 40 * 2
    assert found["log-sum-exp in one piece"] == 4 * 3 * 4 * 1000


def test_flash_cuts_keys_where_multiprocessors_are_idle():
    # One query over 131,072 keys in 8 heads: 8 tiles for 2 x 108 places, 23 parts.
    assert splits(8, 131_072, 64, 108) == 23
    assert splits(173, 131_072, 64, 108) == 1
    assert splits(8, 256, 64, 108) == 1
    found = sizes(forward_lines("flash", **(SHAPE | {"heads": 8, "queries": 1})))
    assert found["sums of parts of the keys"] == 4 * 23 * 8 * 64
    assert found["log-sum-exp of parts of the keys"] == 4 * 23 * 8


def test_deterministic_flash_keeps_a_sum_a_split():
    # 108 multiprocessors over 12 (batch, head) pairs make 9 splits, 100 make ceil(8.3) = 9, 12 make 1.
    base = sizes(every_line("flash", **ODD))
    for multiprocessors, parts in ((108, 9), (100, 9), (12, 1)):
        found = sizes(every_line("flash", deterministic_sms=multiprocessors, **ODD))
        assert found["dq_accum"] == parts * base["dq_accum"]


# Card, bytes a number, channels, (batch, heads, queries, keys), and what a dry run of torch 2.13.0 had in its
# memory-efficient attention at most: forward with out, backward with dq, dk and dv.
DRY = [
    ("gtx1080", 2, 40, (1, 2, 100, 200), 17024, 162400),
    ("gtx1080", 2, 72, (40, 8, 64, 300), 3031040, 65095680),
    ("gtx1080", 2, 104, (1, 2, 100, 200), 42624, 512672),
    ("gtx1080", 2, 136, (40, 8, 64, 300), 16793600, 110648320),
    ("gtx1080", 2, 256, (1, 2, 100, 200), 308224, 1139744),
    ("gtx1080", 4, 40, (1, 2, 100, 200), 33024, 225600),
    ("gtx1080", 4, 72, (40, 8, 64, 300), 5980160, 73154560),
    ("gtx1080", 4, 104, (1, 2, 100, 200), 84224, 584000),
    ("gtx1080", 4, 136, (40, 8, 64, 300), 11223040, 138035200),
    ("gtx1080", 4, 256, (1, 2, 100, 200), 205824, 1435200),
    ("v100-sxm2-16gb", 2, 40, (1, 2, 100, 200), 17024, 162400),
    ("v100-sxm2-16gb", 2, 72, (40, 8, 64, 300), 3031040, 54609920),
    ("v100-sxm2-16gb", 2, 104, (1, 2, 100, 200), 42624, 381536),
    ("v100-sxm2-16gb", 2, 136, (40, 8, 64, 300), 16793600, 136862720),
    ("v100-sxm2-16gb", 2, 256, (1, 2, 100, 200), 308224, 1926048),
    ("v100-sxm2-16gb", 4, 40, (1, 2, 100, 200), 33024, 258400),
    ("v100-sxm2-16gb", 4, 72, (40, 8, 64, 300), 5980160, 77670400),
    ("v100-sxm2-16gb", 4, 104, (1, 2, 100, 200), 84224, 631200),
    ("v100-sxm2-16gb", 4, 136, (40, 8, 64, 300), 11223040, 142556160),
    ("v100-sxm2-16gb", 4, 256, (1, 2, 100, 200), 205824, 1492000),
    ("t4", 2, 40, (1, 2, 100, 200), 17024, 162400),
    ("t4", 2, 72, (40, 8, 64, 300), 3031040, 54609920),
    ("t4", 2, 104, (1, 2, 100, 200), 42624, 381536),
    ("t4", 2, 136, (40, 8, 64, 300), 16793600, 136862720),
    ("t4", 2, 256, (1, 2, 100, 200), 308224, 1926048),
    ("t4", 4, 40, (1, 2, 100, 200), 33024, 258400),
    ("t4", 4, 72, (40, 8, 64, 300), 5980160, 77670400),
    ("t4", 4, 104, (1, 2, 100, 200), 84224, 631200),
    ("t4", 4, 136, (40, 8, 64, 300), 11223040, 142556160),
    ("t4", 4, 256, (1, 2, 100, 200), 205824, 1492000),
    ("rtx3090", 2, 40, (1, 2, 100, 200), 17024, 162400),
    ("rtx3090", 2, 72, (40, 8, 64, 300), 3031040, 54609920),
    ("rtx3090", 2, 104, (1, 2, 100, 200), 42624, 905888),
    ("rtx3090", 2, 136, (40, 8, 64, 300), 16793600, 136862720),
    ("rtx3090", 2, 256, (1, 2, 100, 200), 308224, 1926048),
    ("rtx3090", 4, 40, (1, 2, 100, 200), 33024, 258400),
    ("rtx3090", 4, 72, (40, 8, 64, 300), 5980160, 77670400),
    ("rtx3090", 4, 104, (1, 2, 100, 200), 84224, 631200),
    ("rtx3090", 4, 136, (40, 8, 64, 300), 11223040, 142556160),
    ("rtx3090", 4, 256, (1, 2, 100, 200), 205824, 1492000),
    ("h100-sxm", 2, 40, (1, 2, 100, 200), 17024, 162400),
    ("h100-sxm", 2, 72, (40, 8, 64, 300), 3031040, 54604800),
    ("h100-sxm", 2, 104, (1, 2, 100, 200), 42624, 381504),
    ("h100-sxm", 2, 136, (40, 8, 64, 300), 16793600, 136862720),
    ("h100-sxm", 2, 256, (1, 2, 100, 200), 308224, 1926048),
    ("h100-sxm", 4, 40, (1, 2, 100, 200), 33024, 258400),
    ("h100-sxm", 4, 72, (40, 8, 64, 300), 5980160, 88156160),
    ("h100-sxm", 4, 104, (1, 2, 100, 200), 84224, 631136),
    ("h100-sxm", 4, 136, (40, 8, 64, 300), 11223040, 158284800),
    ("h100-sxm", 4, 256, (1, 2, 100, 200), 205824, 1491872),
    ("rtx5090", 2, 40, (1, 2, 100, 200), 17024, 162400),
    ("rtx5090", 2, 72, (40, 8, 64, 300), 3031040, 65095680),
    ("rtx5090", 2, 104, (1, 2, 100, 200), 42624, 905888),
    ("rtx5090", 2, 136, (40, 8, 64, 300), 16793600, 136862720),
    ("rtx5090", 2, 256, (1, 2, 100, 200), 308224, 1926048),
    ("rtx5090", 4, 40, (1, 2, 100, 200), 33024, 258400),
    ("rtx5090", 4, 72, (40, 8, 64, 300), 5980160, 77670400),
    ("rtx5090", 4, 104, (1, 2, 100, 200), 84224, 631200),
    ("rtx5090", 4, 136, (40, 8, 64, 300), 11223040, 142556160),
    ("rtx5090", 4, 256, (1, 2, 100, 200), 205824, 1492000),
]


@pytest.mark.parametrize("card, itemsize, head_dim, shape, forward, backward", DRY)
def test_the_efficient_kernels_take_what_a_dry_run_took(card, itemsize, head_dim, shape, forward, backward):
    batch, heads, queries, keys = shape
    call = {
        "batch": batch,
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "head_dim": head_dim,
        "itemsize": itemsize,
    }
    out = batch * heads * queries * head_dim * itemsize
    assert out + total(forward_lines("efficient", **call)) == forward
    ahead, *stages = backward_stages("efficient", dense=0, capability=find(card).capability, **call)
    ours = {"random state", "log-sum-exp, padded"}  # made before the operator is called
    copied = total(line for line in ahead if line.name not in ours)
    most = copied + max(map(total, stages))
    assert out + 2 * (batch * heads * keys * head_dim * itemsize) + most == backward


@pytest.mark.parametrize(
    "rows, columns, itemsize, capability, multiprocessors, scratch",
    [
        (2048, 768, 2, (9, 0), 114, (12_582_912, 24)),
        (8, 512, 2, (8, 0), 108, (0, 0)),
        (256, 512, 2, (8, 0), 108, (0, 0)),
        (16_384, 512, 2, (8, 0), 108, (64 * MIB, 16)),
    ],
)
def test_a_bias_gradient_is_summed_in_blocks(rows, columns, itemsize, capability, multiprocessors, scratch):
    assert column_sum(rows, columns, itemsize, capability, multiprocessors) == scratch


def plain_peak(steps):
    """Most bytes that are alive at once."""
    alive, peak = {}, 0
    for step in steps:
        for name in step.frees:
            del alive[name]
        alive[step.line.name] = step.line.bytes
        peak = max(peak, sum(alive.values()))
    return peak


def test_plain_products_hold_whole_scores():
    rows, channels = 8 * 12 * 1000, 8 * 12 * 40 * 8
    sizes = Products(
        queries=channels * 1000,
        keys=channels * 500,
        scores=rows * 500 * 8,
        rows=rows * 8,
        hidden=0,
        copies=1,
        copies_keys=1,
    )
    assert plain_peak(plain_forward(sizes)) == rows * 8 * (1 + 2 * 500) + channels * (500 + 1000)
    # Weights, two more of the scores' size, delta.
    assert plain_peak(plain_backward(sizes)) == rows * 8 * (1 + 3 * 500)
    # Where channels are many: scores, weights and delta, dq, dk and dv, and a copy of the gradient.
    wide = sizes._replace(queries=sizes.queries * 32, keys=sizes.keys * 32)
    held = rows * 8 * (1 + 2 * 500) + 32 * channels * (1000 + 2 * 500 + 1000)
    assert plain_peak(plain_backward(wide)) == held


def test_flex_holds_rows_only():
    rows = 4 * 12 * 1000
    assert sizes(forward_lines("flex", **ODD)) == {"log-sum-exp": rows, "row maxima": rows}
    assert sizes(every_line("flex", **ODD)) == {"delta": rows}


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ConfigError, match="'cudnn'"):
        forward_lines("cudnn", **ODD)
    with pytest.raises(ConfigError, match="'cudnn'"):
        backward_stages("cudnn", **ODD)


GRID = {
    "batch": [1, 2, 3, 1, 70_000],
    "heads": [8, 4, 6, 16, 4],
    "queries": [1, 127, 128, 131_072, 33],
    "keys": [1, 129, 4096, 131_072, 65],
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256])
def test_arrays_give_what_ints_give(kernel, itemsize, head_dim):
    arrays = {name: np.array(values, dtype=np.int64) for name, values in GRID.items()}
    options = {"capability": (7, 0), "deterministic_sms": 80, "dense": 0, "whole": False}

    def both(values):
        call = {**values, "itemsize": itemsize, "head_dim": head_dim}
        return (forward_lines(kernel, **call), *backward_stages(kernel, **options, **call))

    rows = [both({name: values[i] for name, values in GRID.items()}) for i in range(5)]
    for n, stage in enumerate(both(arrays)):
        for at, line in enumerate(stage):
            expected = [row[n][at].bytes for row in rows]
            assert all(type(count) is int for count in expected)
            assert np.broadcast_to(line.bytes, 5).tolist() == expected
    counts = [tuple(line.bytes for line in stage) for stage in both(arrays)]
    most = [largest(tuple(tuple(line.bytes for line in stage) for stage in row)) for row in rows]
    together = [np.broadcast_to(part, 5).tolist() for part in largest(tuple(counts))]
    assert together == [list(parts) for parts in zip(*most, strict=True)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_line_says_what_it_is(kernel):
    for stage in (forward_lines(kernel, **ODD), *backward_stages(kernel, **ODD)):
        assert all(line.inside_allocator and line.component == "workspace" for line in stage)
        assert all(line.name and line.source for line in stage)


def test_every_known_architecture_has_a_context():
    for architecture in {gpu.architecture for gpu in known()}:
        context = device_lines(architecture)[0]
        assert 0.1 * 2**30 < context.bytes < 2**30
        assert context.component == "context"


def test_lines_are_values():
    line = DeviceLine("a", "context", 1, "as given", False)
    assert line == dataclasses.replace(line)
    with pytest.raises(dataclasses.FrozenInstanceError):
        line.bytes = 2  # type: ignore[misc]
    assert total(()) == 0
