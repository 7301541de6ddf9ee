"""What commands show: every figure there is, none that is not, in 80 columns."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from attention import AttentionConfig, SparsePatternConfig
from planner.gpus import Gpu, find, known
from planner.measuring.measure import Environment, Measurement
from planner.report.text.formats import as_json
from planner.report.text.tables import gpu_card, gpu_data, gpu_table, measurement_data, measurement_table
from planner.workload import Workload

GIB = 1 << 30
each_card = pytest.mark.parametrize("gpu", known(), ids=lambda gpu: gpu.key)


def lines(what) -> list[str]:
    """As 80 columns show it."""
    console = Console(file=io.StringIO(), width=80)
    console.print(what)
    found = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert all(len(line) <= 80 for line in found)
    return found


# ---- cards


@each_card
def test_data_of_a_card_is_all_of_it_and_plain(gpu):
    data = json.loads(as_json(gpu_data(gpu)))
    assert {field.name for field in dataclasses.fields(Gpu)} <= set(data)
    assert data["capability"] == ".".join(map(str, gpu.capability))
    assert data["usable_source"] == gpu.usable_source
    assert data["source"] == gpu.source
    assert data["rates"] == dict(gpu.rates)
    assert data["backends"]["float64"] == ["plain"]


def test_rows_say_what_the_data_says():
    shown = lines(gpu_table([find("gtx1060"), find("rtx4060"), find("b100")]))
    assert shown == [
        "name                    --gpu          GiB usable  GB/s  fp16  bf16  fp32  fp64",
        "",
        "Pascal, compute capability 6.1; fp16 by efficient, plain",
        "GTX 1060 6GB            gtx1060          6   5.92   192 0.068     -  4.37 0.137",
        "",
        "Ada, compute capability 8.9; fp16 by flash, efficient, flex, plain",
        "RTX 4060                rtx4060          8   7.75   272  30.2  30.2  15.1 0.236",
        "",
        "Blackwell, compute capability 10.0; fp16 by cudnn, flash, efficient, flex, plain",
        "B100                    b100           192 190.24 8,000 1,750 1,750    60    30",
        "",
        "GiB: as sold; usable: GiB that CUDA reports. fp16 to fp64: peak TFLOP/s.",
    ]


@each_card
def test_no_row_is_cut(gpu):
    text = "\n".join(lines(gpu_table([gpu])))
    assert gpu.key in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


@each_card
def test_a_card_in_full_is_never_cut(gpu):
    text = " ".join(" ".join(lines(gpu_card(gpu))).split())
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for part in (gpu.name, gpu.key, *gpu.aliases, gpu.architecture, gpu.usable_source, gpu.source):
        assert " ".join(part.split()) in text
    assert f"{gpu.usable_bytes:,} bytes" in text


# ---- measurements


def measurement(kind="ok", **changes):
    figures = {"allocated": 2 * 10**9, "allocated_warm": 3 * 10**9, "seconds": 0.25, "spread": 0.125}
    workload = Workload(seq=131_072, heads=8, kv_heads=2, dtype="bfloat16", mode="training", causal=True)
    where = Environment(
        device="NVIDIA H200",
        driver="570.1",
        cuda="12.8",
        capability="9.0",
        torch="2.13.0",
        python="3.11.7",
        system="Linux",
        threads=4,
        backend="sdpa",
        kernel="flash",
        settings={"OMP_NUM_THREADS": "4"},
        date="2026-01-01T00:00:00+00:00",
    )
    given = {
        "config": AttentionConfig(variant="dense"),
        "workload": workload,
        "device": "cuda",
        "runs": 3,
        "environment": where,
        **(figures if kind == "ok" else {"message": "because"}),
        **changes,
    }
    return Measurement(kind=kind, **given)


def test_all_figures_of_a_gpu_are_shown():
    found = measurement(reserved=4 * 10**9, device_peak=5 * 10**9, context=6 * 10**8, cap_bytes=8 * 10**9)
    assert lines(measurement_table(found)) == [
        "dense",
        "131,072 tokens, batch 1, 8 heads (2 for keys) x 64, bfloat16, training, causal",
        "allocated, first call                2.00 GB  2,000,000,000 bytes",
        "allocated, warm call                 3.00 GB  3,000,000,000 bytes",
        "reserved by the caching allocator    4.00 GB  4,000,000,000 bytes",
        "device peak, seen by the driver      5.00 GB  5,000,000,000 bytes",
        "context                            600.00 MB    600,000,000 bytes",
        "floor: q + k + v + out             335.54 MB    335,544,320 bytes",
        "time      0.25 s, median of 3 warm calls, spread 12.5%",
        "held to   8.00 GB (8,000,000,000 bytes)",
        "device    NVIDIA H200, 9.0, 4 threads",
        "software  torch 2.13.0, CUDA 12.8, driver 570.1, Python 3.11.7, Linux",
        "kernel    sdpa, flash",
        "settings  OMP_NUM_THREADS=4",
        "date      2026-01-01T00:00:00+00:00",
    ]


def test_figures_that_a_device_has_not_are_not_shown():
    text = "\n".join(lines(measurement_table(measurement(device="cpu", resident=10**9))))
    assert "resident, above the start" in text
    assert not any(word in text for word in ("reserved", "device peak", "context", "None"))


def test_a_failure_says_why_and_shows_no_figures():
    found = measurement("oom", requested=64 << 20, available=50 << 20, cap_bytes=50 << 20)
    shown = lines(measurement_table(found))
    assert shown[2:6] == [
        "oom             because",
        "asked for last  67.11 MB (67,108,864 bytes)",
        "free then       52.43 MB (52,428,800 bytes)",
        "held to         52.43 MB (52,428,800 bytes)",
    ]
    assert not any("allocated" in line for line in shown)


@pytest.mark.parametrize("kind", ["oom", "crash", "timeout", "error"])
def test_a_message_is_shown_whole_whatever_is_in_it(kind):
    message = "[bold]not markup[/] " + "x" * 200 + " end"
    text = "".join("".join(lines(measurement_table(measurement(kind, message=message)))).split())
    assert "[bold]notmarkup[/]" + "x" * 200 + "end" in text
    assert kind in text


def test_a_sparse_config_is_shown_with_its_pattern():
    pattern = SparsePatternConfig(pattern_type="local_window")
    found = measurement(config=AttentionConfig(variant="block_sparse", pattern=pattern))
    assert lines(measurement_table(found))[0] == "block_sparse, local_window"


def test_data_of_a_measurement_is_its_record():
    found = measurement()
    assert Measurement.from_json(as_json(measurement_data(found))) == found
