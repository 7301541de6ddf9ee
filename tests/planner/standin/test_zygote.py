"""torch's own CUDA build on cards that are not there: it runs, and its memory is what is known of it."""

from __future__ import annotations

import pytest

from planner.gpus import find as find_gpu
from planner.gpus import known

pytestmark = [pytest.mark.slow, pytest.mark.dry]

MIB = 1 << 20
CARDS = (
    "gtx1080",
    "v100-sxm2-16gb",
    "t4",
    "a100-sxm4-40gb",
    "rtx3060",
    "rtx4090",
    "h100-sxm",
    "b200",
    "rtx5090",
)


def value(end):
    assert end.kind == "ok", end.value
    return end.value


@pytest.mark.parametrize("gpu", known(), ids=lambda gpu: gpu.key)
def test_torch_sees_the_card(gpu, dry):
    if gpu.sm_count is None:
        pytest.skip("its multiprocessors are not known")
    found = value(dry.run("dry_programs", "properties", {}, gpu=gpu, gpus=2, held=3 * MIB))
    assert found["name"] == gpu.name
    assert tuple(found["capability"]) == gpu.capability
    assert found["multiprocessors"] == gpu.sm_count
    assert found["total"] == found["mem_total"] == gpu.usable_bytes
    assert found["free"] == gpu.usable_bytes - 3 * MIB
    assert found["l2"] == (gpu.l2_bytes or 0)
    assert found["count"] == 2
    assert found["warp"] == 32
    assert found["registers"] == 65536
    assert found["threads"] in (1024, 1536, 2048)
    assert 48 << 10 <= found["shared"][0] <= found["shared"][1]


def test_what_an_allocation_takes(dry):
    sizes = [1, 5 * MIB, 11 * MIB]
    found = value(dry.run("dry_programs", "allocated_and_reserved", {"sizes": sizes}))
    assert found == [[512, 2 * MIB], [5 * MIB, 20 * MIB], [12 * MIB, 12 * MIB]]


