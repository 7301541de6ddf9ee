"""What a device takes for itself and what kernels allocate, against values computed by hand."""

import dataclasses

import numpy as np
import pytest

from attention import ConfigError
from planner.gpus import known
from planner.memory.cuda_kernels import backward_lines, forward_lines
from planner.memory.cuda_process import DeviceLine, device_lines, library_lines, total

MIB = 1 << 20
KERNELS = ["flash", "efficient", "flex", "plain"]


def sizes(lines):
    return {line.name: line.bytes for line in lines}


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
    ],
)
def test_library_workspaces_by_capability(capability, each):
    assert sizes(library_lines(capability)) == {"cuBLAS workspace": each, "cuBLASLt workspace": MIB}
    assert total(library_lines(capability, handles=3)) == 3 * (each + MIB)
    assert all(line.inside_allocator for line in library_lines(capability))


SHAPE = {"batch": 1, "heads": 16, "queries": 131_072, "keys": 131_072, "head_dim": 64, "itemsize": 2}
ODD = {"batch": 3, "heads": 4, "queries": 1000, "keys": 500, "head_dim": 40, "itemsize": 2}


def test_flash_at_131072_tokens():
    assert sizes(forward_lines("flash", **SHAPE)) == {"log-sum-exp": 8 * MIB}
    assert sizes(backward_lines("flash", kv_heads=16, **SHAPE)) == {
        "softmax_d": 8 * MIB,
        "dq_accum": 512 * MIB,
        "dk and dv expanded": 0,
    }


def test_flash_rounds_queries_to_128_and_channels_to_32():
    found = sizes(backward_lines("flash", kv_heads=4, **ODD))
    assert found["softmax_d"] == 4 * 3 * 4 * 1024
    assert found["dq_accum"] == 4 * 3 * 4 * 1024 * 64


def test_flash_expands_dk_and_dv_for_grouped_heads():
    found = sizes(backward_lines("flash", kv_heads=2, **ODD))
    assert found["dk and dv expanded"] == 2 * 3 * 500 * 4 * 40 * 2


def test_deterministic_flash_keeps_a_sum_a_split():
    # 108 multiprocessors over 12 (batch, head) pairs make 9 splits, 100 make ceil(8.3) = 9, 12 make 1.
    base = sizes(backward_lines("flash", kv_heads=4, **ODD))["dq_accum"]
    for multiprocessors, splits in ((108, 9), (100, 9), (12, 1)):
        lines = backward_lines("flash", kv_heads=4, deterministic_sms=multiprocessors, **ODD)
        assert sizes(lines)["dq_accum"] == splits * base


def test_efficient_forward_pads_its_log_sum_exp_to_32():
    assert sizes(forward_lines("efficient", **ODD)) == {"log-sum-exp": 4 * 3 * 4 * 1024, "output sums": 0}
    few = forward_lines("efficient", **(ODD | {"queries": 33}))
    assert few[0].bytes == 4 * 3 * 4 * 64


@pytest.mark.parametrize(
    "head_dim, itemsize, sums", [(128, 2, 0), (136, 2, 4 * 3 * 4 * 1000 * 136), (136, 4, 0)]
)
def test_efficient_forward_sums_wide_16_bit_outputs_in_float32(head_dim, itemsize, sums):
    lines = forward_lines("efficient", **(ODD | {"head_dim": head_dim, "itemsize": itemsize}))
    assert sizes(lines)["output sums"] == sums


def test_efficient_backward_up_to_64_channels():
    # 16 tiles of 64 queries by one of 64 channels, 4 float32 more each; dk and dv stay in registers.
    assert sizes(backward_lines("efficient", kv_heads=4, **ODD)) == {
        "delta": 2 * 4 * 3 * 4 * 1000,
        "dq accumulator": 4 * 12 * (16 * 64 * 64 + 16 * 4),
        "dk and dv accumulators": 0,
        "grad x out": 0,
    }


