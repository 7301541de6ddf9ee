"""The known cards: complete and consistent figures, names as people write them, kernels by capability."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from attention import ConfigError
from planner import gpus
from planner.gpus import Gpu, backends, find, generic, known, matching, native_bfloat16, torch_builds

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
CAPABILITIES = {
    "Pascal": {(6, 0), (6, 1)},
    "Volta": {(7, 0)},
    "Turing": {(7, 5)},
    "Ampere": {(8, 0), (8, 6)},
    "Ada": {(8, 9)},
    "Hopper": {(9, 0)},
    "Blackwell": {(10, 0), (10, 3), (12, 0)},
}
LANES = {(6, 0): 64, (6, 1): 128, (7, 0): 64, (7, 5): 64, (8, 0): 64}  # float32 lanes a multiprocessor

each_card = pytest.mark.parametrize("gpu", known(), ids=lambda gpu: gpu.key)


def test_the_cards_people_have_are_there():
    keys = {gpu.key for gpu in known()}
    assert keys >= {
        "gtx1060", "gtx1070", "gtx1080", "gtx1080ti", "p100", "p40", "t4", "rtx2060", "rtx2070", "rtx2080",
        "rtx2080ti", "titanrtx", "quadrortx8000", "v100-sxm2-16gb", "v100-sxm2-32gb", "rtx3050", "rtx3060",
        "rtx3070", "rtx3080", "rtx3090", "rtx3090ti", "a10", "a10g", "a30", "a40", "a100-sxm4-40gb",
        "a100-sxm4-80gb", "rtxa4000", "rtxa5000", "rtxa6000", "rtx4050laptop", "rtx4060", "rtx4060ti-16gb",
        "rtx4070", "rtx4070ti", "rtx4080", "rtx4090", "l4", "l40s", "rtx6000ada", "h100-pcie", "h100-sxm",
        "h200", "gh200", "rtx5060", "rtx5070", "rtx5080", "rtx5090", "b200", "gb200", "rtxpro6000",
    }  # 37 keys of cards, a list of words  # fmt: skip


def test_no_two_cards_share_a_name():
    owner: dict[str, str] = {}
    for gpu in known():
        for form in gpus._forms(gpu):
            assert owner.setdefault(form, gpu.key) == gpu.key, form


def test_every_row_has_the_same_fields():
    rows = json.loads((ROOT / "planner/data/gpus.json").read_text(encoding="utf-8"))["cards"]
    assert {frozenset(row) for row in rows} == {frozenset(rows[0])}
    assert {frozenset(row["rates"]) for row in rows} == {
        frozenset({"float16", "bfloat16", "float32", "float64"})
    }
    assert all((row["usable_bytes"] is None) == (row["usable_source"] is None) for row in rows)


@each_card
def test_figures_have_sources_and_possible_sizes(gpu: Gpu):
    assert gpu.source
    assert gpu.usable_source
    assert gpu.capability in CAPABILITIES[gpu.architecture]
    assert 0.9 * gpu.nominal_bytes < gpu.usable_bytes < gpu.nominal_bytes
    assert gpu.nominal_bytes % GIB == 0
    assert gpu.bandwidth is not None
    assert 100e9 < gpu.bandwidth < 10e12
    if gpu.l2_bytes is not None:
        assert 1 << 20 < gpu.l2_bytes <= 128 << 20


@each_card
def test_error_correction_costs_a_sixteenth_of_gddr(gpu: Gpu):
    corrected = gpu.ecc and gpu.memory_type.startswith("GDDR")
    assert (gpu.usable_bytes <= gpu.nominal_bytes * 15 // 16) >= corrected


@each_card
def test_rates_are_ordered(gpu: Gpu):
    half, brain, single, double = (gpu.rates[d] for d in ("float16", "bfloat16", "float32", "float64"))
    assert half is not None
    assert (brain is None) == (gpu.capability < (8, 0))
    assert brain in (None, half)
    assert single is not None
    assert double is not None
    assert double < single
    expected = {(6, 0): (2, 2.1), (6, 1): (1 / 65, 1 / 63), (7, 0): (7.9, 8.1), (7, 5): (2, 8.1)}
    low, high = expected.get(gpu.capability, (2, 33))
    assert low <= half / single * 1.001
    assert half / single <= high


@each_card
def test_geforce_has_half_the_tensor_rate_with_float32_accumulation(gpu: Gpu):
    if "GeForce RTX" not in gpu.name:
        assert not gpu.key.startswith("rtx") or gpu.key.startswith(("rtxa", "rtxpro", "rtx6000"))
        return
    half, single = gpu.rates["float16"], gpu.rates["float32"]
    assert half is not None
    assert single is not None
    assert half / single == pytest.approx(4 if gpu.capability == (7, 5) else 2, rel=1e-3)


@each_card
def test_float32_rate_follows_from_multiprocessors_and_a_possible_clock(gpu: Gpu):
    single = gpu.rates["float32"]
    assert single is not None
    if gpu.sm_count is None:
        assert gpu.key == "b100"
        return
    clock = single / (2 * LANES.get(gpu.capability, 128) * gpu.sm_count)
    assert 1.15e9 < clock < 2.7e9


@pytest.mark.parametrize(
    "key, nominal, usable, bandwidth, half, single, multiprocessors",
    [
        ("gtx1080", 8 * GIB, 8098 << 20, 320e9, 0.1386e12, 8.87e12, 20),
        ("t4", 16 * GIB, 14904 << 20, 320e9, 65e12, 8.1e12, 40),
        ("rtx3090", 24 * GIB, 24123 << 20, 936e9, 71.2e12, 35.6e12, 82),
        ("rtx4060", 8 * GIB, 8_318_222_336, 272e9, 30.2e12, 15.1e12, 24),
        ("a100-sxm4-80gb", 80 * GIB, 81151 << 20, 2039e9, 312e12, 19.5e12, 108),
        ("h100-sxm", 80 * GIB, 81081 << 20, 3352e9, 989.4e12, 66.9e12, 132),
        ("rtx5090", 32 * GIB, 32109 << 20, 1792e9, 209.5e12, 104.8e12, 170),
    ],
)
def test_figures_of_well_known_cards(key, nominal, usable, bandwidth, half, single, multiprocessors):
    gpu = find(key)
    assert (gpu.nominal_bytes, gpu.usable_bytes, gpu.sm_count) == (nominal, usable, multiprocessors)
    assert gpu.bandwidth == bandwidth
    assert gpu.rates["float16"] == pytest.approx(half, rel=2e-3)
    assert gpu.rates["float32"] == pytest.approx(single, rel=2e-3)


def test_unreported_memory_is_derived_from_the_nearest_smaller_reported_card_and_says_so():
    gpu, model = find("rtx3060ti"), find("rtx3070")
    assert gpu.usable_source == "derived: the share that NVIDIA GeForce RTX 3070 reports, 95.4%"
    assert gpu.usable_bytes == model.usable_bytes
    larger, model = find("rtx3080"), find("rtx3070")
    assert larger.usable_bytes == model.usable_bytes * 10 // 8 >> 20 << 20
    assert not model.usable_source.startswith("derived")


@each_card
def test_every_name_finds_its_card(gpu: Gpu):
    for name in (gpu.key, gpu.name, *gpu.aliases):
        assert find(name) is gpu
        assert find(f"  NVIDIA {name.upper().replace('-', ' ')} ") is gpu


@pytest.mark.parametrize(
    "name, key",
    [
        ("RTX 4060", "rtx4060"),
        ("GeForce RTX 4060", "rtx4060"),
        ("4090", "rtx4090"),
        ("gtx-1080", "gtx1080"),
        ("a6000", "rtxa6000"),
        ("RTX A6000", "rtxa6000"),
        ("Tesla T4", "t4"),
        ("h100", "h100-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("A100 80GB", "a100-sxm4-80gb"),
        ("rtx 8000", "quadrortx8000"),
        ("RTX 6000 Ada", "rtx6000ada"),
        ("4060 ti 16", "rtx4060ti-16gb"),
        ("gh2", "gh200"),
        ("p1", "p100"),
        ("RTX_4070_Ti_SUPER", "rtx4070tisuper"),
        ("rtx 4060 laptop", "rtx4060laptop"),
    ],
)
def test_names_as_people_write_them(name: str, key: str):
    assert find(name).key == key


@pytest.mark.parametrize(
    "name, near",
    [("RTX 4600", "rtx4060"), ("gtx 1800", "gtx1080"), ("rxt 3090", "rtx3090"), ("h110", "h100-sxm")],
)
def test_a_typo_is_refused_with_the_nearest(name: str, near: str):
    with pytest.raises(ConfigError, match="is not known; nearest are") as caught:
        find(name)
    assert near in str(caught.value)
    assert str(caught.value).count(", ") == 2
    assert "`planner gpus`" in str(caught.value)


@pytest.mark.parametrize("name, count", [("a100", 4), ("4060 ti", 2), ("NVIDIA GeForce RTX 5060 Ti", 2)])
def test_a_name_of_several_cards_is_refused(name: str, count: int):
    with pytest.raises(ConfigError, match=f"could be {count} cards"):
        find(name)


@pytest.mark.parametrize("name", ["", " ", "NVIDIA", "GeForce", "?", "RTX 3060 Laptop GPU", "x" * 10_000])
def test_no_card_is_made_up(name: str):
    with pytest.raises(ConfigError) as caught:
        find(name)
    assert len(str(caught.value)) < 250


def test_a_generic_card_takes_the_budget_at_its_word():
    gpu = generic(8 * 10**9)
    assert (gpu.name, gpu.capability) == ("generic 8GB card", (8, 0))
    assert gpu.nominal_bytes == gpu.usable_bytes == 8 * 10**9 < find("rtx4060").usable_bytes
    assert gpu.source.startswith("assumption")
    assert gpu.usable_source.startswith("assumption")
    model = find("rtx3060")
    for dtype, rate in model.rates.items():
        assert gpu.rates[dtype] == pytest.approx(rate, rel=0.05)
    assert (gpu.bandwidth, gpu.sm_count, gpu.l2_bytes) == (model.bandwidth, model.sm_count, model.l2_bytes)


@pytest.mark.parametrize(
    "count, name",
    [
        (8 * GIB, "generic 8GiB card"),
        (8_321_499_136, "generic 7.75GiB card"),
        (500 * 10**6, "generic 0.5GB card"),
        (8_318_222_336, "generic 8.32GB card"),
        (80 * 10**9, "generic 80GB card"),
    ],
)
def test_a_generic_card_is_named_after_its_size(count: int, name: str):
    assert generic(count).name == name


@pytest.mark.parametrize("count", [0, -1, True, 8e9])
def test_a_generic_card_without_memory_is_refused(count):
    with pytest.raises(ConfigError, match="vram"):
        generic(count)


@pytest.mark.parametrize(
    "key, dtype, kernels",
    [
        ("gtx1080", "float16", ("efficient", "plain")),
        ("gtx1080", "bfloat16", ("plain",)),
        ("gtx1080", "float32", ("efficient", "plain")),
        ("t4", "float16", ("efficient", "plain")),
        ("v100-sxm2-16gb", "bfloat16", ("plain",)),
        ("rtx3060", "bfloat16", ("flash", "efficient", "flex", "plain")),
        ("rtx3060", "float32", ("efficient", "flex", "plain")),
        ("h100", "float16", ("cudnn", "flash", "efficient", "flex", "plain")),
        ("rtx5090", "float16", ("flash", "efficient", "flex", "plain")),
        ("a100 80gb", "float64", ("plain",)),
    ],
)
def test_kernels_follow_the_capability(key, dtype, kernels):
    assert backends(find(key), dtype) == kernels


def test_builds_and_bfloat16_follow_the_capability():
    assert "2.14" in torch_builds(find("gtx1080"))
    assert "cu126" in torch_builds(find("v100 16gb"))
    assert "cu128" in torch_builds(find("rtx5090"))
    assert torch_builds(find("t4")) == torch_builds(find("rtx4090")) == "any build of PyTorch for CUDA"
    assert [native_bfloat16(find(key)) for key in ("t4", "rtx3050", "h200")] == [False, True, True]


def test_cards_are_values():
    gpu = find("rtx4060")
    assert hash(gpu) == hash(dataclasses.replace(gpu))
    assert gpu == dataclasses.replace(gpu) != dataclasses.replace(gpu, usable_bytes=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        gpu.key = "mine"  # type: ignore[misc]
    with pytest.raises(TypeError):
        gpu.rates["float16"] = 1.0  # type: ignore[index]


def test_importing_reads_no_data_and_loads_neither_torch_nor_numpy():
    code = (
        "import sys, planner.gpus\n"
        "assert planner.gpus.known.cache_info().currsize == 0\n"
        "assert planner.gpus.find('rtx4060').usable_bytes == 8318222336\n"
        "assert not {'torch', 'numpy', 'difflib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_matching_is_the_card_of_that_name_or_all_that_have_it_in_theirs():
    assert matching("RTX 4060") == (find("rtx4060"),)
    forty = matching("rtx 40")
    assert find("rtx4060") in forty
    assert find("rtx4090") in forty
    assert {gpu.architecture for gpu in forty} == {"Ada"}
    assert matching("GeForce") == known()
    with pytest.raises(ConfigError, match="nearest"):
        matching("voodoo2")