@pytest.mark.parametrize(
    "backend, gradient, units",
    [
        ("FLASH_ATTENTION", False, [1.0313]),
        ("FLASH_ATTENTION", True, [1.0313, 7.0312]),
        ("EFFICIENT_ATTENTION", False, [1.0]),
        ("EFFICIENT_ATTENTION", True, [1.0313, 5.0332]),
    ],
)
def test_what_sdpa_takes(backend, gradient, units, dry):
    shape = [1, 8, 131072, 64]
    asked = {"backend": backend, "dtype": "float16", "shape": shape, "gradient": gradient}
    assert value(
        dry.run("dry_programs", "sdpa_units", asked, gpu=find_gpu("a100-sxm4-80gb"))
    ) == pytest.approx(units, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("card", CARDS)
def test_sdpa_runs_on_every_card(card, dtype, dry):
    gpu = find_gpu(card)
    backends = ["MATH"]
    if gpu.capability >= (8, 0) or dtype != "bfloat16":
        backends.append("EFFICIENT_ATTENTION")
    if gpu.capability >= (8, 0) and dtype != "float32":
        backends.append("FLASH_ATTENTION")
    for backend in backends:
        asked = {"backend": backend, "dtype": dtype, "shape": [2, 4, 256, 64], "gradient": True}
        assert len(value(dry.run("dry_programs", "sdpa_units", asked, gpu=gpu))) == 2


@pytest.mark.parametrize(
    "card, name", [("t4", "cutlass"), ("rtx3060", "flash_fwd"), ("rtx5090", "flash_fwd")]
)
def test_kernels_are_logged(card, name, dry, tmp_path):
    log = tmp_path / "launches"
    asked = {"log": str(log), "dtype": "float16"}
    end = dry.run(
        "dry_programs",
        "kernels_of_default_sdpa",
        asked,
        gpu=find_gpu(card),
        variables={"STANDIN_LAUNCHES": str(log)},
    )
    assert any(name in kernel for kernel in value(end))
    assert end.report["launches"] == len(end.value)


@pytest.mark.parametrize("card, each", [("rtx3060", 8_519_680), ("h100-sxm", 32 * MIB)])
def test_cublas_takes_a_workspace_forward_and_another_backward(card, each, dry):
    assert value(dry.run("dry_programs", "workspaces", {}, gpu=find_gpu(card))) == [each, each]


@pytest.mark.parametrize("card", CARDS)
def test_a_step_of_training_runs(card, dry):
    assert value(dry.run("dry_programs", "training", {}, gpu=find_gpu(card))) == [True, 12, True]


@pytest.mark.parametrize(
    "program, found",
    [
        ("tables", [True, 2.0, True, True]),
        ("loader", 2016),
        ("graph", [True, False, 0.0, True]),
        ("convolution", [2, 8, 30, 30]),
        ("operators", [[1000], [0] * 5, [0, 1], [1000], [100], [0] * 3, [5, 1]]),
    ],
)
def test_a_program_runs(program, found, dry):
    assert value(dry.run("dry_programs", program, {})) == found


def test_copies_hold_little_ram(dry):
    kept, large, resident = value(dry.run("dry_programs", "large_copies", {}))
    assert kept
    assert large == 0
    assert resident < 2500


def test_snapshots_have_events_and_stacks(dry):
    actions, named, segments, size = value(dry.run("dry_programs", "snapshot", {}))
    assert actions == ["segment_alloc", "alloc"]
    assert named
    assert segments == [size] == [30 * MIB]


def test_expandable_segments(dry):
    variables = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert value(dry.run("dry_programs", "expandable", {}, variables=variables)) == [[True], 60, 55 * MIB]


def test_two_devices(dry):
    found = value(dry.run("dry_programs", "two_devices", {}, gpus=2))
    assert found == ["cuda:1", "cuda:1", [4096, 4096 + 3 * MIB], True]


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
def test_memory_runs_out_at_what_the_card_has(conf, dry):
    variables = {"PYTORCH_ALLOC_CONF": conf} if conf else {}
    card = {"vram": 1024 * MIB, "held": 100 * MIB, "variables": variables}
    end = dry.run("dry_programs", "fill", {}, **card)
    assert end.kind == "oom"
    assert (
        "CUDA out of memory. Tried to allocate 64.00 MiB. GPU 0 has a total capacity of 1024.00 MiB"
        in end.value
    )
    assert end.report["devices"][0]["peak_allocated"] == 14 * 64 * MIB
    allocated, free = value(dry.run("dry_programs", "fill_and_say", {}, **card))
    assert allocated == 14 * 64 * MIB
    assert free < 64 * MIB


def test_what_is_not_known_is_named(dry):
    assert dry.run("dry_programs", "convolution", {}).report["unknown"] == {"cuDNN convolution": 1}
    asked = {"backend": "FLASH_ATTENTION", "dtype": "float16", "shape": [1, 1, 64, 64], "gradient": False}
    ends = [
        dry.run("dry_programs", "sdpa_units", asked, gpu=find_gpu(card))
        for card in ("a100-sxm4-40gb", "h100-sxm")
    ]
    assert [list(end.report["unknown"]) for end in ends] == [[], ["cuDNN attention"]]
    end = dry.run("dry_programs", "solver", {})
    assert end.kind == "error"
    assert any(name.startswith("cusolver") for name in end.report["unknown"])


def test_ends_of_children_are_values(dry):
    assert "of the program" in dry.run("dry_programs", "fails", {}).value
    assert dry.run("dry_programs", "ends", {})[:2] == ("died", "exit status 7")
    assert dry.run("time", "sleep", {}, timeout=0.5).kind == "error"  # it takes no keyword
    assert value(dry.run("dry_programs", "loader", {})) == 2016


@pytest.mark.parametrize("program", ["compiled", "compiled_flex"])
def test_compiled_functions_run(program, dry, dry_torch):
    if not dry_torch.triton:
        pytest.skip("no Triton")
    assert value(dry.run("dry_programs", program, {}))