def test_efficient_backward_beyond_64_channels():
    # 500 keys make 8 blocks of 64; 200 // 12 = 16 splits would be allowed.
    found = sizes(backward_lines("efficient", kv_heads=4, **(ODD | {"head_dim": 100})))
    assert found["dq accumulator"] == 4 * 12 * (1024 * 128 + 4 * 16 * 2)
    assert found["dk and dv accumulators"] == 4 * 12 * 2 * 8 * 64 * 128
    few = sizes(backward_lines("efficient", kv_heads=4, **(ODD | {"head_dim": 100, "queries": 33})))
    assert few["dq accumulator"] == 4 * 12 * (128 * 128 + 4 * 1 * 2)
    long = sizes(backward_lines("efficient", kv_heads=4, **(ODD | {"head_dim": 100, "keys": 10_000})))
    assert long["dk and dv accumulators"] == 4 * 12 * 2 * 16 * 64 * 128
    many = ODD | {"head_dim": 100, "batch": 1000, "keys": 10_000}
    assert sizes(backward_lines("efficient", kv_heads=4, **many))["dk and dv accumulators"] == (
        4 * 4000 * 2 * 1 * 64 * 128
    )


def test_efficient_backward_in_float32_keeps_no_dk_and_dv():
    found = sizes(backward_lines("efficient", kv_heads=4, **(ODD | {"head_dim": 100, "itemsize": 4})))
    assert found["dk and dv accumulators"] == 0


@pytest.mark.parametrize(
    "capability, head_dim, itemsize, floats",
    [((7, 0), 100, 2, 3), ((7, 0), 64, 2, 0), ((7, 0), 100, 4, 0), ((7, 5), 100, 2, 0)],
)
def test_only_volta_in_16_bits_multiplies_out_and_gradient_aside(capability, head_dim, itemsize, floats):
    shape = ODD | {"head_dim": head_dim, "itemsize": itemsize}
    found = sizes(backward_lines("efficient", kv_heads=4, capability=capability, **shape))
    assert found["grad x out"] == floats * 4 * 12 * 1000 * head_dim


def test_plain_products_hold_whole_scores():
    assert total(forward_lines("plain", **(ODD | {"itemsize": 8}))) == 8 * 12 * 1000 * (1 + 2 * 500)
    assert total(backward_lines("plain", kv_heads=4, **(ODD | {"itemsize": 8}))) == (
        8 * 12 * 1000 * (1 + 3 * 500)
    )


def test_flex_holds_rows_only():
    rows = 4 * 12 * 1000
    assert sizes(forward_lines("flex", **ODD)) == {"log-sum-exp": rows, "row maxima": rows}
    assert sizes(backward_lines("flex", kv_heads=2, **ODD)) == {"delta": rows}


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ConfigError, match="'cudnn'"):
        forward_lines("cudnn", **ODD)
    with pytest.raises(ConfigError, match="'cudnn'"):
        backward_lines("cudnn", kv_heads=4, **ODD)


GRID = {
    "batch": [1, 2, 3, 1, 70_000],
    "heads": [8, 4, 6, 16, 4],
    "kv_heads": [8, 1, 3, 16, 4],
    "queries": [1, 127, 128, 131_072, 33],
    "keys": [1, 129, 4096, 131_072, 65],
    "head_dim": [8, 64, 65, 128, 256],
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_arrays_give_what_ints_give(kernel, itemsize):
    arrays = {name: np.array(values, dtype=np.int64) for name, values in GRID.items()}
    options = {"capability": (7, 0), "deterministic_sms": 80}

    def both(values):
        forward = {name: value for name, value in values.items() if name != "kv_heads"}
        return (
            *forward_lines(kernel, itemsize=itemsize, **forward),
            *backward_lines(kernel, itemsize=itemsize, **options, **values),
        )

    rows = [both({name: values[i] for name, values in GRID.items()}) for i in range(5)]
    for i, line in enumerate(both(arrays)):
        expected = [row[i].bytes for row in rows]
        assert all(type(count) is int for count in expected)
        assert line.bytes.dtype == np.int64
        assert np.broadcast_to(line.bytes, 5).tolist() == expected
    np.testing.assert_array_equal(total(both(arrays)), [total(row) for row in rows])


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_line_says_what_it_is(kernel):
    scratch = (*forward_lines(kernel, **ODD), *backward_lines(kernel, kv_heads=4, **ODD))
    assert all(line.inside_allocator and line.component == "workspace" for line in scratch)
    assert all(line.name and line.source for line in scratch)


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
